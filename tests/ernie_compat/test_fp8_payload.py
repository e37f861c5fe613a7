"""FP8 that callers hand over, end to end: dispatched activations in each carrier, and the combine's FP8 gradient."""

import types

import numpy as np
import paddle
import pytest
from paddle.autograd import PyLayer

from sonicmoe import SonicMoEConfig
from sonicmoe.ernie_compat import quantize_activation_blockscaled_fast, run_sonic_moe
from sonicmoe.functional import set_wgrad_deferral_hook
from tests.support.floors import assert_bf16, cosine, relative_error
from tests.support.lifecycle import assert_same_bits, bits, expert_mlp, weight_grads
from tests.support.oracle import Result
from tests.support.paddle_runs import array, expert_list, main_grads, make_node, native_parameters, oracle, tensor
from tests.support.problems import make_problem

H = 256
BF16 = SonicMoEConfig()
SM90 = SonicMoEConfig(use_fp8=True)
SM100 = SonicMoEConfig(use_fp8=True, fp8_recipe="sm100")
CONFIGS = {"bf16": BF16, "sm90": SM90, "sm100": SM100}
NATIVE = {"fp32_1x128": "sm90", "ue8m0_bytes": "sm100", "ue8m0_words": "sm100", "ue8m0_values": "sm100"}


def make(magnitude=1.0, **kwargs):
    return make_problem(**{"n_tokens": 20, "hidden": H, "n_experts": 3, "magnitude": magnitude, **kwargs})


def payload(values, carrier):
    """(e4m3 data, scales) of a float array, with the scales in one of the forms that dispatchers send."""
    data, scale = quantize_activation_blockscaled_fast(tensor(values), NATIVE[carrier])
    if carrier == "ue8m0_words":
        # Four bytes a word, the first block lowest: what a little-endian machine sees in the bytes as they lie.
        scale = paddle.to_tensor(np.ascontiguousarray(scale.numpy()).view("<i4"))
    elif carrier == "ue8m0_values":
        scale = scale.astype("int32")
    return data, scale


def dequantized(values, carrier):
    """float32 numbers that a payload stands for, from its definition."""
    recipe = NATIVE[carrier]
    data, scale = quantize_activation_blockscaled_fast(tensor(values), recipe)
    factor = scale.numpy() if recipe == "sm90" else np.exp2(scale.numpy().astype(np.float64) - 127)
    return array(data) * np.repeat(factor, H // factor.shape[1], axis=1).astype(np.float32)


def run(problem, config, x, *, carry_grad=True, **kwargs):
    """Forward, backward and step of a new node; results by name, and what came back as ``Result``."""
    experts = expert_list(problem)
    node = make_node(problem, experts, config=config)
    probs = tensor(problem.probs, "float32", grad=True)
    out = node(x, problem.counts, tensor(problem.indices, "int32"), probs, **kwargs)
    assert out.dtype == paddle.bfloat16
    out.backward(tensor(problem.dout))
    node.step()
    dw1, dw2 = main_grads(experts)
    named = {"out": out, "ds": probs.grad, **weight_grads(experts)}
    dx = None if x.grad is None else array(x.grad)
    if carry_grad:
        assert x.grad.dtype == paddle.bfloat16
        named["dx"] = x.grad
    return named, Result(out=array(out), dx=dx, ds=array(probs.grad), dw1=dw1, dw2=dw2)


def run_beside(problem, config, carrier, layout=None, carrier_values=None):
    """FP8 data beside a bf16 x that is there for its gradient alone."""
    data, scale = payload(problem.x, carrier)
    x = tensor(problem.x if carrier_values is None else carrier_values, grad=True)
    return run(
        problem,
        config,
        x,
        dispatched_hidden_states_fp8=data,
        dispatched_hidden_states_scales=scale,
        dispatched_hidden_states_scale_layout=layout,
    )


def run_as_x(problem, config, carrier):
    data, scale = payload(problem.x, carrier)
    return run(problem, config, data, carry_grad=False, dispatched_hidden_states_scales=scale)


def assert_wired(result, expected, names=Result.NAMES, where=""):
    """Not the format's floors, which test_fp8_precision holds: a scale on the wrong block or row is far from this."""
    for name in names:
        value, wanted = getattr(result, name), getattr(expected, name)
        assert relative_error(value, wanted) < 0.15 and cosine(value, wanted) > 0.99, (where, name)


def on_dequantized(problem, carrier):
    return types.SimpleNamespace(**{**vars(problem), "x": dequantized(problem.x, carrier)})


# ---- Dispatched activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", CONFIGS)
@pytest.mark.parametrize("carrier", NATIVE)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 300.0])
def test_every_carrier_against_the_oracle_on_what_it_stands_for(carrier, mode, magnitude):
    problem = make(magnitude)
    expected = oracle(on_dequantized(problem, carrier))
    _, result = run_beside(problem, CONFIGS[mode], carrier)
    if mode == "bf16":
        assert_bf16(result, expected, where=carrier)
    else:
        assert_wired(result, expected, where=f"{carrier} {mode}")


