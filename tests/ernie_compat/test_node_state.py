"""State belongs to a node and to a call: whatever the order of forwards and backwards, each gets its own numbers."""

import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.utils import recompute

from sonicmoe import SonicMoEConfig
from tests.support.floors import relative_error
from tests.support.lifecycle import (
    MAKE_EXPERTS,
    Flight,
    assert_same_bits,
    bits,
    clone_experts,
    expert_mlp,
    fly,
    fresh_results,
    interleaved,
    one_by_one,
    one_forward_one_backward,
    params_of,
    record_saved,
    series,
    together,
    weight_grads,
)
from tests.support.paddle_runs import array, expert_list, forward_node, make_node, tensor
from tests.support.problems import make_problem

SMALL = {"n_tokens": 12, "n_experts": 3}
BF16 = SonicMoEConfig()
FP8 = SonicMoEConfig(use_fp8=True)
CONFIGS = {
    "bf16": BF16,
    "fp8": FP8,
    "sm100_wgrad": SonicMoEConfig(use_fp8=True, fp8_recipe="sm100", fp8_wgrad=True),
    "recompute_z": SonicMoEConfig(use_fp8=True, fp8_recompute_z=True),
    "mem": SonicMoEConfig(fp8_mode="mem"),
    "bf16_stagewise": SonicMoEConfig(stagewise_memory=True),
}
config_of = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def sequential(experts, problems, config):
    """Results of every micro-batch and the weight gradients of the plain order, on a model of its own."""
    copy = clone_experts(experts)
    node = make_node(problems[0], copy, config=config)
    results = fly(node, problems, one_by_one(len(problems)))
    node.step()
    return results, weight_grads(copy)


# ---- Accumulation and order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
def test_many_micro_batches_accumulate_exactly_the_sum(config):
    problems = series(10, **SMALL)
    experts = expert_list(problems[0])
    node = make_node(problems[0], experts, config=config)
    total = {}
    for problem in problems:
        Flight(node, problem).land()
        alone = fresh_results(experts, problem, config=config)
        for name in ("0.up_gate_proj", "1.down_proj", "2.up_gate_proj"):
            if name in alone:
                total[name] = total.get(name, np.float32(0)) + alone[name].numpy()
    node.step()
    grads = weight_grads(experts)
    assert_same_bits({name: grads[name] for name in total}, total)
    assert len(total) == 3


@pytest.mark.parametrize("kind", MAKE_EXPERTS)
@pytest.mark.parametrize("warmup", [1, 2, 3, 8])
def test_one_forward_one_backward_is_the_plain_order_bit_for_bit(warmup, kind):
    problems = series(6, **SMALL)
    experts = MAKE_EXPERTS[kind](problems[0])
    expected, expected_grads = sequential(experts, problems, BF16)
    node = make_node(problems[0], experts)
    for result, wanted in zip(fly(node, problems, one_forward_one_backward(6, warmup)), expected, strict=True):
        assert_same_bits(result, wanted)
    node.step()
    assert_same_bits(weight_grads(experts), expected_grads)


@config_of
def test_one_forward_one_backward_under_every_memory_policy(config):
    problems = series(4, **SMALL)
    experts = expert_list(problems[0])
    expected, expected_grads = sequential(experts, problems, config)
    node = make_node(problems[0], experts, config=config)
    for result, wanted in zip(fly(node, problems, one_forward_one_backward(4, 3)), expected, strict=True):
        assert_same_bits(result, wanted)
    node.step()
    assert_same_bits(weight_grads(experts), expected_grads)


