"""``SonicMoEMlpNode`` against the float64 oracle in BF16, FP16 and FP32: out, dx, ds, dW1 and dW2, each with its floor.

Errors are relative, so tiny and large magnitudes are held to the same digits as ordinary ones.
"""

import numpy as np
import paddle
import pytest

from sonicmoe import ActivationType, SonicMoEConfig
from tests.support.floors import (
    BF16,
    FP16,
    FP32,
    assert_bf16,
    assert_equal_results,
    assert_within,
    relative_error,
)
from tests.support.paddle_runs import (
    array,
    expert_list,
    forward_node,
    fused_experts,
    main_grads,
    make_node,
    oracle,
    run_node,
    tensor,
)
from tests.support.problems import ROUTINGS, make_problem, to_bf16

pytestmark = pytest.mark.contract

MAGNITUDES = (1e-4, 1.0, 300.0)
GLU = ("swiglu", "geglu", "reglu")
PLAIN = ("relu", "relu_sq", "silu", "gelu")
CLAMP = 0.3  # well inside what z reaches here: some thirty percent of the entries are clamped


def assert_nothing(result, names):
    for name in names:
        assert not np.asarray(getattr(result, name)).any(), f"{name} of nothing must be zero"


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing, magnitude):
    problem = make_problem(routing=routing, magnitude=magnitude, topk=1 if routing == "idle_experts" else 2)
    result, expected = run_node(problem), oracle(problem)
    if routing == "idle_experts":
        assert 0 in problem.counts
    assert_bf16(result, expected, where=f"{routing} {magnitude}")
    here = (problem.indices >= 0) & (problem.indices < problem.n_experts)
    assert not result.ds[~here].any(), "ds must be 0, not small, where no expert of this rank was meant"
    for expert, count in enumerate(problem.counts):
        if count == 0:
            assert not result.dw1[expert].any() and not result.dw2[expert].any()


@pytest.mark.parametrize("fused", [False, True], ids=["list", "fused"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_tokens": 1},
        {"n_tokens": 1, "topk": 1, "n_experts": 1},
        {"topk": 6, "n_experts": 3},
        {"topk": 1, "n_experts": 1},
        {"n_experts": 128, "topk": 8, "n_tokens": 96, "hidden": 64, "intermediate": 64},
        {"n_experts": 128, "topk": 8, "n_tokens": 96, "hidden": 64, "intermediate": 64, "routing": "skewed"},
        {"hidden": 72, "intermediate": 40},
        {"hidden": 8, "intermediate": 200},
        {"n_tokens": 300, "topk": 4, "n_experts": 7, "routing": "beyond"},
    ],
    ids=lambda sizes: "-".join(f"{name[:2]}{value}" for name, value in sizes.items()),
)
def test_sizes(sizes, fused):
    problem = make_problem(seed=5, **sizes)
    result = run_node(problem, fused_experts(problem) if fused else None)
    assert_bf16(result, oracle(problem), where=str(sizes))


@pytest.mark.parametrize("topk", [1, 3])
def test_no_token_at_all(topk):
    problem = make_problem(n_tokens=0, topk=topk)
    experts = expert_list(problem)
    result = run_node(problem, experts)
    assert result.out.shape == result.dx.shape == (0, problem.hidden) and result.ds.shape == (0, topk)
    assert_nothing(result, ("dw1", "dw2"))


def test_a_rank_without_a_valid_slot():
    problem = make_problem(routing="idle_rank")
    result = run_node(problem)
    assert result.out.shape == problem.x.shape
    assert_nothing(result, result.NAMES)


