"""The raw functions: the template of the expert-parallel guide as it is printed, and each function by itself."""

import types
from pathlib import Path

import pytest

from tests.support import torch_oracle as oracle
from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

# The guide's code block, byte for byte.
TEMPLATE = Path(__file__).with_name("ep_template.txt")

if torch:
    from sonicmoe import SonicMoEConfig
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional.backward import (
        _down_projection_backward_act,
        _down_projection_backward_weight,
        _up_projection_backward_act,
        _up_projection_backward_weight,
    )
    from sonicmoe.functional.forward import _down_projection_forward, _up_projection_forward


@pytest.fixture
def template(monkeypatch):
    """The template's class; a CPU has no current CUDA stream, so 0, the default one, stands in for it."""
    if torch is None:
        return None
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *a: types.SimpleNamespace(cuda_stream=0))
    names = {}
    exec(compile(TEMPLATE.read_text(encoding="utf-8"), str(TEMPLATE), "exec"), names)
    return names["SonicMoELocalExperts"]


def local_rows(counts, dtype, seed=0, offset_dtype="int32"):
    """One slot a token, tokens in the order of their experts, as they come out of an all-to-all."""
    problem = oracle.make(T=sum(counts), K=1, E=len(counts), dtype=dtype, seed=seed)
    expert = [e for e, count in enumerate(counts) for _ in range(count)]
    problem.indices = torch.tensor(expert, dtype=torch.int32).reshape(-1, 1)
    bounds = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=getattr(torch, offset_dtype))
    return problem, bounds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("counts", [[13, 0, 30, 1], [40], [0, 0], [0, 0, 7]])
@pytest.mark.parametrize("offset_dtype", ["int32", "int64"])
def test_template_as_printed(template, counts, dtype, offset_dtype):
    """Its output is without the scores, which its caller multiplies with; its gradients are with them."""
    problem, bounds = local_rows(counts, dtype, offset_dtype=offset_dtype)
    w1, w2 = (w.detach().permute(1, 2, 0).requires_grad_() for w in (problem.w1, problem.w2))
    scores = problem.scores.detach().flatten().requires_grad_()
    y2 = template.apply(problem.x, w1, w2, bounds, scores)
    y2.backward(problem.dout)
    expected = oracle.reference(problem)
    expected["out"] = expected["out"] / problem.scores.detach().double()
    found = {"out": y2, "x": problem.x.grad, "s": scores.grad.reshape(-1, 1)}
    found |= {"w1": w1.grad.permute(2, 0, 1), "w2": w2.grad.permute(2, 0, 1)}
    oracle.assert_close(found, expected, oracle.FLOORS[dtype])
    for e, count in enumerate(counts):
        assert bool(found["w1"][e].any()) == bool(found["w2"][e].any()) == (count > 0)


# ---- Each function, with gather and scatter --------------------------------------------------------------------------


