"""``run_sonic_moe``: the experts on stacked weights, with PaddleFleet's calling conventions.

During compute PaddleFleet holds w1 [E,2I,H] and w2 [E,H,I] in native layout, ``w1.main_grad`` native too, and
``w2.main_grad`` grouped [E,I,H]. Weight gradients go straight into those, then the parameter's backward hook fires.
Under FP8 it may have emptied the parameters' bf16 storage: then ``weight.fp8`` and ``weight.transposed_fp8`` are all
there is, and nothing here touches the data of the parameter itself.
"""

import threading

import paddle

from .. import checks
from ..enums import ActivationType, is_glu
from ..gemm.api import ExpertWeights, GradBuffers
from ..gemm.plan import Plan, make_plan
from ..launch import make_current
from ..quant.api import quantize_weights
from ..quant.formats import QuantWeights
from ..wgrad_deferral import offer_wgrad
from . import dispatch
from .autocast import without_autocast
from .call import ExpertCall, needs_grad, require_gradient_carrier, run, storage_of
from .fleet_config import resolve
from .fp8_payload import weight_payload
from .main_grad import require_main_grad
from .weights import is_emptied

# Two threads may run backwards through the same parameters: neither may allocate over the other's main_grad, nor add
# to it at the same time.
_main_grad_lock = threading.Lock()


def run_sonic_moe(
    hidden_states,
    topk_indices,
    topk_scores,
    K,
    E,
    w1,
    w2,
    fp8=False,
    tokens_per_expert=None,
    fp8_scale=None,
    fp8_combine_grad_handle=None,
    fp8_config=None,
    release_fp8_weights=False,
    activation_type=ActivationType.SWIGLU,
    hidden_states_fp8=None,
):
    """out [T,H] bf16 in token order for hidden_states [T,H] (bf16, or e4m3 with ``fp8_scale``).

    ``hidden_states_fp8`` with ``fp8_scale``: the FP8 dispatch, where ``hidden_states`` is bf16 and only carries the
    gradient.
    Without FP8 the weights are read where they are, not copied: change them only when no backward is outstanding.
    ``tokens_per_expert`` None counts the indices. ``release_fp8_weights`` drops ``.fp8`` and ``.transposed_fp8`` of
    both weights once this call's backward has run (at once if it has none).
    """
    n_experts = checks.require_int("E", E)
    topk = checks.require_int("K", K)
    kind = ActivationType.parse(activation_type)
    config = resolve(fp8, fp8_config)
    checks.require_tensor("hidden_states", hidden_states)
    checks.require_rank("hidden_states", hidden_states, 2, "[T, H]")
    n_tokens, hidden = checks.shape_of(hidden_states)
    dispatch.check_hidden("hidden_states", hidden_states, hidden)
    require_gradient_carrier("hidden_states", hidden_states)
    dispatch.check_topk(
        topk_indices, topk_scores, n_tokens, ("topk_indices", "topk_scores"), ("hidden_states", hidden_states)
    )
    if checks.shape_of(topk_indices)[1] != topk:
        raise ValueError(f"K: got {topk}, but topk_indices has {checks.shape_of(topk_indices)[1]} columns")
    for name, weight in (("w1", w1), ("w2", w2)):
        checks.require_tensor(name, weight)
        checks.require_dtype(name, weight, checks.FLOAT_DTYPES if name == "w1" else (checks.dtype_name(w1),))
        if not is_emptied(weight):  # a tensor without storage has no place either
            checks.require_same_place(name, weight, "hidden_states", hidden_states)
    intermediate = _check_weights(w1, w2, n_experts, hidden, kind)
    counts = None if tokens_per_expert is None else checks.host_counts(tokens_per_expert, n_experts)
    dispatch.check_handle(fp8_combine_grad_handle)
    names = ("hidden_states", "hidden_states_fp8", "fp8_scale")
    x = dispatch.engine_input(names, hidden_states, hidden_states_fp8, fp8_scale)
    storage = storage_of(x)
    checks.require_layer_sizes(hidden, intermediate, storage, config.use_fp8)
    plan = make_plan(config, kind, storage=storage, x_name="hidden_states", **dispatch.place_facts(hidden_states))
    _check_main_grads(w1, w2)
    make_current(hidden_states)
    with paddle.no_grad(), without_autocast():
        weights = _weights(w1, w2, hidden, intermediate, plan)
        routing = dispatch.route(topk_indices, topk_scores, counts, n_experts, plan, config, "topk_indices")
    train1, train2 = (not w1.stop_gradient,) * n_experts, (not w2.stop_gradient,) * n_experts

    place = hidden_states.place

    def on_wgrad(wgrad, experts1, experts2, _):  # these weights are watched by nobody: the caller keeps them
        _accumulate("w2", w2, place, wgrad.accumulate_dw2, experts1, experts2)
        _accumulate("w1", w1, place, wgrad.accumulate_dw1, experts1, experts2)
        if release_fp8_weights:
            _release(w1, w2)

    call = ExpertCall(
        x=x,
        routing=routing,
        weights=weights,
        plan=plan,
        need_dx=needs_grad(hidden_states),
        need_ds=needs_grad(topk_scores),
        experts1=train1,
        experts2=train2,
        on_wgrad=on_wgrad,
        combine_grad_handle=fp8_combine_grad_handle,
    )
    out = run(hidden_states, topk_scores, call)
    if release_fp8_weights and not (paddle.is_grad_enabled() and call.need_wgrad):
        _release(w1, w2)
    return out


