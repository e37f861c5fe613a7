"""``run_sonic_moe`` on stacked weights against the float64 oracle, and against the node: one engine, the same bits."""

import numpy as np
import paddle
import pytest

from sonicmoe import SonicMoEConfig
from sonicmoe.ernie_compat import run_sonic_moe
from sonicmoe.ernie_compat.fleet_config import FleetFP8Config
from tests.support import fp8_model
from tests.support.floors import FP32, assert_bf16, assert_equal_results, assert_within, relative_error
from tests.support.paddle_runs import array, native_parameters, oracle, run_fleet, run_node, tensor
from tests.support.problems import ROUTINGS, make_problem, to_bf16

pytestmark = pytest.mark.contract

MAGNITUDES = (1e-4, 1.0, 300.0)
GLU = ("swiglu", "geglu", "reglu")
PLAIN = ("relu", "relu_sq", "silu", "gelu")
FP8_RUNS = {
    "sm90": ({"fp8_recipe": "sm90"}, fp8_model.SM90),
    "sm90-pow2": ({"fp8_recipe": "sm90", "fp8_pow2_scale": True}, fp8_model.SM90_POW2),
    "sm100": ({"fp8_recipe": "sm100"}, fp8_model.SM100),
    "sm100-iso32": ({"fp8_recipe": "sm100", "fp8_iso32_weight": True}, fp8_model.SM100_ISO32),
}


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing, magnitude):
    problem = make_problem(routing=routing, magnitude=magnitude, topk=1 if routing == "idle_experts" else 2, seed=1)
    result = run_fleet(problem, counts=problem.counts)
    assert_bf16(result, oracle(problem), where=f"{routing} {magnitude}")
    here = (problem.indices >= 0) & (problem.indices < problem.n_experts)
    assert not result.ds[~here].any()
    for expert, count in enumerate(problem.counts):
        if count == 0:
            assert not result.dw1[expert].any() and not result.dw2[expert].any()


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_tokens": 1},
        {"n_tokens": 1, "topk": 1, "n_experts": 1},
        {"topk": 6, "n_experts": 3},
        {"n_experts": 128, "topk": 8, "n_tokens": 96, "hidden": 64, "intermediate": 64, "routing": "skewed"},
        {"hidden": 72, "intermediate": 40},
        {"n_tokens": 300, "topk": 4, "n_experts": 7, "routing": "holes"},
    ],
    ids=lambda sizes: "-".join(f"{name[:2]}{value}" for name, value in sizes.items()),
)
def test_sizes(sizes):
    problem = make_problem(seed=5, **sizes)
    assert_bf16(run_fleet(problem), oracle(problem), where=str(sizes))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("n_tokens", [0, 16])
def test_a_rank_without_work(n_tokens, fp8):
    problem = make_problem(n_tokens=n_tokens, routing="idle_rank")
    result = run_fleet(problem, fp8=fp8, counts=[0] * problem.n_experts)
    for name in result.NAMES:
        assert not getattr(result, name).any(), name
    assert result.out.shape == result.dx.shape == problem.x.shape and result.ds.shape == problem.probs.shape


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize(
    "carrier",
    [
        lambda c: None,
        lambda c: c,
        tuple,
        lambda c: [np.int64(v) for v in c],
        lambda c: np.asarray(c, np.int32),
        lambda c: np.asarray(c, np.int64),
        lambda c: paddle.to_tensor(np.asarray(c, np.int32)),
        lambda c: paddle.to_tensor(np.asarray(c, np.int64)),
    ],
    ids=["none", "list", "tuple", "numpy-ints", "numpy32", "numpy64", "tensor32", "tensor64"],
)
def test_carriers_of_counts_and_ids(carrier, index_dtype):
    problem = make_problem(routing="beyond", seed=2)
    result = run_fleet(problem, counts=carrier(problem.counts), index_dtype=index_dtype)
    assert_equal_results(result, run_node(problem))


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("kind", GLU + PLAIN)
def test_activations(kind, magnitude):
    glu = kind in GLU
    problem = make_problem(glu=glu, magnitude=magnitude, weight_std=0.05, seed=6)
    result = run_fleet(problem, glu=glu, activation_type=kind)
    assert_bf16(result, oracle(problem, kind), where=f"{kind} {magnitude}")


