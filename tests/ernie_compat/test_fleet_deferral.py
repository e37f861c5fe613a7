"""Parameters' backward hooks under ``run_sonic_moe``, and weight gradients that a pipeline runs later."""

import paddle
import pytest

from sonicmoe.ernie_compat import handover
from sonicmoe.functional import set_wgrad_deferral_hook
from tests.support.fleet_calls import RECIPES, SMALL, Call, activations_of, once
from tests.support.lifecycle import assert_same_bits, bits, host_bytes, series, together
from tests.support.paddle_runs import array, native_parameters
from tests.support.problems import make_problem


@pytest.fixture
def deferral():
    yield set_wgrad_deferral_hook
    set_wgrad_deferral_hook(None)


def recording_hooks(weights):
    """What each parameter's backward hook found in main_grad when it fired, in order."""
    fired = []
    for name, weight in zip(("w1", "w2"), weights, strict=True):
        # Paddle hands these hooks no argument.
        weight._register_backward_hook(lambda *_, n=name, w=weight: fired.append((n, bits(w.main_grad))))
    return fired


def test_backward_hooks_fire_once_and_find_the_whole_sum():
    problems = series(2, **SMALL)
    parts = [once(problem) for problem in problems]
    weights = native_parameters(problems[0])
    fired = recording_hooks(weights)
    call = Call(problems[0], weights)
    assert fired == []
    call.land()
    assert sorted(fired) == [("w1", bits(parts[0]["dw1"])), ("w2", bits(parts[0]["dw2"]))]
    fired.clear()
    Call(problems[1], weights).land()
    both = {name: bits(parts[0][name] + parts[1][name]) for name in ("dw1", "dw2")}
    assert sorted(fired) == [("w1", both["dw1"]), ("w2", both["dw2"])]


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)], ids=["w1", "w2", "both"])
def test_a_frozen_weight_gets_neither_hook_nor_main_grad(frozen):
    problem = make_problem(**SMALL)
    expected = once(problem)
    weights = native_parameters(problem)
    fired = recording_hooks(weights)
    for number in frozen:
        weights[number].stop_gradient = True
    results = Call(problem, weights).land().results()
    assert [name for name, _ in sorted(fired)] == [n for i, n in enumerate(("w1", "w2")) if i not in frozen]
    assert_same_bits(results, {name: expected[name] for name in results})
    assert len(results) == 5 - len(frozen)


@pytest.mark.parametrize("taken", [("w1", "w2"), ("w1",), ("w2",), ()], ids=["both", "w1", "w2", "none"])
@pytest.mark.parametrize("name", ["bf16", *RECIPES])
def test_deferred_weight_gradients(name, taken, deferral):
    config, fp8 = RECIPES.get(name), name in RECIPES
    problems = series(2, **SMALL)
    expected = [once(problem, fp8, fp8_config=config) for problem in problems]
    weights = native_parameters(problems[0])
    fired, queue, offered = recording_hooks(weights), [], []

    def hook(point, weight, run_wgrad):
        offered.append((point, weight))
        if point not in taken:
            return False
        queue.append((point, weight, run_wgrad))
        return True

    deferral(hook)
    calls = [Call(problem, weights, fp8, fp8_config=config).land() for problem in problems]
    deferral(None)
    assert sorted(point for point, _ in offered) == ["w1", "w1", "w2", "w2"]
    assert all(weight is weights[int(point[1]) - 1] for point, weight in offered)
    for number, (point, weight) in enumerate(zip(("w1", "w2"), weights, strict=True)):
        found = [grad for name_, grad in fired if name_ == point]
        total = bits(expected[0][f"dw{number + 1}"] + expected[1][f"dw{number + 1}"])
        if point in taken:
            assert found == [] and getattr(weight, "main_grad", None) is None
        else:
            assert found[-1] == total and len(found) == 2
    for call, wanted in zip(calls, expected, strict=True):
        assert_same_bits(call.activations(), activations_of(wanted))
    del calls, call  # what is queued must live by itself
    for _, _, run_wgrad in queue:
        run_wgrad()
    for number, weight in enumerate(weights):
        assert bits(weight.main_grad) == bits(expected[0][f"dw{number + 1}"] + expected[1][f"dw{number + 1}"])


def deferred(problem, deferral):
    """(call, its owed gradients) of a call whose backward has run."""
    queue = []
    deferral(lambda point, weight, run_wgrad: queue.append(run_wgrad) is None)
    call = Call(problem, native_parameters(problem)).land()
    deferral(None)
    return call, queue


