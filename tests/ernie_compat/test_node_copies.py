"""A model that holds a node, copied whole: the copy is a model of its own, and the original never learns of it."""

import copy
import gc
import pickle
import threading

import numpy as np
import paddle
import pytest

from sonicmoe import SonicMoEConfig
from tests.support.lifecycle import (
    MAKE_EXPERTS,
    Flight,
    assert_same_bits,
    bits,
    fresh_results,
    host_bytes,
    nbytes,
    params_of,
    record_saved,
    series,
    weight_grads,
)
from tests.support.paddle_runs import forward_node, fused_experts, make_node
from tests.support.problems import make_problem

SMALL = {"n_tokens": 12, "n_experts": 3}
BF16 = SonicMoEConfig()
FP8 = SonicMoEConfig(use_fp8=True)
config_of = pytest.mark.parametrize("config", [BF16, FP8], ids=["bf16", "fp8"])
PROBLEMS = series(3, **SMALL)


class Model(paddle.nn.Layer):
    """Experts and their node, which comes first: whatever is copied first, the two must find each other."""

    def __init__(self, kind, config):
        super().__init__()
        made = MAKE_EXPERTS[kind](PROBLEMS[0])
        self.node = make_node(PROBLEMS[0], made, config=config)
        if kind == "fused":
            self.experts = made
        else:
            self.layers = paddle.nn.LayerList(made)

    def parts(self):
        return list(self.layers) if hasattr(self, "layers") else self.experts


class HoldsItsNode(paddle.nn.Layer):
    """Fused weights beside the node that reads them: the node's experts are the layer that is being copied."""

    def __init__(self, kind, config):
        super().__init__()
        made = fused_experts(PROBLEMS[0])
        self.node = None
        self.weight1, self.weight2 = made.weight1, made.weight2
        self.node = make_node(PROBLEMS[0], self, config=config)

    def parts(self):
        return type(fused_experts(PROBLEMS[0]))(weight1=self.weight1, weight2=self.weight2)


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


models = pytest.mark.parametrize(
    "make, kind", [(Model, "list"), (Model, "fused"), (HoldsItsNode, "fused")], ids=["list", "fused", "cycle"]
)
ways = pytest.mark.parametrize("copied", [by_deepcopy, by_pickle])


def step_results(model, problem) -> dict:
    """out, dx, ds and what a step adds to main_grad, which begins without any."""
    for param in params_of(model.parts()):
        param.main_grad = None
    flight = Flight(model.node, problem).land()
    model.node.step()
    return {**flight.results(), **weight_grads(model.parts())}


def change(model, factor=-0.5):
    with paddle.no_grad():
        for param in params_of(model.parts()):
            param.scale_(factor)


@ways
@config_of
@models
def test_each_follows_its_own_weights(make, kind, config, copied):
    """Both train, by turns, after the original has run: bits as if each were alone."""
    original = make(kind, config)
    Flight(original.node, PROBLEMS[0]).land()
    original.node.step()
    twin = copied(original)
    assert twin.node is not original.node and type(twin.node) is type(original.node)
    addresses = {param.data_ptr() for model in (original, twin) for param in params_of(model.parts())}
    assert len(addresses) == 2 * len(params_of(original.parts()))
    outs = set()
    for model, factor in ((twin, 1.0), (twin, -0.5), (original, 2.0), (twin, 1.5)):
        change(model, factor)
        for each in (original, twin):
            wanted = fresh_results(each.parts(), PROBLEMS[1], config=config)
            assert_same_bits(step_results(each, PROBLEMS[1]), wanted)
            outs.add(bits(wanted["out"]))
    assert len(outs) == 4, "these changes show in nothing"


