"""The backward of both projections, gradients of activations and of weights apart: the counterpart of ``forward.py``.

Rows, tokens and weights as there. A weight gradient is a kernel view like its weight; it is overwritten, in its own
dtype, and an expert without rows gets zeros.
"""

import torch

from .. import checks
from ..gemm.api import GradBuffers, stages
from .kernel_views import native_view, refuse_bias
from .raw import (
    any_activation,
    parse_activation,
    raw_plan,
    refuse_schedule,
    require_gradient,
    require_rows,
    routing_of,
    weights_of,
)
from .streams import on_stream, without_autocast


@torch.no_grad()
def _down_projection_backward_act(
    dout,
    z,
    w2,
    dz,
    ds,
    b2,
    db2,
    y1s,
    topk_scores,
    expert_frequency_offset,
    expert_schedule_order,
    x_gather_idx,
    s_scatter_idx,
    is_glu_activation: bool,
    activation_type,
    stream_id,
) -> None:
    """dz [M,2I], ds [M] and y1s [M,I] = score * activation, from dout [T,H].

    Row r belongs to token ``x_gather_idx[r]``, its score and ds are at ``s_scatter_idx[r]``.
    """
    refuse_bias(b2=b2, db2=db2)
    refuse_schedule(expert_schedule_order)
    plan = raw_plan("z", z, parse_activation(activation_type, is_glu_activation))
    w2_EHI = native_view("w2", w2)
    n_experts, hidden, intermediate = checks.shape_of(w2_EHI)
    n_tokens, n_rows, width = checks.shape_of(dout)[0], checks.shape_of(z)[0], plan.width(intermediate)
    require_rows(plan, z, dout=(dout, (n_tokens, hidden)), y1s=(y1s, (n_rows, intermediate)))
    require_rows(plan, z, z=(z, (n_rows, width)), dz=(dz, (n_rows, width)))
    for name, values in (("topk_scores", topk_scores), ("ds", ds)):
        checks.require_tensor(name, values)
        checks.require_dtype(name, values, checks.FLOAT_DTYPES)
        checks.require_shape(name, values, (n_rows,), "one entry a row")
        checks.require_same_place(name, values, "the rows", z)
    with on_stream(stream_id, z), without_autocast(z):
        scores = topk_scores.detach().to(torch.float32).contiguous()
        routing = routing_of(
            z, n_experts, expert_frequency_offset, n_tokens, n_rows, x_gather_idx, s_scatter_idx, scores
        )
        run, weights = stages(plan), weights_of(plan, z, w2_EHI=w2_EHI)
        rows = run.prepare_rows(dout, plan)
        _, _, ds_parts = run.down_projection_backward(rows, z, weights, routing, plan, need_wgrad=True, out=(dz, y1s))
        ds.copy_(run.score_gradient(ds_parts, routing, plan))


@torch.no_grad()
def _down_projection_backward_weight(
    dout, y1s, dw2, expert_frequency_offset, expert_schedule_order, x_gather_idx, stream_id
) -> None:
    """dw2 [H,I,E]: each expert's dout[x_gather_idx]^T @ y1s."""
    refuse_schedule(expert_schedule_order)
    plan = raw_plan("y1s", y1s, any_activation(True))
    dw2_EHI = native_view("dw2", dw2)
    n_experts, hidden, intermediate = checks.shape_of(dw2_EHI)
    n_tokens, n_rows = checks.shape_of(dout)[0], checks.shape_of(y1s)[0]
    require_gradient("dw2", dw2_EHI, y1s)
    require_rows(plan, y1s, dout=(dout, (n_tokens, hidden)), y1s=(y1s, (n_rows, intermediate)))
    with on_stream(stream_id, y1s), without_autocast(y1s):
        routing = routing_of(y1s, n_experts, expert_frequency_offset, n_tokens, n_rows, x_gather_idx)
        everyone = (True,) * n_experts
        buffers = GradBuffers(None, dw2_EHI, False, everyone, everyone, overwrite=True)
        stages(plan).accumulate_dw2(y1s, dout, routing, plan, buffers)


@torch.no_grad()
def _up_projection_backward_act(
    w1,
    dx_expanded,
    dz,
    db1,
    expert_frequency_offset,
    expert_schedule_order,
    x_gather_idx,
    s_scatter_idx,
    is_glu_activation: bool,
    stream_id,
) -> None:
    """dx_expanded [M,H] = dz @ w1[expert], rows as they are: neither index is read."""
    refuse_bias(db1=db1)
    refuse_schedule(expert_schedule_order)
    plan = raw_plan("dz", dz, any_activation(is_glu_activation))
    w1_EFH = native_view("w1", w1)
    (n_experts, width, hidden), n_rows = checks.shape_of(w1_EFH), checks.shape_of(dz)[0]
    require_rows(plan, dz, dz=(dz, (n_rows, width)), dx_expanded=(dx_expanded, (n_rows, hidden)))
    with on_stream(stream_id, dz), without_autocast(dz):
        routing = routing_of(dz, n_experts, expert_frequency_offset, n_rows, n_rows)
        weights = weights_of(plan, dz, w1_EFH=w1_EFH)
        stages(plan).up_projection_backward(dz, weights, routing, plan, out=dx_expanded)


@torch.no_grad()
def _up_projection_backward_weight(
    x, dw1, dz, expert_frequency_offset, expert_schedule_order, x_gather_idx, is_glu_activation: bool, stream_id
) -> None:
    """dw1 [2I,H,E]: each expert's dz^T @ x[x_gather_idx]."""
    refuse_schedule(expert_schedule_order)
    plan = raw_plan("dz", dz, any_activation(is_glu_activation))
    dw1_EFH = native_view("dw1", dw1)
    n_experts, width, hidden = checks.shape_of(dw1_EFH)
    n_tokens, n_rows = checks.shape_of(x)[0], checks.shape_of(dz)[0]
    require_gradient("dw1", dw1_EFH, dz)
    require_rows(plan, dz, x=(x, (n_tokens, hidden)), dz=(dz, (n_rows, width)))
    with on_stream(stream_id, dz), without_autocast(dz):
        routing = routing_of(dz, n_experts, expert_frequency_offset, n_tokens, n_rows, x_gather_idx)
        everyone = (True,) * n_experts
        buffers = GradBuffers(dw1_EFH, None, False, everyone, everyone, overwrite=True)
        stages(plan).accumulate_dw1(dz, x.detach(), routing, plan, buffers)
