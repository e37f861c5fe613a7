"""The MoE module against float64, its parameters, its modes, and where it can be had."""

import copy
import pickle

import numpy as np
import pytest

from tests.support import children, floors
from tests.support import oracle as numpy_oracle
from tests.support import torch_oracle as oracle
from tests.support.torch_child import torch
from tests.support.torch_moe import in_float64, inputs, make, run

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    import torch.nn.functional as F

    from sonicmoe import KernelBackendMoE
    from sonicmoe.functional import route_topk


@pytest.mark.parametrize("backend", ["sonicmoe", "torch"])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_float32_against_float64(kind, backend):
    moe, (x, dout) = make(kind), inputs(50, 64)
    oracle.assert_close(run(moe, x, dout, backend), in_float64(moe, x, dout), floors.FP32["out"])


@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("E", [8, 33])
def test_any_k(K, E):
    moe, (x, dout) = make(K=K, E=E), inputs(20, 64)
    oracle.assert_close(run(moe, x, dout), in_float64(moe, x, dout), floors.FP32["out"])


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_bf16_against_float64(kind):
    """With the router in float32: logits rounded to bf16 are other logits, and no fault of the experts."""
    moe, (x, dout) = make(kind, dtype="bfloat16"), inputs(64, 64, dtype="bfloat16")
    moe.router.float()
    found = run(moe, x, dout)
    oracle.assert_close(found, in_float64(moe, x, dout), floors.BF16["out"])
    assert found["out"].dtype == found["x"].dtype == found["c_fc.weight"].dtype == torch.bfloat16
    assert found["aux"].dtype == torch.float32


def test_all_in_bf16():
    moe, (x, dout) = make(dtype="bfloat16", std=0.1), inputs(64, 64, dtype="bfloat16")
    _, chosen = route_topk(F.linear(x, moe.router.weight), moe.top_k)
    found, expected = run(moe, x, dout), in_float64(moe, x, dout, chosen)
    oracle.assert_close(found, expected, 2 * floors.BF16["out"])  # the logits' rounding comes on top


@pytest.mark.parametrize("kind", ["swiglu", "relu_sq"])
def test_plain_backend_against_the_numpy_oracle(kind):
    """The module's own oracle is held to the one that knows no torch."""
    moe, (x, dout) = make(kind).double(), inputs(30, 64)
    x = x.detach().double().requires_grad_()
    found = run(moe, x, dout, "torch", aux_weight=0.0)
    scores, chosen = (t.detach().numpy() for t in (moe.router(x).topk(2)))
    scores = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    w1, w2 = moe.c_fc.weight.detach().numpy(), moe.c_proj.weight.detach().numpy()
    if kind == "swiglu":
        w1 = np.concatenate([w1[:, 0::2], w1[:, 1::2]], axis=1)
    args = (x.detach().numpy(), w1.transpose(0, 2, 1), w2.transpose(0, 2, 1), chosen, scores, dout.double().numpy())
    expected = numpy_oracle.reference(*args, kind)
    assert floors.relative_error(found["out"].detach().numpy(), expected.out) < 1e-6
    assert floors.relative_error(found["c_proj.weight"].numpy(), expected.dw2.transpose(0, 2, 1)) < 1e-6


@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 64), (2, 3, 2, 64), (64,), (0, 64), (3, 0, 64)])
@pytest.mark.parametrize("backend", ["sonicmoe", "torch"])
def test_shapes(shape, backend):
    moe, (x, dout) = make(), inputs(*shape)
    found = run(moe, x, dout, backend)
    assert found["out"].shape == x.shape and found["aux"].shape == ()
    oracle.assert_close(found, in_float64(moe, x, dout), floors.FP32["out"])


def test_x_in_other_strides():
    moe, (x, dout) = make(), inputs(64, 20)
    whole, _ = inputs(20, 80)
    for view in (x.detach().T, whole.detach()[:, 8:72]):
        given = view.requires_grad_()
        assert not given.is_contiguous()
        oracle.assert_close(run(moe, given, dout.T), in_float64(moe, given, dout.T), floors.FP32["out"])