@pytest.mark.parametrize("mode", CONFIGS)
@pytest.mark.parametrize("carrier", NATIVE)
def test_x_itself_or_beside_a_carrier_is_the_same(carrier, mode):
    problem = make()
    beside, _ = run_beside(problem, CONFIGS[mode], carrier)
    itself, _ = run_as_x(problem, CONFIGS[mode], carrier)
    assert_same_bits(itself, {name: value for name, value in beside.items() if name != "dx"})
    named, _ = run_beside(problem, CONFIGS[mode], carrier, layout=carrier)
    assert_same_bits(named, beside)


@pytest.mark.parametrize("mode", CONFIGS)
def test_the_three_ue8m0_carriers_are_one(mode):
    # At this magnitude bytes lie above 127, so that words are negative numbers and a sign that spreads would show.
    problem = make(3000.0)
    assert (payload(problem.x, "ue8m0_words")[1].numpy() < 0).all()
    expected, _ = run_beside(problem, CONFIGS[mode], "ue8m0_bytes")
    for carrier in ("ue8m0_words", "ue8m0_values"):
        assert_same_bits(run_beside(problem, CONFIGS[mode], carrier)[0], expected, where=carrier)


def test_what_the_carrier_holds_is_never_read():
    problem = make()
    expected, _ = run_beside(problem, SM100, "ue8m0_bytes")
    nothing = np.full_like(problem.x, np.nan)
    assert_same_bits(run_beside(problem, SM100, "ue8m0_bytes", carrier_values=nothing)[0], expected)


@pytest.mark.parametrize("carrier", NATIVE)
def test_a_matching_recipe_is_used_as_it_is(carrier, monkeypatch):
    problem, config = make(), CONFIGS[NATIVE[carrier]]
    operands, prepare = [], expert_mlp.api.stages

    def watched(plan):
        stages = prepare(plan)
        wrapped = types.SimpleNamespace(**vars(stages))
        wrapped.prepare_rows = lambda x, plan: operands.append((x, stages.prepare_rows(x, plan))) or operands[-1][1]
        return wrapped

    monkeypatch.setattr(expert_mlp.api, "stages", watched)
    run_beside(problem, config, carrier)
    given, used = operands[0]
    assert used is given and used.matches(row_format(config)), "quantized a second time"


@pytest.mark.parametrize("mode", ["bf16", "sm90"])
def test_scales_changed_in_place_before_backward_are_an_error(mode):
    """As x itself: dW1 is made of what the dispatch delivered."""
    problem = make()
    node = make_node(problem, config=CONFIGS[mode])
    x, probs = tensor(problem.x, grad=True), tensor(problem.probs, "float32")
    data, scale = payload(problem.x, "fp32_1x128")
    given = {"dispatched_hidden_states_fp8": data, "dispatched_hidden_states_scales": scale}
    out = node(x, problem.counts, tensor(problem.indices, "int32"), probs, **given)
    scale.scale_(3.0)
    with pytest.raises(Exception, match="x: it or its scales changed in place after forward"):
        out.backward(tensor(problem.dout))
    assert not node.has_pending_grads


def row_format(config):
    """What a payload is compared with: the row format of the config's recipe."""
    blackwell = config.fp8_recipe == "sm100"
    return types.SimpleNamespace(row_block=(1, 32) if blackwell else (1, 128), ue8m0=blackwell)


@pytest.mark.parametrize("carrier, mode", [("fp32_1x128", "sm100"), ("ue8m0_words", "sm90"), ("ue8m0_bytes", "sm90")])
def test_another_recipe_is_requantized(carrier, mode):
    """The forward is that of the payload requantized by hand. dW1 sees the payload itself, so it is left out."""
    problem, config = make(), CONFIGS[mode]
    result, _ = run_beside(problem, config, carrier)
    values = paddle.to_tensor(dequantized(problem.x, carrier))
    data, scale = quantize_activation_blockscaled_fast(values, mode)
    by_hand, _ = run(
        problem,
        config,
        tensor(problem.x, grad=True),
        dispatched_hidden_states_fp8=data,
        dispatched_hidden_states_scales=scale,
    )
    names = [name for name in by_hand if not name.endswith("up_gate_proj")]
    assert_same_bits({n: result[n] for n in names}, {n: by_hand[n] for n in names})


