"""Micro-batches in flight: schedules, exact comparison, what a call keeps, and runs in threads or child processes."""

import os
import pathlib
import subprocess
import sys
import threading
from dataclasses import fields, is_dataclass, replace

import numpy as np
import paddle
import pytest
from paddle.base import core

from sonicmoe.ernie_compat import SonicMoEMlpNode, mlp_node

from .paddle_runs import Expert, expert_list, forward_node, fused_experts, make_node, tensor
from .problems import make_problem

expert_mlp = mlp_node.expert_mlp
ROOT = pathlib.Path(__file__).resolve().parents[2]


# ---- Exact comparison ------------------------------------------------------------------------------------------------


def bits(value) -> bytes:
    """The bytes of a tensor or an array: the only comparison that tells -0.0, NaN and the last place apart."""
    # Never by Tensor.view(uint8): of a slice, Paddle's view of another item size looks at the wrong place.
    return np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.detach().numpy()).tobytes()


def assert_same_bits(values: dict, expected: dict, where="") -> None:
    """Both hold tensors or arrays by name; the names must agree too."""
    assert values.keys() == expected.keys(), (where, values.keys(), expected.keys())
    for name, value in values.items():
        assert list(value.shape) == list(expected[name].shape), f"{where} {name}: shapes differ"
        assert bits(value) == bits(expected[name]), f"{where} {name}: other bits"


# ---- Micro-batches ---------------------------------------------------------------------------------------------------


def series(count, seed=0, **kwargs):
    """``count`` problems on the same weights: the micro-batches of one step."""
    first = make_problem(seed=seed, **kwargs)
    rest = [make_problem(seed=seed + 1000 + n, **kwargs) for n in range(count - 1)]
    return [first, *(replace(problem, w1=first.w1, w2=first.w2) for problem in rest)]


class Flight:
    """One forward and, some time later, its backward."""

    def __init__(self, node, problem, call=None, **kwargs):
        self.problem = problem
        self.out, self.x, self.probs = (call or forward_node)(node, problem, **kwargs)

    def land(self):
        self.out.backward(tensor(self.problem.dout, str(self.out.dtype).rsplit(".", 1)[-1]))
        return self

    def results(self) -> dict:
        return {"out": self.out, "dx": self.x.grad, "ds": self.probs.grad}


def fly(node, flights, order, **kwargs) -> list[dict]:
    """Run ``order``, a list of ("F" or "B", number), over the problems; results by number."""
    launched = {}
    for action, number in order:
        if action == "F":
            launched[number] = Flight(node, flights[number], **kwargs)
        else:
            launched[number].land()
    return [launched[number].results() for number in range(len(flights))]


def one_by_one(count):
    return [step for number in range(count) for step in (("F", number), ("B", number))]


def one_forward_one_backward(count, warmup):
    """A pipeline stage's order: ``warmup`` forwards, then one backward for each forward, then the rest."""
    forward, backward = iter(range(count)), iter(range(count))
    order = [("F", next(forward)) for _ in range(min(warmup, count))]
    for number in forward:
        order += [("F", number), ("B", next(backward))]
    return order + [("B", number) for number in backward]


def interleaved(count, chunks, warmup):
    """(action, chunk, number) of a device that holds several virtual stages and runs them two micro-batches at a
    time: forwards climb through the chunks, backwards come down."""
    climb = [(c, g + n) for g in range(0, count, 2) for c in range(chunks) for n in range(min(2, count - g))]
    descend = [(chunks - 1 - c, n) for c, n in climb]
    order = [("F", *step) for step in climb[:warmup]]
    backward = iter(descend)
    for step in climb[warmup:]:
        order += [("F", *step), ("B", *next(backward))]
    return order + [("B", *step) for step in backward]


def weight_grads(experts) -> dict:
    """main_grad of every parameter that has one, by name."""
    named = {}
    if hasattr(experts, "weight1"):
        params = {"weight1": experts.weight1, "weight2": experts.weight2}
    else:
        parts = ("up_gate_proj", "down_proj")
        params = {f"{n}.{part}": getattr(e, part).weight for n, e in enumerate(experts) for part in parts}
    for name, param in params.items():
        if getattr(param, "main_grad", None) is not None:
            named[name] = param.main_grad
    return named