def test_idle_experts_have_zero_gradients():
    moe, (x, dout) = make(E=12, K=1), inputs(4, 64)
    found = run(moe, x, dout)
    idle = [e for e in range(12) if not found["c_fc.weight"][e].any()]
    assert len(idle) >= 8 and not found["c_proj.weight"][idle].any()
    oracle.assert_close(found, in_float64(moe, x, dout), floors.FP32["out"])


# ---- Parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("add_bias", [False, True])
def test_state_dict(kind, add_bias):
    """Names and shapes of the published package, and the same numbers after a round trip."""
    moe, width = make(kind, add_bias=add_bias), 64 if kind == "swiglu" else 32
    state = moe.state_dict()
    shapes = {"router.weight": (6, 64), "c_fc.weight": (6, width, 64), "c_proj.weight": (6, 64, 32)}
    shapes |= {"c_fc.bias": (6, width), "c_proj.bias": (6, 64)} if add_bias else {}
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes
    other = make(kind, add_bias=add_bias, seed=5)
    x, _ = inputs(9, 64)
    backend = KernelBackendMoE.torch if add_bias else KernelBackendMoE.sonicmoe
    before = other(x, backend)[0]
    other.load_state_dict(state)
    for same in (other, copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(same(x, backend)[0], moe(x, backend)[0]) and not torch.equal(before, same(x, backend)[0])


def test_initial_values():
    moe = make(H=256, I=256, std=0.02, add_bias=True)
    for weight in (moe.c_fc.weight, moe.c_proj.weight):
        assert 0.0195 < float(weight.detach().std()) < 0.0205 and abs(float(weight.detach().mean())) < 1e-3
    assert not moe.c_fc.bias.any() and not moe.c_proj.bias.any()


def test_rows_of_the_up_projection_are_gate_and_up_in_turn():
    moe = make(E=1, K=1)
    gate, up = torch.randn(32, 64), torch.randn(32, 64)
    with torch.no_grad():
        moe.c_fc.weight[0, 0::2], moe.c_fc.weight[0, 1::2] = gate, up
    x, _ = inputs(9, 64)
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ moe.c_proj.weight[0].T
    for backend in (KernelBackendMoE.sonicmoe, KernelBackendMoE.torch):
        assert oracle.error(moe(x, backend)[0], expected) < 1e-5


def test_main_grad_of_the_module_over_micro_batches():
    moe, plain = make(dtype="bfloat16"), make(dtype="bfloat16")
    for weight in (moe.c_fc.weight, moe.c_proj.weight):
        weight.main_grad = torch.zeros(weight.shape)
    for seed in range(3):
        x, dout = inputs(40, 64, dtype="bfloat16", seed=seed)
        moe(x)[0].backward(dout)
        plain(x)[0].backward(dout)
    for ours, theirs in ((moe.c_fc, plain.c_fc), (moe.c_proj, plain.c_proj)):
        assert ours.weight.grad is None and oracle.error(ours.weight.main_grad, theirs.weight.grad) < 0.01
    assert torch.equal(moe.router.weight.grad, plain.router.weight.grad)


def test_autocast():
    moe, (x, dout) = make(), inputs(50, 64)
    expected = in_float64(moe, x, dout, route_topk(F.linear(x.bfloat16(), moe.router.weight.bfloat16()), 2)[1])
    with torch.autocast("cpu", torch.bfloat16):
        found = run(moe, x, dout)
    assert found["out"].dtype == torch.bfloat16 and found["x"].dtype == found["c_fc.weight"].dtype == torch.float32
    oracle.assert_close(found, expected, 2 * floors.BF16["out"])
    assert oracle.error(found["out"], expected["out"]) > 1e-4  # it was in bf16


# ---- Modes -----------------------------------------------------------------------------------------------------------


def test_inference_mode_keeps_nothing():
    moe, (x, _) = make(), inputs(9, 64)
    out, aux = moe(x, is_inference_mode=True)
    assert aux is None and not out.requires_grad and torch.equal(out, moe(x)[0])
    moe.eval()  # by itself no reason to lose gradients
    assert moe(x)[0].requires_grad and moe(x)[1] is not None


def test_backends_by_name_and_their_errors():
    moe, (x, _) = make(), inputs(9, 64)
    assert torch.equal(moe(x, "sonicmoe")[0], moe(x)[0])
    with pytest.raises(ValueError, match="kernel_backend_moe: got 'scattermoe', .* is another package"):
        moe(x, KernelBackendMoE.scattermoe)
    with pytest.raises(ValueError, match="kernel_backend_moe: got 'cuda'"):
        moe(x, "cuda")


def test_bias():
    moe, (x, _) = make(add_bias=True, E=1, K=1), inputs(9, 64)
    with torch.no_grad():
        moe.c_fc.bias.normal_(), moe.c_proj.bias.normal_()
    h = F.linear(x, moe.c_fc.weight[0], moe.c_fc.bias[0])
    expected = F.linear(F.silu(h[:, ::2]) * h[:, 1::2], moe.c_proj.weight[0], moe.c_proj.bias[0])
    assert oracle.error(moe(x, KernelBackendMoE.torch)[0], expected) < 1e-6
    with pytest.raises(NotImplementedError, match="^add_bias: got Parameter, need None"):
        moe(x)


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (dict(K=7), ValueError, "num_experts_per_tok: got 7, need at most num_experts, 6"),
        (dict(K=0), ValueError, "num_experts_per_tok: got 0"),
        (dict(E=1.5), TypeError, "num_experts: got 1.5"),
        (dict(H=-1), ValueError, "hidden_size: got -1"),
    ],
)
def test_constructor_errors(arguments, kind, says):
    with pytest.raises(kind, match=f"^{says}"):
        make(**arguments)