@config_of
@models
def test_training_one_leaves_the_other_as_it_is(make, kind, config, monkeypatch):
    original = make(kind, config)
    kept = record_saved(monkeypatch)
    Flight(original.node, PROBLEMS[0]).land()
    original.node.flush_grads()
    twin = copy.deepcopy(original)
    for trained, other in ((twin, original), (original, twin)):
        forward_node(other.node, PROBLEMS[0])
        copies = kept[-1].weights
        before = {str(n): np.array(value.numpy()) for n, value in enumerate(params_of(other.parts()))}
        before |= {name: np.array(grad.numpy()) for name, grad in weight_grads(other.parts()).items()}
        epoch = other.node.weight_epoch
        change(trained)
        Flight(trained.node, PROBLEMS[1]).land()
        assert trained.node.has_pending_grads and not other.node.has_pending_grads
        trained.node.step()
        after = {str(n): value for n, value in enumerate(params_of(other.parts()))}
        assert_same_bits({**after, **weight_grads(other.parts())}, before)
        forward_node(other.node, PROBLEMS[0])
        assert kept[-1].weights is copies and other.node.weight_epoch == epoch


@config_of
@models
def test_gradients_under_way_reach_the_original_alone(make, kind, config):
    """One backward has run, one is still to come, one comes after the copy's own."""
    original = make(kind, config)
    for flown in [Flight(original.node, problem) for problem in PROBLEMS]:
        flown.land()
    original.node.step()
    expected = {name: np.array(grad.numpy()) for name, grad in weight_grads(original.parts()).items()}
    for param in params_of(original.parts()):
        param.main_grad = None
    flights = [Flight(original.node, problem) for problem in PROBLEMS]
    flights[0].land()
    twin = copy.deepcopy(original)
    flights[1].land()
    assert not twin.node.has_pending_grads
    twin.node.step()
    assert not weight_grads(twin.parts())
    assert_same_bits(step_results(twin, PROBLEMS[1]), fresh_results(twin.parts(), PROBLEMS[1], config=config))
    flights[2].land()
    assert not twin.node.has_pending_grads and original.node.has_pending_grads
    original.node.step()
    assert_same_bits(weight_grads(original.parts()), expected)


@config_of
@models
def test_a_copy_begins_like_a_new_node(make, kind, config):
    """And holds no more memory than its weights."""
    original = make(kind, config)
    Flight(original.node, PROBLEMS[0]).land()
    change(original)
    in_flight = Flight(original.node, PROBLEMS[1])
    assert original.node.weight_epoch == 2 and original.node.last_path is not None
    gc.collect()
    before = host_bytes()
    twin = copy.deepcopy(original)
    weights = nbytes(params_of(twin.parts()))
    assert weights <= host_bytes() - before < 1.05 * weights
    assert twin.node.last_path is None and twin.node.weight_epoch == 0 and not twin.node.has_pending_grads
    assert twin.node.config == config
    in_flight.land()


def test_frozen_experts_stay_frozen():
    original = Model("list", BF16)
    original.parts()[1].down_proj.weight.stop_gradient = True
    found = step_results(copy.deepcopy(original), PROBLEMS[0])
    assert "1.up_gate_proj" in found and "1.down_proj" not in found


def test_a_copy_waits_for_no_lock_of_the_original():
    """As one that is evaluated while the original's backward runs in another thread."""
    original, done = Model("list", FP8), []
    twin = copy.deepcopy(original)

    def step():
        done.append(step_results(twin, PROBLEMS[0]))

    with original.node._store._lock, original.node._grads._lock:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join(timeout=30)
        went_on = bool(done)
    thread.join()
    assert went_on


def test_what_was_accumulated_is_not_lost_in_a_pickle():
    model = Model("list", BF16)
    flight = Flight(model.node, PROBLEMS[0])
    pickle.dumps(model)  # of a call in flight nothing has been accumulated
    flight.land()
    with pytest.raises(RuntimeError, match="got pickled with weight gradients .*; call step"):
        pickle.dumps(model)
    model.node.flush_grads()
    pickle.dumps(model)


def test_a_node_copied_by_itself_has_experts_of_its_own():
    problem = make_problem(**SMALL)
    experts = MAKE_EXPERTS["list"](problem)
    node = make_node(problem, experts)
    twin = copy.deepcopy(node)
    Flight(twin, problem).land()
    twin.step()
    assert not weight_grads(experts) and not node.has_pending_grads
    both, other = copy.deepcopy((experts, node))
    Flight(other, problem).land()
    other.step()
    assert len(weight_grads(both)) == len(params_of(experts))