def params_of(experts) -> list:
    if hasattr(experts, "weight1"):
        return [experts.weight1, experts.weight2]
    return [weight for e in experts for weight in (e.up_gate_proj.weight, e.down_proj.weight)]


def clone_experts(experts):
    """A second model with the same numbers and nothing in common with the first."""
    if hasattr(experts, "weight1"):
        copy = type(experts)(weight1=None, weight2=None)
        for name in ("weight1", "weight2"):
            setattr(copy, name, _clone(getattr(experts, name)))
        return copy
    copies = []
    for expert in experts:
        copy = Expert(np.zeros([1, 1]), np.zeros([1, 1]))
        copy.up_gate_proj.weight = _clone(expert.up_gate_proj.weight)
        copy.down_proj.weight = _clone(expert.down_proj.weight)
        copies.append(copy)
    return copies


def _clone(param):
    dtype = str(param.dtype).rsplit(".", 1)[-1]
    made = paddle.create_parameter(list(param.shape), dtype, default_initializer=paddle.nn.initializer.Constant(0.0))
    made.set_value(param.detach().clone())
    made.stop_gradient = param.stop_gradient
    return made


def fresh_results(experts, problem, **kwargs) -> dict:
    """What a node that has never seen another weight gives for these experts: out, dx, ds and all main_grads."""
    copy = clone_experts(experts)
    node = node_on(copy, problem, **kwargs)
    flight = Flight(node, problem).land()
    node.step()
    return {**flight.results(), **weight_grads(copy)}


def node_on(experts, problem, **kwargs) -> SonicMoEMlpNode:
    return make_node(problem, experts, **kwargs)


MAKE_EXPERTS = {"list": expert_list, "fused": fused_experts}


# ---- Memory ----------------------------------------------------------------------------------------------------------


def host_bytes() -> int:
    """Bytes of all CPU tensors alive, to the byte."""
    return core.host_memory_stat_current_value("Allocated", 0)


def tensors_in(value, seen=None) -> list:
    """Every tensor that a structure of dataclasses, tuples, lists and dicts holds, each storage once."""
    seen = {} if seen is None else seen
    if isinstance(value, paddle.Tensor):
        if 0 not in value.shape:
            seen.setdefault(value.data_ptr(), value)
    elif is_dataclass(value):
        for field in fields(value):
            tensors_in(getattr(value, field.name), seen)
    elif isinstance(value, (tuple, list)):
        for part in value:
            tensors_in(part, seen)
    elif isinstance(value, dict):
        tensors_in(list(value.values()), seen)
    return list(seen.values())


def nbytes(tensors) -> int:
    return sum(len(bits(tensor)) for tensor in tensors)


# ---- Threads and processes -------------------------------------------------------------------------------------------


def together(*jobs) -> list:
    """Start all jobs at the same moment, one thread each; their results, or the first exception."""
    gate = threading.Barrier(len(jobs))
    results, errors = [None] * len(jobs), []

    def work(number, job):
        try:
            gate.wait()
            results[number] = job()
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def child(code: str, *paths, timeout=120) -> str:
    """Run Python code in a process of its own with ``paths`` (and nothing of this repository) on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SONIC_MOE_")}
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"child failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- What a call keeps -----------------------------------------------------------------------------------------------


def record_saved(monkeypatch) -> list:
    """A list that receives what each forward of the engine leaves for its backward (None if nothing)."""
    kept, forward = [], expert_mlp.forward

    def recording(*args, **kwargs):
        out, saved = forward(*args, **kwargs)
        kept.append(saved)
        return out, saved

    monkeypatch.setattr(expert_mlp, "forward", recording)
    return kept


# ---- Errors ----------------------------------------------------------------------------------------------------------


def refused(call, kind, message):
    """``call`` raises exactly ``kind``, with one line of at most 400 characters that matches ``message``."""
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert "\n" not in text and len(text) <= 400, text
    assert "need" in text or "got" in text, text


def forbid_engine(monkeypatch) -> None:
    """From here on, computing anything fails the test: the arguments should have been refused before."""

    def forbidden(*args, **kwargs):
        raise AssertionError("the engine ran before the arguments were checked")

    for name in ("forward", "backward"):
        monkeypatch.setattr(expert_mlp, name, forbidden)