def test_call_errors():
    x, _ = inputs(9, 64)
    for moe, given, kind, says in (
        (make(), x[:, :32], ValueError, r"hidden_states: got shape \[9, 32\], need \[..., H\] with H=64"),
        (make(), 3.0, TypeError, "hidden_states: got float"),
        (make().double(), x.detach().double(), TypeError, "x: got dtype float64"),
        (make(I=30), x, ValueError, "intermediate_size: got 30, need a multiple of 4"),
    ):
        with pytest.raises(kind, match=f"^{says}"):
            moe(given)


# ---- Where torch is not, or is not torch -----------------------------------------------------------------------------


def test_without_torch():
    script = """
        import json, sonicmoe, sonicmoe.functional
        found = []
        for owner, name in ((sonicmoe, "MoE"), (sonicmoe.functional, "moe_general_routing_inputs")):
            try:
                getattr(owner, name)
            except ModuleNotFoundError as error:
                found.append(str(error))
        print(json.dumps(found))
    """
    assert children.answer(script, options=["-S"]) == ["No module named 'torch'"] * 2


def test_beside_the_paddle_glue():
    script = """
        import json, sonicmoe.ernie_compat, sonicmoe
        try:
            sonicmoe.MoE
        except ImportError as error:
            print(json.dumps(str(error)))
    """
    assert "needs torch, but in this process `torch` means Paddle" in children.answer(script)


def test_moved_to_another_name_after_import():
    script = """
        import json, sys, types, torch, sonicmoe, sonicmoe.functional
        parent = types.ModuleType("ops")
        parent.__path__ = []
        sys.modules["ops"] = parent
        for name in [n for n in sys.modules if n.partition(".")[0] == "sonicmoe"]:
            sys.modules["ops." + name] = sys.modules.pop(name)
        parent.sonicmoe = sys.modules["ops.sonicmoe"]

        class Forbidden:
            def find_spec(self, name, path=None, target=None):
                assert name.partition(".")[0] != "sonicmoe", f"{name} is imported a second time"

        sys.meta_path.insert(0, Forbidden())
        from ops.sonicmoe import MoE, moe_general_routing_inputs
        from ops.sonicmoe.functional.forward import _up_projection_forward
        out, aux = MoE(4, 2, 64, 32, "swiglu", False, 0.02)(torch.randn(5, 64))
        (aux + out.sum()).backward()
        print(json.dumps([n for n in sys.modules if n.partition(".")[0] == "sonicmoe"]))
    """
    site = [path for path in children.os.environ["PYTHONPATH"].split(children.os.pathsep)]
    assert children.answer(script, env=children.clean_env(site)) == []