@pytest.mark.parametrize("fp8_config", [FleetFP8Config(swiglu_clamp_value=0.3), SonicMoEConfig(swiglu_clamp=0.3)])
def test_clamp(fp8_config):
    problem = make_problem(weight_std=0.05, seed=7)
    result = run_fleet(problem, fp8_config=fp8_config)
    assert relative_error(result.out, oracle(problem).out) > 0.05, "the clamp was lost on the way"
    assert_bf16(result, oracle(problem, clamp=0.3), names=["out", "ds", "dw2"])
    assert_bf16(result, oracle(problem, clamp=0.3, keep_z=to_bf16))


def test_fp32():
    problem = make_problem(seed=8)
    assert_within(run_fleet(problem, dtype="float32"), oracle(problem), FP32)


def test_main_grads_lie_as_the_caller_holds_them_and_are_added_to():
    """w1.main_grad native, w2.main_grad grouped; what was there stays in the sum, in the same storage."""
    problem = make_problem(seed=9)
    w1, w2 = weights = native_parameters(problem)
    e, h, i = problem.n_experts, problem.hidden, problem.intermediate
    w1.main_grad, w2.main_grad = paddle.full([e, 2 * i, h], 2.0), paddle.full([e, i, h], -3.0)
    held = w1.main_grad, w2.main_grad
    result, expected = run_fleet(problem, weights=weights), oracle(problem)
    assert w1.main_grad is held[0] and w2.main_grad is held[1] and w1.grad is None and w2.grad is None
    assert_bf16(result, expected, names=["out", "dx", "ds"])
    for name, start in (("dw1", 2.0), ("dw2", -3.0)):
        assert relative_error(getattr(result, name) - start, getattr(expected, name)) < 0.01, name
    native = np.empty((e, 2 * i, h))
    native[:, 0::2], native[:, 1::2] = np.split(expected.dw1.transpose(0, 2, 1), 2, axis=1)
    assert relative_error(array(w1.main_grad) - 2.0, native) < 0.01
    run_fleet(problem, weights=weights)
    assert relative_error(array(w2.main_grad) + 3.0, 2 * expected.dw2) < 0.01


@pytest.mark.parametrize("fp8_wgrad", [False, True], ids=["bf16-wgrad", "fp8-wgrad"])
@pytest.mark.parametrize("run", FP8_RUNS)
def test_fp8_is_the_formats_arithmetic(run, fp8_wgrad):
    """Within BF16's floors of a model that rounds to e4m3 where the recipe says, and the node's bits exactly."""
    fields, recipe = FP8_RUNS[run]
    problem = make_problem(n_tokens=64, hidden=256, topk=3, n_experts=5, routing="holes", seed=10)
    config = SonicMoEConfig(use_fp8=True, fp8_wgrad=fp8_wgrad, **fields)
    result = run_fleet(problem, fp8=True, fp8_config=config, counts=problem.counts)
    assert_bf16(result, fp8_model.layer(problem, recipe, fp8_wgrad), where=run)
    # dW2 is summed in the other orientation here, so its last bits may differ.
    node = run_node(problem, config=config)
    assert_equal_results(result, node, names=["out", "dx", "ds", "dw1"])
    assert relative_error(result.dw2, node.dw2) < 1e-6


def test_fleet_config_switches_what_it_names():
    problem = make_problem(n_tokens=64, hidden=256, seed=11)

    def run(**fields):
        return run_fleet(problem, fp8=True, fp8_config=FleetFP8Config(enabled=True, **fields))

    plain, wgrad, again = run(), run(fp8_wgrad=True), run(recompute_z=True)
    assert_equal_results(again, plain)
    assert_equal_results(wgrad, plain, names=["out", "dx", "ds"])
    assert relative_error(wgrad.dw1, plain.dw1) > 0.01 and relative_error(wgrad.dw2, plain.dw2) > 0.01


def test_inference_keeps_the_numbers():
    problem = make_problem(seed=12)
    weights = native_parameters(problem)
    trained = run_fleet(problem, weights=weights).out
    with paddle.no_grad():
        x, probs = tensor(problem.x), tensor(problem.probs, "float32")
        indices = paddle.to_tensor(problem.indices)
        out = run_sonic_moe(x, indices, probs, problem.indices.shape[1], problem.n_experts, *weights)
    np.testing.assert_array_equal(array(out), trained)
