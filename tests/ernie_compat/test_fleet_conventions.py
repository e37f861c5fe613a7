"""What PaddleFleet does around ``run_sonic_moe``: emptied storage, main_grad layouts, hooks, deferred weight gradients,
shared parameters, its settings objects, streams as objects."""

import types

import numpy as np
import paddle
import pytest

from sonicmoe import SonicMoEConfig, SonicMoEMlpNode
from sonicmoe.ernie_compat import (
    fused_sonic_w1_to_grouped,
    quantize_native_fp8_weights,
    run_sonic_moe,
)
from sonicmoe.ernie_compat.fleet_config import FleetFP8Config
from sonicmoe.functional import _refresh_fp8_config
from tests.support.fleet_calls import RECIPES, SMALL, Call, activations_of, once
from tests.support.floors import BF16, assert_bf16, relative_error
from tests.support.lifecycle import assert_same_bits, bits, fresh_results, series
from tests.support.paddle_runs import array, expert_list, native_parameters, oracle, run_fleet, tensor
from tests.support.problems import make_problem

# ---- Emptied storage -------------------------------------------------------------------------------------------------


def with_copies(problem, config):
    weights = native_parameters(problem)
    recipe = "sm90" if config.fp8_recipe == "auto" else config.fp8_recipe
    pairs = quantize_native_fp8_weights(*weights, config.fp8_iso32_weight, recipe)
    for weight, (plain, transposed) in zip(weights, (pairs[:2], pairs[2:]), strict=True):
        weight.fp8, weight.transposed_fp8 = plain, transposed
    return weights


def empty(weights):
    for weight in weights:
        weight._clear_data()
    return weights


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("options", [{}, {"fp8_wgrad": True}, {"fp8_recompute_z": True}, {"stagewise_memory": True}])
def test_emptied_storage_gives_the_same_bits(name, options):
    problem, config = make_problem(**SMALL), RECIPES[name].replace(**options)
    alive = Call(problem, native_parameters(problem), True, fp8_config=config).land().results()
    weights = empty(with_copies(problem, config))
    assert_same_bits(Call(problem, weights, True, fp8_config=config).land().results(), alive)
    assert not weights[0]._is_initialized() and not weights[1]._is_initialized(), "the storage came back"


@pytest.mark.parametrize("name", RECIPES)
def test_a_stale_copy_beside_live_storage_does_not_matter(name):
    problem, other = series(1, **SMALL)[0], make_problem(seed=9, **SMALL)
    config = RECIPES[name]
    expected = once(problem, True, fp8_config=config)
    weights = native_parameters(problem)
    for weight, stale in zip(weights, with_copies(other, config), strict=True):
        weight.fp8, weight.transposed_fp8 = stale.fp8, stale.transposed_fp8
    assert_same_bits(Call(problem, weights, True, fp8_config=config).land().results(), expected)
    with paddle.no_grad():
        assert bits(Call(problem, weights).out) == bits(once(problem)["out"])


def test_square_blocks_may_be_one_copy_and_its_view():
    """As PaddleFleet holds them under iso32."""
    problem, config = make_problem(**SMALL), RECIPES["iso32"]
    expected = once(problem, True, fp8_config=config)
    weights = with_copies(problem, config)
    for weight in weights:
        data, scale = weight.fp8
        weight.transposed_fp8 = data.transpose([0, 2, 1]), scale.transpose([0, 2, 1])
        assert not weight.transposed_fp8[0].is_contiguous()
    assert_same_bits(Call(problem, empty(weights), True, fp8_config=config).land().results(), expected)


