"""The autograd node over the engine: gradients against float64, both ways of a weight gradient, and the tape's ways."""

import threading
import weakref

import pytest

from tests.support import torch_oracle as oracle
from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from torch.utils.checkpoint import checkpoint

    from sonicmoe import SonicMoEConfig, expert_mlp
    from sonicmoe.functional import set_wgrad_deferral_hook
    from sonicmoe.functional.autograd import apply_experts
    from sonicmoe.functional.dispatched import dispatched_experts
    from sonicmoe.functional.whole_layer import whole_layer
    from sonicmoe.gemm import api, naive
    from sonicmoe.gemm.plan import make_plan
    from sonicmoe.routing import metadata


def route(problem, config=None, storage=None):
    config = config or SonicMoEConfig.current()
    storage = storage or str(problem.x.dtype).removeprefix("torch.")
    plan = make_plan(config, problem.kind, storage=storage, device="cpu")
    scores = problem.scores.detach().float()
    return metadata.build(problem.indices, scores, problem.w1.shape[0], plan.row_block, config), plan


def forward(problem, config=None):
    return apply_experts(*problem.tensors().values(), *route(problem, config))


def run(problem, config=None):
    """Output and gradients by name; those of parameters without gradient are left out."""
    out = forward(problem, config)
    found = {"out": out.detach()}
    out.backward(problem.dout)
    return found | {name: value.grad for name, value in problem.tensors().items() if value.grad is not None}


def check(problem, found=None, names=("out", "x", "s", "w1", "w2")):
    found = run(problem) if found is None else found
    assert set(found) == set(names)
    oracle.assert_close(found, oracle.reference(problem), oracle.FLOORS[str(problem.x.dtype).removeprefix("torch.")])
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_gradients(kind, dtype):
    problem = oracle.make(kind, dtype=dtype)
    for name, grad in check(problem).items():
        assert grad.dtype == (torch.float32 if name == "s" else problem.x.dtype)


@pytest.mark.parametrize(
    ("T", "K", "E"),
    [*[(24, K, 8) for K in range(1, 9)], (24, 1, 1), (24, 2, 2), (3, 2, 40), (1, 1, 3), (0, 2, 4), (130, 4, 6)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes(T, K, E, dtype):
    check(oracle.make(T=T, K=K, E=E, dtype=dtype, seed=T + K))


def test_an_expert_without_tokens_has_a_zero_gradient():
    problem = oracle.make(E=6, experts_used=3, dtype="bfloat16")
    found = check(problem)
    assert not found["w1"][3:].any() and not found["w2"][3:].any() and found["w1"][:3].any()


def test_expanded_gradient():
    problem = oracle.make()
    problem.dout = torch.ones_like(problem.dout)
    forward(problem).sum().backward()
    oracle.assert_close({"x": problem.x.grad}, oracle.reference(problem), 1e-5)


@pytest.mark.parametrize("frozen", ["x", "s", "w1", "w2"])
def test_what_wants_no_gradient_gets_none(frozen):
    problem = oracle.make()
    problem.tensors()[frozen].requires_grad_(False)
    check(problem, run(problem), {"out", "x", "s", "w1", "w2"} - {frozen})


def test_nothing_is_kept_where_nothing_wants_a_gradient(monkeypatch):
    kept, real = [], expert_mlp.forward
    monkeypatch.setattr(
        "sonicmoe.functional.autograd.engine_forward", lambda *a, keep=True: kept.append(keep) or real(*a, keep=keep)
    )
    problem = oracle.make()
    with torch.no_grad():
        assert not forward(problem).requires_grad
    assert not apply_experts(*problem.tensors().values(), *route(problem), inference=True).requires_grad
    forward(problem)
    assert kept == [False, False, True]


# ---- main_grad -------------------------------------------------------------------------------------------------------


def micro_batches(dtype, count=3):
    problems = [oracle.make(dtype=dtype, seed=seed) for seed in range(count)]
    for problem in problems[1:]:
        problem.w1, problem.w2 = problems[0].w1, problems[0].w2
    return problems


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_main_grad_is_the_sum_over_micro_batches(dtype):
    problems = micro_batches(dtype)
    weights = {"w1": problems[0].w1, "w2": problems[0].w2}
    expected = {name: torch.full(weight.shape, 0.5, dtype=torch.float64) for name, weight in weights.items()}
    buffers = {}
    for name, weight in weights.items():
        weight.main_grad = buffers[name] = torch.full(weight.shape, 0.5)
    for problem in problems:
        found = run(problem)
        assert set(found) == {"out", "x", "s"} and problem.w1.grad is None
        for name in weights:
            expected[name] += oracle.reference(problem)[name]
    for name, weight in weights.items():
        assert weight.main_grad is buffers[name]
    oracle.assert_close(buffers, expected, oracle.FLOORS[dtype])


def test_main_grad_keeps_what_bf16_would_lose():
    """Small contributions to a large sum: in bf16 they would vanish."""
    problem = oracle.make(dtype="bfloat16")
    problem.w2.main_grad = torch.full(problem.w2.shape, 1000.0)
    run(problem)
    oracle.assert_close({"w2": problem.w2.main_grad - 1000.0}, oracle.reference(problem), 0.01)


def test_each_weight_goes_its_own_way():
    problem = oracle.make()
    problem.w2.main_grad = torch.zeros(problem.w2.shape)
    found = run(problem)
    assert set(found) == {"out", "x", "s", "w1"}
    check(problem, found | {"w2": problem.w2.main_grad})


@pytest.mark.parametrize("zero_out", [False, True])
def test_megatron_gets_its_flag_and_something_to_throw_away(zero_out):
    problem = oracle.make()
    for weight in (problem.w1, problem.w2):
        weight.main_grad = torch.zeros(weight.shape)
        weight.grad_added_to_main_grad = False
        weight.zero_out_wgrad = zero_out
    run(problem)
    for weight in (problem.w1, problem.w2):
        assert weight.grad_added_to_main_grad is True
        assert weight.grad.shape == weight.shape and (not zero_out or not weight.grad.any())
    oracle.assert_close({"w1": problem.w1.main_grad, "w2": problem.w2.main_grad}, oracle.reference(problem), 1e-5)


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda w: torch.zeros(w.shape, dtype=torch.bfloat16), TypeError, "w2.main_grad: got dtype bfloat16"),
        (lambda w: torch.zeros(w.shape[0], w.shape[2], w.shape[1]), ValueError, "w2.main_grad: got shape"),
        (lambda w: torch.zeros(w.shape[::-1]).permute(2, 1, 0), ValueError, "w2.main_grad: got a non-contiguous"),
        (lambda w: 3.0, TypeError, "w2.main_grad: got float, need a tensor"),
        (lambda w: torch.zeros(w.numel() + 1)[1:].view(w.shape), ValueError, "w2.main_grad: begins 4 bytes behind a"),
    ],
)
def test_a_main_grad_of_another_kind_is_refused(make, kind, says):
    problem = oracle.make()
    problem.w2.main_grad = make(problem.w2)
    with pytest.raises(kind, match=says):
        forward(problem)


