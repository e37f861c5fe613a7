"""Callers' mistakes, at the node and at ``run_sonic_moe``: one readable line that names the argument, before anything
is computed or changed."""

import types

import numpy as np
import paddle
import pytest

from sonicmoe import SonicMoEConfig, SonicMoEMlpNode
from sonicmoe.ernie_compat import fused_grouped_w1_to_sonic, quantize_activation_blockscaled_fast, run_sonic_moe
from sonicmoe.ernie_compat.weights import WeightStore
from tests.support.lifecycle import (
    Flight,
    assert_same_bits,
    fly,
    forbid_engine,
    one_by_one,
    refused,
    series,
    weight_grads,
)
from tests.support.paddle_runs import (
    Expert,
    array,
    expert_list,
    forward_node,
    make_node,
    native_parameters,
    parameter,
    tensor,
)
from tests.support.problems import make_problem

pytestmark = pytest.mark.contract

PROBLEM = make_problem(n_tokens=12, n_experts=3)
T, H, I, E, K = 12, 128, 128, 3, 2
FP8 = SonicMoEConfig(use_fp8=True)


class MidStep:
    """A node after one backward and with a forward under way. An error must disturb neither, nor any later call."""

    def __init__(self, config=None):
        self.problems, self.config = series(3, n_tokens=T, n_experts=E), config
        self.experts = expert_list(self.problems[0])
        self.node = make_node(self.problems[0], self.experts, config=config)
        Flight(self.node, self.problems[0]).land()
        self.flight = Flight(self.node, self.problems[1])

    def state(self):
        store = self.node._store
        return self.node.last_path, store.epoch, list(store._copies), self.node.has_pending_grads

    def finish(self):
        self.flight.land()
        last = Flight(self.node, self.problems[2]).land()
        self.node.step()
        experts = expert_list(self.problems[0])
        node = make_node(self.problems[0], experts, config=self.config)
        results = fly(node, self.problems, one_by_one(3))
        node.step()
        assert_same_bits(self.flight.results(), results[1])
        assert_same_bits(last.results(), results[2])
        assert_same_bits(weight_grads(self.experts), weight_grads(experts))


# ---- What both entry points check: x, indices, probs, counts ---------------------------------------------------------

X, INDICES, PROBS, COUNTS = PROBLEM.x, PROBLEM.indices, PROBLEM.probs, PROBLEM.counts


def e4m3(rows=T):
    return quantize_activation_blockscaled_fast(tensor(X[:rows]))


def transposed_view(values):
    return tensor(np.ascontiguousarray(values.T)).transpose([1, 0])


def swapped(counts):
    """Another split with the right sum."""
    return [counts[1], counts[0], *counts[2:]]


assert COUNTS[0] != COUNTS[1]
NEEDS_X = "need bfloat16 or float16 or float32 or float8_e4m3fn"
NEEDS_INT = "need int32 or int64"
ONE_ROW = r": got shape \[12\], need 2 dimensions"

