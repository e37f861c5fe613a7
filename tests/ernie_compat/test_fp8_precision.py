"""What FP8 costs, against the float64 oracle, and that it costs nothing else, against a model of the format.

docs/precision.md explains the floors. Every run is also held to the model: e4m3 roundings where the recipe puts them
and exact sums between them. The engine may differ from that by bf16 storage and no more.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest

from tests.support import fp8_model
from tests.support.floors import (
    FP8_BEYOND_INHERENT,
    assert_bf16,
    assert_equal_results,
    fp8_cosine_floor,
    fp8_floors,
    relative_error,
    sampled,
)
from tests.support.fp8_runs import (
    CARRIERS,
    RECIPES,
    Errors,
    fp8_config,
    fp8_tensors,
    inherent,
    payload,
    row_problem,
    with_heavy_channel,
)
from tests.support.oracle import Result
from tests.support.paddle_runs import expert_list, oracle, run_fleet, run_node
from tests.support.precision_rows import FULL_HIDDEN, HEAVY_CHANNEL, ROWS
from tests.support.problems import make_problem

pytestmark = pytest.mark.contract

ENOUGH = 4096  # values of ds that a row is judged on: that many measure its error to about one percent of it
WGRADS = pytest.mark.parametrize("fp8_wgrad", [False, True], ids=["bf16-wgrad", "fp8-wgrad"])
BY_RECIPE = pytest.mark.parametrize("recipe", RECIPES)
# Recipes whose rows can be a dispatcher's payload as it is, and the carriers that hold such rows.
TAKEN_AS_THEY_ARE = [("sm90", "fp32"), *((r, c) for r in ("sm100", "sm100-iso32") for c in CARRIERS[1:])]


def assert_fp8(errors, recipe, names=Result.NAMES, where=""):
    for name in names:
        floor = fp8_floors(recipe)[name]
        # ds has one value a slot where the others have hundreds: only there does the sample matter.
        allowed = sampled(floor, errors.count("ds")) if name == "ds" else floor
        assert errors.relative(name) < allowed, f"{where} {name}: {errors.relative(name):.4f}, floor {allowed:.4f}"
        assert errors.cosine(name) >= fp8_cosine_floor(allowed), f"{where} {name}: cosine {errors.cosine(name):.5f}"


def assert_beyond_inherent(errors, unavoidable, names=Result.NAMES, where=""):
    for name in names:
        allowed = 1.05 * np.hypot(unavoidable.relative(name), FP8_BEYOND_INHERENT)
        assert errors.relative(name) < allowed, f"{where} {name}: {errors.relative(name):.4f}, allowed {allowed:.4f}"


@functools.cache
def row_errors(row, recipe, fp8_wgrad):
    """A row of the table, narrowed to H=256 and I=128, on as many seeds as ds needs. The precision of wgrad is
    nothing to ds, so BF16 wgrad is looked at with fewer."""
    n_tokens, topk, _, _ = row
    total = Errors()
    for seed in range(max(1, (ENOUGH if fp8_wgrad else 1024) // (n_tokens * topk))):
        problem = row_problem(row, seed=seed, hidden=256, intermediate=128)
        total.add(run_node(problem, config=fp8_config(recipe, fp8_wgrad)), oracle(problem))
    return total


@WGRADS
@pytest.mark.parametrize("recipe", ["sm90", "sm100"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_rows(row, recipe, fp8_wgrad):
    errors = row_errors(row, recipe, fp8_wgrad)
    assert_fp8(errors, recipe, where=f"{row} {recipe}")
    # A backend that computed in BF16 and said FP8 would pass every floor above.
    assert all(errors.relative(name) > 0.05 for name in Result.NAMES), "this is no FP8"


@pytest.mark.parametrize("recipe", ["sm90", "sm100"])
def test_ds_over_all_rows(recipe):
    """With 24 thousand values no allowance for the sample is left to make."""
    sums = [row_errors(row, recipe, True).sums["ds"] for row in ROWS]
    pooled = Errors({"ds": np.sum(sums, axis=0)})
    floor = fp8_floors(recipe)["ds"]
    assert pooled.relative("ds") < floor and pooled.cosine("ds") >= fp8_cosine_floor(floor)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, recipe",
    [(ROWS[0], "sm90"), (ROWS[0], "sm100"), (ROWS[1], "sm90"), (ROWS[1], "sm100"), (ROWS[2], "sm90")],
    ids=str,
)
def test_rows_at_full_size(row, recipe):
    problem = row_problem(row, hidden=FULL_HIDDEN)
    errors = Errors().add(run_node(problem, config=fp8_config(recipe, True)), oracle(problem))
    assert_fp8(errors, recipe, where=f"{row} {recipe}")


@pytest.mark.parametrize("recipe, fp8_wgrad", [*((recipe, True) for recipe in RECIPES), ("sm90", False)])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 300.0])
def test_magnitudes(magnitude, recipe, fp8_wgrad):
    problem = row_problem(ROWS[2], seed=20, hidden=256, intermediate=128, magnitude=magnitude)
    result, expected = run_node(problem, config=fp8_config(recipe, fp8_wgrad)), oracle(problem)
    errors, where = Errors().add(result, expected), f"{magnitude} {recipe}"
    assert_bf16(result, fp8_model.layer(problem, RECIPES[recipe][1], fp8_wgrad), where=f"{where}, model")
    # At 300 the gate is a step for all but a few z, and rounding x and w1 throws some of them to its other side.
    stepped = ("dx", "dw1") if magnitude == 300 else ()
    assert_fp8(errors, recipe, [name for name in Result.NAMES if name not in stepped], where)
    assert_beyond_inherent(errors, inherent(problem, recipe), where=where)


@pytest.mark.parametrize("recipe, fp8_wgrad", [*((recipe, True) for recipe in RECIPES), ("sm90", False)])
def test_heavy_tails(recipe, fp8_wgrad):
    """One channel a hundred times the rest. A float32 scale puts it on 448 exactly; a power of two does not, and then
    its rounding is shared by gate and up of a whole row: with those scales only the inherent bound can hold."""
    problem = with_heavy_channel(row_problem(ROWS[2], seed=21, hidden=256, intermediate=128))
    result, expected = run_node(problem, config=fp8_config(recipe, fp8_wgrad)), oracle(problem)
    assert_bf16(result, fp8_model.layer(problem, RECIPES[recipe][1], fp8_wgrad), where=recipe)
    errors = Errors().add(result, expected)
    if recipe == "sm90":
        assert_fp8(errors, recipe, where=recipe)
    assert_beyond_inherent(errors, inherent(problem, recipe), where=recipe)
    # The heavy channel holds nearly all of dW1's norm; the others must not be lost behind it.
    light = np.arange(problem.hidden) != HEAVY_CHANNEL
    assert relative_error(result.dw1[:, light], expected.dw1[:, light]) < 0.08


@pytest.mark.parametrize("kind, glu", [("geglu", True), ("reglu", True), ("silu", False), ("relu_sq", False)])
@pytest.mark.parametrize("recipe", ["sm90", "sm100"])
def test_other_activations(recipe, kind, glu):
    problem = make_problem(n_tokens=96, hidden=256, topk=3, n_experts=5, routing="holes", glu=glu, seed=22)
    result = run_node(problem, config=fp8_config(recipe, True), activation_type=kind)
    assert_bf16(result, fp8_model.layer(problem, RECIPES[recipe][1], True, kind), where=kind)


@BY_RECIPE
def test_clamp(recipe):
    problem = make_problem(n_tokens=96, hidden=256, topk=3, n_experts=5, weight_std=0.05, seed=23)
    result = run_node(problem, config=fp8_config(recipe, True, swiglu_clamp=0.8))
    # Where the model's z and the engine's lie on two sides of the clamp by an fp32 rounding, a whole entry differs.
    model = fp8_model.layer(problem, RECIPES[recipe][1], True, clamp=0.8)
    assert_bf16(result, model, names=("out", "ds", "dw2"))
    assert relative_error(result.dx, model.dx) < 0.02 and relative_error(result.dw1, model.dw1) < 0.02
    assert relative_error(model.out, fp8_model.layer(problem, RECIPES[recipe][1], True).out) > 0.05


@WGRADS
@BY_RECIPE
@pytest.mark.parametrize("routing", ["skewed", "beyond", "one_expert", "idle_experts"])
def test_routings(routing, recipe, fp8_wgrad):
    """Segments of 1, of 128 and of 129 rows: pads neither lose a row nor add one."""
    problem = make_problem(n_tokens=129, n_experts=6, topk=2, routing=routing, seed=24)
    if routing == "beyond":
        problem.indices[:] = 6
        problem.indices[:128, 0], problem.indices[:, 1], problem.indices[5, 0] = 2, 4, 0
    result = run_node(problem, config=fp8_config(recipe, fp8_wgrad))
    assert_bf16(result, fp8_model.layer(problem, RECIPES[recipe][1], fp8_wgrad), where=routing)


def test_fp16_storage():
    problem = make_problem(n_tokens=64, hidden=256, seed=25)
    result = run_node(problem, expert_list(problem, "float16"), config=fp8_config("sm90", True), dtype="float16")
    assert_bf16(result, fp8_model.layer(problem, fp8_model.SM90, True))


# ---- Switches that may not move a bit --------------------------------------------------------------------------------


@WGRADS
@BY_RECIPE
def test_recompute_and_stagewise_keep_every_bit(recipe, fp8_wgrad):
    problem = make_problem(n_tokens=70, hidden=256, topk=3, n_experts=5, routing="holes", seed=26)
    plain = run_node(problem, config=fp8_config(recipe, fp8_wgrad))
    for fields in (
        {"fp8_recompute_z": True},
        {"stagewise_memory": True},
        {"fp8_mode": "mem"},
        {"fp8_mode": "mem", "fp8_recompute_z": True},
    ):
        config = fp8_config(recipe, fp8_wgrad).replace(**fields)
        assert_equal_results(run_node(problem, config=config), plain, where=str(fields))


@BY_RECIPE
def test_wgrad_precision_is_the_weights_alone(recipe):
    problem = make_problem(n_tokens=70, hidden=256, seed=27)
    bf16, fp8 = (run_node(problem, config=fp8_config(recipe, wgrad)) for wgrad in (False, True))
    assert_equal_results(fp8, bf16, names=("out", "dx", "ds"))
    for name in ("dw1", "dw2"):
        assert relative_error(getattr(fp8, name), getattr(bf16, name)) > 0.02


@BY_RECIPE
def test_the_same_bits_every_time(recipe):
    problem = make_problem(n_tokens=90, hidden=256, topk=3, n_experts=5, routing="skewed", seed=28)
    first = run_node(problem, config=fp8_config(recipe, True))
    for _ in range(3):
        assert_equal_results(run_node(problem, config=fp8_config(recipe, True)), first)


# ---- FP8 that arrives from outside -----------------------------------------------------------------------------------


def dispatched(problem, carrier, config):
    data, scales = fp8_tensors(problem.x, carrier)
    return run_node(problem, config=config, dispatched_hidden_states_fp8=data, dispatched_hidden_states_scales=scales)


def as_received(problem, carrier):
    """The problem on the values that the payload stands for."""
    return replace(problem, x=payload(problem.x, carrier)[2])


@WGRADS
@pytest.mark.parametrize("recipe, carrier", TAKEN_AS_THEY_ARE)
def test_dispatch_in_the_recipes_own_format(recipe, carrier, fp8_wgrad):
    """A payload quantized as the layer would have done it: the bits of a BF16 dispatch but for dW1, whose x is what
    arrived."""
    problem = make_problem(n_tokens=70, hidden=256, topk=3, n_experts=5, routing="holes", seed=29)
    config = fp8_config(recipe, fp8_wgrad)
    result = dispatched(problem, carrier, config)
    assert_equal_results(result, run_node(problem, config=config), names=("out", "dx", "ds", "dw2"))
    assert_bf16(result, fp8_model.layer(as_received(problem, carrier), RECIPES[recipe][1], fp8_wgrad))


@pytest.mark.parametrize("recipe, carrier", [("sm90", c) for c in CARRIERS[1:]] + [("sm100", "fp32")])
def test_dispatch_in_another_format(recipe, carrier):
    """Requantized on arrival, in one rounding more."""
    problem = make_problem(n_tokens=70, hidden=256, topk=3, n_experts=5, routing="holes", seed=30)
    result, received = dispatched(problem, carrier, fp8_config(recipe, True)), as_received(problem, carrier)
    assert_bf16(result, fp8_model.layer(received, RECIPES[recipe][1], True))


@pytest.mark.parametrize("recipe, carrier", [("sm90", "fp32"), ("sm90", "ue8m0_words"), ("sm100", "ue8m0_words")])
def test_precision_of_a_dispatch_in_fp8(recipe, carrier):
    """In the recipe's own format the floors hold against the bf16 that the sender had. In another one the sender's
    rounding comes on top of this layer's, which is judged on what arrived."""
    problem = row_problem(ROWS[2], seed=30, hidden=256, intermediate=128)
    own = (recipe, carrier) in TAKEN_AS_THEY_ARE
    result = dispatched(problem, carrier, fp8_config(recipe, True))
    assert_fp8(Errors().add(result, oracle(problem if own else as_received(problem, carrier))), recipe)


