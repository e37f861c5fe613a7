"""Experts on rows that a dispatch brought: what ``SonicMoEMlpNode`` is on Paddle, for torch."""

import torch

from .. import checks
from ..config import SonicMoEConfig
from ..enums import ActivationType
from ..quant.formats import QuantTensor
from ..routing.metadata import build as build_routing
from .autograd import ExpertCall, inference_experts, weight_needs
from .layer import layer_plan
from .streams import on_stream, without_autocast


def dispatched_experts(
    x,
    tokens_per_expert,
    dispatched_indices,
    dispatched_probs,
    w1_EFH,
    w2_EHI,
    activation: ActivationType | str = ActivationType.SWIGLU,
    *,
    payload: QuantTensor | None = None,
    combine_grad_handle: dict | None = None,
    config: SonicMoEConfig | None = None,
):
    """out [T,H] in x's type, with weights in native layout. Ids under 0 or at and above E are not on this rank.

    ``payload``: an FP8 dispatch, beside which x only carries the gradient. ``combine_grad_handle``: backward finds its
    gradient there, e4m3 ``data`` with ``scale``, and empties it. Counts in a list cost no sync.
    """
    config = SonicMoEConfig.current() if config is None else config
    n_experts = int(w2_EHI.shape[0])
    checks.require_rank("x", x, 2, "[T, H]")
    for name, tensor, allowed in (
        ("dispatched_indices", dispatched_indices, checks.INT_DTYPES),
        ("dispatched_probs", dispatched_probs, ("float32",)),
    ):
        checks.require_tensor(name, tensor)
        checks.require_rank(name, tensor, 2, "[T, K]")
        checks.require_shape(name, tensor, (x.shape[0], dispatched_indices.shape[1]), "[T, K], T rows as in x")
        checks.require_dtype(name, tensor, allowed)
        checks.require_same_place(name, tensor, "x", x)
    if payload is not None:
        checks.require_shape("payload", payload.data, checks.shape_of(x), "[T, H], as x")
    counts = checks.host_counts(tokens_per_expert, n_experts)
    with on_stream(None, x):
        plan = layer_plan(x, w1_EFH, w2_EHI, activation, config)
        with torch.no_grad():
            routing = build_routing(
                dispatched_indices, dispatched_probs.detach(), n_experts, plan.row_block, config, counts
            )
        inputs = (x, dispatched_probs, w1_EFH, w2_EHI)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return _DispatchedExperts.apply(*inputs, payload, combine_grad_handle, routing, plan)
        return inference_experts(x if payload is None else payload, w1_EFH, w2_EHI, routing, plan)


class _DispatchedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, probs, w1, w2, payload, handle, routing, plan):
        rows = x if payload is None else payload
        with without_autocast(x):
            out, ctx.call, z_parts = ExpertCall.forward(rows, w1, w2, routing, plan)
        kept = (x,) if payload is None else (payload.data, payload.scale)
        ctx.n_kept, ctx.block, ctx.handle = len(kept), None if payload is None else payload.block, handle
        ctx.save_for_backward(*kept, w1, w2, *z_parts)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        saved = ctx.saved_tensors
        kept, (w1, w2, *z_parts) = saved[: ctx.n_kept], saved[ctx.n_kept :]
        x = kept[0] if ctx.block is None else QuantTensor(*kept, ctx.block)
        if ctx.handle is not None:
            dout = _handed_over(ctx.handle, dout)
        with without_autocast(w1):
            grads = ctx.call.backward(x, w1, w2, z_parts, dout, *ctx.needs_input_grad[:2], *weight_needs(ctx))
        return *grads, None, None, None, None


def _handed_over(handle: dict, dout) -> QuantTensor:
    """The FP8 gradient of the combine, which nobody finds a second time."""
    if handle.get("data") is None or handle.get("scale") is None:
        raise ValueError(
            f"combine_grad_handle: got keys {sorted(handle)} at backward, need 'data' and 'scale', which the combine's "
            "backward puts there; leave the handle away for a gradient that is not FP8"
        )
    data, scale = handle["data"], handle["scale"]
    checks.require_dtype("combine_grad_handle['data']", data, (checks.FP8_DTYPE,))
    checks.require_shape("combine_grad_handle['data']", data, checks.shape_of(dout), "[T, H]")
    n_rows, hidden = checks.shape_of(dout)
    wanted = (n_rows, hidden // checks.FP8_ALIGN)
    checks.require_shape("combine_grad_handle['scale']", scale, wanted, "float32, one for 128 channels")
    checks.require_dtype("combine_grad_handle['scale']", scale, ("float32",))
    handle.clear()
    return QuantTensor(data, scale, (1, checks.FP8_ALIGN))
