"""The quantizers that callers use: the Triton kernels on Hopper, for the recipe that is made for it, and the definition
everywhere else. Both give the same bytes."""

from importlib.util import find_spec

from .. import checks
from ..launch import arch, current_stream
from . import naive
from .formats import QuantTensor, QuantWeights, Recipe, make_recipe

if find_spec("triton") is not None:
    from . import triton_fingerprint, triton_quantize
else:
    triton_fingerprint = triton_quantize = None

_SM90 = make_recipe("sm90")


def _compiled(tensor, recipe: Recipe, backend: str):
    """The kernels, or None for the definition. Other architectures have other casts, or none to e4m3."""
    if triton_quantize is None or backend == "naive" or recipe.name != "sm90" or checks.is_cpu(tensor):
        return None
    return triton_quantize if arch(tensor)[:5] == "sm_90" else None


def quantize_rows(x_TC, recipe: Recipe, backend: str = "auto") -> QuantTensor:
    """Activations: one scale for each ``recipe.block`` elements of a row. ``backend`` "naive" asks for the
    definition."""
    compiled = _compiled(x_TC, recipe, backend)
    if compiled is None:
        return naive.quantize_rows(x_TC, recipe)
    return compiled.quantize_rows(x_TC, recipe.pow2)


def dequantize_rows(rows: QuantTensor, dtype):
    """Activations of whichever recipe, as plain numbers."""
    compiled = _compiled(rows.data, _SM90, "auto")
    if compiled is None or not rows.matches(_SM90):
        return naive.dequantize(rows).to(dtype)
    return compiled.dequantize_rows(rows.data, rows.scale, dtype)


def quantize_weights(w1_EFH, w2_EHI, recipe: Recipe, backend: str = "auto") -> QuantWeights:
    """Both orientations of both weights. ``backend`` "naive" asks for the definition."""
    compiled = _compiled(w1_EFH, recipe, backend)
    if compiled is None:
        return naive.quantize_weights(w1_EFH, w2_EHI, recipe)
    return _together(*compiled.quantize_weights((w1_EFH, w2_EHI), recipe.pow2), recipe)


def quantize_weight(w_ERC, recipe: Recipe, backend: str = "auto") -> tuple[QuantTensor, QuantTensor]:
    """Both orientations of one weight."""
    compiled = _compiled(w_ERC, recipe, backend)
    if compiled is None:
        return naive.quantize_weight(w_ERC, recipe)
    return _orientations(*compiled.quantize_weights((w_ERC,), recipe.pow2), recipe)


def _orientations(made, recipe: Recipe) -> tuple[QuantTensor, QuantTensor]:
    data, scale, data_t, scale_t = made
    return QuantTensor(data, scale, recipe.weight_block), QuantTensor(data_t, scale_t, recipe.weight_block)


def _together(first, second, recipe: Recipe) -> QuantWeights:
    (w1, w1_t), (w2, w2_t) = _orientations(first, recipe), _orientations(second, recipe)
    return QuantWeights(w1=w1, w2=w2, w1_t=w1_t, w2_t=w2_t)


class WeightCopies:
    """FP8 copies of one layer's weights, on a GPU that has the kernels. They are made again where the weights' bytes
    have changed, however that came about; the device finds out, and nobody waits for the answer."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._memory = self._table = self._made = self._copies = None
        self._facts, self._again = None, ()
        self._unfinished = False

    @staticmethod
    def can_hold(w1_EFH, w2_EHI, recipe: Recipe, backend: str) -> bool:
        if not (w1_EFH.is_contiguous() and w2_EHI.is_contiguous()) or _compiled(w1_EFH, recipe, backend) is None:
            return False
        return "float32" not in (checks.dtype_name(w1_EFH), checks.dtype_name(w2_EHI))

    def current(self, w1_EFH, w2_EHI) -> QuantWeights:
        """This moment's weights, the same tensors' at each call, on the current stream."""
        weights = (w1_EFH, w2_EHI)
        # Whatever a launch was made for; the device goes with the address.
        facts = (
            w1_EFH.data_ptr(), w1_EFH.shape, w1_EFH.dtype, w1_EFH.is_contiguous(),
            w2_EHI.data_ptr(), w2_EHI.shape, w2_EHI.dtype, w2_EHI.is_contiguous(),
        )  # fmt: skip
        if self._again and facts == self._facts and not self._unfinished:
            self._unfinished = True
            stream = current_stream(w1_EFH)
            for again in self._again:
                again(stream)
            self._unfinished = False
            return self._copies
        if self._memory is None:
            self._memory = triton_fingerprint.make_memory(weights)
        elif self._unfinished:
            # An earlier call noted the weights and then did not get as far as copying them: forget what it noted.
            self._memory.state.zero_()
        self._unfinished = True
        found = triton_fingerprint.fingerprint(weights, table=self._table, memory=self._memory, repeatable=True)
        self._table = found.table
        self._made, copied = triton_quantize.quantize_weights_repeatable(
            weights, self.recipe.pow2, self._made, found.changed
        )
        self._unfinished = False
        self._facts, self._again = facts, (found.again, copied) if found.again and copied else ()
        if self._copies is None:  # later calls write the same memory
            self._copies = _together(*self._made, self.recipe)
        return self._copies