def test_a_main_grad_that_went_away_is_noticed():
    problem = oracle.make()
    problem.w1.main_grad = torch.zeros(problem.w1.shape)
    out = forward(problem)
    problem.w1.main_grad = None
    with pytest.raises(RuntimeError, match="w1.main_grad: was there in forward"):
        out.backward(problem.dout)


def test_an_error_in_backward_adds_to_neither_main_grad():
    problem = oracle.make()
    for weight in (problem.w1, problem.w2):
        weight.main_grad = torch.ones(weight.shape)
    out = forward(problem)
    kept, problem.w1.main_grad = problem.w1.main_grad, None
    with pytest.raises(RuntimeError, match="w1.main_grad: was there in forward"):
        out.backward(problem.dout, retain_graph=True)
    assert (problem.w2.main_grad == 1).all()
    problem.w1.main_grad = kept
    out.backward(problem.dout)
    found = {name: getattr(problem, name).main_grad - 1 for name in ("w1", "w2")}
    oracle.assert_close(found, oracle.reference(problem), 1e-5)


CALLS = {
    "experts": forward,
    "dispatched": lambda p: dispatched_experts(
        p.x, torch.bincount(p.indices.flatten(), minlength=4).tolist(), p.indices, p.scores, p.w1, p.w2
    ),
    "layer": lambda p: whole_layer(p.x, torch.randn(4, 64), p.w1, p.w2, 2, "swiglu", False)[0],
}


@pytest.mark.parametrize("call", CALLS)
def test_a_backward_of_some_inputs_leaves_the_other_main_grads_alone(call):
    """As a pipeline asks for the gradients of activations first, and for those of weights when it has time."""
    problem = oracle.make()
    weights = {"w1": problem.w1, "w2": problem.w2}
    for weight in weights.values():
        weight.main_grad = torch.zeros(weight.shape)
    out = CALLS[call](problem)
    (dx,) = torch.autograd.grad(out, problem.x, problem.dout, retain_graph=True)
    out.backward(problem.dout, inputs=[problem.x], retain_graph=True)
    assert dx.any() and torch.equal(problem.x.grad, dx)
    assert not any(weight.main_grad.any() for weight in weights.values())
    asked = torch.autograd.grad(out, [problem.w2, problem.x], problem.dout, retain_graph=True)[0]
    assert asked.any() and not any(weight.main_grad.any() for weight in weights.values())
    out.backward(problem.dout, inputs=[problem.w2], retain_graph=True)
    assert torch.equal(problem.w2.main_grad, asked) and not problem.w1.main_grad.any()
    out.backward(problem.dout, inputs=[problem.w1, problem.x])
    assert problem.w1.main_grad.any() and torch.equal(problem.w2.main_grad, asked)


