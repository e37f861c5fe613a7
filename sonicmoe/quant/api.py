"""The quantizers that callers use: the Triton kernels on Hopper, for the recipe that is made for it, and the definition
everywhere else. Both give the same bytes."""

from importlib.util import find_spec

from .. import checks
from ..launch import arch
from . import naive
from .formats import QuantTensor, QuantWeights, Recipe

if find_spec("triton") is not None:
    from . import triton_quantize
else:
    triton_quantize = None


def _compiled(tensor, recipe: Recipe, backend: str):
    """The kernels, or None for the definition. Other architectures have other casts, or none to e4m3."""
    if triton_quantize is None or backend == "naive" or recipe.name != "sm90" or checks.is_cpu(tensor):
        return None
    return triton_quantize if arch(tensor).startswith("sm_90") else None


def quantize_rows(x_TC, recipe: Recipe, backend: str = "auto") -> QuantTensor:
    """Activations: one scale for each ``recipe.block`` elements of a row. ``backend`` "naive" asks for the
    definition."""
    compiled = _compiled(x_TC, recipe, backend)
    if compiled is None:
        return naive.quantize_rows(x_TC, recipe)
    return QuantTensor(*compiled.quantize_rows(x_TC, recipe.pow2), recipe.row_block)


def quantize_weights(w1_EFH, w2_EHI, recipe: Recipe, backend: str = "auto") -> QuantWeights:
    """Both orientations of both weights. ``backend`` "naive" asks for the definition."""
    compiled = _compiled(w1_EFH, recipe, backend)
    if compiled is None:
        return naive.quantize_weights(w1_EFH, w2_EHI, recipe)

    def both(w):
        data, scale, data_t, scale_t = compiled.quantize_weight(w, recipe.pow2)
        return QuantTensor(data, scale, recipe.weight_block), QuantTensor(data_t, scale_t, recipe.weight_block)

    w1, w1_t = both(w1_EFH)
    w2, w2_t = both(w2_EHI)
    return QuantWeights(w1=w1, w2=w2, w1_t=w1_t, w2_t=w2_t)