# name -> (argument and value, kind, message after the argument's name)
SHARED = {
    "x none": ("x", lambda: None, TypeError, ": got NoneType, need a tensor$"),
    "x numpy": ("x", lambda: X, TypeError, ": got ndarray, need a tensor$"),
    "x 1-d": ("x", lambda: tensor(X[0]), ValueError, r": got shape \[128\], need 2 dimensions \[T, H\]"),
    "x 3-d": ("x", lambda: tensor(X[None]), ValueError, r": got shape \[1, 12, 128\], need 2 dimensions \[T, H\]"),
    "x int": ("x", lambda: tensor(X, "int32"), TypeError, f": got dtype int32, {NEEDS_X}"),
    "x fp64": ("x", lambda: tensor(X, "float64"), TypeError, f": got dtype float64, {NEEDS_X}"),
    "x transposed": ("x", lambda: transposed_view(X), ValueError, ": got a non-contiguous tensor, need a contiguous"),
    "x strided": ("x", lambda: tensor(np.repeat(X, 2, 1))[:, ::2], ValueError, ": got a non-contiguous tensor"),
    "indices none": ("indices", lambda: None, TypeError, ": got NoneType, need a tensor"),
    "indices numpy": ("indices", lambda: INDICES, TypeError, ": got ndarray, need a tensor"),
    "indices float": ("indices", lambda: tensor(INDICES, "float32"), TypeError, f": got dtype float32, {NEEDS_INT}"),
    "indices int16": ("indices", lambda: tensor(INDICES, "int16"), TypeError, f": got dtype int16, {NEEDS_INT}"),
    "indices 1-d": ("indices", lambda: tensor(INDICES[:, 0], "int32"), ValueError, ONE_ROW),
    "indices T": ("indices", lambda: tensor(INDICES[:5], "int32"), ValueError, r": got shape \[5, 2\], need \[12, 2\]"),
    "probs none": ("probs", lambda: None, TypeError, ": got NoneType, need a tensor"),
    "probs bf16": ("probs", lambda: tensor(PROBS), TypeError, ": got dtype bfloat16, need float32"),
    "probs fp64": ("probs", lambda: tensor(PROBS, "float64"), TypeError, ": got dtype float64, need float32"),
    "probs 1-d": ("probs", lambda: tensor(PROBS[:, 0], "float32"), ValueError, ONE_ROW),
    "probs T": ("probs", lambda: tensor(PROBS[:5], "float32"), ValueError, r": got shape \[5, 2\], need \[12, 2\]"),
    "probs K": ("probs", lambda: tensor(PROBS[:, :1], "float32"), ValueError, r": got shape \[12, 1\], need \[12, 2\]"),
    "counts short": ("counts", lambda: COUNTS[:2], ValueError, ": got 2 counts, need one for each of 3 experts"),
    "counts long": ("counts", lambda: [*COUNTS, 0], ValueError, ": got 4 counts, need one for each of 3 experts"),
    "counts sum": ("counts", lambda: [COUNTS[0] - 1, *COUNTS[1:]], ValueError, r": .*sum 23.* \(sum 24\)$"),
    "counts split": ("counts", lambda: swapped(COUNTS), ValueError, ": .*expert 0 .*sum 24.* 9 .*sum 24"),
    "counts split numpy": ("counts", lambda: np.array(swapped(COUNTS)), ValueError, ": .*expert 0 "),
    "counts split tensor": ("counts", lambda: tensor(swapped(COUNTS), "int64"), ValueError, ": .*expert 0 "),
    "counts negative": ("counts", lambda: [-1, 12, 13], ValueError, r"\[0\]: got -1, need at least 0"),
    "counts fraction": ("counts", lambda: [7.5, 8, 8.5], TypeError, r"\[0\]: got 7.5, need an integer"),
    "counts fractions": ("counts", lambda: np.array([9, 7.5, 8]), TypeError, r"\[1\]: got 7.5, need an integer"),
    "counts nan": ("counts", lambda: [float("nan"), 8, 8], TypeError, r"\[0\]: got nan, need an integer"),
    "counts inf": ("counts", lambda: [float("inf"), 8, 8], TypeError, r"\[0\]: got inf, need an integer"),
    "counts bool": ("counts", lambda: [True, 12, 11], TypeError, r"\[0\]: got True, need an integer"),
    "counts 2-d": ("counts", lambda: [[9], [7], [8]], TypeError, r"\[0\]: got \[9\], need an integer"),
    "counts 2-d numpy": ("counts", lambda: np.array([COUNTS]), ValueError, ": got 1 counts, need one for each of 3"),
    "counts 0-d": ("counts", lambda: paddle.to_tensor(24), TypeError, ": got Tensor, need a list, NumPy array or int"),
    "counts text": ("counts", lambda: "978", TypeError, ": got str, need a list, NumPy array or int tensor"),
    "handle list": ("handle", lambda: [1], TypeError, ": got list, need a dict"),
    "handle text": ("handle", lambda: "data", TypeError, ": got str, need a dict"),
    "scale alone": ("scale", lambda: e4m3()[1], ValueError, ".*float8_e4m3fn"),
}
# The same argument under the two entry points' own names.
NODE_NAMES = {
    "x": "x",
    "indices": "dispatched_indices",
    "probs": "dispatched_probs",
    "counts": "tokens_per_expert",
    "handle": "fp8_combine_grad_handle",
    "scale": "dispatched_hidden_states_scales",
    "data": "dispatched_hidden_states_fp8",
}
FLEET_NAMES = {
    "x": "hidden_states",
    "indices": "topk_indices",
    "probs": "topk_scores",
    "counts": "tokens_per_expert",
    "handle": "fp8_combine_grad_handle",
    "scale": "fp8_scale",
    "data": "hidden_states_fp8",
}
# name -> (arguments, kind, message with {x} and so on for the names)
PAIRS = {
    "e4m3 without scales": (lambda: {"x": e4m3()[0]}, ValueError, "{scale}: got None"),
    "scales of other rows": (
        lambda: {"x": e4m3()[0], "scale": e4m3(5)[1]},
        ValueError,
        r"{scale}: got float32 \[5, 1\], need float32 \[12, 1\], uint8 \[12, 4\]",
    ),
    "scales 1-d": (lambda: {"x": e4m3()[0], "scale": e4m3()[1][0]}, ValueError, r"{scale}: got float32 \[1\], need"),
    "scales bf16": (
        lambda: {"x": e4m3()[0], "scale": e4m3()[1].astype("bfloat16")},
        ValueError,
        r"{scale}: got bfloat16 \[12, 1\], need float32 \[12, 1\], uint8 \[12, 4\], int32 \[12, 1\]",
    ),
    "scales list": (lambda: {"x": e4m3()[0], "scale": [1.0]}, TypeError, "{scale}: got list, need a tensor"),
    "data bf16": (
        lambda: {"data": tensor(X), "scale": e4m3()[1]},
        TypeError,
        "{data}: got dtype bfloat16, need float8_e4m3fn",
    ),
    "data without scales": (lambda: {"data": e4m3()[0]}, ValueError, "{scale}: got None"),
    "data of other rows": (
        lambda: dict(zip(("data", "scale"), e4m3(5), strict=True)),
        ValueError,
        r"{data}: got shape \[5, 128\], need \[12, 128\]",
    ),
    "data list": (lambda: {"data": [1.0], "scale": e4m3()[1]}, TypeError, "{data}: got list, need a tensor"),
    "e4m3 with gradient": (
        lambda: {"x": trainable_e4m3(), "scale": e4m3()[1]},
        ValueError,
        "{x}: got a float8_e4m3fn tensor that needs a gradient",
    ),
}


