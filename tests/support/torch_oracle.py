"""The experts in float64 torch ops with autograd, from the definition, for slots given as a list; and comparisons.

Native layout: w1 [E,2I,H] with rows gate 0, up 0, gate 1, ... ([E,I,H] without a gate), w2 [E,H,I].
"""

from dataclasses import dataclass
from typing import Any

from tests.support import floors
from tests.support.torch_child import torch

GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
KINDS = (*GATES, "relu_sq", "relu", "gelu", "silu")


def curve(name, v):
    if name == "gelu":
        return torch.nn.functional.gelu(v, approximate="tanh")
    return {"silu": lambda: v * torch.sigmoid(v), "relu": lambda: v.relu(), "relu_sq": lambda: v.relu() ** 2}[name]()


def activate(h, kind):
    if kind not in GATES:
        return curve(kind, h)
    h = h.unflatten(-1, (-1, 2))
    return curve(GATES[kind], h[..., 0]) * h[..., 1]


def experts(x, token, expert, score, w1, w2, kind="swiglu"):
    """out [T,H]: for every slot, score * expert(x[token])."""
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        slots = torch.nonzero(expert == e).flatten()
        a = activate(x[token[slots]] @ w1[e].T, kind)
        out = out.index_add(0, token[slots], a @ w2[e].T * score[slots, None])
    return out


@dataclass
class Problem:
    """Inputs of the given type, indices [T,K], float32 scores [T,K], and dout."""

    x: Any
    scores: Any
    indices: Any
    w1: Any
    w2: Any
    dout: Any
    kind: str

    def tensors(self):
        return {"x": self.x, "s": self.scores, "w1": self.w1, "w2": self.w2}


def make(kind="swiglu", T=40, K=2, E=4, H=64, I=32, dtype="float32", seed=0, experts_used=None):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=random) * scale).to(getattr(torch, dtype))

    width = 2 * I if kind in GATES else I
    order = torch.rand(T, experts_used or E, generator=random).argsort(dim=1)
    return Problem(
        x=normal(T, H).requires_grad_(),
        scores=(torch.rand(T, K, generator=random) + 0.05).requires_grad_(),
        indices=order[:, :K].to(torch.int32).contiguous(),
        w1=normal(E, width, H, scale=H**-0.5).requires_grad_(),
        w2=normal(E, H, I, scale=I**-0.5).requires_grad_(),
        dout=normal(T, H),
        kind=kind,
    )


def reference(problem):
    """{"out", "x", "s", "w1", "w2"}: the output and all gradients in float64."""
    given = {name: value.detach().double().requires_grad_() for name, value in problem.tensors().items()}
    n_tokens, topk = problem.indices.shape
    token = torch.arange(n_tokens).repeat_interleave(topk)
    score = given["s"].flatten()
    out = experts(given["x"], token, problem.indices.flatten(), score, given["w1"], given["w2"], problem.kind)
    out.backward(problem.dout.double())
    return {"out": out.detach()} | {name: value.grad for name, value in given.items()}


FLOORS = {"float32": floors.FP32["out"], "bfloat16": floors.BF16["out"], "float16": floors.FP16["out"]}


def error(value, expected):
    """|value - expected| / |expected|; 0 for two zeros, infinite or NaN for anything else that is wrong."""
    value, expected = value.detach().double(), expected.detach().double()
    assert value.shape == expected.shape, (value.shape, expected.shape)
    return floors.relative_error(value.numpy(), expected.numpy())


def assert_close(found, expected, floor, where=""):
    assert found.keys() <= expected.keys() and found, (found.keys(), expected.keys())
    for name, value in found.items():
        assert error(value, expected[name]) <= floor, f"{where} {name}: {error(value, expected[name]):.2e} > {floor}"