def test_a_batch_that_adds_nothing_leaves_earlier_gradients_alone():
    """An empty micro-batch between two full ones, as a rank of an uneven dispatch sees it."""
    problem, idle, empty = make_problem(), make_problem(routing="idle_rank", seed=9), make_problem(n_tokens=0)
    experts = expert_list(problem)
    node = make_node(problem, experts)
    for batch in (problem, idle, empty, problem):
        out, _, _ = forward_node(node, batch)
        out.backward(tensor(batch.dout))
    node.step()
    expected = oracle(problem)
    for found, once in zip(main_grads(experts), (expected.dw1, expected.dw2), strict=True):
        assert np.linalg.norm(found - 2 * once) < BF16["dw1"] * np.linalg.norm(2 * once)


COUNTS = {
    "list": lambda c: c,
    "tuple": tuple,
    "list of numpy ints": lambda c: [np.int64(v) for v in c],
    "list of numpy int32": lambda c: list(np.asarray(c, np.int32)),
    "numpy int32": lambda c: np.asarray(c, np.int32),
    "numpy int64": lambda c: np.asarray(c, np.int64),
    "tensor int32": lambda c: paddle.to_tensor(np.asarray(c, np.int32)),
    "tensor int64": lambda c: paddle.to_tensor(np.asarray(c, np.int64)),
}


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("carrier", COUNTS)
def test_carriers_of_counts_and_ids(carrier, index_dtype):
    """How counts and ids are carried changes no bit of the result."""
    problem = make_problem(routing="holes", seed=2)
    plain = run_node(problem)
    assert_bf16(plain, oracle(problem))
    result = run_node(problem, counts=COUNTS[carrier](problem.counts), index_dtype=index_dtype)
    assert_equal_results(result, plain)


def test_ids_far_outside_of_every_range():
    problem = make_problem(routing="holes", seed=4)
    plain = run_node(problem)
    wild = problem.indices.astype(np.int64)
    wild[wild < 0] = np.resize([-1, -9, problem.n_experts, 2**31 - 1, 2**31 + 5, -(2**40)], (wild < 0).sum())
    problem.indices = wild
    assert_equal_results(run_node(problem, index_dtype="int64"), plain)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("kind", GLU + PLAIN)
def test_activations(kind, magnitude):
    glu = kind in GLU
    # relu and its kin are step functions: bf16 storage of z cannot move a gate, for its sign is kept exactly.
    problem = make_problem(glu=glu, magnitude=magnitude, weight_std=0.05, seed=6)
    result = run_node(problem, activation_type=kind)
    assert_bf16(result, oracle(problem, kind), where=f"{kind} {magnitude}")


@pytest.mark.parametrize("kind", ActivationType)
def test_activations_by_enum_are_those_by_name(kind):
    problem = make_problem(glu=kind.value in GLU, n_tokens=8)
    assert_equal_results(run_node(problem, activation_type=kind), run_node(problem, activation_type=kind.value))


@pytest.mark.parametrize("fused", [False, True], ids=["list", "fused"])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_clamped_swiglu(magnitude, fused):
    problem = make_problem(magnitude=magnitude, weight_std=0.05, seed=7)
    # The clamp follows the magnitude, so that it cuts the same share of z everywhere.
    clamp = CLAMP * magnitude
    config = SonicMoEConfig(swiglu_clamp=clamp)
    result = run_node(problem, fused_experts(problem) if fused else None, config=config)
    expected = oracle(problem, clamp=clamp)
    assert relative_error(expected.out, oracle(problem).out) > 0.05, "the clamp does nothing here"
    assert_bf16(result, expected, names=["out", "ds", "dw2"], where=f"clamp {clamp}")
    # z is kept in bf16, and an entry whose rounding crosses the clamp gains or loses its whole gradient.
    assert_bf16(result, oracle(problem, clamp=clamp, keep_z=to_bf16), where=f"clamp {clamp}, z in bf16")
    assert_within(result, expected, dict.fromkeys(("dx", "dw1"), 0.06), names=["dx", "dw1"])


def test_clamped_swiglu_in_fp32():
    """Where nothing rounds z, the clamp costs nothing."""
    problem = make_problem(weight_std=0.05, seed=7)
    config = SonicMoEConfig(swiglu_clamp=CLAMP)
    result = run_node(problem, expert_list(problem, "float32"), config=config, dtype="float32")
    assert_within(result, oracle(problem, clamp=CLAMP), FP32)


