"""One dispatch with its combine, and their gradients: what the tapes of both frameworks call.

    plan_calls
    begin_dispatch, finish_dispatch  [experts]  begin_combine, finish_combine
    and backward:  finish_combine, begin_combine  [experts]  finish_dispatch, begin_dispatch

Backward goes through the same four places in the other order, and there, too, the first of two begins to send and the
second waits. So whatever the tape puts between the two runs beside the exchange, in either direction.
"""

from dataclasses import dataclass

from .. import checks
from ..quant.api import quantize_rows
from ..quant.formats import Recipe, make_recipe
from . import layout
from .terms import Terms
from .transport import Dispatched
from .words import WORD_BYTES

# What Hopper's kernels take as it comes: float32 scales for 128 channels. DeepEP has the same.
PAYLOAD_RECIPE: Recipe = make_recipe("sm90")


@dataclass(frozen=True)
class Wire:
    """How rows travel. FP8 is e4m3 with a scale for each 128 channels; outputs and dx always come in x's own type."""

    fp8_dispatch: bool = False
    fp8_combine_grad: bool = False

    def check(self, hidden: int) -> None:
        for name in ("fp8_dispatch", "fp8_combine_grad"):
            if getattr(self, name) not in (True, False):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, need True or False")
            if getattr(self, name) and hidden % checks.FP8_ALIGN:
                raise ValueError(f"{name}: got True with {hidden} channels, need a multiple of {checks.FP8_ALIGN}")


def plan_calls(pieces, n_experts: int, transport, wire: Wire | None, needs_grad, backward: bool) -> list["EpCall"]:
    """For ``pieces`` of (x [T,H], probs [T,K], indices [T,K]), all planned at once. All ranks call it together.

    ``backward``: whether one will come that neither x nor probs want.
    """
    wire = Wire() if wire is None else wire
    terms = []
    for x, probs, indices in pieces:
        _check_rows("x", x)
        channels = checks.shape_of(x)[1]
        wire.check(channels)
        layout.check_indices(indices)
        checks.require_tensor("probs", probs)
        checks.require_shape("probs", probs, (x.shape[0], indices.shape[1]), "[T, K], T rows as in x")
        checks.require_dtype("probs", probs, ("float32",))
        # A plugin's operators may leave a result without an element on the CPU.
        for name, tensor in (("probs", probs), ("indices", indices)) if x.shape[0] else ():
            checks.require_same_place(name, tensor, "x", x)
        alike = (n_experts, int(indices.shape[1]), channels, checks.dtype_name(x))
        needs = needs_grad(x), needs_grad(probs)
        terms.append(Terms(*alike, wire.fp8_dispatch, wire.fp8_combine_grad, backward or any(needs), *needs))
    planned = transport.plan([(indices, probs.detach()) for _, probs, indices in pieces], n_experts, terms)
    return [
        EpCall(transport, plan, wire, (checks.shape_of(x), its.dtype), its.x_wants_gradient, its.probs_wants_gradient)
        for plan, its, (x, _, _) in zip(planned, terms, pieces, strict=True)
    ]


def _check_rows(name: str, rows) -> None:
    checks.require_tensor(name, rows)
    checks.require_rank(name, rows, 2, "[rows, channels]")
    checks.require_dtype(name, rows, checks.FLOAT_DTYPES)
    step, channels = WORD_BYTES // checks.ITEMSIZE[checks.dtype_name(rows)], checks.shape_of(rows)[1]
    if not channels or channels % step:
        raise ValueError(
            f"{name}: got {channels} channels, need a multiple of {step}, whole words of {WORD_BYTES} bytes"
        )


class EpCall:
    def __init__(self, transport, planned, wire: Wire, opened, need_dx: bool, need_ds: bool):
        """``opened``: (shape, dtype) of the x that it was planned for."""
        self.transport, self.planned, self.wire, self.opened = transport, planned, wire, opened
        self.need_dx, self.need_ds = need_dx, need_ds
        self.combine_grad_handle = {} if wire.fp8_combine_grad else None
        self.layout = self.counts = self.local_indices = self.payload = None
        self._wait = None

    def _begin(self, wait) -> None:
        self._wait = wait

    def _finish(self):
        wait, self._wait = self._wait, None
        return wait()

    # ---- forward -----------------------------------------------------------------------------------------------------

    def begin_dispatch(self, x) -> None:
        checks.require_tensor("x", x)
        shape, dtype = self.opened
        checks.require_shape("x", x, shape, "[T, H], as the call was opened for")
        checks.require_dtype("x", x, (dtype,))
        rows = quantize_rows(x, PAYLOAD_RECIPE) if self.wire.fp8_dispatch else x
        planned, self.planned = self.planned, None
        self._begin(self.transport.begin_dispatch(rows, planned))

    def finish_dispatch(self):
        """(x [N,H] or None where it is ``payload``, probs [N,K])."""
        found: Dispatched = self._finish()
        self.layout, self.counts, self.local_indices = found.layout, found.counts, found.indices
        if not self.wire.fp8_dispatch:
            return found.x, found.probs
        self.payload = found.x
        return None, found.probs

    def take_payload(self):
        """What an FP8 dispatch brought, or None; once, so that it goes when its user lets go of it."""
        payload, self.payload = self.payload, None
        return payload

    def begin_combine(self, y) -> None:
        _check_rows("y", y)
        checks.require_shape("y", y, (self.layout.n_received, y.shape[1]), "one for each row that came")
        self._begin(self.transport.begin_combine(y, self.layout))

    def finish_combine(self):
        return self._finish()[0]

    # ---- backward ----------------------------------------------------------------------------------------------------

    def begin_combine_gradient(self, dout) -> None:
        rows = quantize_rows(dout, PAYLOAD_RECIPE) if self.wire.fp8_combine_grad else dout
        self._begin(self.transport.begin_dispatch_again(rows, self.layout))

    def finish_combine_gradient(self):
        """The gradient of y [N,H]; None where it went into ``combine_grad_handle``, as e4m3 with scales."""
        found = self._finish()
        if not self.wire.fp8_combine_grad:
            return found
        self.combine_grad_handle.update(data=found.data, scale=found.scale)
        return None

    def begin_dispatch_gradient(self, dx, ds) -> None:
        if self.combine_grad_handle:  # what came to the experts over the tape was no gradient
            raise ValueError(
                "combine_grad_handle: the experts' backward left the gradient of y in it; give them the handle, or "
                "open the call without fp8_combine_grad"
            )
        self._begin(self.transport.begin_combine(dx, self.layout, ds))

    def finish_dispatch_gradient(self):
        """(dx [T,H] or None, ds [T,K] or None)."""
        dx, ds = self._finish()
        return dx if self.need_dx else None, ds if self.need_ds else None
