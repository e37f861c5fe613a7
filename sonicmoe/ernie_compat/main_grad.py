"""fp32 gradient buffers of a node, and their way into ``weight.main_grad``."""

import copy
import threading

import paddle

from .. import checks
from ..gemm.api import GradBuffers
from .autocast import without_autocast
from .weight_layout_fusion import fused_sonic_w1_to_grouped, fused_transpose_w2_layout
from .weights import WeightStore, is_emptied


def require_main_grad(name: str, param, shape, beside) -> None:
    """An existing main_grad must be fp32 of the right shape, with memory where ``beside`` is: adding to anything else
    would be a silent loss, or an error that comes when others have been added to already."""
    grad = getattr(param, "main_grad", None)
    if grad is not None:
        checks.require_tensor(f"{name}.main_grad", grad)
        checks.require_shape(f"{name}.main_grad", grad, shape, "the weight's layout")
        checks.require_dtype(f"{name}.main_grad", grad, ("float32",))
        if is_emptied(grad):
            raise ValueError(f"{name}.main_grad: got a tensor whose storage is empty, need float32 memory, or None")
        checks.require_same_place(f"{name}.main_grad", grad, "the layer", beside)


def add_to_main_grad(param, grad) -> None:
    """Add in place where a main_grad is, so that views and fused storages of it see the sum."""
    if getattr(param, "main_grad", None) is None:
        param.main_grad = grad
    else:
        param.main_grad.add_(grad)


class GradAccumulator:
    """What one node has accumulated since its last flush, in native layout, allocated by the first backward."""

    def __init__(self, store: WeightStore):
        self._store = store
        self._lock = threading.Lock()
        self._dw1 = self._dw2 = None
        self._reset()

    def __deepcopy__(self, memo: dict) -> "GradAccumulator":
        """Empty: a copied parameter has no gradients either. Those of the original, also of calls in flight, stay
        its own."""
        return GradAccumulator(copy.deepcopy(self._store, memo))

    def __reduce__(self):
        """Where a pickle is loaded there may be no original that still has them."""
        if self.pending:
            raise RuntimeError(
                "SonicMoEMlpNode: got pickled with weight gradients that no step() has added to main_grad, and the "
                "pickle would lose them; call step(), flush_grads() or discard_grads() first"
            )
        return GradAccumulator, (self._store,)

    def _reset(self) -> None:
        for buffer in (self._dw1, self._dw2):
            if buffer is not None:
                buffer.zero_()
        n = self._store.n_experts
        self._touched1, self._touched2 = [False] * n, [False] * n

    @property
    def pending(self) -> bool:
        return any(self._touched1) or any(self._touched2)

    def accumulate(self, wgrad, experts1: tuple[bool, ...], experts2: tuple[bool, ...], check=None) -> None:
        """Run both weight gradients of one backward into the buffers. One backward at a time. ``check`` is called at
        the end, with what was added to: no flush comes in between."""
        store = self._store
        with self._lock, paddle.no_grad(), without_autocast():
            e, h, i, f = store.n_experts, store.hidden_size, store.intermediate_size, store.width
            place = store.place_of().place
            if any(experts1) and self._dw1 is None:
                self._dw1 = paddle.zeros([e, f, h], dtype="float32", device=place)
            if any(experts2) and self._dw2 is None:
                self._dw2 = paddle.zeros([e, h, i], dtype="float32", device=place)
            buffers = GradBuffers(self._dw1, self._dw2, False, experts1, experts2)
            if any(experts1):
                wgrad.accumulate_dw1(buffers)
                self._touched1 = [old or new for old, new in zip(self._touched1, experts1, strict=True)]
            if any(experts2):
                wgrad.accumulate_dw2(buffers)
                self._touched2 = [old or new for old, new in zip(self._touched2, experts2, strict=True)]
            if check is not None:
                check(self._dw1 if any(experts1) else None, self._dw2 if any(experts2) else None)

    def flush(self) -> None:
        """Add everything to the weights' main_grad, in their layout, and start again from zero."""
        with self._lock, paddle.no_grad(), without_autocast():
            for name, param, shape, _ in self._store.named():
                require_main_grad(name, param, shape, self._store.place_of())
            # Converted first, added second: main_grad only ever changes by whole, converted sums.
            grouped1 = grouped2 = None
            if any(self._touched1):
                convert = fused_sonic_w1_to_grouped if self._store.glu else fused_transpose_w2_layout
                grouped1 = convert(self._dw1)
            if any(self._touched2):
                grouped2 = fused_transpose_w2_layout(self._dw2)
            self._add(self._store.params1(), grouped1, self._touched1)
            self._add(self._store.params2(), grouped2, self._touched2)
            self._reset()

    def _add(self, params, grouped, touched) -> None:
        if grouped is None:
            return
        if self._store.fused:
            add_to_main_grad(params[0], grouped)
            return
        for expert, param in enumerate(params):
            if touched[expert]:
                # A copy of its own: a slice would keep the whole stacked tensor alive in every expert.
                add_to_main_grad(param, grouped[expert].clone())

    def discard(self) -> None:
        """Forget what was accumulated, as after a skipped step."""
        with self._lock:
            self._reset()