def trainable_e4m3():
    data = e4m3()[0].detach()
    data.stop_gradient = False
    return data


def shared_case(name, names):
    """(keyword arguments, kind, message) under one entry point's names."""
    if name in SHARED:
        argument, value, kind, message = SHARED[name]
        return {names[argument]: value()}, kind, f"{names[argument]}{message}"
    arguments, kind, message = PAIRS[name]
    message = message.replace("{x}", names["x"]).replace("{scale}", names["scale"]).replace("{data}", names["data"])
    return {names[argument]: value for argument, value in arguments().items()}, kind, message


def node_arguments(**changes):
    return {
        "x": tensor(X),
        "tokens_per_expert": COUNTS,
        "dispatched_indices": tensor(INDICES, "int32"),
        "dispatched_probs": tensor(PROBS, "float32"),
    } | changes


ONCE_AND_TWICE = [(name, False) for name in (*SHARED, *PAIRS)] + [(name, True) for name in PAIRS]
by_name = pytest.mark.parametrize(
    "name, fp8", ONCE_AND_TWICE, ids=[f"{name}-{'fp8' if fp8 else 'bf16'}" for name, fp8 in ONCE_AND_TWICE]
)


@by_name
def test_node_refuses(name, fp8, monkeypatch):
    changes, kind, message = shared_case(name, NODE_NAMES)
    step = MidStep(FP8 if fp8 else None)
    before = step.state()
    forbid_engine(monkeypatch)
    refused(lambda: step.node(**node_arguments(**changes)), kind, message)
    assert step.state() == before
    monkeypatch.undo()
    step.finish()


def fleet_arguments(**changes):
    w1, w2 = native_parameters(PROBLEM)
    return {
        "hidden_states": tensor(X),
        "topk_indices": tensor(INDICES, "int32"),
        "topk_scores": tensor(PROBS, "float32"),
        "K": K,
        "E": E,
        "w1": w1,
        "w2": w2,
    } | changes


@by_name
def test_fleet_refuses(name, fp8, monkeypatch):
    changes, kind, message = shared_case(name, FLEET_NAMES)
    arguments = fleet_arguments(fp8=fp8, **changes)
    forbid_engine(monkeypatch)
    refused(lambda: run_sonic_moe(**arguments), kind, message)


@pytest.mark.parametrize("config", [None, FP8], ids=["bf16", "fp8"])
def test_fp16_runs_or_is_refused_by_name(config):
    """Contract: accepted where the backend can run it, else a clear error. Never an operator's own complaint."""
    try:
        out = make_node(PROBLEM, config=config)(**node_arguments(x=tensor(X, "float16")))
    except TypeError as error:
        assert str(error).startswith("x: got dtype float16, need ") and "\n" not in str(error)
    else:
        assert out.dtype == paddle.float16 and np.isfinite(array(out)).all()


# ---- The node alone --------------------------------------------------------------------------------------------------