def test_two_threads_add_to_one_main_grad():
    problems = micro_batches("float32", 8)
    w1 = problems[0].w1
    w1.main_grad = torch.zeros(w1.shape)
    threads = [threading.Thread(target=lambda p=p: forward(p).backward(p.dout)) for p in problems]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    expected = sum(oracle.reference(problem)["w1"] for problem in problems)
    assert oracle.error(w1.main_grad, expected) < 1e-5


def left_for_later(problem, point):
    """The one weight gradient that a pipeline takes in a backward, if that weight alone has a main_grad."""
    getattr(problem, point).main_grad = torch.zeros(getattr(problem, point).shape)
    taken = []
    set_wgrad_deferral_hook(lambda *given: taken.append(given) or True)
    try:
        run(problem)
    finally:
        set_wgrad_deferral_hook(None)
    (found,) = taken  # the other one has no main_grad: it goes through the tape
    return found


def test_a_pipeline_may_take_the_weight_gradient_for_later():
    problem = oracle.make()
    point, weight, work = left_for_later(problem, "w1")
    assert point == "w1" and weight is problem.w1 and not problem.w1.main_grad.any()
    work()
    oracle.assert_close({"w1": problem.w1.main_grad}, oracle.reference(problem), 1e-5)
    once = problem.w1.main_grad.clone()
    with pytest.raises(RuntimeError, match="called again for w1"):
        work()
    assert torch.equal(problem.w1.main_grad, once)


def test_a_pipeline_that_has_run_it_may_not_say_that_it_has_not():
    problem = oracle.make()
    problem.w1.main_grad = torch.zeros(problem.w1.shape)
    set_wgrad_deferral_hook(lambda point, weight, work: work())
    try:
        with pytest.raises(RuntimeError, match="called again for w1"):
            run(problem)
    finally:
        set_wgrad_deferral_hook(None)


@pytest.mark.parametrize("point", ["w1", "w2"])
def test_what_a_later_gradient_is_made_from_may_not_change(point):
    problem = oracle.make()
    _, weight, work = left_for_later(problem, point)
    with torch.no_grad():
        (problem.x if point == "w1" else problem.dout).mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place after backward, but the gradient of " + point):
        work()
    assert not weight.main_grad.any()


def test_a_later_gradient_holds_its_activations_until_it_is_there():
    _, _, work = left_for_later(oracle.make(), "w1")
    wgrad = weakref.ref(work._work[0])
    assert wgrad() is not None
    work()
    assert wgrad() is None


# ---- What a tape does ------------------------------------------------------------------------------------------------


def using_up_z(monkeypatch):
    """A backend as on a GPU: the backward of the activation leaves something else where z was."""
    real = naive.down_projection_backward

    def consume(dout_rows, z, *rest, **more):
        found = real(dout_rows, z.clone(), *rest, **more)
        z.fill_(float("nan"))
        return found

    monkeypatch.setattr(naive, "OVERWRITES_Z", True)
    monkeypatch.setattr(naive, "down_projection_backward", consume)


@pytest.mark.parametrize("alone", [True, False])
def test_a_used_up_z_is_freed_where_its_memory_is_its_own(alone, monkeypatch):
    """Hooks may have put it into memory that holds other tensors too."""
    using_up_z(monkeypatch)
    monkeypatch.setattr(naive, "DX_FIRST", True)
    problem, saved = oracle.make(dtype="bfloat16"), []

    def pack(tensor):
        if not alone:
            room = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
            room[: tensor.numel()] = tensor.detach().flatten()
            tensor = room[: tensor.numel()].view(tensor.shape)
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(problem)
    out.backward(problem.dout)
    assert [tensor.untyped_storage().nbytes() == 0 for tensor in saved].count(True) == int(alone)