@pytest.mark.parametrize("chunks, warmup", [(2, 2), (2, 5), (3, 4), (3, 9)])
def test_virtual_stages_that_take_turns(chunks, warmup):
    problems = [series(4, seed=10 * c, **SMALL) for c in range(chunks)]
    experts = [expert_list(part[0]) for part in problems]
    nodes = [make_node(part[0], e) for part, e in zip(problems, experts, strict=True)]
    flights = {}
    for action, chunk, number in interleaved(4, chunks, warmup):
        if action == "F":
            flights[chunk, number] = Flight(nodes[chunk], problems[chunk][number])
        else:
            flights[chunk, number].land()
    for chunk in range(chunks):
        expected, expected_grads = sequential(experts[chunk], problems[chunk], BF16)
        nodes[chunk].step()
        assert_same_bits(weight_grads(experts[chunk]), expected_grads)
        for number in range(4):
            assert_same_bits(flights[chunk, number].results(), expected[number])


def test_interleaved_schedule_is_whole():
    """The schedule above, itself: each backward after its forward, all of them once, micro-batches in order."""
    for count, chunks, warmup in [(4, 2, 2), (4, 2, 5), (4, 3, 4), (4, 3, 9), (3, 2, 2)]:
        order = interleaved(count, chunks, warmup)
        assert len(set(order)) == len(order) == 2 * count * chunks
        place = {step: number for number, step in enumerate(order)}
        assert all(place["F", c, n] < place["B", c, n] for c in range(chunks) for n in range(count))


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (2, 0, 3, 1)])
@pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
def test_backward_in_any_order(config, order):
    problems = series(4, **SMALL)
    experts = expert_list(problems[0])
    expected, expected_grads = sequential(experts, problems, config)
    node = make_node(problems[0], experts, config=config)
    schedule = [("F", n) for n in range(4)] + [("B", n) for n in order]
    for result, wanted in zip(fly(node, problems, schedule), expected, strict=True):
        assert_same_bits(result, wanted)
    node.step()
    grads = weight_grads(experts)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert relative_error(array(grad), array(expected_grads[name])) < 1e-6, name


# ---- Recompute, retained graphs --------------------------------------------------------------------------------------


@config_of
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recompute_gives_the_same_bits(use_reentrant, config):
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    expected = fresh_results(experts, problem, config=config)
    node = make_node(problem, experts, config=config)
    forwards = []

    def recomputed(node, problem):
        x, probs = tensor(problem.x, grad=True), tensor(problem.probs, "float32", grad=True)
        indices = paddle.to_tensor(problem.indices)

        def layer(x, probs):
            forwards.append(1)
            return node(x, problem.counts, indices, probs)

        return recompute(layer, x, probs, use_reentrant=use_reentrant), x, probs

    flight = Flight(node, problem, call=recomputed)
    assert len(forwards) == 1
    flight.land()
    # Without re-entrance Paddle runs forward again only for tensors that ops have saved through its own hooks.
    assert len(forwards) == 2 or not use_reentrant
    node.step()
    assert_same_bits({**flight.results(), **weight_grads(experts)}, expected)


@pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
def test_a_retained_graph_runs_twice_and_adds_twice(config):
    # paddle.grad, because stock Paddle ends the process when .backward() comes twice to any PyLayer.
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    expected = fresh_results(experts, problem, config=config)
    node = make_node(problem, experts, config=config)
    out, x, probs = forward_node(node, problem)
    for _ in range(2):
        dx, ds = paddle.grad(out, [x, probs], tensor(problem.dout), retain_graph=True)
        assert_same_bits({"dx": dx, "ds": ds}, {"dx": expected["dx"], "ds": expected["ds"]})
    node.step()
    for name, grad in weight_grads(experts).items():
        assert bits(grad) == bits(2 * expected[name]), name


@pytest.mark.parametrize("wanted", ["x", "probs"])
def test_a_second_derivative_is_an_error(wanted):
    """The first one is exact. Without a word, Paddle would take the second for 0."""
    problem = make_problem(**SMALL)
    node = make_node(problem, expert_list(problem, "float32"))
    plain = Flight(node, problem, dtype="float32").land()
    out, x, probs = forward_node(node, problem, dtype="float32")
    dx, ds = paddle.grad(out, [x, probs], tensor(problem.dout, "float32"), create_graph=True)
    assert_same_bits({"dx": dx, "ds": ds}, {"dx": plain.x.grad, "ds": plain.probs.grad})
    with pytest.raises(Exception, match="experts: .* can be differentiated only once"):
        ({"x": dx, "probs": ds}[wanted] ** 2).sum().backward()