@pytest.mark.parametrize("stale", [True, False], ids=["stale copies", "no copies"])
@pytest.mark.parametrize("gone", [0, 1], ids=["w1", "w2"])
@pytest.mark.parametrize("name", RECIPES)
def test_one_weight_emptied_and_the_other_alive(name, gone, stale):
    """What is alive is read, whatever copies lie beside it."""
    problem, config = make_problem(**SMALL), RECIPES[name]
    expected = once(problem, True, fp8_config=config)
    weights = with_copies(problem, config)
    other = with_copies(make_problem(seed=9, **SMALL), config)[1 - gone]
    alive = weights[1 - gone]
    alive.fp8, alive.transposed_fp8 = (other.fp8, other.transposed_fp8) if stale else (None, None)
    empty([weights[gone]])
    assert_same_bits(Call(problem, weights, True, fp8_config=config).land().results(), expected)


def test_storage_emptied_between_forward_and_backward():
    """The optimizer may clear bf16 storage once the FP8 copies exist; under FP8 backward reads none of it."""
    problem, config = make_problem(**SMALL), RECIPES["sm90"]
    expected = once(problem, True, fp8_config=config)
    weights = with_copies(problem, config)
    call = Call(problem, weights, True, fp8_config=config)
    empty(weights)
    assert_same_bits(call.land().results(), expected)


def copies_of(weights):
    return [getattr(weight, name, None) for weight in weights for name in ("fp8", "transposed_fp8")]


def test_release_while_another_call_is_in_flight():
    problems, config = series(3, **SMALL), RECIPES["sm90"]
    expected = [once(problem, True, fp8_config=config) for problem in problems]
    weights = empty(with_copies(problems[0], config))
    early = Call(problems[0], weights, True, fp8_config=config)
    late = Call(problems[1], weights, True, fp8_config=config, release_fp8_weights=True)
    assert None not in copies_of(weights), "released before its backward"
    late.land()
    assert copies_of(weights) == [None] * 4
    early.land()
    for call, wanted in ((late, expected[1]), (early, expected[0])):
        assert_same_bits(call.activations(), activations_of(wanted))
    for name, weight in zip(("dw1", "dw2"), weights, strict=True):
        assert bits(weight.main_grad) == bits(expected[1][name] + expected[0][name])
    with pytest.raises(ValueError, match="^w1: its bf16 storage is empty and w1.fp8 is NoneType"):
        Call(problems[2], weights, True, fp8_config=config)


@pytest.mark.parametrize("reason", ["no_grad", "frozen"])
def test_release_without_a_backward_is_at_once(reason):
    problem, config = make_problem(**SMALL), RECIPES["iso32"]
    weights = empty(with_copies(problem, config))
    if reason == "no_grad":
        with paddle.no_grad():
            Call(problem, weights, True, fp8_config=config, release_fp8_weights=True)
    else:
        for weight in weights:
            weight.stop_gradient = True
        call = Call(problem, weights, True, fp8_config=config, release_fp8_weights=True)
        expected = once(problem, True, fp8_config=config)
        assert_same_bits(call.land().results(), activations_of(expected))
    assert copies_of(weights) == [None] * 4


# ---- main_grad and hooks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_main_grad_layouts_are_accumulated_in_place(fp8):
    """w1 native, w2 grouped, both slices of a sharding optimizer's flat buffer, whose address never changes."""
    problems = series(3, **SMALL, intermediate=256)
    parts = [once(problem, fp8) for problem in problems]
    w1, w2 = native_parameters(problems[0])
    size = int(np.prod(w1.shape))
    flat = paddle.full([size + int(np.prod(w2.shape))], 0.25, dtype="float32")
    grouped = [3, 256, 128]
    assert list(w2.shape) == [3, 128, 256]
    w1.main_grad, w2.main_grad = flat[:size].reshape(w1.shape), flat[size:].reshape(grouped)
    given = (w1.main_grad, w2.main_grad, w1.main_grad.data_ptr(), w2.main_grad.data_ptr())
    total1, total2 = (np.full(part.shape, 0.25, np.float32) for part in (w1.main_grad, w2.main_grad))
    for problem, part in zip(problems, parts, strict=True):
        Call(problem, (w1, w2), fp8).land()
        total1, total2 = total1 + part["dw1"].numpy(), total2 + part["dw2"].numpy()
    assert w1.main_grad is given[0] and w2.main_grad is given[1]
    assert (w1.main_grad.data_ptr(), w2.main_grad.data_ptr()) == given[2:]
    assert_same_bits({"dw1": w1.main_grad, "dw2": w2.main_grad}, {"dw1": total1, "dw2": total2})
    assert bits(flat) == total1.tobytes() + total2.tobytes()
    assert w1.grad is None and w2.grad is None


