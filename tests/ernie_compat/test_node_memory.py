"""What a call keeps, to the byte, and when it lets go; and what the node says about the path it took."""

import gc
import weakref

import paddle
import pytest

from sonicmoe import SonicMoEConfig
from tests.support.lifecycle import (
    Flight,
    assert_same_bits,
    bits,
    fresh_results,
    host_bytes,
    nbytes,
    params_of,
    record_saved,
    tensors_in,
    weight_grads,
)
from tests.support.paddle_runs import expert_list, forward_node, make_node, tensor
from tests.support.problems import make_problem

# T, H, I, E, K all different, so that no tensor can be taken for another by its shape.
T, H, I, E, K = 40, 128, 384, 5, 3
SIZES = {"n_tokens": T, "hidden": H, "intermediate": I, "n_experts": E, "topk": K}
SMALL = {"n_tokens": 12, "n_experts": 3}

BF16 = SonicMoEConfig()
FP8 = SonicMoEConfig(use_fp8=True)
SM100 = SonicMoEConfig(use_fp8=True, fp8_recipe="sm100")
RECOMPUTE = SonicMoEConfig(use_fp8=True, fp8_recompute_z=True)

PARAMETERS = E * (H * 2 * I + I * H)


def routing_bytes(problem, block):
    counts = problem.counts
    rows = sum((count + block - 1) // block * block for count in counts)
    slots = sum(counts)
    # expert_offset, slot_offset; x_gather, s_scatter, scores by row; s_reverse and score_src by slot.
    return rows, 4 * (E + 1 + T + 1 + 3 * rows + 2 * slots)


def z_bytes(rows, config):
    if config is BF16:
        return rows * 2 * I * 2
    if config is RECOMPUTE:
        return 0
    return rows * 2 * I + rows * (2 * I // 128 * 4 if config is FP8 else 2 * I // 32)


def weight_bytes(config):
    """Native copies, or both orientations in FP8 with their scales."""
    if config is BF16:
        return 2 * PARAMETERS
    return 2 * (PARAMETERS + (PARAMETERS // 128**2 * 4 if config is not SM100 else PARAMETERS // 32))


@pytest.mark.parametrize("config", [BF16, FP8, SM100, RECOMPUTE], ids=["bf16", "fp8", "sm100", "recompute_z"])
def test_saved_holds_what_backward_reads_and_no_more(config, monkeypatch):
    problem = make_problem(**SIZES)
    kept = record_saved(monkeypatch)
    node = make_node(problem, config=config)
    out, x, _ = forward_node(node, problem)
    (saved,) = kept
    rows, routing = routing_bytes(problem, 1 if config is BF16 else 128)
    assert saved.x.data_ptr() == x.data_ptr(), "x is copied"
    assert (saved.z is None) == (config is RECOMPUTE)
    found = {
        "x": nbytes(tensors_in(saved.x)),
        "z": nbytes(tensors_in(saved.z)),
        "routing": nbytes(tensors_in(saved.routing)),
        "weights": nbytes(tensors_in(saved.weights)),
    }
    assert found == {"x": T * H * 2, "z": z_bytes(rows, config), "routing": routing, "weights": weight_bytes(config)}
    assert nbytes(tensors_in(saved)) == sum(found.values()), "Saved holds something else"
    assert [rows, H] not in [list(held.shape) for held in tensors_in(saved)], "y or gathered x is kept"

    # The same from outside: whoever holds it, and wherever, a second call costs x's reference, z and routing.
    del saved, out
    kept.clear()
    gc.collect()
    x, probs = tensor(problem.x, grad=True), tensor(problem.probs, "float32", grad=True)
    indices = paddle.to_tensor(problem.indices)
    before = host_bytes()
    out = node(x, problem.counts, indices, probs)
    # The routing's arrays are one allocation, in which x_gather begins at a multiple of 16 bytes.
    routing += -4 * (E + 1) % 16
    assert host_bytes() - before == T * H * 2 + z_bytes(rows, config) + routing, "something else than out is kept"
    kept.clear()
    out.backward(tensor(problem.dout))
    gc.collect()
    buffers = 4 * PARAMETERS
    assert host_bytes() - before == buffers + nbytes([out, x.grad, probs.grad]), "backward leaves something behind"


@pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
def test_what_is_saved_dies_with_its_backward(config, monkeypatch):
    problem = make_problem(**SMALL)
    kept = record_saved(monkeypatch)
    node = make_node(problem, config=config)
    out, _, _ = forward_node(node, problem)
    saved = weakref.ref(kept.pop())
    gc.collect()
    assert saved() is not None
    out.backward(tensor(problem.dout))
    gc.collect()
    assert saved() is None, "kept after its backward, as long as the output lives"
    out, _, _ = forward_node(node, problem)
    saved = weakref.ref(kept.pop())
    del out
    gc.collect()
    assert saved() is None, "a forward whose output is dropped stays in memory"


def watched(monkeypatch, maker: str, number: int, user: str) -> list[bool]:
    """Filled by each call of the naive stage ``user``: whether result ``number`` of ``maker``'s last call is there."""
    from sonicmoe.gemm import naive  # needs the torch that the node has set up

    made, alive = [], []
    make, use = getattr(naive, maker), getattr(naive, user)

    def making(*args, **options):
        results = make(*args, **options)
        made.append(weakref.ref(results[number]))
        return results

    def using(*args, **options):
        alive.append(made[-1]() is not None)
        return use(*args, **options)

    monkeypatch.setattr(naive, maker, making)
    monkeypatch.setattr(naive, user, using)
    return alive


def test_parts_of_the_scores_gradient_are_gone_before_dx(monkeypatch):
    alive = watched(monkeypatch, "down_projection_backward", 2, "up_projection_backward")
    problem = make_problem(**SMALL)
    out, _, _ = forward_node(make_node(problem, config=BF16), problem)
    out.backward(tensor(problem.dout))
    assert alive == [False]


def test_the_activation_is_gone_before_the_sums_want_memory(monkeypatch):
    alive = watched(monkeypatch, "up_projection", 1, "sum_slots")
    problem = make_problem(**SMALL)
    forward_node(make_node(problem, config=BF16), problem)
    assert alive == [False]


@pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
def test_no_grad_keeps_nothing(config, monkeypatch):
    problem = make_problem(**SIZES)
    kept = record_saved(monkeypatch)
    experts = expert_list(problem)
    node = make_node(problem, experts, config=config)
    with paddle.no_grad():
        first, _, _ = forward_node(node, problem)  # makes the weight copies
        gc.collect()
        before = host_bytes()
        second, x, probs = forward_node(node, problem)
        gc.collect()
        inputs = nbytes([x, probs])
        assert host_bytes() - before == nbytes([second]) + inputs
    assert kept == [None, None]
    assert second.stop_gradient and not node.has_pending_grads and weight_grads(experts) == {}
    node.step()
    assert weight_grads(experts) == {}
    assert_same_bits({"out": second}, {"out": fresh_results(experts, problem, config=config)["out"]})


def test_inputs_and_experts_without_gradient_keep_nothing_either(monkeypatch):
    problem = make_problem(**SMALL)
    kept = record_saved(monkeypatch)
    experts = expert_list(problem)
    for param in params_of(experts):
        param.stop_gradient = True
    out, _, _ = forward_node(make_node(problem, experts), problem, grad=(False, False))
    assert kept == [None] and out.stop_gradient


@pytest.mark.parametrize(
    "config", [BF16, FP8, pytest.param(SM100, marks=pytest.mark.slow)], ids=["bf16", "fp8", "sm100"]
)
def test_two_hundred_steps_take_no_memory(config):
    """Forward, backward, step, forward without backward, warm-up, one error: to the byte what it was after three."""
    problem = make_problem(n_tokens=4, n_experts=1, topk=1)
    experts = expert_list(problem)
    node = make_node(problem, experts, config=config)
    sizes = []
    for number in range(200):
        flight = Flight(node, problem).land()
        abandoned = Flight(node, problem)
        node.step() if number % 10 == 5 else node.flush_grads()
        if number % 50 == 0:
            node.warmup()
        if number % 20 == 0:
            with pytest.raises(ValueError, match="tokens_per_expert"):
                forward_node(node, problem, counts=[0])
        del flight, abandoned
        if number in (4, 104, 199):
            gc.collect()
            sizes.append(host_bytes())
    assert sizes[0] == sizes[1] == sizes[2]


def test_memory_of_a_new_token_count_is_given_back():
    problem = make_problem(n_tokens=6, n_experts=2)
    node = make_node(problem, config=FP8)
    Flight(node, problem).land()
    gc.collect()
    before = host_bytes()
    for n_tokens in (1, 300, 7, 131, 0):
        Flight(node, make_problem(n_tokens=n_tokens, n_experts=2)).land()
    gc.collect()
    assert host_bytes() == before


# ---- warmup and last_path --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [BF16, FP8, SM100], ids=["bf16", "fp8", "sm100"])
def test_warmup_leaves_gradients_alone(config):
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    expected = fresh_results(experts, problem, config=config)
    node = make_node(problem, experts, config=config)
    node.warmup()
    assert not node.has_pending_grads and weight_grads(experts) == {}
    assert node.last_path is None, "warm-up is no forward of the user's"
    flight = Flight(node, problem).land()
    node.warmup(n_tokens=3, topk=2)
    node.warmup(topk=50)
    assert node.has_pending_grads and weight_grads(experts) == {}
    node.step()
    assert_same_bits({**flight.results(), **weight_grads(experts)}, expected)
    before = {name: bits(grad) for name, grad in weight_grads(experts).items()}
    node.warmup()
    node.step()
    assert {name: bits(grad) for name, grad in weight_grads(experts).items()} == before


PATHS = {
    "cpu/naive/bf16": BF16,
    "cpu/naive/bf16+stagewise": SonicMoEConfig(stagewise_memory=True),
    "cpu/naive/fp8-sm90+bf16_wgrad": FP8,
    "cpu/naive/fp8-sm90+fp8_wgrad": SonicMoEConfig(use_fp8=True, fp8_wgrad=True),
    "cpu/naive/fp8-sm90+bf16_wgrad+stagewise": SonicMoEConfig(fp8_mode="mem"),
    "cpu/naive/fp8-sm90+bf16_wgrad+recompute_z": RECOMPUTE,
    "cpu/naive/fp8-sm90+pow2+bf16_wgrad": SonicMoEConfig(use_fp8=True, fp8_pow2_scale=True),
    "cpu/naive/fp8-sm100+bf16_wgrad": SM100,
    "cpu/naive/fp8-sm100+iso32+bf16_wgrad": SonicMoEConfig(use_fp8=True, fp8_recipe="sm100", fp8_iso32_weight=True),
}


def test_last_path_tells_what_ran(monkeypatch):
    """One node through all the configurations: what it says, against what the engine was given and left behind."""
    problem = make_problem(**SMALL)
    kept = record_saved(monkeypatch)
    node = make_node(problem)
    assert node.last_path is None
    for path, config in PATHS.items():
        with config.activate():
            forward_node(node, problem)
        assert node.last_path == path
        plan, weights = kept[-1].plan, kept[-1].weights
        assert plan.path == path
        assert (weights.fp8 is None) == (not config.use_fp8) == (weights.w1_EFH is not None)
        if config.use_fp8:
            block = {"sm90": (128, 128), "sm100": (32, 32) if config.fp8_iso32_weight else (1, 32)}[plan.recipe.name]
            assert weights.fp8.w1.block == weights.fp8.w2_t.block == block
            assert (kept[-1].z is None) == config.fp8_recompute_z
    with FP8.activate(), pytest.raises(ValueError, match="tokens_per_expert"):
        forward_node(node, problem, counts=[0, 0, 0])
    assert node.last_path == path, "a call that failed is no path that ran"


def test_last_path_follows_the_environment(monkeypatch):
    problem = make_problem(**SMALL)
    node = make_node(problem)
    for mode, path in (("perf", "cpu/naive/fp8-sm90+bf16_wgrad"), ("", "cpu/naive/bf16")):
        monkeypatch.setenv("SONIC_MOE_FP8_MODE", mode)
        forward_node(node, problem)
        assert node.last_path == path


def test_backward_follows_its_forward_whatever_the_config_is_by_then(monkeypatch):
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    expected = fresh_results(experts, problem, config=SM100)
    node = make_node(problem, experts)
    with SM100.activate():
        flight = Flight(node, problem)
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "perf")
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "1")
    flight.land()
    node.step()
    assert_same_bits({**flight.results(), **weight_grads(experts)}, expected)
