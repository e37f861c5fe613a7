"""The whole layer of the MoE module as one autograd node: router, experts and balance loss.

Nothing that lies between these leaves the module, so nothing but the node's inputs and results needs a place on the
tape. Each node there, and each sum of two gradients, costs the host more than the launch of a kernel; at few tokens
that is what a step waits for. Callers of ``layer.py`` get the logits too, and may hang on them what they like: there
each part is a node of its own.
"""

import torch

from ..config import SonicMoEConfig
from ..routing import router_weight
from ..routing.switch_loss import backward as loss_backward
from ..routing.switch_loss import forward as loss_forward
from ..routing.topk import backward as router_backward
from ..routing.topk import forward as router_forward
from .autograd import ExpertCall, apply_experts, weight_needs
from .layer import checked_topk, layer_plan, route
from .router import plus_product, require_router, router_logits
from .streams import compute_input, in_dtype, on_stream, without_autocast


def whole_layer(x, router_w, w1_EFH, w2_EHI, k: int, activation, inference: bool):
    """(out, balance loss) for x [..,H], with weights in native layout. Under ``inference`` nothing is kept for a
    backward, and there is no loss (None)."""
    config = SonicMoEConfig.current()
    inputs = (x, router_w, w1_EFH, w2_EHI)
    with on_stream(None, x):
        if torch.is_grad_enabled() and not inference and any([tensor.requires_grad for tensor in inputs]):
            return _WholeLayer.apply(*inputs, k, activation, config)
        with torch.no_grad():
            logits, scores, _, routing, frequency, rows, plan = _routed(*inputs, k, activation, config)
            out = apply_experts(rows, scores, w1_EFH, w2_EHI, routing, plan, inference).reshape(x.shape)
            if inference:
                return out, None
            with without_autocast(x):
                return out, loss_forward(logits, frequency, config)


def _routed(x, router_w, w1, w2, k: int, activation, config: SonicMoEConfig):
    """All that comes before the experts, for the tokens of x [..,H] one after the other."""
    if x.ndim != 2:
        x = x.reshape(-1, x.shape[-1])
    require_router(x, router_w, w2)
    k = checked_topk(k, int(router_w.shape[0]))
    logits = router_logits(x, router_w, config)
    rows = compute_input(x)
    plan = layer_plan(rows, w1, w2, activation, config)
    with without_autocast(x):
        scores, indices = router_forward(logits, k, config)
        routing, frequency = route(indices, scores, int(router_w.shape[0]), plan, config)
    return logits, scores, indices, routing, frequency, rows, plan


class _WholeLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, router_w, w1, w2, k, activation, config):
        found = _routed(x, router_w, w1, w2, k, activation, config)
        logits, scores, indices, routing, frequency, rows, plan = found
        with without_autocast(x):
            out, ctx.call, z_parts = ExpertCall.forward(rows, w1, w2, routing, plan)
            loss = loss_forward(logits, frequency, config)
        ctx.save_for_backward(rows, router_w, w1, w2, logits, frequency, scores, indices, *z_parts)
        ctx.x_shape, ctx.x_dtype, ctx.config = x.shape, x.dtype, config
        if x.ndim != 2:
            out.resize_(x.shape)  # of the same size; a view would be one that nobody may write in place
        ctx.set_materialize_grads(False)  # a result that nobody used costs nothing
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(loss)
        return out, loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dloss):
        rows, router_w, w1, w2, logits, frequency, scores, indices, *z_parts = ctx.saved_tensors
        need_dx, need_router = ctx.needs_input_grad[:2]
        need_logits = need_dx or need_router
        dx = dlogits = drouter = dw1 = dw2 = None
        with without_autocast(rows):
            if dout is not None:
                dout = dout if dout.ndim == 2 else dout.reshape(rows.shape)
                needs = need_dx, need_logits, *weight_needs(ctx)
                dx, ds, dw1, dw2 = ctx.call.backward(rows, w1, w2, z_parts, dout, *needs)
                if need_logits:
                    dlogits = router_backward(ds, scores, indices, int(logits.shape[1]), logits.dtype, ctx.config)
            if dloss is not None and need_logits:
                of_loss = loss_backward(dloss, logits, frequency, ctx.config)
                dlogits = of_loss if dlogits is None else dlogits.add_(of_loss)
            if need_router and dlogits is not None:
                drouter = router_weight.gradient(dlogits, rows, router_w.dtype, ctx.config)
            if need_dx and dlogits is not None:
                dx = plus_product(dx, dlogits, in_dtype(router_w, logits.dtype), ctx.x_dtype, ctx.config)
                if dx.shape != ctx.x_shape:
                    dx = dx.reshape(ctx.x_shape)
        return dx, drouter, dw1, dw2, None, None, None