def test_main_grads_are_what_the_oracle_says_in_their_layouts():
    problem = make_problem(**SMALL, intermediate=256)
    w1, w2 = native_parameters(problem)
    Call(problem, (w1, w2)).land()
    expected = oracle(problem)
    assert relative_error(array(fused_sonic_w1_to_grouped(w1.main_grad)), expected.dw1) < BF16["dw1"]
    assert relative_error(array(w2.main_grad), expected.dw2) < BF16["dw2"]


# ---- Shared parameters and threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", ["both", "w1"])
def test_two_layers_with_the_same_parameters(tied):
    """Forwards up, backwards down, as a model with tied layers runs them: both gradients add."""
    first, second = series(2, **SMALL)
    parts = [once(first), once(second)]
    w1, w2 = native_parameters(first)
    other = (w1, w2) if tied == "both" else (w1, native_parameters(first)[1])
    calls = Call(first, (w1, w2)), Call(second, other)
    calls[1].land()
    calls[0].land()
    assert bits(w1.main_grad) == bits(parts[1]["dw1"] + parts[0]["dw1"])
    if tied == "both":
        assert bits(w2.main_grad) == bits(parts[1]["dw2"] + parts[0]["dw2"])
    else:
        assert bits(w2.main_grad) == bits(parts[0]["dw2"]) and bits(other[1].main_grad) == bits(parts[1]["dw2"])


def test_the_output_of_one_layer_feeds_the_next_with_the_same_parameters():
    problem = make_problem(n_tokens=12, n_experts=3, weight_std=0.1)
    w1, w2 = native_parameters(problem)
    x, probs, indices = tensor(problem.x, grad=True), tensor(problem.probs, "float32"), tensor(problem.indices, "int32")
    middle = run_sonic_moe(x, indices, probs, 2, 3, w1, w2)
    run_sonic_moe(middle, indices, probs, 2, 3, w1, w2).backward(tensor(problem.dout))
    top = oracle(types.SimpleNamespace(**{**vars(problem), "x": array(middle)}))
    bottom = oracle(types.SimpleNamespace(**{**vars(problem), "dout": top.dx}))
    assert relative_error(array(x.grad), bottom.dx) < 2 * BF16["dx"]
    assert relative_error(array(fused_sonic_w1_to_grouped(w1.main_grad)), top.dw1 + bottom.dw1) < 2 * BF16["dw1"]
    assert relative_error(array(w2.main_grad), top.dw2 + bottom.dw2) < 2 * BF16["dw2"]


# ---- Counts, settings, streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["uniform", "holes", "beyond", "one_expert", "idle_rank"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_counts_in_every_form(routing, fp8):
    problem = make_problem(routing=routing, **SMALL)
    expected = once(problem, fp8)
    counts = problem.counts
    forms = (counts, tuple(counts), np.array(counts), paddle.to_tensor(counts), tensor(counts, "int32"))
    for form in forms:
        assert_same_bits(once(problem, fp8, counts=form), expected, where=str(type(form)))


def test_fleet_and_node_are_one_function():
    problem = make_problem(**SMALL)
    fleet, node = run_fleet(problem), fresh_results(expert_list(problem), problem)
    for name in ("out", "dx", "ds"):
        assert (getattr(fleet, name) == array(node[name])).all(), name
    assert_bf16(fleet, oracle(problem))


def foreign(**attributes):
    return types.SimpleNamespace(**{"fuse_y1_quant": True, "fuse_y1_bf16_trunc": False, "enabled": None, **attributes})


