"""Deep copies of the torch layers: between calls they keep parameters, buffers and a group, and no more."""

import copy
import sys

import pytest

from tests.support.torch_child import torch
from tests.support.torch_moe import inputs, make

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    import torch.distributed as dist

    from sonicmoe import SonicMoEConfig
    from sonicmoe.ep.deepep import DeepEp
    from sonicmoe.ep.torch_communicator import TorchCommunicator
    from sonicmoe.ep.torch_layer import ExpertParallelMoE
    from sonicmoe.ep.transport import AllToAll
    from tests.support import deep_ep_stub

H = 128
use_fp8 = pytest.mark.parametrize("use_fp8", [False, True], ids=["bf16", "fp8"])


def moe():
    return make(H=H, I=128, dtype="bfloat16")


def over_a_group(transport):
    layer = ExpertParallelMoE(6, 2, H, 128, std=0.15, balance_speed=0.01)
    layer.comm = TorchCommunicator(dist.new_group([0]))
    layer.transport = DeepEp(layer.comm.group) if transport == "deepep" else AllToAll(layer.comm)
    return layer.bfloat16()


LAYERS = {
    "moe": moe,
    "alone": lambda: ExpertParallelMoE(6, 2, H, 128, std=0.15, balance_speed=0.01).bfloat16(),
    "alltoall": lambda: over_a_group("alltoall"),
    "deepep": lambda: over_a_group("deepep"),
}


@pytest.fixture(scope="module")
def group():
    if not torch:
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def results(layer, config, x, dout) -> list:
    """out, aux, dx and the weights' gradients, those of the experts in main_grad."""
    experts = [layer.c_fc.weight, layer.c_proj.weight]
    for weight in experts:
        weight.main_grad = torch.zeros(weight.shape)
    with config.activate():
        given = x.detach().requires_grad_()
        out, aux = layer(given)
        torch.autograd.backward([out, aux], [dout, torch.tensor(0.5)])
    found = [out, aux, given.grad, layer.router.weight.grad, *[weight.main_grad for weight in experts]]
    layer.router.weight.grad = None
    for weight in experts:
        del weight.main_grad
    return [tensor.detach().clone() for tensor in found]


def alike(found, wanted) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(found, wanted, strict=True)]


@use_fp8
@pytest.mark.parametrize("name", LAYERS)
def test_a_copied_layer_is_another(name, use_fp8, group, monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", deep_ep_stub)
    layer, config = LAYERS[name](), SonicMoEConfig(use_fp8=use_fp8)
    x, dout = inputs(24, H, dtype="bfloat16")
    before = results(layer, config, x, dout)
    with config.activate():
        waiting, _ = layer(x)
    twin = copy.deepcopy(layer)
    waiting.backward(dout)
    assert layer.c_fc.weight.grad is not None and twin.c_fc.weight.grad is None
    layer.zero_grad(set_to_none=True)
    assert all(alike(results(twin, config, x, dout), before))
    with torch.no_grad():
        twin.c_fc.weight *= 2
    after = results(twin, config, x, dout)
    assert all(alike(results(layer, config, x, dout), before))
    # The router's loss knows nothing of the experts.
    assert [n for n, same in enumerate(alike(after, before)) if same] == [1]
    with torch.no_grad():
        layer.c_fc.weight *= 2
    assert all(alike(results(layer, config, x, dout), after)) and all(alike(results(twin, config, x, dout), after))
