"""The layer as functions: router, routing and experts on the tape, with the published names and arguments."""

from functools import lru_cache

import torch

from .. import checks
from ..config import SonicMoEConfig
from ..enums import ActivationType, is_glu
from ..gemm.api import build_ahead
from ..gemm.plan import Plan
from ..launch import arch
from ..routing.counts import count, slots_of_experts
from ..routing.metadata import build as build_routing
from ..routing.pairs import build as build_pairs
from ..routing.pairs import order_by_token
from ..routing.topk import backward as router_backward
from ..routing.topk import forward as router_forward
from .autograd import apply_experts, main_grad_of
from .kernel_views import native_view, refuse_bias
from .router import logits_on_tape, require_router
from .streams import compute_input, on_stream, plan_for, without_autocast


class _SoftmaxOverTopk(torch.autograd.Function):
    """logits [T,E] -> scores [T,K] float32 and experts [T,K] int32."""

    @staticmethod
    def forward(ctx, logits, k, config):
        scores, indices = router_forward(logits, k, config)
        ctx.save_for_backward(scores, indices)
        ctx.n_experts, ctx.dtype, ctx.config = int(logits.shape[1]), logits.dtype, config
        ctx.mark_non_differentiable(indices)
        return scores, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dscores, _):
        scores, indices = ctx.saved_tensors
        dlogits = router_backward(dscores.contiguous(), scores, indices, ctx.n_experts, ctx.dtype, ctx.config)
        return dlogits, None, None


def route_topk(
    logits,
    k: int,
    is_softmax_over_topk: bool = True,
    norm_topk_probs: bool = False,
    config: SonicMoEConfig | None = None,
):
    """(scores [T,K] float32, experts [T,K] int32) from router logits [T,E].

    Softmax over the K largest logits; or, with ``is_softmax_over_topk=False``, the K largest of the softmax over all,
    which ``norm_topk_probs`` divides by their sum. Among equal logits the lower expert comes first.
    """
    config = SonicMoEConfig.current() if config is None else config
    checks.require_tensor("logits", logits)
    checks.require_rank("logits", logits, 2, "[T, E]")
    checks.require_dtype("logits", logits, (*checks.FLOAT_DTYPES, "float64"))
    k = checked_topk(k, int(logits.shape[1]))
    with on_stream(None, logits), without_autocast(logits):
        if is_softmax_over_topk or norm_topk_probs:  # divided by their sum, both are the same numbers
            return _SoftmaxOverTopk.apply(logits.contiguous(), k, config)
        with torch.no_grad():
            _, indices = router_forward(logits.detach().contiguous(), k, config)
        return torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, indices.to(torch.int64)), indices


def topk_layer(
    x,
    router_w,
    w1_EFH,
    w2_EHI,
    k: int,
    activation,
    *,
    stream_id=None,
    inference: bool = False,
    is_softmax_over_topk: bool = True,
    norm_topk_probs: bool = False,
):
    """(out [T,H], router logits [T,E], tokens of each expert [E] int32), with weights in native layout."""
    config = SonicMoEConfig.current()
    require_router(x, router_w, w2_EHI)
    with on_stream(stream_id, x), torch.set_grad_enabled(torch.is_grad_enabled() and not inference):
        logits = logits_on_tape(x, router_w, config)
        scores, indices = route_topk(logits, k, is_softmax_over_topk, norm_topk_probs, config)
        x = compute_input(x)
        plan = layer_plan(x, w1_EFH, w2_EHI, activation, config)
        with torch.no_grad():
            routing, frequency = route(indices, scores.detach(), int(router_w.shape[0]), plan, config)
        out = apply_experts(x, scores, w1_EFH, w2_EHI, routing, plan, inference)
    return out, logits, frequency


def route(indices, scores, n_experts: int, plan: Plan, config: SonicMoEConfig):
    """The routing of a top-k, and how many slots each expert got, int32 [E]."""
    routing = build_routing(indices, scores, n_experts, plan.row_block, config, index_name="topk", all_valid=True)
    return routing, slots_of_experts(routing, indices, config)


def moe_TC_softmax_topk_layer(
    x,
    router_w,
    w1,
    b1,
    w2,
    b2,
    K: int,
    stream_id=None,
    activation_type: ActivationType | str = ActivationType.SWIGLU,
    is_inference_mode_enabled: bool = False,
    is_softmax_over_topk: bool = True,
    norm_topk_probs: bool = False,
    concat_layout: bool = False,
):
    """(out [T,H], router logits [T,E], tokens of each expert [E] int32) for x [T,H] and router_w [E,H].

    w1 [2I,H,E] and w2 [H,I,E] are kernel views: native weights [E,2I,H] and [E,H,I] after ``.permute(1, 2, 0)``.
    ``concat_layout``: the rows of w1 are all gates, then all ups, instead of interleaved; costs a copy of w1.
    """
    w1_EFH, w2_EHI = _native_weights(w1, b1, w2, b2, activation_type, concat_layout)
    return topk_layer(
        x,
        router_w,
        w1_EFH,
        w2_EHI,
        K,
        activation_type,
        stream_id=stream_id,
        inference=is_inference_mode_enabled,
        is_softmax_over_topk=is_softmax_over_topk,
        norm_topk_probs=norm_topk_probs,
    )


