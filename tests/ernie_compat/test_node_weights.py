"""Whoever changes a weight, and however: the next forward computes with the new one, with no word to the node.

The judge is always a node that has never seen another weight, and the comparison is exact.
"""

import numpy as np
import paddle
import pytest

from sonicmoe import SonicMoEConfig
from tests.support.lifecycle import (
    MAKE_EXPERTS,
    Flight,
    assert_same_bits,
    bits,
    clone_experts,
    expert_mlp,
    fresh_results,
    params_of,
    record_saved,
    series,
    weight_grads,
)
from tests.support.paddle_runs import Expert, expert_list, forward_node, make_node, parameter, tensor
from tests.support.problems import make_problem

SMALL = {"n_tokens": 10, "n_experts": 3}
BF16 = SonicMoEConfig()
FP8 = SonicMoEConfig(use_fp8=True)
ISO32 = SonicMoEConfig(use_fp8=True, fp8_recipe="sm100", fp8_iso32_weight=True)
config_of = pytest.mark.parametrize("config", [BF16, FP8, ISO32], ids=["bf16", "fp8", "iso32"])


# ---- Ways to change a weight -----------------------------------------------------------------------------------------


def by_optimizer(make):
    """One step on main_grad. Paddle's CPU optimizers compute in fp32: bf16 weights go through a master copy, as
    mixed-precision training writes them back."""

    def change(experts):
        params = params_of(experts)
        bf16 = params[0].dtype == paddle.bfloat16
        masters = [parameter(p.astype("float32").numpy(), "float32") if bf16 else p for p in params]
        rng = np.random.default_rng(5)
        optimizer = make(parameters=masters)
        for master in masters:
            master.grad = paddle.to_tensor(rng.standard_normal(master.shape).astype(np.float32))
        optimizer.step()
        optimizer.clear_grad()
        if bf16:
            for param, master in zip(params, masters, strict=True):
                param.set_value(master.detach().astype("bfloat16"))

    return change


def to_each(function):
    def change(experts):
        with paddle.no_grad():
            for param in params_of(experts):
                function(param)

    return change


def other_values(param):
    rng = np.random.default_rng(3)
    return paddle.to_tensor(rng.standard_normal(param.shape).astype(np.float32) * 0.03).astype(param.dtype)


def one_element(param):
    param[..., -1] = 0.5  # the last column alone; the sum over it all must not be what is looked at


def through_a_view(param):
    flat = param.detach().reshape([-1])
    assert flat.data_ptr() == param.data_ptr()
    flat[3:7] = 1.0


def load_state(experts):
    if not isinstance(experts, list):  # the fused object is no Layer: what a loader does to it is set_value
        return to_each(lambda param: param.set_value(other_values(param)))(experts)
    layer = paddle.nn.LayerList(experts)
    assert len(layer.state_dict()) == 6
    missing, unexpected = layer.set_state_dict({n: other_values(p) for n, p in layer.state_dict().items()})
    assert not missing and not unexpected


def swap_two_experts(experts):
    """The same values in other places: every sum over all the weights stays as it was."""
    if not isinstance(experts, list):
        for param in params_of(experts):
            param.set_value(param.detach()[paddle.to_tensor([1, 0, 2])])
        return
    for part in ("up_gate_proj", "down_proj"):
        first, second = getattr(experts[0], part).weight, getattr(experts[1], part).weight
        held = first.detach().clone()
        first.set_value(second.detach().clone())
        second.set_value(held)


def replace_parameters(experts):
    if not isinstance(experts, list):
        experts.weight1 = parameter(experts.weight1.astype("float32").numpy() * 2, str(experts.weight1.dtype)[7:])
        return
    weight = experts[1].down_proj.weight
    experts[1].down_proj.weight = parameter(weight.astype("float32").numpy() * 2, str(weight.dtype)[7:])