CONSTRUCTOR = {
    "experts short": ({"n_experts": 4}, ValueError, "^experts: got 3, need n_experts=4"),
    "experts none": ({"experts": None}, TypeError, "^experts: got NoneType, need a list of experts with"),
    "experts without": ({"experts": [object()] * 3}, TypeError, r"^experts\[0\]: got object without .up_gate_proj."),
    "n_experts zero": ({"n_experts": 0}, ValueError, "^n_experts: got 0, need at least 1"),
    "n_experts fraction": ({"n_experts": 2.5}, TypeError, "^n_experts: got 2.5, need an integer"),
    "n_experts inf": ({"n_experts": float("inf")}, TypeError, "^n_experts: got inf, need an integer"),
    "n_experts text": ({"n_experts": "3"}, TypeError, "^n_experts: got '3', need an integer"),
    "hidden_size": ({"hidden_size": -8}, ValueError, "^hidden_size: got -8, need at least 1"),
    "hidden_size other": ({"hidden_size": 64}, ValueError, r"^experts\[0\].up_gate_proj.weight: got shape \[128, 2"),
    "intermediate_size": ({"intermediate_size": None}, TypeError, "^intermediate_size: got None, need an integer"),
    "activation": ({"activation_type": "swish"}, ValueError, "^activation_type: got 'swish', need one of .*'swiglu'"),
    "activation none": ({"activation_type": None}, ValueError, "^activation_type: got None, need one of"),
    "not glu": ({"activation_type": "relu"}, ValueError, r"got shape \[128, 256\], need \[128, 128\] \(\[H, I\]\)"),
    "config dict": ({"config": {"fp8_mode": "perf"}}, TypeError, "^config: got dict, need a SonicMoEConfig or None"),
    "config class": ({"config": SonicMoEConfig}, TypeError, "^config: got type, need a SonicMoEConfig or None"),
    "stream_id": ({"stream_id": object()}, TypeError, "^stream_id: got object, need an integer handle"),
}


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_constructor_refuses(name):
    changes, kind, message = CONSTRUCTOR[name]
    sizes = {"n_experts": E, "hidden_size": H, "intermediate_size": I}
    refused(lambda: SonicMoEMlpNode(**{"experts": expert_list(PROBLEM), **sizes, **changes}), kind, message)


def with_weight(weight, part="down_proj"):
    expert = Expert(PROBLEM.w1[1], PROBLEM.w2[1])
    setattr(expert, part, types.SimpleNamespace(weight=weight))
    return expert


def holder(weight):
    return types.SimpleNamespace(weight=weight)