def moe_general_routing_inputs(
    x,
    router_scores,
    token_indices,
    expert_indices,
    w1,
    b1,
    w2,
    b2,
    E: int,
    stream_id=None,
    activation_type: ActivationType | str = ActivationType.SWIGLU,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
):
    """(out [T,H], slots of each expert [E] int32) for any routing: slot s sends token ``token_indices[s]`` to expert
    ``expert_indices[s]`` with weight ``router_scores[s]``.

    Any number of slots a token, in any order; ids in [0,T) and [0,E). Weights as in ``moe_TC_softmax_topk_layer``.
    """
    w1_EFH, w2_EHI = _native_weights(w1, b1, w2, b2, activation_type, concat_layout)
    n_experts = int(w2_EHI.shape[0])
    if E != n_experts:
        raise ValueError(f"E: got {E}, but w2 holds {n_experts} experts")
    config = SonicMoEConfig.current()
    checks.require_tensor("x", x)
    checks.require_rank("x", x, 2, "[T, H]")
    n_tokens = int(x.shape[0])
    _check_slots(x, router_scores, token_indices, expert_indices, n_tokens)
    inference = is_inference_mode_enabled
    with on_stream(stream_id, x), torch.set_grad_enabled(torch.is_grad_enabled() and not inference):
        x = compute_input(x)
        plan = layer_plan(x, w1_EFH, w2_EHI, activation_type, config)
        order = order_by_token(token_indices)
        tokens, experts, scores = (
            values.index_select(0, order) for values in (token_indices, expert_indices, router_scores)
        )
        with torch.no_grad():
            known = scores.detach().to(torch.float32)
            routing = build_pairs(tokens, experts, known, n_tokens, n_experts, plan.row_block, config)
            frequency = slots_of_experts(routing, expert_indices, config)
        out = apply_experts(x, scores, w1_EFH, w2_EHI, routing, plan, inference)
    return out, frequency


@torch.no_grad()
def count_cumsum(x, E: int, do_cumsum: bool = True):
    """How often each of 0..E-1 occurs in x, int32 [E], and the running sums of these counts. Waits for nothing."""
    checks.require_rank("x", x, 1, "")
    checks.require_dtype("x", x, checks.INT_DTYPES)
    found = count(x, E)
    return (found, torch.cumsum(found, dim=0, dtype=torch.int32)) if do_cumsum else found


def checked_topk(k, n_experts: int) -> int:
    k = checks.require_int("K", k)
    if k > n_experts:
        raise ValueError(f"K: got {k}, need at most the number of experts, {n_experts}")
    return k


def _check_slots(x, router_scores, token_indices, expert_indices, n_tokens: int) -> None:
    slots = (("router_scores", router_scores), ("token_indices", token_indices), ("expert_indices", expert_indices))
    for name, tensor in slots:
        checks.require_tensor(name, tensor)
        checks.require_rank(name, tensor, 1, "[S]")
        checks.require_shape(name, tensor, checks.shape_of(router_scores), "[S], as router_scores")
        checks.require_dtype(name, tensor, checks.FLOAT_DTYPES if name == "router_scores" else checks.INT_DTYPES)
        checks.require_same_place(name, tensor, "x", x)
    if checks.is_cpu(x) and len(token_indices):  # on a GPU looking would mean to wait
        _check_tokens(token_indices, n_tokens)


def _check_tokens(token_indices, n_tokens: int) -> None:
    low, high = int(token_indices.min()), int(token_indices.max())
    if low < 0 or high >= n_tokens:
        raise ValueError(f"token_indices: got {low if low < 0 else high}, need 0 to {n_tokens - 1}, the rows of x")


def _native_weights(w1, b1, w2, b2, activation, concat_layout: bool):
    refuse_bias(b1=b1, b2=b2)
    w1_EFH, w2_EHI = native_view("w1", w1), native_view("w2", w2)
    if concat_layout:
        if not is_glu(ActivationType.parse(activation)):
            raise ValueError(f"concat_layout: got True with activation {activation}, which has no gate to lay apart")
        if main_grad_of("w1", w1_EFH) is not None:
            raise ValueError(
                "concat_layout: got True with a w1.main_grad, which the gradient of a copy in another order would not "
                "reach; need interleaved rows, or a w1 without main_grad"
            )
        n_experts, width, hidden = w1_EFH.shape
        halves = w1_EFH.reshape(n_experts, 2, width // 2, hidden)
        return halves.transpose(1, 2).reshape(n_experts, width, hidden), w2_EHI
    return w1_EFH, w2_EHI


def layer_plan(x, w1_EFH, w2_EHI, activation, config: SonicMoEConfig) -> Plan:
    """Checks of x and the weights together, none of which waits for the device."""
    return _layer_plan(checks.facts_of(x, w1_EFH, w2_EHI), ActivationType.parse(activation), config)


@lru_cache(maxsize=256)
def _layer_plan(facts, activation: ActivationType, config: SonicMoEConfig) -> Plan:
    x, w1_EFH, w2_EHI = (checks.Facts(*fields) for fields in facts)
    plan = plan_for(x, activation, config)
    n_experts, hidden, intermediate = checks.shape_of(w2_EHI)
    checks.require_shape("x", x, (x.shape[0], hidden), "[T, H], H as in w2")
    checks.require_layer_sizes(hidden, intermediate, plan.storage, config.use_fp8)
    width = plan.width(intermediate)
    checks.require_shape("w1", w1_EFH, (n_experts, width, hidden), "native [E, 2I or I, H], sizes as in w2")
    for name, weight in (("w1", w1_EFH), ("w2", w2_EHI)):
        checks.require_dtype(name, weight, checks.FLOAT_DTYPES)
        checks.require_contiguous(name, weight)
        checks.require_same_place(name, weight, "x", x)
    if plan.device == "cuda":
        build_ahead(plan, arch(x))
    return plan