SETTINGS = {
    "wgrad": ({"fp8_wgrad": True}, {"fp8_wgrad": True}),
    "no wgrad": ({"fp8_wgrad": False}, {"fp8_wgrad": False}),
    "recompute": ({"recompute_z": True}, {"fp8_recompute_z": True}),
    "clamp": ({"swiglu_clamp_value": 0.125}, {"swiglu_clamp": 0.125}),
    "clamp numpy": ({"swiglu_clamp_value": np.float32(0.125)}, {"swiglu_clamp": 0.125}),
    "clamp zero": ({"swiglu_clamp_value": 0.0}, {}),
    "clamp none": ({"swiglu_clamp_value": None}, {}),
    "enabled": ({"enabled": True}, {}),
    "as PaddleFleet": ({"enabled": True, "fuse_y1_bf16_trunc": True, "swiglu_clamp_value": 0.0}, {}),
}


def filled(**attributes):
    settings = _refresh_fp8_config()
    for name, value in attributes.items():
        setattr(settings, name, value)
    return settings


@pytest.mark.parametrize("make", [FleetFP8Config, filled, foreign])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_objects_say_the_same(name, make):
    theirs, ours = SETTINGS[name]
    problem = make_problem(**SMALL)
    expected = once(problem, True, fp8_config=SonicMoEConfig(**ours))
    assert_same_bits(once(problem, True, fp8_config=make(**theirs)), expected)
    if "clamp" in name or "wgrad" in name:
        changed = bits(expected["dw1"]) != bits(once(problem, True)["dw1"])
        assert changed == (ours not in ({}, {"fp8_wgrad": False})), "this setting shows in nothing"


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_a_forwarded_clamp_is_the_oracles(fp8):
    """Far from both mistakes, no clamp and another clamp; the floors of the clamp itself are the node's tests."""
    problem = make_problem(weight_std=0.2, **SMALL)
    result = run_fleet(problem, fp8=fp8, fp8_config=foreign(swiglu_clamp_value=1.0))
    for name in ("out", "dx", "ds", "dw1", "dw2"):
        candidates = [getattr(oracle(problem, clamp=clamp), name) for clamp in (1.0, None, 2.0)]
        errors = [relative_error(getattr(result, name), candidate) for candidate in candidates]
        # A gradient jumps where its input crosses the clamp, so the formats' floors do not hold near it.
        assert errors[0] < 0.4 * min(errors[1:]), (name, errors)


def test_a_setting_left_open_follows_the_active_configuration():
    problem = make_problem(**SMALL)
    config = SonicMoEConfig(fp8_wgrad=True, fp8_recipe="sm100")
    expected = once(problem, True, fp8_config=config)
    with config.activate():
        assert_same_bits(once(problem, True), expected)
        assert_same_bits(once(problem, True, fp8_config=foreign(fp8_wgrad=None)), expected)
    assert bits(once(problem, True)["dw1"]) != bits(expected["dw1"])


class Raw:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


STREAMS = [None, 0, 12345, Raw(cuda_stream=7), Raw(raw_stream=7), Raw(stream_base=Raw(cuda_stream=0, junk="x"))]


@pytest.mark.parametrize("stream", STREAMS, ids=range(len(STREAMS)))
def test_stream_id_as_a_handle_or_an_object(stream):
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    node = SonicMoEMlpNode(experts, 3, 128, 128, stream_id=stream)
    out = node(tensor(problem.x), problem.counts, tensor(problem.indices, "int32"), tensor(problem.probs, "float32"))
    assert bits(out) == bits(fresh_results(experts, problem)["out"])


@pytest.mark.parametrize("junk", ["0", 1.0, True, object(), Raw(cuda_stream="7"), Raw(stream_base=Raw()), [0]])
def test_stream_id_that_is_none(junk):
    with pytest.raises(TypeError, match="^stream_id: got .*, need an integer handle, a Stream object or None$"):
        SonicMoEMlpNode(expert_list(make_problem(**SMALL)), 3, 128, 128, stream_id=junk)