@pytest.mark.parametrize("carrier", NATIVE)
def test_fp8_dispatch_under_bf16_is_bf16_of_what_it_stands_for(carrier):
    problem = make()
    result, _ = run_beside(problem, BF16, carrier)
    plain, _ = run(problem, BF16, tensor(dequantized(problem.x, carrier), grad=True))
    assert_same_bits(result, plain)


def test_fp8_dispatch_equals_bf16_dispatch_where_the_numbers_are_exact():
    """e4m3 times a power of two is a bf16 number: sent either way, the layer computes the same, gradients too."""
    problem = make()
    result, _ = run_beside(problem, SM100, "ue8m0_bytes")
    plain, _ = run(problem, SM100, tensor(dequantized(problem.x, "ue8m0_bytes"), grad=True))
    assert_same_bits(result, plain)


def test_a_bf16_carrier_gets_a_gradient_that_e4m3_could_not_hold():
    """Gradients of 1e5 and of 1e-5 in one tensor: an e4m3 without a scale saturates the one and loses the other."""
    problem = make()
    problem.dout[::2] *= 1e5
    problem.dout[1::2] *= 1e-5
    _, result = run_beside(problem, SM90, "fp32_1x128")
    expected = oracle(on_dequantized(problem, "fp32_1x128"))
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        part = Result(*(getattr(result, n)[rows] if n == "dx" else None for n in Result.NAMES))
        wanted = Result(*(getattr(expected, n)[rows] if n == "dx" else None for n in Result.NAMES))
        assert_wired(part, wanted, names=("dx",))


def test_special_scales():
    """Byte 255 is NaN and shows in its token alone; byte 0 is the smallest scale, not zero, and no error."""
    problem = make()
    data, scale = payload(problem.x, "ue8m0_bytes")
    changed = scale.numpy().copy()
    changed[4, 3], changed[9, :] = 255, 0
    probs, indices = tensor(problem.probs, "float32"), tensor(problem.indices, "int32")
    for config in (BF16, SM100):
        node = make_node(problem, config=config)
        clean = array(node(data, problem.counts, indices, probs, dispatched_hidden_states_scales=scale))
        found = array(
            node(data, problem.counts, indices, probs, dispatched_hidden_states_scales=paddle.to_tensor(changed))
        )
        assert np.isnan(found[4]).all() and np.isfinite(np.delete(found, 4, axis=0)).all()
        untouched = [t for t in range(20) if t not in (4, 9)]
        assert (found[untouched] == clean[untouched]).all()
        assert np.abs(found[9]).max() < 1e-30


@pytest.mark.parametrize("n_tokens", [0, 1])
@pytest.mark.parametrize("carrier", NATIVE)
def test_no_token_and_one(carrier, n_tokens):
    problem = make(n_tokens=n_tokens)
    data, scale = payload(problem.x, carrier)
    assert list(scale.shape) == [n_tokens, {"fp32_1x128": 2, "ue8m0_words": 2}.get(carrier, 8)]
    for config in CONFIGS.values():
        x = tensor(problem.x, grad=True)
        given = {"dispatched_hidden_states_fp8": data, "dispatched_hidden_states_scales": scale}
        _, result = run(problem, config, x, **given)
        assert result.out.shape == result.dx.shape == (n_tokens, H) and np.isfinite(result.out).all()


@pytest.mark.parametrize("mode", CONFIGS)
@pytest.mark.parametrize("carrier", NATIVE)
def test_fleet_takes_the_same_carriers(carrier, mode):
    problem, config = make(), CONFIGS[mode]
    expected, _ = run_beside(problem, config, carrier)
    data, scale = payload(problem.x, carrier)
    w1, w2 = native_parameters(problem)
    x, probs = tensor(problem.x, grad=True), tensor(problem.probs, "float32", grad=True)
    given = {"fp8_scale": scale, "fp8_config": config}
    arguments = (tensor(problem.indices, "int32"), probs, 2, 3, w1, w2, config.use_fp8)
    out = run_sonic_moe(x, *arguments, hidden_states_fp8=data, **given)
    out.backward(tensor(problem.dout))
    found = {"out": out, "dx": x.grad, "ds": probs.grad}
    assert_same_bits(found, {name: expected[name] for name in found})
    assert bits(run_sonic_moe(data, *arguments, **given)) == bits(out)


