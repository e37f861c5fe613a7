"""One forward and its backward on Paddle's tape, for the node and for ``run_sonic_moe`` alike.

Everything that belongs to a call lives in its ``ExpertCall``, which Paddle's context holds: a node called again before
its backward, recomputed, or driven from another thread never meets another call's state.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle.autograd import PyLayer

from .. import checks, expert_mlp
from ..gemm.plan import Plan
from ..launch import make_current
from ..quant.formats import QuantTensor
from ..routing.metadata import Routing
from .autocast import without_autocast
from .fp8_payload import combine_gradient

CHANGED = "x: it or its scales changed in place after forward, but backward needs them as they were; clone them first"


@dataclass
class ExpertCall:
    """What one call computes with. ``x`` is a bf16 tensor or an FP8 payload, free of the tape."""

    x: Any
    routing: Routing
    weights: expert_mlp.ExpertWeights
    plan: Plan
    need_dx: bool
    need_ds: bool
    experts1: tuple[bool, ...]
    experts2: tuple[bool, ...]
    on_wgrad: Callable  # (PendingWgrad, experts1, experts2, check) -> None, see ``_ExpertMlp.backward``
    combine_grad_handle: dict | None = None
    saved: Any = field(default=None, init=False)
    x_versions: tuple[int, ...] = field(default=(), init=False)

    @property
    def need_wgrad(self) -> bool:
        return any(self.experts1) or any(self.experts2)

    @property
    def need_backward(self) -> bool:
        return self.need_dx or self.need_ds or self.need_wgrad


class _ExpertMlp(PyLayer):
    """x, probs and the anchor are on the tape; weights are not, their gradients go to main_grad."""

    @staticmethod
    def forward(ctx, x, probs, anchor, call: ExpertCall):
        ctx.call = call
        call.x_versions = versions(call.x)
        # Else Paddle casts an FP8 gradient to the type of out before anybody can see that it came without scales.
        ctx.set_grad_in_dtype_consistent(False)
        with without_autocast():
            out, call.saved = expert_mlp.forward(call.x, call.routing, call.weights, call.plan, keep=call.need_backward)
        return out

    @staticmethod
    def backward(ctx, dout):
        call = ctx.call
        if versions(call.x) != call.x_versions:
            raise RuntimeError(CHANGED)
        n_rows, hidden = checks.shape_of(dout)
        make_current(dout)  # whatever thread this is
        grad = combine_gradient(call.combine_grad_handle, dout, n_rows, hidden)
        if not isinstance(grad, QuantTensor) and checks.dtype_name(grad) != call.plan.storage:
            grad = grad.astype(call.plan.storage)
        with paddle.no_grad(), without_autocast():
            grads = expert_mlp.backward(
                call.saved, grad, need_dx=call.need_dx, need_ds=call.need_ds, need_wgrad=call.need_wgrad
            )
            watch = call.weights.watch

            def check(*buffers):
                """To be called behind the last use of the weights, with the gradient buffers that were added to: if
                the weights are no longer those of the forward, no number of this backward may pass for one."""
                if watch is not None:
                    watch.spoil(grads.dx, grads.ds, *buffers)

            if grads.wgrad is not None:
                call.on_wgrad(grads.wgrad, call.experts1, call.experts2, check)
            else:
                check()
        dx, ds = grads.dx, grads.ds
        if paddle.is_grad_enabled():  # create_graph: somebody may want to differentiate these
            dx, ds = (None if grad is None else _OnceOnly.apply(grad, _anchor()) for grad in (dx, ds))
        # None where an input's stop_gradient is set: Paddle insists. The anchor has served by making this run.
        return dx, ds, None


class _OnceOnly(PyLayer):
    """A gradient that has none of its own, where Paddle would take that for 0."""

    @staticmethod
    def forward(ctx, grad, anchor):
        return grad.clone()

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("experts: got a backward through their gradient, but they can be differentiated only once")


def _anchor():
    """An input of a PyLayer that wants a gradient: Paddle runs no backward where none does."""
    anchor = paddle.zeros([1], dtype="float32")
    anchor.stop_gradient = False
    return anchor


def needs_grad(tensor) -> bool:
    """Asked outside ``apply``: inside it Paddle does not tell the truth."""
    return paddle.is_grad_enabled() and not tensor.stop_gradient


def require_leaf(name: str, weight) -> None:
    """A weight's gradient goes to its main_grad and not down the tape: whatever it was computed from would never see
    any. A caller who gave it a main_grad, a view of the real parameter's say, has seen to that."""
    if needs_grad(weight) and not weight.is_leaf and getattr(weight, "main_grad", None) is None:
        raise ValueError(
            f"{name}: got a tensor that was made from others on the tape, need a leaf: the gradient goes to its own "
            "main_grad, and theirs would be lost; give it a main_grad, detach it, or compute it under no_grad"
        )


class _WiderGradient(PyLayer):
    """An e4m3 tensor whose gradient, 1024 in bf16, e4m3 cannot hold."""

    @staticmethod
    def forward(ctx, x):
        return x.astype("float32")

    @staticmethod
    def backward(ctx, dout):
        return (dout * 1024.0).astype("bfloat16")


@functools.cache
def tape_keeps_bf16_gradient_of_e4m3() -> bool:
    """Whether this Paddle hands a bf16 gradient of an e4m3 tensor on as it is.

    Stock 3.3 casts it to e4m3 without a scale: wrong numbers and no error. Tried once, on one element.
    """
    with paddle.enable_grad():
        x = paddle.zeros([1], dtype="float32").astype(paddle.float8_e4m3fn)
        x.stop_gradient = False
        _WiderGradient.apply(x).sum().backward()
        return checks.dtype_name(x.grad) == "bfloat16"


def require_gradient_carrier(name: str, x) -> None:
    """Refuse an e4m3 tensor on the tape where its gradient would be ruined on the way out."""
    if checks.dtype_name(x) == checks.FP8_DTYPE and needs_grad(x) and not tape_keeps_bf16_gradient_of_e4m3():
        raise ValueError(
            f"{name}: got a float8_e4m3fn tensor that needs a gradient, but this Paddle casts gradients of such "
            f"tensors to e4m3 without a scale; pass a bf16 [T, H] tensor as {name} to carry the gradient, and the FP8 "
            "data beside it"
        )


def versions(*values) -> tuple[int, ...]:
    """Paddle's counts of the in-place changes of tensors and FP8 payloads."""
    parts = [(value.data, value.scale) if isinstance(value, QuantTensor) else (value,) for value in values]
    return tuple([tensor.inplace_version for part in parts for tensor in part])


def run(x_on_tape, probs, call: ExpertCall):
    """out [T,H] on the tape. A call without anything to differentiate keeps nothing."""
    if not paddle.is_grad_enabled() or not call.need_backward:
        with paddle.no_grad(), without_autocast():
            out, _ = expert_mlp.forward(call.x, call.routing, call.weights, call.plan, keep=False)
        return out
    # Trainable experts behind inputs without gradient (a frozen router on the first layer) must still see a backward.
    return _ExpertMlp.apply(x_on_tape, probs, _anchor(), call)


def storage_of(x) -> str:
    """The type of the layer's output and of what it stores: x's own, bf16 for an FP8 dispatch."""
    return "bfloat16" if isinstance(x, QuantTensor) else checks.dtype_name(x)