def test_a_second_backward_under_stagewise_memory_says_why(monkeypatch):
    problem = make_problem(**SMALL)
    calls = record_saved(monkeypatch)
    node = make_node(problem, config=CONFIGS["bf16_stagewise"])
    out, x, probs = forward_node(node, problem)
    (saved,) = calls
    out.backward(tensor(problem.dout))
    assert saved.x is None and saved.z is None and saved.weights is None
    with pytest.raises(RuntimeError, match="^backward ran a second time, but stage-wise memory released"):
        expert_mlp.backward(saved, tensor(problem.dout))
    node.step()
    assert_same_bits({"dx": x.grad}, {"dx": fresh_results(expert_list(problem), problem)["dx"]})


@pytest.mark.parametrize("change", ["add_", "setitem"])
def test_x_changed_in_place_before_its_backward_is_an_error(change):
    """As with any operator that keeps its input: Paddle's own refuse, and a wrong dW would say nothing."""
    problem = make_problem(**SMALL)
    experts = expert_list(problem, "float32")
    node = make_node(problem, experts)
    x = tensor(problem.x, "float32", grad=True) * 1.0
    probs, indices = tensor(problem.probs, "float32"), tensor(problem.indices, "int32")
    out = node(x, problem.counts, indices, probs)
    if change == "add_":
        x.add_(paddle.ones_like(x))
    else:
        x[3] = 0.0
    with pytest.raises(Exception, match=r"x: .*in place"):
        out.backward(tensor(problem.dout, "float32"))
    assert not node.has_pending_grads


# ---- Layers and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
def test_layers_share_nothing(count, config):
    """All forwards up the stack, all backwards down, step in another order: each layer as if it were alone."""
    problems = [make_problem(seed=n, n_tokens=5 + n, n_experts=2 + n % 2) for n in range(count)]
    experts = [expert_list(problem) for problem in problems]
    nodes = [make_node(problem, e, config=config) for problem, e in zip(problems, experts, strict=True)]
    flights = [Flight(node, problem) for node, problem in zip(nodes, problems, strict=True)]
    for flight in reversed(flights):
        flight.land()
    for node in nodes[1::2] + nodes[::2]:
        node.step()
    for flight, e, problem in zip(flights, experts, problems, strict=True):
        assert_same_bits({**flight.results(), **weight_grads(e)}, fresh_results(e, problem, config=config))
    pointers = [grad.data_ptr() for e in experts for grad in weight_grads(e).values()]
    assert len(set(pointers)) == len(pointers)


def test_an_unflushed_node_next_to_a_flushed_one():
    problems = [make_problem(seed=n, **SMALL) for n in range(2)]
    experts = [expert_list(problem) for problem in problems]
    first, second = (make_node(p, e) for p, e in zip(problems, experts, strict=True))
    for node, problem in ((first, problems[0]), (second, problems[1])):
        Flight(node, problem).land()
    first.step()
    assert not first.has_pending_grads and second.has_pending_grads
    assert weight_grads(experts[1]) == {}
    Flight(first, problems[0]).land()
    second.step()
    assert first.has_pending_grads and not second.has_pending_grads
    for e, problem in zip(experts, problems, strict=True):
        expected = fresh_results(e, problem)
        for name, grad in weight_grads(e).items():
            assert bits(grad) == bits(expected[name])


@pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
def test_two_threads_with_a_node_each(config):
    problems = [make_problem(seed=n, **SMALL) for n in range(2)]
    experts = [expert_list(problem) for problem in problems]
    expected = [fresh_results(e, p, config=config) for e, p in zip(experts, problems, strict=True)]
    nodes = [make_node(p, e, config=config) for p, e in zip(problems, experts, strict=True)]

    def train(number):
        results = []
        for _ in range(5):
            flight = Flight(nodes[number], problems[number]).land()
            nodes[number].step()
            results.append({**flight.results(), **{n: g.clone() for n, g in weight_grads(experts[number]).items()}})
            for param in params_of(experts[number]):
                param.main_grad = None
        return results

    for number, results in enumerate(together(lambda: train(0), lambda: train(1))):
        for result in results:
            assert_same_bits(result, expected[number])


@pytest.mark.parametrize("config", [BF16, FP8, CONFIGS["mem"]], ids=["bf16", "fp8", "mem"])
def test_two_threads_on_one_node(config):
    problems = series(2, **SMALL)
    experts = expert_list(problems[0])
    expected, expected_grads = sequential(experts, problems, config)
    node = make_node(problems[0], experts, config=config)
    for _ in range(5):
        flights = together(*(lambda p=p: Flight(node, p).land() for p in problems))
        for flight, wanted in zip(flights, expected, strict=True):
            assert_same_bits(flight.results(), wanted)
        node.step()
        # Two terms have one sum in either order, so even the weight gradients must agree to the bit.
        assert_same_bits(weight_grads(experts), expected_grads)
        for param in params_of(experts):
            param.main_grad = None


def test_two_threads_add_to_one_buffer():
    """One token and a large weight: nearly all of backward is the addition, where the two must not meet."""
    problems = series(2, n_tokens=1, n_experts=1, topk=1, hidden=512, intermediate=1024)
    experts = expert_list(problems[0])
    _, expected_grads = sequential(experts, problems, BF16)
    node = make_node(problems[0], experts)
    for _ in range(12):
        flights = [Flight(node, problem) for problem in problems]
        together(*(flight.land for flight in flights))
        node.step()
        assert_same_bits(weight_grads(experts), expected_grads)
        for param in params_of(experts):
            param.main_grad = None


def test_forward_in_one_thread_and_backward_in_another():
    problems = series(2, **SMALL)
    experts = expert_list(problems[0])
    _, expected_grads = sequential(experts, problems, FP8)
    node = make_node(problems[0], experts)
    with FP8.activate():  # the other thread does not see this config: backward must not ask for it
        flights = [Flight(node, problem) for problem in problems]
    together(flights[0].land)
    together(flights[1].land)
    node.step()
    assert_same_bits(weight_grads(experts), expected_grads)


# ---- What takes a gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKE_EXPERTS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)], ids=["w1", "w2", "both"])
def test_frozen_weights(kind, frozen):
    problem = make_problem(**SMALL)
    experts = MAKE_EXPERTS[kind](problem)
    expected = fresh_results(experts, problem)
    params = params_of(experts)
    for number, param in enumerate(params):
        param.stop_gradient = number % 2 in frozen
    node = make_node(problem, experts)
    flight = Flight(node, problem).land()
    assert node.has_pending_grads == (len(frozen) == 1)
    node.step()
    assert_same_bits(flight.results(), {name: expected[name] for name in ("out", "dx", "ds")})
    for number, param in enumerate(params):
        assert (getattr(param, "main_grad", None) is None) == (number % 2 in frozen)
    for name, grad in weight_grads(experts).items():
        assert bits(grad) == bits(expected[name])

    for param in params:  # unfrozen later, with no word to the node
        param.stop_gradient, param.main_grad = False, None
    Flight(node, problem).land()
    node.step()
    assert_same_bits(weight_grads(experts), {name: expected[name] for name in expected.keys() - {"out", "dx", "ds"}})