CHANGES = {
    "AdamW": by_optimizer(lambda parameters: paddle.optimizer.AdamW(0.01, parameters=parameters, weight_decay=0.1)),
    "SGD": by_optimizer(lambda parameters: paddle.optimizer.SGD(0.01, parameters=parameters)),
    "Momentum": by_optimizer(lambda parameters: paddle.optimizer.Momentum(0.01, parameters=parameters)),
    "set_value": to_each(lambda param: param.set_value(other_values(param))),
    "assign": to_each(lambda param: paddle.assign(other_values(param), param)),
    "copy_": to_each(lambda param: param.copy_(other_values(param))),
    "multiply_": to_each(lambda param: param.multiply_(other_values(param))),
    "scale_": to_each(lambda param: param.scale_(-1.0)),
    "setitem": to_each(one_element),
    "view": to_each(through_a_view),
    "state_dict": load_state,
    "swap": swap_two_experts,
    "replace": replace_parameters,
}
IN_FP32 = {"add_": to_each(lambda param: param.add_(other_values(param)))}  # no bf16 kernel in stock CPU Paddle


def change_is_seen(change, kind, dtype, config):
    problem = make_problem(**SMALL)
    experts = MAKE_EXPERTS[kind](problem, dtype)
    node = make_node(problem, experts, config=config)
    before = Flight(node, problem).results()["out"]
    node.discard_grads()
    epoch = node.weight_epoch
    change(experts)
    expected = fresh_results(experts, problem, config=config)
    assert bits(before) != bits(expected["out"]), "this change shows in nothing"
    flight = Flight(node, problem).land()
    assert node.weight_epoch == epoch + 1
    node.step()
    assert_same_bits({**flight.results(), **weight_grads(experts)}, expected)


@config_of
@pytest.mark.parametrize("name", CHANGES)
def test_the_next_forward_sees(name, config):
    change_is_seen(CHANGES[name], "list", "bfloat16", config)


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_forward_sees_in_fused_weights(name):
    change_is_seen(CHANGES[name], "fused", "bfloat16", BF16)


@pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Momentum", "add_", "setitem", "swap"])
def test_the_next_forward_sees_in_fp32_weights(name, config):
    change_is_seen({**CHANGES, **IN_FP32}[name], "list", "float32", config)


@config_of
@pytest.mark.parametrize("name", ["AdamW", "set_value", "scale_", "swap", "replace"])
@pytest.mark.parametrize("kind", MAKE_EXPERTS)
def test_backward_uses_the_weights_of_its_forward(name, kind, config):
    problem = make_problem(**SMALL)
    experts = MAKE_EXPERTS[kind](problem)
    expected = fresh_results(experts, problem, config=config)
    node = make_node(problem, experts, config=config)
    flight = Flight(node, problem)
    CHANGES[name](experts)
    behind = Flight(node, problem)  # a forward with the new weights must not pull the old ones from under the first
    flight.land()
    node.step()
    assert_same_bits({**flight.results(), **weight_grads(experts)}, expected)
    for param in params_of(experts):
        param.main_grad = None
    behind.land()
    node.step()
    assert_same_bits({**behind.results(), **weight_grads(experts)}, fresh_results(experts, problem, config=config))


@pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_that_are_slices_of_one_buffer(dtype, config):
    """Sharding optimizers lay all parameters into one buffer and write to that."""
    problem = make_problem(**SMALL)
    experts = expert_list(problem, dtype)
    params = params_of(experts)
    sizes = [int(np.prod(param.shape)) for param in params]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    # Room behind them: Paddle's view of a slice in another item size looks further back than the slice is, and
    # there it must find bytes that never change, or a wrong look would pass by luck.
    flat = paddle.concat([*(param.detach().reshape([-1]) for param in params), paddle.zeros([3 * sum(sizes)], dtype)])
    width = 2 if dtype == "bfloat16" else 4
    for param, start, size in zip(params, starts, sizes, strict=True):
        shape = param.shape
        flat._slice(start, start + size)._share_buffer_to(param)
        param.get_tensor()._set_dims(shape)
        assert param.data_ptr() == flat.data_ptr() + width * start and list(param.shape) == list(shape)
    node = make_node(problem, experts, config=config)
    forward_node(node, problem)
    for number, start in enumerate(starts):
        flat[start : start + 1000] = 0.25
        expected = fresh_results(experts, problem, config=config)
        assert bits(forward_node(node, problem)[0]) == bits(expected["out"]), f"slice {number}"
        assert node.weight_epoch == number + 2


def test_the_same_bytes_in_another_type_are_another_weight():
    """bf16 and fp16 are both two bytes wide, and a converted checkpoint could hold either."""
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    node = make_node(problem, experts)
    forward_node(node, problem)
    for expert in experts:
        for part in (expert.up_gate_proj, expert.down_proj):
            codes = part.weight.detach().numpy()
            part.weight = parameter(codes.view(np.float16), "float16")
            assert bits(part.weight) == codes.tobytes()
    expected = fresh_results(experts, problem)
    assert bits(forward_node(node, problem)[0]) == bits(expected["out"])


