"""Dispatch and combine on torch's tape.

    (call,) = open_calls([(x, probs, indices)], n_experts, transport)    # or one for each of several pieces
    ticket = begin_dispatch(x, probs, call)
    rows, row_probs = finish_dispatch(ticket, x, call)    # with call.counts, call.local_indices, call.payload
    ticket = begin_combine(y, call)
    out = finish_combine(ticket, call)

A ticket is one number that ties the two halves together on the tape: what is under way is no tensor yet.
"""

import torch

from .call import EpCall, Wire, plan_calls


def open_calls(pieces, n_experts: int, transport, wire: Wire | None = None, backward: bool = False) -> list[EpCall]:
    """For ``pieces`` of (x [T,H], probs [T,K], indices [T,K]). All ranks call it together, with as many.

    ``backward``: there will be one though neither x nor probs want a gradient, since this rank's experts do.
    """
    grad = torch.is_grad_enabled()
    with torch.no_grad():
        return plan_calls(pieces, n_experts, transport, wire, lambda tensor: grad and tensor.requires_grad, backward)


def _ticket(like):
    return torch.zeros([1], dtype=torch.float32, device=like.device)


class _BeginDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, probs, call):
        ctx.call, ctx.dtype = call, x.dtype
        call.begin_dispatch(x)
        return _ticket(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        dx, ds = ctx.call.finish_dispatch_gradient()
        return None if dx is None else dx.to(ctx.dtype), ds, None


class _FinishDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, like, call):
        ctx.call = call
        rows, probs = call.finish_dispatch()
        if rows is None:  # an FP8 payload; this carries its gradient, and takes no memory
            rows = torch.zeros([1], dtype=like.dtype, device=like.device).expand(call.layout.n_received, like.shape[1])
        without_gradient = [part for part, needed in ((rows, call.need_dx), (probs, call.need_ds)) if not needed]
        ctx.mark_non_differentiable(*without_gradient)
        return rows, probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx, ds):
        call = ctx.call
        call.begin_dispatch_gradient(dx if call.need_dx else None, ds.contiguous() if call.need_ds else None)
        return _ticket(dx), None, None


class _BeginCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, call):
        ctx.call, ctx.like = call, (y.shape, y.dtype)
        call.begin_combine(y)
        return _ticket(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dticket):
        dy = ctx.call.finish_combine_gradient()
        shape, dtype = ctx.like
        # The handle has it; the tape wants something of y's shape.
        return dticket.to(dtype).expand(shape) if dy is None else dy.to(dtype), None


class _FinishCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, call):
        ctx.call = call
        return call.finish_combine()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        ctx.call.begin_combine_gradient(dout.contiguous())
        return _ticket(dout), None


def begin_dispatch(x, probs, call: EpCall):
    """x [T,H] and probs [T,K], of which the call was opened, leave. All ranks call it together."""
    return _BeginDispatch.apply(x, probs, call)


def finish_dispatch(ticket, x, call: EpCall):
    """(rows [N,H], probs [N,K]); the rows' values are ``call.payload`` where dispatch is FP8. ``x`` only tells the type
    and the width."""
    return _FinishDispatch.apply(ticket, x.detach(), call)


def begin_combine(y, call: EpCall):
    """y [N,H], the experts' results for the rows that came, goes back."""
    return _BeginCombine.apply(y, call)


def finish_combine(ticket, call: EpCall):
    """[T,H]: what came back, added up by token."""
    return _FinishCombine.apply(ticket, call)