def chain(problem, order=None):
    """All six on a top-k problem, into tensors of ours. ``order``: some other numbering of the slots."""
    n_tokens, topk = problem.indices.shape
    n_experts, width, hidden = problem.w1.shape
    n_rows, intermediate, dtype = n_tokens * topk, problem.w2.shape[2], problem.x.dtype
    flat = problem.indices.flatten().long()
    slot = torch.argsort(flat, stable=True)  # sorted row -> slot
    gather = (slot // topk).int()
    scatter = torch.arange(n_rows) if order is None else order
    scores = torch.empty(n_rows)
    scores[scatter] = problem.scores.detach().flatten()
    where = scatter[slot].int()
    bounds = torch.cat([torch.zeros(1), torch.bincount(flat, minlength=n_experts).cumsum(0)]).int()
    w1, w2 = (w.detach().permute(1, 2, 0) for w in (problem.w1, problem.w2))
    mine = {name: torch.empty(n_rows, columns, dtype=dtype) for name, columns in
            dict(z=width, y1=intermediate, y2=hidden, dz=width, y1s=intermediate, dx=hidden).items()}  # fmt: skip
    mine |= {"ds": torch.empty(n_rows), "dw1": torch.empty_like(w1), "dw2": torch.empty_like(w2)}
    addresses = {name: value.data_ptr() for name, value in mine.items()}
    rows = dict(expert_frequency_offset=bounds, expert_schedule_order=None, stream_id=None)
    glu = dict(is_glu_activation=problem.kind in oracle.GATES)
    kind = dict(activation_type=problem.kind)
    x, dout = problem.x, problem.dout
    both = dict(x_gather_idx=gather, s_scatter_idx=where)
    _up_projection_forward(x=x, w1=w1, z=mine["z"], y1=mine["y1"], b1=None, x_gather_idx=gather, **rows, **glu, **kind)
    _down_projection_forward(w2=w2, y1=mine["y1"], y2=mine["y2"], b2=None, x_gather_idx=gather, **rows)
    _down_projection_backward_act(
        dout=dout, z=mine["z"], w2=w2, dz=mine["dz"], ds=mine["ds"], b2=None, db2=None, y1s=mine["y1s"],
        topk_scores=scores, **both, **rows, **glu, **kind,
    )  # fmt: skip
    _down_projection_backward_weight(dout=dout, y1s=mine["y1s"], dw2=mine["dw2"], x_gather_idx=gather, **rows)
    _up_projection_backward_act(w1=w1, dx_expanded=mine["dx"], dz=mine["dz"], db1=None, **both, **rows, **glu)
    _up_projection_backward_weight(x=x, dw1=mine["dw1"], dz=mine["dz"], x_gather_idx=gather, **rows, **glu)
    assert addresses == {name: value.data_ptr() for name, value in mine.items()}
    assert not any(value.requires_grad for value in mine.values())
    return mine, gather.long(), scores[where.long()].reshape(-1, 1), scatter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_all_six_make_the_layer(kind, dtype):
    problem = oracle.make(kind, T=33, K=3, E=6, experts_used=5, dtype=dtype)
    mine, gather, score_M, scatter = chain(problem, torch.randperm(99, generator=torch.Generator().manual_seed(1)))
    n_tokens, hidden = problem.x.shape
    zeros = torch.zeros(n_tokens, hidden, dtype=torch.float64)
    found = {
        "out": zeros.index_add(0, gather, mine["y2"].double() * score_M),
        "x": zeros.index_add(0, gather, mine["dx"].double()),
        "s": mine["ds"][scatter].reshape(n_tokens, -1),
        "w1": mine["dw1"].permute(2, 0, 1),
        "w2": mine["dw2"].permute(2, 0, 1),
    }
    oracle.assert_close(found, oracle.reference(problem), oracle.FLOORS[dtype])
    a = oracle.activate(mine["z"].double(), kind)
    assert oracle.error(mine["y1"], a) < 0.02 and oracle.error(mine["y1s"], a * score_M) < 0.02


def arguments(dtype="float32"):
    problem, bounds = local_rows([5, 3], dtype)
    w1, w2 = (w.detach().permute(1, 2, 0) for w in (problem.w1, problem.w2))
    rows = torch.empty(8, 64, dtype=problem.x.dtype)
    narrow = torch.empty(8, 32, dtype=problem.x.dtype)
    index = torch.arange(8, dtype=torch.int32)
    common = dict(expert_frequency_offset=bounds, expert_schedule_order=None, x_gather_idx=index, stream_id=0)
    act = dict(is_glu_activation=True, activation_type="swiglu")
    x = problem.x.detach()
    return {
        "up": dict(x=x, w1=w1, z=rows.clone(), y1=narrow, b1=None, **common, **act),
        "down": dict(w2=w2, y1=x[:, :32].contiguous(), y2=rows, b2=None, **common),
        "down_act": dict(
            dout=problem.dout, z=x.clone(), w2=w2, dz=rows, ds=torch.empty(8), b2=None, db2=None, y1s=narrow,
            topk_scores=problem.scores.detach().flatten(), s_scatter_idx=index, **common, **act,
        ),
        "down_weight": dict(dout=problem.dout, y1s=x[:, :32].contiguous(), dw2=torch.empty_like(w2), **common),
        "up_act": dict(w1=w1, dx_expanded=rows, dz=x, db1=None, s_scatter_idx=index, is_glu_activation=True, **common),
        "up_weight": dict(x=x, dw1=torch.empty_like(w1), dz=x.clone(), is_glu_activation=True, **common),
    }  # fmt: skip


def call(name, **changes):
    run = {
        "up": _up_projection_forward,
        "down": _down_projection_forward,
        "down_act": _down_projection_backward_act,
        "down_weight": _down_projection_backward_weight,
        "up_act": _up_projection_backward_act,
        "up_weight": _up_projection_backward_weight,
    }[name]
    given = arguments() | {}
    run(**given[name] | {key: change(given[name].get(key)) for key, change in changes.items()})


ALL = ("up", "down", "down_act", "down_weight", "up_act", "up_weight")
WEIGHTS = {"up": "w1", "down": "w2", "down_act": "w2", "down_weight": "dw2", "up_act": "w1", "up_weight": "dw1"}


@pytest.mark.parametrize("name", ALL)
def test_arguments_of_the_error_tests_are_right(name):
    call(name)


@pytest.mark.parametrize("name", ALL)
def test_other_strides_are_refused(name):
    weight = WEIGHTS[name]
    with pytest.raises(ValueError, match=rf"^{weight}: got shape .* need stride order \(2, 0, 1\)"):
        call(name, **{weight: lambda w: w.contiguous()})


@pytest.mark.parametrize("name", ALL)
def test_a_schedule_is_refused(name):
    with pytest.raises(ValueError, match="^expert_schedule_order: got an order"):
        call(name, expert_schedule_order=lambda _: torch.arange(2))


@pytest.mark.parametrize("name", ALL)
def test_fp8_is_refused(name):
    with SonicMoEConfig(fp8_mode="perf").activate(), pytest.raises(ValueError, match="^fp8_mode: got 'perf'"):
        call(name)


@pytest.mark.parametrize(("name", "bias"), [("up", "b1"), ("down", "b2"), ("down_act", "b2"), ("down_act", "db2"),
                                            ("up_act", "db1")])  # fmt: skip
def test_biases_are_refused(name, bias):
    with pytest.raises(NotImplementedError, match=f"^{bias}: got Tensor, need None"):
        call(name, **{bias: lambda _: torch.zeros(2, 64)})


@pytest.mark.parametrize(
    ("name", "argument", "change", "kind", "says"),
    [
        ("up", "z", lambda t: t[:, :32], ValueError, r"z: got shape \[8, 32\], need \[8, 64\]"),
        ("up", "z", lambda t: None, TypeError, "z: got NoneType, need a tensor"),
        ("up", "y1", lambda t: t.bfloat16(), TypeError, "y1: got dtype bfloat16, need float32"),
        ("up", "y1", lambda t: t.T.contiguous().T, ValueError, "y1: got a non-contiguous"),
        ("up", "x", lambda t: t[:, :32].contiguous(), ValueError, "x: got shape"),
        ("up", "w1", lambda t: t.bfloat16(), TypeError, "w1: got dtype bfloat16, need float32"),
        ("up", "w1", lambda t: t[0], ValueError, "w1: got shape .* need 3 dimensions"),
        ("up", "is_glu_activation", lambda _: False, ValueError, "is_glu_activation: got False with activation_type"),
        ("up", "activation_type", lambda _: "tanh", ValueError, "activation_type: got 'tanh'"),
        ("up", "expert_frequency_offset", lambda t: t[1:], ValueError, "expert_frequency_offset: got shape"),
        ("up", "expert_frequency_offset", lambda t: t.float(), TypeError, "expert_frequency_offset: got dtype"),
        ("up", "stream_id", lambda _: "two", TypeError, "stream_id: got str"),
        ("down", "y2", lambda t: t[:4], ValueError, "y2: got shape"),
        ("down_act", "x_gather_idx", lambda t: t[:4], ValueError, "x_gather_idx: got shape"),
        ("down_act", "s_scatter_idx", lambda t: t.float(), TypeError, "s_scatter_idx: got dtype float32"),
        ("down_act", "topk_scores", lambda t: t[:4], ValueError, "topk_scores: got shape"),
        ("down_act", "dz", lambda t: t[:, :32], ValueError, "dz: got shape"),
        ("down_act", "ds", lambda t: t.int(), TypeError, "ds: got dtype int32"),
        ("down_weight", "dout", lambda t: t[:, :32], ValueError, "dout: got shape"),
        ("up_act", "dx_expanded", lambda t: t[:4], ValueError, "dx_expanded: got shape"),
        ("up_weight", "dz", lambda t: t[:, :32], ValueError, "dz: got shape"),
    ],
)
def test_errors_name_the_argument(name, argument, change, kind, says):
    with pytest.raises(kind, match=f"^{says}"):
        call(name, **{argument: change})


PLACED = {  # all tensors but the rows that tell the others where to be
    "up": ("w1", "z", "y1", "expert_frequency_offset", "x_gather_idx"),
    "down": ("w2", "y2", "expert_frequency_offset"),
    "down_act": ("dout", "w2", "dz", "ds", "y1s", "topk_scores", "expert_frequency_offset", "x_gather_idx",
                 "s_scatter_idx"),
    "down_weight": ("dout", "dw2", "expert_frequency_offset", "x_gather_idx"),
    "up_act": ("w1", "dx_expanded", "expert_frequency_offset"),
    "up_weight": ("x", "dw1", "expert_frequency_offset", "x_gather_idx"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_tensor_elsewhere_is_refused(name):
    """Its address would mean something else where the kernels run."""
    for argument in PLACED[name]:
        with pytest.raises(ValueError, match=f"^{argument}: got a tensor on meta, need cpu, where the rows"):
            call(name, **{argument: lambda tensor: tensor.to("meta")})


@pytest.mark.parametrize(("name", "argument"), [("down_weight", "dw2"), ("up_weight", "dw1")])
def test_a_weight_gradient_of_integers_is_refused(name, argument):
    with pytest.raises(TypeError, match=f"^{argument}: got dtype int32"):
        call(name, **{argument: lambda tensor: torch.zeros_like(tensor, dtype=torch.int32)})


def test_no_z_in_inference_mode():
    call("up", z=lambda _: None, is_inference_mode_enabled=lambda _: True)


def test_activation_as_a_member():
    call("up", activation_type=lambda _: ActivationType.SWIGLU)