WEIGHT_ROUNDING = {"bfloat16": to_bf16, "float16": lambda w: w.astype(np.float16), "float32": lambda w: w}
STORAGE_FLOORS = {"bfloat16": BF16, "float16": FP16, "float32": FP32}


@pytest.mark.parametrize("fused", [False, True], ids=["list", "fused"])
@pytest.mark.parametrize("weight_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(x_dtype, weight_dtype, fused):
    """out and dx have x's type, and the floor is that of the coarser of the two types."""
    problem = make_problem(seed=8)
    rng = np.random.default_rng(8)
    # Weights with more bits than bf16 has, rounded only to their own type: using them unrounded would show.
    for name in ("w1", "w2"):
        fine = (getattr(problem, name) * (1 + 0.01 * rng.random(getattr(problem, name).shape))).astype(np.float32)
        setattr(problem, name, WEIGHT_ROUNDING[weight_dtype](fine).astype(np.float32))
    experts = fused_experts(problem, weight_dtype) if fused else expert_list(problem, weight_dtype)
    node = make_node(problem, experts)
    out, x, probs = forward_node(node, problem, dtype=x_dtype)
    assert str(out.dtype).endswith(x_dtype)
    out.backward(tensor(problem.dout, x_dtype))
    node.step()
    assert str(x.grad.dtype).endswith(x_dtype) and str(probs.grad.dtype).endswith("float32")
    dw1, dw2 = main_grads(experts)
    expected = oracle(problem)
    result = type(expected)(array(out), array(x.grad), array(probs.grad), dw1, dw2)
    assert_within(result, expected, STORAGE_FLOORS[x_dtype], where=f"x {x_dtype}, weights {weight_dtype}")


def test_main_grad_is_fp32_in_the_weights_own_layout():
    problem = make_problem()
    for experts in (expert_list(problem), fused_experts(problem)):
        run_node(problem, experts)
        params = (
            [experts.weight1, experts.weight2]
            if hasattr(experts, "weight1")
            else [p for e in experts for p in (e.up_gate_proj.weight, e.down_proj.weight)]
        )
        for param in params:
            assert param.main_grad.dtype == paddle.float32 and param.main_grad.shape == param.shape
            assert param.grad is None


def test_list_and_fused_experts_give_the_same_bits():
    problem = make_problem(routing="skewed", n_tokens=64)
    assert_equal_results(run_node(problem, fused_experts(problem)), run_node(problem))


def test_main_grad_is_added_to():
    problem = make_problem()
    experts = expert_list(problem)
    for expert in experts:
        for param in (expert.up_gate_proj.weight, expert.down_proj.weight):
            param.main_grad = paddle.full(param.shape, 3.0, dtype="float32")
    dw1, dw2 = run_node(problem, experts).dw1, run_node(problem).dw2
    expected = oracle(problem)
    np.testing.assert_allclose(dw1 - 3.0, expected.dw1, atol=0.01 * np.abs(expected.dw1).max())
    np.testing.assert_allclose(main_grads(experts)[1] - 3.0, dw2, atol=1e-6)


def test_zero_probabilities_silence_a_slot_but_not_its_score():
    problem = make_problem(seed=11)
    problem.probs[::2, 0] = 0.0
    result, expected = run_node(problem), oracle(problem)
    assert_bf16(result, expected)
    assert result.ds[::2, 0].all(), "a slot of probability 0 still has a gradient for its probability"


@pytest.mark.slow
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_at_a_realistic_width(routing, magnitude):
    problem = make_problem(
        n_tokens=256, hidden=1024, intermediate=512, n_experts=16, topk=8, routing=routing, magnitude=magnitude, seed=1
    )
    assert_bf16(run_node(problem), oracle(problem), where=f"{routing} {magnitude}")
