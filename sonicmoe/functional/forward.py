"""The two projections of forward, one call each, into tensors that the caller owns: for expert-parallel code that
dispatches and combines on its own.

M rows in sorted order, T tokens. Weights are kernel views: w1 [2I,H,E] (or [I,H,E]) and w2 [H,I,E], with stride order
(2,0,1).
"""

import torch

from .. import checks
from ..gemm.api import stages
from .kernel_views import native_view, refuse_bias
from .raw import (
    any_activation,
    parse_activation,
    raw_plan,
    refuse_schedule,
    require_rows,
    routing_of,
    weights_of,
)
from .streams import on_stream, without_autocast


@torch.no_grad()
def _up_projection_forward(
    x,
    w1,
    z,
    y1,
    b1,
    expert_frequency_offset,
    expert_schedule_order,
    x_gather_idx,
    stream_id,
    activation_type,
    is_glu_activation: bool,
    is_inference_mode_enabled: bool = False,
) -> None:
    """z [M,2I] = x[x_gather_idx] @ w1[expert]^T, and y1 [M,I] its activation. z may be None in inference mode."""
    refuse_bias(b1=b1)
    refuse_schedule(expert_schedule_order)
    plan = raw_plan("x", x, parse_activation(activation_type, is_glu_activation))
    w1_EFH = native_view("w1", w1)
    weights = weights_of(plan, x, w1_EFH=w1_EFH)
    (n_experts, width, hidden), n_tokens = checks.shape_of(w1_EFH), checks.shape_of(x)[0]
    checks.require_rank("x_gather_idx", x_gather_idx, 1, "[M]")
    n_rows = checks.shape_of(x_gather_idx)[0]
    require_rows(plan, x, x=(x, (n_tokens, hidden)), y1=(y1, (n_rows, weights.intermediate_size)))
    if z is not None or not is_inference_mode_enabled:
        require_rows(plan, x, z=(z, (n_rows, width)))
    with on_stream(stream_id, x), without_autocast(x):
        routing = routing_of(x, n_experts, expert_frequency_offset, n_tokens, n_rows, x_gather_idx)
        run = stages(plan)
        run.up_projection(run.prepare_rows(x.detach(), plan), weights, routing, plan, need_a=True, out=(z, y1))


@torch.no_grad()
def _down_projection_forward(
    w2, y1, y2, b2, expert_frequency_offset, expert_schedule_order, x_gather_idx, stream_id
) -> None:
    """y2 [M,H] = y1 @ w2[expert]^T, rows as they are: ``x_gather_idx`` is not read."""
    refuse_bias(b2=b2)
    refuse_schedule(expert_schedule_order)
    plan = raw_plan("y1", y1, any_activation(True))
    w2_EHI = native_view("w2", w2)
    (n_experts, hidden, intermediate), n_rows = checks.shape_of(w2_EHI), checks.shape_of(y1)[0]
    require_rows(plan, y1, y1=(y1, (n_rows, intermediate)), y2=(y2, (n_rows, hidden)))
    with on_stream(stream_id, y1), without_autocast(y1):
        routing = routing_of(y1, n_experts, expert_frequency_offset, n_rows, n_rows)
        weights = weights_of(plan, y1, w2_EHI=w2_EHI)
        stages(plan).down_projection(y1.detach(), weights, routing, plan, out=y2)