def test_ue8m0_carriers_give_the_same_bits():
    problem = make_problem(n_tokens=40, hidden=256, seed=31)
    runs = [dispatched(problem, carrier, fp8_config("sm100", True)) for carrier in CARRIERS[1:]]
    for other in runs[1:]:
        assert_equal_results(other, runs[0])


@pytest.mark.parametrize("carrier", CARRIERS)
def test_fp8_dispatch_into_a_bf16_layer(carrier):
    """Without FP8 mode the payload is read, not computed with: BF16 precision on what arrived."""
    problem = make_problem(n_tokens=40, hidden=256, seed=32)
    assert_bf16(dispatched(problem, carrier, None), oracle(as_received(problem, carrier)))


@pytest.mark.parametrize("recipe, carrier", TAKEN_AS_THEY_ARE)
def test_combine_gradient_in_the_recipes_own_format(recipe, carrier):
    """dout in FP8 through the handle: the bits of a BF16 dout but for dW2, whose dout is what arrived."""
    problem = make_problem(n_tokens=70, hidden=256, topk=3, n_experts=5, routing="holes", seed=33)
    data, scales = fp8_tensors(problem.dout, carrier)
    config, handle = fp8_config(recipe, True), {"data": data, "scale": scales}
    result = run_node(problem, config=config, fp8_combine_grad_handle=handle)
    assert handle == {}, "a later backward must not find this one's gradient"
    assert_equal_results(result, run_node(problem, config=config), names=("out", "dx", "ds", "dw1"))
    received = replace(problem, dout=payload(problem.dout, carrier)[2])
    assert_bf16(result, fp8_model.layer(received, RECIPES[recipe][1], True))


def test_fleet_takes_the_same_gradient_handle():
    problem = make_problem(n_tokens=70, hidden=256, seed=34)
    config = fp8_config("sm90", True)
    results = []
    for run in (run_node, run_fleet):
        handle = dict(zip(("data", "scale"), fp8_tensors(problem.dout, "fp32"), strict=True))
        how = {"config": config} if run is run_node else {"fp8": True, "fp8_config": config}
        results.append(run(problem, fp8_combine_grad_handle=handle, **how))
    assert_equal_results(results[1], results[0], names=("out", "dx", "ds", "dw1"))
    assert relative_error(results[1].dw2, results[0].dw2) < 1e-6