# ---- The combine's FP8 gradient --------------------------------------------------------------------------------------


class Combine(PyLayer):
    """A combine whose backward communicates FP8: the payload goes into the handle, and what autograd is given is not
    the gradient."""

    @staticmethod
    def forward(ctx, out, handle, gradient, filler):
        ctx.handle, ctx.gradient, ctx.filler = handle, gradient, filler
        return out.astype("float32").sum()

    @staticmethod
    def backward(ctx, dout):
        ctx.handle["data"], ctx.handle["scale"] = ctx.gradient
        return ctx.gradient[0] if ctx.filler == "e4m3" else paddle.full(ctx.gradient[0].shape, np.nan, "bfloat16")


def through_handle(entry, problem, config, gradient, handle, filler):
    """Results of a backward whose gradient is FP8 in the handle; of a bf16 one if there is no handle."""
    x, probs = tensor(problem.x, grad=True), tensor(problem.probs, "float32", grad=True)
    indices = tensor(problem.indices, "int32")
    if entry == "node":
        experts = expert_list(problem)
        node = make_node(problem, experts, config=config)
        out = node(x, problem.counts, indices, probs, fp8_combine_grad_handle=handle)
    else:
        w1, w2 = native_parameters(problem)
        given = {"fp8_combine_grad_handle": handle, "fp8_config": config}
        out = run_sonic_moe(x, indices, probs, 2, 3, w1, w2, config.use_fp8, **given)
    if handle is None:
        out.backward(gradient)
    else:
        assert handle == {}
        Combine.apply(out, handle, gradient, filler).backward()
        assert handle == {}, "the gradient is left behind for a later backward"
    if entry == "node":
        node.step()
    grads = weight_grads(experts) if entry == "node" else {"w1": w1.main_grad, "w2": w2.main_grad}
    return {"out": out, "dx": x.grad, "ds": probs.grad, **grads}


EXACT = [("bf16", carrier) for carrier in NATIVE] + [("sm100", c) for c in NATIVE if NATIVE[c] == "sm100"]


@pytest.mark.parametrize("entry", ["node", "fleet"])
@pytest.mark.parametrize("filler", ["nan", "e4m3"])
@pytest.mark.parametrize("mode, carrier", EXACT)
def test_the_handles_gradient_is_the_dequantized_one(mode, carrier, filler, entry):
    problem, config = make(), CONFIGS[mode]
    plain = tensor(dequantized(problem.dout, carrier))
    expected = through_handle(entry, problem, config, plain, None, None)
    assert_same_bits(through_handle(entry, problem, config, payload(problem.dout, carrier), {}, filler), expected)


@pytest.mark.parametrize("wgrad", [False, True], ids=["bf16_wgrad", "fp8_wgrad"])
@pytest.mark.parametrize("mode", ["sm90", "sm100"])
@pytest.mark.parametrize("carrier", ["fp32_1x128", "ue8m0_words"])
def test_the_handles_gradient_against_the_oracle(carrier, mode, wgrad):
    problem, config = make(), CONFIGS[mode].replace(fp8_wgrad=wgrad)
    found = through_handle("node", problem, config, payload(problem.dout, carrier), {}, "nan")
    grads = [np.stack([array(found[f"{e}.{part}"]) for e in range(3)]) for part in ("up_gate_proj", "down_proj")]
    result = Result(array(found["out"]), array(found["dx"]), array(found["ds"]), *grads)
    exact = types.SimpleNamespace(**{**vars(problem), "dout": dequantized(problem.dout, carrier)})
    assert_wired(result, oracle(exact), where=f"{carrier} {mode}")


def test_two_calls_in_flight_with_a_handle_each():
    """An overlap scheduler runs both combines' backward first, and the experts' after, in the other order."""
    problems = [make(seed=n) for n in range(2)]
    gradients = [payload(problem.dout, "fp32_1x128") for problem in problems]
    handles, flights = [{}, {}], []
    for problem, handle in zip(problems, handles, strict=True):
        node = make_node(problem, config=SM90)
        x, probs = tensor(problem.x, grad=True), tensor(problem.probs, "float32", grad=True)
        out = node(x, problem.counts, tensor(problem.indices, "int32"), probs, fp8_combine_grad_handle=handle)
        flights.append((out, x, probs))
    for handle, (data, scale) in zip(handles, gradients, strict=True):
        handle.update(data=data, scale=scale)
    for number in (1, 0):
        out, x, probs = flights[number]
        out.backward(paddle.full_like(out, float("nan")))
        expected = through_handle("node", problems[number], SM90, gradients[number], {}, "nan")
        assert_same_bits({"dx": x.grad, "ds": probs.grad}, {n: expected[n] for n in ("dx", "ds")})
    assert handles == [{}, {}]