@pytest.mark.parametrize("how", ["read", "used up", "used up and freed"])
def test_second_backward_over_a_retained_graph(how, monkeypatch):
    if how != "read":
        using_up_z(monkeypatch)
    monkeypatch.setattr(naive, "DX_FIRST", how == "used up and freed")
    problem = oracle.make(dtype="bfloat16")
    out, tensors = forward(problem), problem.tensors()
    results = []
    for retain in (True, True, False):
        out.backward(problem.dout, retain_graph=retain)
        results.append({name: value.grad for name, value in tensors.items()})
        for value in tensors.values():
            value.grad = None
    check(problem, results[0] | {"out": out.detach()})
    for later in results[1:]:
        assert all(torch.equal(later[name], results[0][name]) for name in tensors)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(problem.dout)


@pytest.mark.parametrize("changed", ["x", "w1", "w2"])
def test_a_change_in_place_between_forward_and_backward_is_caught(changed):
    problem = oracle.make()
    out = forward(problem)
    with torch.no_grad():
        problem.tensors()[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(problem.dout)


def test_a_gradient_of_the_gradient_is_refused():
    problem = oracle.make()
    dout = problem.dout.requires_grad_()
    (dx,) = torch.autograd.grad(forward(problem), problem.x, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_everything_big_goes_through_the_saved_tensor_hooks():
    """Or activation offloading and checkpointing would leave z where it is."""
    problem, shapes = oracle.make(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        forward(problem)
    assert sorted(shapes) == sorted([(40, 64), (4, 64, 64), (4, 64, 32), (80, 64)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, monkeypatch):
    using_up_z(monkeypatch)
    problem = oracle.make()
    out = checkpoint(lambda *tensors: apply_experts(*tensors, *route(problem)), *problem.tensors().values(),
                     use_reentrant=reentrant)  # fmt: skip
    out.backward(problem.dout)
    check(problem, {"out": out.detach()} | {name: value.grad for name, value in problem.tensors().items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_does_not_reach_into_the_engine(dtype):
    plain, inside = run(oracle.make(dtype=dtype)), oracle.make(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inside)
    for name, value in found.items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("wide", ["float32", "float16"])
def test_weights_of_another_type_than_x(wide):
    """Their gradients come in their own type; under float32 with no rounding to bf16 in between."""
    problem = oracle.make(dtype="bfloat16")
    problem.w1, problem.w2 = (w.detach().to(getattr(torch, wide)).requires_grad_() for w in (problem.w1, problem.w2))
    found = check(problem)
    assert found["w1"].dtype == found["w2"].dtype == getattr(torch, wide) and found["x"].dtype == torch.bfloat16
    assert wide != "float32" or not torch.equal(found["w1"].bfloat16().float(), found["w1"])


@pytest.mark.parametrize("wgrad", [False, True])
def test_fp8(wgrad):
    problem = oracle.make(T=96, H=128, I=128, dtype="bfloat16")
    config = SonicMoEConfig(fp8_mode="perf", fp8_recipe="sm90", fp8_wgrad=wgrad)
    out = forward(problem, config)
    out.backward(problem.dout, retain_graph=True)
    first = {name: value.grad.clone() for name, value in problem.tensors().items()}
    expected = oracle.reference(problem)
    for name, value in ({"out": out} | first).items():
        assert 0.01 < oracle.error(value, expected[name]) < 0.076, name  # FP8 did run
    for value in problem.tensors().values():
        value.grad = None
    out.backward(problem.dout)
    assert all(torch.equal(value.grad, first[name]) for name, value in problem.tensors().items())


# ---- Buffers that are filled -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_overwritten_buffers_hold_the_sum_rounded_once(dtype, grouped):
    problem = oracle.make(E=4, experts_used=3, dtype="bfloat16")
    routing, plan = route(problem)
    w1, w2 = problem.w1.detach(), problem.w2.detach()
    _, saved = expert_mlp.forward(problem.x.detach(), routing, api.ExpertWeights(w1, w2, None, 64, 32), plan)
    wgrad = expert_mlp.backward(saved, problem.dout).wgrad

    def fill(dtype, value, overwrite, taking=(True, False, True, True)):
        dw1 = torch.full(w1.shape, value, dtype=dtype)
        dw2 = torch.full((4, 32, 64) if grouped else w2.shape, value, dtype=dtype)
        buffers = api.GradBuffers(dw1, dw2, grouped, taking, taking, overwrite)
        wgrad.accumulate_dw1(buffers), wgrad.accumulate_dw2(buffers)
        return dw1, dw2

    sums = fill(torch.float32, 0.0, False)
    for found, expected in zip(fill(getattr(torch, dtype), float("nan"), True), sums, strict=True):
        assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]].to(found.dtype))
        assert found[1].isnan().all()  # a frozen expert's rows are not touched
        assert not found[3].any() and found[0].any()