def _check_weights(w1, w2, n_experts: int, hidden: int, kind: ActivationType) -> int:
    """I, read off both shapes together: either weight alone could be in either layout."""
    for name, weight in (("w1", w1), ("w2", w2)):
        checks.require_rank(name, weight, 3, "in native layout")
    given = [list(checks.shape_of(w)) for w in (w1, w2)]
    intermediate = given[1][2]
    width = intermediate * (2 if is_glu(kind) else 1)
    if given == [[n_experts, width, hidden], [n_experts, hidden, intermediate]]:
        return intermediate
    factor = 2 if is_glu(kind) else 1
    grouped_i = given[1][1]
    hint = ""
    if given == [[n_experts, hidden, factor * grouped_i], [n_experts, grouped_i, hidden]]:
        hint = "; these are in grouped layout: convert them with weight_layout_fusion"
    f_name = "2I" if factor == 2 else "I"
    raise ValueError(
        f"w1, w2: got shapes {given[0]} and {given[1]}, need native [E, {f_name}, H] and [E, H, I] with E={n_experts}, "
        f"H={hidden}{hint}"
    )


def _grouped_shape(w2) -> tuple[int, int, int]:
    experts, hidden, intermediate = checks.shape_of(w2)
    return experts, intermediate, hidden


def _check_main_grads(w1, w2) -> None:
    require_main_grad("w1", w1, checks.shape_of(w1))
    require_main_grad("w2", w2, _grouped_shape(w2))


def _weights(w1, w2, hidden: int, intermediate: int, plan: Plan) -> ExpertWeights:
    """The bf16 storage where there is one, for it cannot be stale; else the caller's FP8 copies."""
    emptied = [name for name, weight in (("w1", w1), ("w2", w2)) if is_emptied(weight)]
    if not emptied:
        w1_EFH, w2_EHI = (w.detach().astype(plan.storage) for w in (w1, w2))
        if plan.recipe is None:
            return ExpertWeights(w1_EFH, w2_EHI, None, hidden, intermediate)
        fp8 = quantize_weights(w1_EFH, w2_EHI, plan.recipe, plan.backend)
        return ExpertWeights(None, None, fp8, hidden, intermediate)
    if plan.recipe is None:
        raise ValueError(f"{emptied[0]}: its bf16 storage is empty and fp8 is False; need the bf16 weights")
    n_experts, width, _ = checks.shape_of(w1)
    fp8 = QuantWeights(
        w1=weight_payload(w1, "fp8", "w1", (n_experts, width, hidden)),
        w2=weight_payload(w2, "fp8", "w2", (n_experts, hidden, intermediate)),
        w1_t=weight_payload(w1, "transposed_fp8", "w1", (n_experts, hidden, width)),
        w2_t=weight_payload(w2, "transposed_fp8", "w2", (n_experts, intermediate, hidden)),
    )
    wanted = (plan.recipe.weight_block, plan.recipe.ue8m0)
    for name in ("w1", "w1_t", "w2", "w2_t"):
        payload = getattr(fp8, name)
        found = (payload.block, checks.dtype_name(payload.scale) == "uint8")
        if found != wanted:
            raise ValueError(
                f"{name} FP8 copy: got {found[0]} blocks with {'UE8M0' if found[1] else 'float32'} scales, but recipe "
                f"{plan.recipe.name!r} needs {wanted[0]} blocks with {'UE8M0' if wanted[1] else 'float32'} scales"
            )
    return ExpertWeights(None, None, fp8, hidden, intermediate)


def _accumulate(point: str, weight, place, accumulate, experts1, experts2) -> None:
    """One weight's gradient into its main_grad, then its backward hook: a reducer must find the whole sum there."""
    if not any(experts1 if point == "w1" else experts2):
        return
    n_experts, a, b = checks.shape_of(weight)
    shape = [n_experts, a, b] if point == "w1" else list(_grouped_shape(weight))

    def run_wgrad():
        with _main_grad_lock, paddle.no_grad(), without_autocast():
            if getattr(weight, "main_grad", None) is None:
                weight.main_grad = paddle.zeros(shape, dtype="float32", device=place)
            accumulate(GradBuffers(weight.main_grad, weight.main_grad, True, experts1, experts2))

    if offer_wgrad(point, weight, run_wgrad):
        return
    run_wgrad()
    fire = getattr(weight, "_apply_backward_hook", None)
    if fire is not None:
        fire()


def _release(*weights) -> None:
    """Forget the caller's FP8 copies. Dropping the references frees no storage that something else still reads."""
    for weight in weights:
        for attribute in ("fp8", "transposed_fp8"):
            if getattr(weight, attribute, None) is not None:
                setattr(weight, attribute, None)
