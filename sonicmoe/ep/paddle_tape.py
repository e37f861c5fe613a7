"""Dispatch and combine on Paddle's tape.

    (call,) = open_calls([(x, probs, indices)], n_experts, transport)    # or one for each of several pieces
    ticket = begin_dispatch(x, probs, call)
    rows, row_probs = finish_dispatch(ticket, x, call)    # with call.counts, call.local_indices, call.payload
    ticket = begin_combine(y, call)
    out = finish_combine(ticket, call)

A ticket is one number that ties the two halves together on the tape: what is under way is no tensor yet.
"""

import paddle
from paddle.autograd import PyLayer

from ..ernie_compat import torch_proxy
from ..ernie_compat.autocast import without_autocast
from ..ernie_compat.call import needs_grad

torch_proxy.cover(__package__.rpartition(".")[0])

from .call import EpCall, Wire, plan_calls  # noqa: E402


def open_calls(pieces, n_experts: int, transport, wire: Wire | None = None, backward: bool = False) -> list[EpCall]:
    """For ``pieces`` of (x [T,H], probs [T,K], indices [T,K]). All ranks call it together, with as many.

    ``backward``: there will be one though neither x nor probs want a gradient, since this rank's experts do.
    """
    given = [tensor for piece in pieces for tensor in piece[:2] if isinstance(tensor, paddle.Tensor)]
    needs = {id(tensor): needs_grad(tensor) for tensor in given}
    with paddle.no_grad(), without_autocast():
        return plan_calls(pieces, n_experts, transport, wire, lambda tensor: needs[id(tensor)], backward)


def _ticket():
    return paddle.zeros([1], dtype="float32")


class _BeginDispatch(PyLayer):
    @staticmethod
    def forward(ctx, x, probs, call):
        ctx.call = call
        with without_autocast():
            call.begin_dispatch(x)
        return _ticket()

    @staticmethod
    def backward(ctx, _):
        with paddle.no_grad(), without_autocast():
            return ctx.call.finish_dispatch_gradient()


class _FinishDispatch(PyLayer):
    @staticmethod
    def forward(ctx, ticket, like, call):
        ctx.call = call
        with without_autocast():
            rows, probs = call.finish_dispatch()
        if rows is None:  # an FP8 payload; this carries its gradient, and nobody reads it
            rows = paddle.empty([call.layout.n_received, like.shape[1]], dtype=like.dtype)
        return rows, probs

    @staticmethod
    def backward(ctx, dx, ds):
        call = ctx.call
        with paddle.no_grad(), without_autocast():
            call.begin_dispatch_gradient(dx if call.need_dx else None, ds if call.need_ds else None)
        return _ticket(), None


class _BeginCombine(PyLayer):
    @staticmethod
    def forward(ctx, y, call):
        ctx.call = call
        with without_autocast():
            call.begin_combine(y)
        return _ticket()

    @staticmethod
    def backward(ctx, _):
        with paddle.no_grad(), without_autocast():
            dy = ctx.call.finish_combine_gradient()
        # The handle has it; the tape wants something of y's shape, and e4m3 is there already.
        return ctx.call.combine_grad_handle["data"] if dy is None else dy


class _FinishCombine(PyLayer):
    @staticmethod
    def forward(ctx, ticket, call):
        ctx.call = call
        with without_autocast():
            return call.finish_combine()

    @staticmethod
    def backward(ctx, dout):
        with paddle.no_grad(), without_autocast():
            ctx.call.begin_combine_gradient(dout)
        return _ticket()


def begin_dispatch(x, probs, call: EpCall):
    """x [T,H] and probs [T,K], of which the call was opened, leave. All ranks call it together."""
    return _BeginDispatch.apply(x, probs, call)


def finish_dispatch(ticket, x, call: EpCall):
    """(rows [N,H], probs [N,K]); the rows' values are ``call.payload`` where dispatch is FP8. ``x`` only tells the type
    and the width."""
    rows, probs = _FinishDispatch.apply(ticket, x.detach(), call)
    rows.stop_gradient, probs.stop_gradient = not call.need_dx, not call.need_ds
    return rows, probs


def begin_combine(y, call: EpCall):
    """y [N,H], the experts' results for the rows that came, goes back."""
    return _BeginCombine.apply(y, call)


def finish_combine(ticket, call: EpCall):
    """[T,H]: what came back, added up by token."""
    return _FinishCombine.apply(ticket, call)