def test_two_configurations_over_one_change():
    """A copy made under one configuration must not outlive a change that another configuration saw first."""
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    node = make_node(problem, experts)
    configs = [BF16, FP8, ISO32]
    for config in configs:
        with config.activate():
            forward_node(node, problem)
    CHANGES["set_value"](experts)
    for config in reversed(configs):
        with config.activate():
            out, _, _ = forward_node(node, problem)
        assert bits(out) == bits(fresh_results(experts, problem, config=config)["out"])


# ---- The epoch and the copies ----------------------------------------------------------------------------------------


def test_the_epoch_grows_exactly_when_bytes_change():
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    node = make_node(problem, experts)
    assert node.weight_epoch == 0
    epochs = []

    def observe(expected_epoch):
        forward_node(node, problem)
        epochs.append(node.weight_epoch)
        assert node.weight_epoch == expected_epoch, epochs

    observe(1)
    observe(1)
    weight = experts[2].down_proj.weight
    original = weight.detach().clone()
    weight.set_value(original.clone())
    observe(1)
    node.step()
    node.invalidate_caches()
    observe(1)
    experts[2].down_proj.weight = parameter(original.astype("float32").numpy())  # another object, the same bytes
    observe(1)
    weight = experts[2].down_proj.weight
    with paddle.no_grad():
        weight[5, 7] = 3.0
    observe(2)
    with FP8.activate():
        observe(2)
    weight.set_value(original)
    observe(3)
    with paddle.no_grad():
        weight[0, 0] = 0.0
    observe(4)
    with paddle.no_grad():
        weight.scale_(1.0)
        weight[0, 0] = -0.0  # equal as numbers, and yet another weight
    observe(5)
    with paddle.no_grad():
        weight[-1, -1] = weight[-1, -1] + 1.0  # the very last number of the very last weight
    observe(6)


@config_of
def test_copies_are_made_once_an_epoch(config, monkeypatch):
    problems = series(3, **SMALL)
    experts = expert_list(problems[0])
    kept = record_saved(monkeypatch)
    node = make_node(problems[0], experts, config=config)
    for problem in problems:
        forward_node(node, problem)
    weights = [saved.weights for saved in kept]
    assert weights[0] is weights[1] is weights[2]
    CHANGES["scale_"](experts)
    forward_node(node, problems[0])
    forward_node(node, problems[1])
    assert kept[3].weights is kept[4].weights is not weights[0]
    other = make_node(problems[0], experts, config=config)
    forward_node(other, problems[0])
    assert kept[5].weights is not kept[4].weights, "two nodes share a copy"


def test_prequantize_release_invalidate_and_step(monkeypatch):
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    expected = fresh_results(experts, problem, config=FP8)
    kept = record_saved(monkeypatch)
    node = make_node(problem, experts, config=FP8)
    quantized, quantize = [], expert_mlp.QuantTensor
    node.prequantize_weights()
    assert node._store.fp8_copies() == 1 and node.weight_epoch == 1

    def forward():
        out, _, _ = forward_node(node, problem)
        assert bits(out) == bits(expected["out"])
        quantized.append(kept[-1].weights)
        assert isinstance(kept[-1].weights.fp8.w1, quantize)
        return kept[-1].weights

    first = forward()
    node.prequantize_weights()
    assert forward() is first, "made twice in one epoch"
    for drop in (node.release_fp8_weights, node.invalidate_caches, node.step):
        drop()
        assert node._store.fp8_copies() == 0
        assert forward() is not quantized[-2]
        assert node._store.fp8_copies() == 1
    assert node.weight_epoch == 1

    with BF16.replace().activate():  # the node's own configuration wins, so nothing changes
        node.prequantize_weights()
    node.prequantize_weights()
    CHANGES["swap"](experts)
    out, _, _ = forward_node(node, problem)
    assert bits(out) == bits(fresh_results(experts, problem, config=FP8)["out"]), "prequantized copies went stale"