def test_a_gradient_counts_once(deferral):
    problem = make_problem(**SMALL)
    call, queue = deferred(problem, deferral)
    for run_wgrad in queue:
        run_wgrad()
        with pytest.raises(RuntimeError, match="^run_wgrad: called again for w[12]"):
            run_wgrad()
    assert_same_bits(call.results(), once(problem))
    deferral(lambda point, weight, run_wgrad: run_wgrad())  # has run it, and says that it has not
    with pytest.raises(Exception, match="run_wgrad: called again for w2"):
        Call(problem, native_parameters(problem)).land()


def test_activations_that_change_before_a_deferred_gradient(deferral):
    call, queue = deferred(make_problem(**SMALL), deferral)
    with paddle.no_grad():
        call.x.zero_()
    for run_wgrad in queue:
        with pytest.raises(RuntimeError, match="^run_wgrad: x or the gradient of the output changed in place"):
            run_wgrad()
    assert [getattr(weight, "main_grad", None) for weight in call.weights] == [None, None]


def test_what_is_owed_dies_when_it_is_done(deferral):
    problem = make_problem(**SMALL)
    call, queue = deferred(problem, deferral)
    del call
    before = host_bytes()
    for run_wgrad in queue:
        run_wgrad()
    grads = 4 * (problem.w1.size + problem.w2.size)
    assert host_bytes() - grads < before, "activations outlive the gradients that were made of them"


@pytest.mark.parametrize("which", [0, 1])
def test_a_main_grad_that_changes_behind_forward_is_looked_at_again(which):
    problem = make_problem(**SMALL)
    weights = native_parameters(problem)
    call = Call(problem, weights)
    weights[which].main_grad = paddle.zeros([3, 256, 128] if which == 0 else [3, 128, 128], dtype="bfloat16")
    with pytest.raises(Exception, match=f"w{which + 1}.main_grad: got dtype bfloat16, need float32"):
        call.land()
    assert not array(weights[which].main_grad).any()


def test_none_resets_the_deferral_hook(deferral):
    problem = make_problem(**SMALL)
    deferral(lambda *_: True)
    weights = native_parameters(problem)
    Call(problem, weights).land()
    assert getattr(weights[0], "main_grad", None) is None
    deferral(None)
    assert_same_bits(Call(problem, weights).land().results(), once(problem))


@pytest.mark.parametrize("given", [False, True], ids=["absent", "given"])
def test_two_threads_on_the_same_parameters(given, deferral):
    """The accumulation of both calls at the same moment, again and again; it is where their paths meet."""
    problems = series(2, **SMALL)
    parts = [once(problem) for problem in problems]
    weights = native_parameters(problems[0])
    queue = {"w1": [], "w2": []}
    deferral(lambda point, weight, run_wgrad: queue[point].append(run_wgrad) is None)
    for number in range(40):
        for problem in problems:
            Call(problem, weights).land()
        for name, weight, part in zip(("w1", "w2"), weights, ("dw1", "dw2"), strict=True):
            weight.main_grad = paddle.zeros(parts[0][part].shape) if given else None
            together(*queue.pop(name))
            queue[name] = []
            total = bits(parts[0][part] + parts[1][part])
            assert bits(weight.main_grad) == total, f"{name}, round {number}: a gradient is lost"


class Event:
    """Writes down what streams are asked for."""

    said: list

    def record(self, stream):
        self.said.append(("record", stream))

    def wait(self, stream):
        self.said.append(("wait", stream))


@pytest.mark.parametrize("later", [7, 8], ids=["same stream", "another stream"])
def test_streams_of_a_deferred_gradient(later, monkeypatch):
    """Another stream runs it between what the backward's had queued and what that one does next."""
    said, now = [], [7]
    monkeypatch.setattr(Event, "said", said, raising=False)
    monkeypatch.setattr(handover.cuda_driver, "Event", Event)
    monkeypatch.setattr(handover.checks, "is_cpu", lambda tensor: False)
    monkeypatch.setattr(handover, "is_cuda", lambda tensor: True)
    monkeypatch.setattr(handover, "make_current", lambda tensor: None)
    monkeypatch.setattr(handover, "current_stream", lambda tensor: now[0])
    found = handover.Handover(None)
    now[0] = later
    with found.here():
        said.append("work")
    ordered = [("wait", 8), "work", ("record", 8), ("wait", 7)]
    assert said == [("record", 7), *(["work"] if later == 7 else ordered)]