def test_some_experts_frozen():
    problem = make_problem(n_tokens=20, n_experts=4)
    experts = expert_list(problem)
    expected = fresh_results(experts, problem)
    frozen = {"1.up_gate_proj", "1.down_proj", "2.down_proj"}
    for name in frozen:
        number, part = name.split(".")
        getattr(experts[int(number)], part).weight.stop_gradient = True
    node = make_node(problem, experts)
    flight = Flight(node, problem).land()
    node.step()
    trained = {name: value for name, value in expected.items() if name not in frozen}
    assert_same_bits({**flight.results(), **weight_grads(experts)}, trained)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=["x", "probs", "none"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_inputs_with_and_without_gradient(needs, frozen):
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    expected = fresh_results(experts, problem)
    for param in params_of(experts):
        param.stop_gradient = frozen
    node = make_node(problem, experts)
    out, x, probs = forward_node(node, problem, grad=needs)
    assert out.stop_gradient == (frozen and not any(needs))
    if not out.stop_gradient:
        out.backward(tensor(problem.dout))
    node.step()
    for name, value, needed in (("dx", x.grad, needs[0]), ("ds", probs.grad, needs[1])):
        assert (value is not None) == needed
        assert not needed or bits(value) == bits(expected[name])
    grads = {} if frozen else {n: g for n, g in expected.items() if n not in ("out", "dx", "ds")}
    assert_same_bits(weight_grads(experts), grads)


# ---- main_grad -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKE_EXPERTS)
def test_main_grad_is_added_to_in_place_and_only_by_step(kind):
    problem = make_problem(**SMALL)
    experts = MAKE_EXPERTS[kind](problem)
    expected = fresh_results(experts, problem)
    params = params_of(experts)
    # One flat buffer for all of them, as a sharding optimizer lays it out.
    sizes = [int(np.prod(param.shape)) for param in params]
    flat = paddle.full([sum(sizes)], 0.5, dtype="float32")
    given, start = [], 0
    for param, size in zip(params, sizes, strict=True):
        param.main_grad = flat[start : start + size].reshape(param.shape)
        assert param.main_grad.data_ptr() == flat.data_ptr() + 4 * start
        given.append((param.main_grad, param.main_grad.data_ptr()))
        start += size
    node = make_node(problem, experts)
    Flight(node, problem).land()
    assert (flat.numpy() == 0.5).all(), "main_grad shows something before step()"
    node.step()
    for param, (tensor_given, pointer), (name, grad) in zip(params, given, weight_grads(experts).items(), strict=True):
        assert param.main_grad is tensor_given and param.main_grad.data_ptr() == pointer
        assert bits(grad) == bits(expected[name] + 0.5)
        assert param.grad is None
    assert bits(flat) == b"".join(bits(grad) for grad, _ in given)
    before = bits(flat)
    node.step()
    node.flush_grads()
    assert bits(flat) == before, "a second step() added something"


def test_flush_grads_and_discard_grads():
    problems = series(3, **SMALL)
    experts = expert_list(problems[0])
    node = make_node(problems[0], experts)
    parts = [fresh_results(experts, problem) for problem in problems]
    Flight(node, problems[0]).land()
    node.flush_grads()
    Flight(node, problems[1]).land()
    node.discard_grads()
    assert not node.has_pending_grads
    node.step()
    for name, grad in weight_grads(experts).items():
        assert bits(grad) == bits(parts[0][name])
    Flight(node, problems[2]).land()
    node.step()
    for name, grad in weight_grads(experts).items():
        assert bits(grad) == bits(parts[0][name] + parts[2][name])


def test_a_failing_step_keeps_what_was_accumulated():
    problem = make_problem(**SMALL)
    experts = expert_list(problem)
    expected = fresh_results(experts, problem)
    node = make_node(problem, experts)
    Flight(node, problem).land()
    last = experts[2].down_proj.weight
    last.main_grad = paddle.zeros(last.shape, dtype="bfloat16")
    with pytest.raises(TypeError, match=r"^experts\[2\].down_proj.weight.main_grad: got dtype bfloat16, need float32$"):
        node.step()
    assert node.has_pending_grads
    assert list(weight_grads(experts)) == ["2.down_proj"]
    last.main_grad = None
    node.step()
    for name, grad in weight_grads(experts).items():
        assert bits(grad) == bits(expected[name])