@pytest.mark.parametrize("drop", ["release_fp8_weights", "invalidate_caches", "step"])
def test_dropping_copies_does_not_reach_a_call_in_flight(drop):
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    expected = fresh_results(experts, problem, config=FP8)
    node = make_node(problem, experts, config=FP8)
    flight = Flight(node, problem)
    getattr(node, drop)()
    flight.land()
    node.step()
    assert_same_bits({**flight.results(), **weight_grads(experts)}, expected)


def test_release_keeps_the_bf16_copy(monkeypatch):
    problem = make_problem(**SMALL)
    kept = record_saved(monkeypatch)
    node = make_node(problem)
    forward_node(node, problem)
    with FP8.activate():
        forward_node(node, problem)
    node.release_fp8_weights()
    forward_node(node, problem)
    assert kept[2].weights is kept[0].weights


# ---- Save and load ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
def test_save_and_load_in_mid_step_continues_to_the_same_bits(config, tmp_path):
    """Saved between two micro-batches of a step, into a model of its own: weights, optimizer state and main_grad."""
    problems = series(6, **SMALL)

    def make():
        experts = [Expert(problems[0].w1[e], problems[0].w2[e], "float32") for e in range(3)]
        optimizer = paddle.optimizer.AdamW(0.01, parameters=params_of(experts))
        return experts, optimizer, make_node(problems[0], experts, config=config)

    def micro_batch(node, problem):
        out, _, _ = forward_node(node, problem)
        loss = (out.astype("float32") * tensor(problem.dout, "float32")).mean()
        loss.backward()
        return loss

    def update(experts, optimizer, node):
        node.step()
        for param in params_of(experts):
            param.grad = param.main_grad
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        for param in params_of(experts):
            param.main_grad = None

    def second_half(experts, optimizer, node):
        losses = [micro_batch(node, problems[3])]
        update(experts, optimizer, node)
        losses += [micro_batch(node, problem) for problem in problems[4:]]
        update(experts, optimizer, node)
        return {str(n): loss for n, loss in enumerate(losses)} | {f"w{n}": p for n, p in enumerate(params_of(experts))}

    experts, optimizer, node = make()
    for problem in problems[:2]:
        micro_batch(node, problem)
    update(experts, optimizer, node)
    micro_batch(node, problems[2])
    node.flush_grads()
    layer = paddle.nn.LayerList(experts)
    paddle.save(layer.state_dict(), str(tmp_path / "model.pdparams"))
    paddle.save(optimizer.state_dict(), str(tmp_path / "model.pdopt"))
    paddle.save({n: p.main_grad for n, p in layer.named_parameters()}, str(tmp_path / "main_grad.pd"))
    expected = second_half(experts, optimizer, node)

    experts, optimizer, node = make()
    forward_node(node, problems[0])  # its copies are of the initial weights, and must be of no use after loading
    layer = paddle.nn.LayerList(experts)
    layer.set_state_dict(paddle.load(str(tmp_path / "model.pdparams")))
    # Names of accumulators hold the parameters' own: a second model in one process has to borrow them.
    state = paddle.load(str(tmp_path / "model.pdopt"))
    optimizer.set_state_dict(rename(state, [p.name for p in params_of(experts)]))
    main_grads = paddle.load(str(tmp_path / "main_grad.pd"))
    for name, param in layer.named_parameters():
        param.main_grad = main_grads[name]
    assert_same_bits(second_half(experts, optimizer, node), expected)


def rename(state, names):
    """Optimizer state of the parameters in this order, under the names of another model's."""
    found = []
    for key in state:
        owner = key.split("_moment")[0].split("_beta")[0]
        if owner != key and owner not in found:
            found.append(owner)
    assert len(found) == len(names), state.keys()
    table = dict(zip(found, names, strict=True))
    renamed = {}
    for key, value in state.items():
        owner = next((owner for owner in table if key.startswith(f"{owner}_")), None)
        renamed[table[owner] + key.removeprefix(owner) if owner else key] = value
    return renamed


def test_a_model_that_is_copied_shares_no_state():
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    node, twin_experts = make_node(problem, experts), clone_experts(experts)
    twin = make_node(problem, twin_experts)
    Flight(node, problem).land()
    CHANGES["scale_"](experts)
    forward_node(node, problem)
    assert not twin.has_pending_grads and twin.weight_epoch == 0
    expected = fresh_results(twin_experts, problem)
    flight = Flight(twin, problem).land()
    twin.step()
    assert_same_bits({**flight.results(), **weight_grads(twin_experts)}, expected)
