"""The package inside another package, and moved to another name after its import: each in a process of its own."""

import shutil
import textwrap

import pytest

from tests.support.lifecycle import ROOT, child

# What a caller does with the package afterwards, whatever it is called by then.
USE = """
import sys, types
import numpy as np
import paddle

def use(node_class, run_sonic_moe):
    rng = np.random.default_rng(0)
    def bf16(*shape): return paddle.to_tensor(rng.standard_normal(shape).astype("float32") * 0.1).astype("bfloat16")
    w1, w2 = bf16(2, 128, 256), bf16(2, 128, 128)
    x, probs = bf16(4, 128), paddle.ones([4, 1])
    indices, counts = paddle.to_tensor([[0], [1], [1], [0]]), [2, 2]
    for weight in (w1, w2): weight.stop_gradient = False
    experts = types.SimpleNamespace(weight1=w1, weight2=w2)
    node = node_class(experts, 2, 128, 128)
    outs, grads = [], []
    for fp8 in (False, True):
        paddle.assign(x, x)
        out = node(x, counts, indices, probs)
        out.backward(paddle.ones_like(out))
        halves = w1.detach().reshape([2, 128, 2, 128]).transpose([0, 3, 2, 1]).reshape([2, 256, 128])
        native1, native2 = halves.contiguous(), w2.detach().transpose([0, 2, 1]).contiguous()
        for weight in (native1, native2): weight.stop_gradient = False
        other = run_sonic_moe(x, indices, probs, 1, 2, native1, native2, fp8)
        other.backward(paddle.ones_like(other))
        if not fp8:
            assert (out.numpy() == other.numpy()).all()
        assert paddle.isfinite(other.astype("float32")).all() and native1.main_grad is not None
    node.step()
    assert float(w1.main_grad.abs().sum()) > 0 and float(w2.main_grad.abs().sum()) > 0
    h = np.einsum("h,hf->f", x[0].astype("float32").numpy(), w1[0].astype("float32").numpy())
    a = h[:128] / (1 + np.exp(-h[:128])) * h[128:]
    assert np.allclose(out[0].astype("float32").numpy(), a @ w2[0].astype("float32").numpy(), rtol=0.05, atol=0.01)
    assert "torch" not in sys.modules or sys.modules["torch"].Tensor is paddle.Tensor
"""


USE_EP = """
def use_ep(layer_class):
    layer = layer_class(4, 2, 128, 128, fp8_dispatch=True)
    out, balance = layer(paddle.randn([6, 128]))
    (out.sum() + balance).backward()
    layer.step()
    assert float(layer.router.weight.grad.abs().sum()) > 0
    assert "torch" not in sys.modules or sys.modules["torch"].Tensor is paddle.Tensor
"""


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with a parent package that ships this one inside; the repository itself is not on the child's path."""
    parent = tmp_path / "fleet_ops_like"
    parent.mkdir()
    (parent / "__init__.py").write_text("")
    shutil.copytree(ROOT / "sonicmoe", parent / "sonicmoe", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_as_a_subpackage(elsewhere):
    use = """
        import fleet_ops_like.sonicmoe as sonicmoe
        assert "paddle" in sys.modules and sonicmoe.API_VERSION >= 1
        use(sonicmoe.SonicMoEMlpNode, sonicmoe.run_sonic_moe)
        import fleet_ops_like.sonicmoe.functional, fleet_ops_like.sonicmoe.enums
        from fleet_ops_like.sonicmoe.ernie_compat.deepep_metadata import deepep_topk_to_sonic_metadata
        from fleet_ops_like.sonicmoe.ep.paddle_layer import ExpertParallelMoE
        use_ep(ExpertParallelMoE)
        assert not [name for name in sys.modules if name == "sonicmoe" or name.startswith("sonicmoe.")]
    """
    child(USE + USE_EP + textwrap.dedent(use), elsewhere)


# As PaddleFleet installs an ecosystem library: imported at top level, then moved below a name of its own.
RENAME = """
def rename():
    parent = types.ModuleType("fleet_ops")
    parent.__path__ = []
    sys.modules["fleet_ops"] = parent
    for name in list(sys.modules):
        if name == "sonicmoe" or name.startswith("sonicmoe."):
            sys.modules["fleet_ops." + name] = sys.modules.pop(name)
    parent.sonicmoe = sys.modules["fleet_ops.sonicmoe"]

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "sonicmoe", f"{name} is imported a second time"

def enable(scope):
    enable = getattr(paddle, "enable_compat", None) or paddle.compat.enable_torch_proxy
    enable(scope=scope)
"""


@pytest.mark.parametrize("still_there", [True, False], ids=["still on the path", "gone from the path"])
@pytest.mark.parametrize("loaded", ["sonicmoe", "sonicmoe.ernie_compat"])
def test_moved_to_another_name_after_import(loaded, still_there, elsewhere):
    """The loader imports only the top of the package, and may take its folder off the path before the first call."""
    use = f"""
        sys.path.insert(0, {str(elsewhere / "fleet_ops_like")!r})
        enable({{"sonicmoe", "quack", "triton"}})
        import {loaded}
        rename()
        if {not still_there}:
            del sys.path[0]
        sys.meta_path.insert(0, Forbidden())
        import fleet_ops.sonicmoe as moved
        from fleet_ops.sonicmoe.enums import ActivationType
        from fleet_ops.sonicmoe.functional import set_wgrad_deferral_hook, clear_all_fp8_weight_caches
        from fleet_ops.sonicmoe.functional import _refresh_fp8_config
        assert _refresh_fp8_config().fp8_wgrad is None
        from fleet_ops.sonicmoe.ernie_compat import SonicMoEMlpNode, run_sonic_moe
        assert moved.SonicMoEMlpNode is SonicMoEMlpNode and moved.run_sonic_moe is run_sonic_moe
        assert moved.ActivationType is ActivationType
        use(SonicMoEMlpNode, run_sonic_moe)
        if {still_there}:
            from fleet_ops.sonicmoe.ep.paddle_layer import ExpertParallelMoE
            use_ep(ExpertParallelMoE)
        assert not [name for name in sys.modules if name == "sonicmoe" or name.startswith("sonicmoe.")]
    """
    child(USE + USE_EP + RENAME + textwrap.dedent(use))
