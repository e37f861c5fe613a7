"""``run_sonic_moe``: the experts on stacked weights, with PaddleFleet's calling conventions.

During compute PaddleFleet holds w1 [E,2I,H] and w2 [E,H,I] in native layout, ``w1.main_grad`` native too, and
``w2.main_grad`` grouped [E,I,H]. Weight gradients go straight into those, then the parameter's backward hook fires.
Under FP8 it may have emptied the parameters' bf16 storage: then ``weight.fp8`` and ``weight.transposed_fp8`` are all
there is, and nothing here touches the data of the parameter itself.
"""

import threading
from contextlib import nullcontext

import paddle

from .. import checks
from ..enums import ActivationType, is_glu
from ..gemm.api import ExpertWeights, GradBuffers
from ..gemm.plan import Plan, make_plan
from ..launch import make_current
from ..quant.api import quantize_weight, quantize_weights
from ..quant.formats import QuantWeights
from ..wgrad_deferral import OwedGradient, may_be_deferred
from . import dispatch
from .autocast import without_autocast
from .call import ExpertCall, needs_grad, require_gradient_carrier, require_leaf, run, storage_of, versions
from .fleet_config import resolve
from .fp8_payload import weight_payload
from .handover import Handover
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
        require_leaf(name, weight)
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
    for point, weight in (("w1", w1), ("w2", w2)):
        _check_main_grad(point, weight, hidden_states)
    make_current(hidden_states)
    with paddle.no_grad(), without_autocast():
        weights = _weights(w1, w2, hidden, intermediate, plan, hidden_states)
        routing = dispatch.route(topk_indices, topk_scores, counts, n_experts, plan, config, "topk_indices")
    train1, train2 = (not w1.stop_gradient,) * n_experts, (not w2.stop_gradient,) * n_experts

    place = hidden_states.place

    def on_wgrad(wgrad, experts1, experts2, _):  # these weights are watched by nobody: the caller keeps them
        if any(experts2):
            _accumulate("w2", w2, place, wgrad, (experts1, experts2))
        if any(experts1):
            _accumulate("w1", w1, place, wgrad, (experts1, experts2))
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


def _main_grad_shape(point: str, weight) -> tuple[int, int, int]:
    """That of w2 stays grouped."""
    experts, rows, columns = checks.shape_of(weight)
    return (experts, rows, columns) if point == "w1" else (experts, columns, rows)


def _check_main_grad(point: str, weight, beside) -> None:
    require_main_grad(point, weight, _main_grad_shape(point, weight), beside)
    if getattr(weight, "main_grad", None) is not None:  # kernels write it by its address
        checks.require_contiguous(f"{point}.main_grad", weight.main_grad)
        if not checks.is_cpu(weight.main_grad):
            checks.require_aligned(f"{point}.main_grad", weight.main_grad)


def _weights(w1, w2, hidden: int, intermediate: int, plan: Plan, beside) -> ExpertWeights:
    """Of each weight the bf16 storage where there is one, for it cannot be stale; else the caller's FP8 copies."""
    emptied = [name for name, weight in (("w1", w1), ("w2", w2)) if is_emptied(weight)]
    w1_EFH, w2_EHI = (None if is_emptied(w) else w.detach().astype(plan.storage) for w in (w1, w2))
    if plan.recipe is None:
        if emptied:
            raise ValueError(f"{emptied[0]}: its bf16 storage is empty and fp8 is False; need the bf16 weights")
        return ExpertWeights(w1_EFH, w2_EHI, None, hidden, intermediate)
    if not emptied:
        fp8 = quantize_weights(w1_EFH, w2_EHI, plan.recipe, plan.backend)
        return ExpertWeights(None, None, fp8, hidden, intermediate)
    n_experts, width, _ = checks.shape_of(w1)
    parts = {}
    for name, weight, made, size in (("w1", w1, w1_EFH, (width, hidden)), ("w2", w2, w2_EHI, (hidden, intermediate))):
        if made is None:
            shape, swapped = (n_experts, *size), (n_experts, *reversed(size))
            parts[name] = weight_payload(weight, "fp8", name, shape, beside)
            parts[f"{name}_t"] = weight_payload(weight, "transposed_fp8", name, swapped, beside)
        else:
            parts[name], parts[f"{name}_t"] = quantize_weight(made, plan.recipe, plan.backend)
    _check_blocks(parts, plan.recipe)
    if plan.backend != "naive":  # kernels read them by their addresses
        for name, payload in parts.items():
            checks.require_contiguous(f"{name} FP8 copy", payload.data)
            checks.require_contiguous(f"{name} FP8 copy's scales", payload.scale)
    return ExpertWeights(None, None, QuantWeights(**parts), hidden, intermediate)


def _check_blocks(parts: dict, recipe) -> None:
    wanted = (recipe.weight_block, recipe.ue8m0)
    for name in ("w1", "w1_t", "w2", "w2_t"):
        payload = parts[name]
        found = (payload.block, checks.dtype_name(payload.scale) == "uint8")
        if found != wanted:
            raise ValueError(
                f"{name} FP8 copy: got {found[0]} blocks with {'UE8M0' if found[1] else 'float32'} scales, but recipe "
                f"{recipe.name!r} needs {wanted[0]} blocks with {'UE8M0' if wanted[1] else 'float32'} scales"
            )


def _accumulate(point: str, weight, place, wgrad, experts) -> None:
    """One weight's gradient into its main_grad, then its backward hook: a reducer must find the whole sum there. Or a
    pipeline does both later."""
    handover = Handover(wgrad.routing.expert_offset) if may_be_deferred() else None

    def add(wgrad):
        like = wgrad.routing.expert_offset
        with _main_grad_lock, paddle.no_grad(), without_autocast():
            make_current(like)
            if getattr(weight, "main_grad", None) is None:
                shape = list(_main_grad_shape(point, weight))
                weight.main_grad = paddle.zeros(shape, dtype="float32", device=place)
            else:  # another one than at forward, maybe
                _check_main_grad(point, weight, like)
            run = wgrad.accumulate_dw1 if point == "w1" else wgrad.accumulate_dw2
            with handover.here() if handover else nullcontext():
                run(GradBuffers(weight.main_grad, weight.main_grad, True, *experts))

    if OwedGradient(point, weight, wgrad, versions, add).settle():
        fire = getattr(weight, "_apply_backward_hook", None)
        if fire is not None:
            fire()


def _release(*weights) -> None:
    """Forget the caller's FP8 copies. Dropping the references frees no storage that something else still reads."""
    for weight in weights:
        for attribute in ("fp8", "transposed_fp8"):
            if getattr(weight, attribute, None) is not None:
                setattr(weight, attribute, None)