def test_a_deferred_weight_gradient_keeps_the_handles_payload():
    problem, queue = make(), []
    gradient = payload(problem.dout, "fp32_1x128")
    expected = through_handle("fleet", problem, SM90, gradient, {}, "nan")
    w1, w2 = native_parameters(problem)
    handle = {}
    set_wgrad_deferral_hook(lambda point, weight, run_wgrad: queue.append(run_wgrad) is None)
    try:
        probs, indices = tensor(problem.probs, "float32"), tensor(problem.indices, "int32")
        given = {"fp8_config": SM90, "fp8_combine_grad_handle": handle}
        out = run_sonic_moe(tensor(problem.x), indices, probs, 2, 3, w1, w2, True, **given)
        Combine.apply(out, handle, gradient, "nan").backward()
    finally:
        set_wgrad_deferral_hook(None)
    assert handle == {} and len(queue) == 2
    handle.update(data=None, scale=None)  # the next micro-batch's combine writes into it
    for run_wgrad in queue:
        run_wgrad()
    assert_same_bits({"w1": w1.main_grad, "w2": w2.main_grad}, {"w1": expected["w1"], "w2": expected["w2"]})


def test_a_handle_that_nobody_filled_is_an_error():
    """Stock Paddle casts an e4m3 gradient to bf16 on its way to the node, so codes without scales would look like
    numbers; only the promised handle tells that they were meant to be FP8."""

    class SendsCodes(PyLayer):
        @staticmethod
        def forward(ctx, out):
            return out.astype("float32").sum()

        @staticmethod
        def backward(ctx, dout):
            return payload(make().dout, "fp32_1x128")[0]

    problem = make()
    for send in (SendsCodes.apply, lambda out: out.astype("float32").sum()):
        experts = expert_list(problem)
        node = make_node(problem, experts)
        x, probs = tensor(problem.x, grad=True), tensor(problem.probs, "float32", grad=True)
        out = node(x, problem.counts, tensor(problem.indices, "int32"), probs, fp8_combine_grad_handle={})
        with pytest.raises(
            Exception, match="fp8_combine_grad_handle: got keys .. at backward, need .data. and .scale."
        ):
            send(out).backward()
        assert not node.has_pending_grads


@pytest.mark.parametrize("entry", ["node", "fleet"])
def test_an_fp8_gradient_where_no_handle_was_promised_is_an_error(entry):
    """Codes without scales, and nobody said that scales would come."""
    problem = make()
    x, probs = tensor(problem.x, grad=True), tensor(problem.probs, "float32", grad=True)
    indices = tensor(problem.indices, "int32")
    if entry == "node":
        out = make_node(problem)(x, problem.counts, indices, probs)
    else:
        out = run_sonic_moe(x, indices, probs, 2, 3, *native_parameters(problem))
    sent = Combine.apply(out, {}, payload(problem.dout, "fp32_1x128"), "e4m3")
    with pytest.raises(Exception, match="gradient of the expert output: got float8_e4m3fn without scales"):
        sent.backward()
    assert x.grad is None


def test_a_wider_gradient_is_rounded_to_the_outputs_type():
    """What Paddle itself does for every operator, and so what a loss in fp32 relies on."""

    class SendsFp32(PyLayer):
        @staticmethod
        def forward(ctx, out, gradient):
            ctx.gradient = gradient
            return out.astype("float32").sum()

        @staticmethod
        def backward(ctx, dout):
            return ctx.gradient

    problem = make()
    expected, _ = run(problem, BF16, tensor(problem.x, grad=True))
    experts = expert_list(problem)
    node = make_node(problem, experts)
    x, probs = tensor(problem.x, grad=True), tensor(problem.probs, "float32", grad=True)
    out = node(x, problem.counts, tensor(problem.indices, "int32"), probs)
    SendsFp32.apply(out, tensor(problem.dout, "float32") * (1 + 2.0**-12)).backward()
    node.step()
    assert_same_bits({"out": out, "ds": probs.grad, **weight_grads(experts), "dx": x.grad}, expected)