WEIGHTS = {
    "none": (lambda: None, TypeError, ": got NoneType, need a tensor"),
    "numpy": (lambda: PROBLEM.w2[1], TypeError, ": got ndarray, need a tensor"),
    "native layout": (lambda: tensor(PROBLEM.w1[1].T), ValueError, r": got shape \[256, 128\], need \[128, 128\] "),
    "stacked": (lambda: tensor(PROBLEM.w2), ValueError, r": got shape \[3, 128, 128\], need \[128, 128\]"),
    "int": (lambda: tensor(PROBLEM.w2[1], "int32"), TypeError, ": got dtype int32, need bfloat16 or float16 or "),
    "mixed": (
        lambda: tensor(PROBLEM.w2[1], "float32"),
        TypeError,
        r": got dtype float32, need bfloat16, which experts\[0\].up_gate_proj.weight has",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_checked_at_construction_and_at_every_call(name):
    value, kind, message = WEIGHTS[name]
    message = rf"^experts\[1\].down_proj.weight{message}"
    parts = [types.SimpleNamespace(up_gate_proj=e.up_gate_proj, down_proj=e.down_proj) for e in expert_list(PROBLEM)]
    node = make_node(PROBLEM, parts)
    right = parts[1].down_proj
    for _ in range(2):  # without a forward before, and behind one that found all right
        parts[1].down_proj = holder(value())
        refused(lambda: make_node(PROBLEM, parts), kind, message)
        refused(lambda: forward_node(node, PROBLEM), kind, message)
        parts[1].down_proj = right
        forward_node(node, PROBLEM)


def test_weights_that_are_as_they_were_are_not_checked_again(monkeypatch):
    """With many experts the checks would take most of a forward's time on the host."""
    experts = expert_list(PROBLEM)
    node = make_node(PROBLEM, experts)
    forward_node(node, PROBLEM)
    looked, check = [], WeightStore.check
    monkeypatch.setattr(WeightStore, "check", lambda store: looked.append(store) or check(store))
    for _ in range(3):
        forward_node(node, PROBLEM)
    assert not looked
    weight = experts[1].down_proj
    weight.weight = parameter(weight.weight.astype("float32").numpy())
    forward_node(node, PROBLEM)
    assert len(looked) == 1


def test_an_expert_without_its_projection():
    experts = expert_list(PROBLEM)
    del experts[1].down_proj
    refused(lambda: make_node(PROBLEM, experts), TypeError, r"^experts\[1\]: got Expert without .down_proj.weight")


def test_fused_weights_in_the_wrong_layout():
    native = types.SimpleNamespace(weight1=fused_grouped_w1_to_sonic(tensor(PROBLEM.w1)), weight2=tensor(PROBLEM.w2))
    refused(
        lambda: make_node(PROBLEM, native),
        ValueError,
        r"^experts.weight1: got shape \[3, 256, 128\], need \[3, 128, 256\] \(\[E, H, 2I\]\)",
    )


def test_a_weight_that_the_tape_made_of_others():
    """Its own main_grad would get the gradient, and be gone with it."""
    parts = dict(zip(("w1", "w2"), native_parameters(PROBLEM, dtype="float32"), strict=True))
    for name, leaf in parts.items():
        given = fleet_arguments(**{name: leaf.astype("bfloat16")})
        message = f"^{name}: got a tensor that was made from others on the tape, need a leaf"
        refused(lambda given=given: run_sonic_moe(**given), ValueError, message)
    up, made = expert_list(PROBLEM)[2].up_gate_proj.weight, parts["w2"][0].t().astype("bfloat16")
    node = make_node(
        PROBLEM, [*expert_list(PROBLEM)[:2], types.SimpleNamespace(up_gate_proj=holder(up), down_proj=holder(made))]
    )
    message = r"^experts\[2\].down_proj.weight: got a tensor that was made from others"
    refused(lambda: forward_node(node, PROBLEM), ValueError, message)
    with paddle.no_grad():
        forward_node(node, PROBLEM)
    made.main_grad = paddle.zeros(made.shape)  # now somebody has a place for it
    out, _, _ = forward_node(node, PROBLEM)
    out.backward(tensor(PROBLEM.dout))
    node.step()
    assert float(made.main_grad.abs().sum()) > 0


def test_emptied_storage_of_a_nodes_weight():
    experts = expert_list(PROBLEM)
    node = make_node(PROBLEM, experts)
    forward_node(node, PROBLEM)
    experts[2].down_proj.weight._clear_data()
    with pytest.raises(ValueError, match=r"^experts\[2\].down_proj.weight: its storage is empty.* reads its weights"):
        forward_node(node, PROBLEM)


def test_x_of_another_width():
    refused(
        lambda: make_node(PROBLEM)(**node_arguments(x=tensor(X[:, :64]))),
        ValueError,
        r"^x: got shape \[12, 64\], need \[12, 128\]",
    )


def without_memory(shape):
    made = paddle.zeros(shape)
    made._clear_data()
    return made


MAIN_GRADS = {
    "shape": (lambda: paddle.zeros([128, 64]), ValueError, r"got shape \[128, 64\], need \[128, 128\]"),
    "flat": (lambda: paddle.zeros([128 * 128]), ValueError, r"got shape \[16384\], need \[128, 128\]"),
    "bf16": (lambda: paddle.zeros([128, 128], "bfloat16"), TypeError, "got dtype bfloat16, need float32"),
    "numpy": (lambda: np.zeros([128, 128], np.float32), TypeError, "got ndarray, need a tensor"),
    "emptied": (lambda: without_memory([128, 128]), ValueError, "got a tensor whose storage is empty, need float32"),
}


@pytest.mark.parametrize("name", MAIN_GRADS)
def test_node_main_grad(name):
    value, kind, message = MAIN_GRADS[name]
    step = MidStep()
    weight = step.experts[1].down_proj.weight
    weight.main_grad = value()
    refused(step.node.step, kind, rf"^experts\[1\].down_proj.weight.main_grad: {message}")
    weight.main_grad = None
    assert not weight_grads(step.experts), "some were added to before the error"
    step.finish()


@pytest.mark.parametrize("name, value", [("n_tokens", -1), ("n_tokens", "many"), ("n_tokens", 2.5), ("topk", -3)])
def test_warmup_arguments(name, value):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: got .*, need ") as caught:
        make_node(PROBLEM).warmup(**{name: value})
    assert "\n" not in str(caught.value)
