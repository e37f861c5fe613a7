"""The torch layer on one rank, under autocast."""

from contextlib import nullcontext

import pytest

from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe.ep.torch_layer import ExpertParallelMoE

LAYERS = {
    "plain": dict(),
    "shared expert, balance, overlap": dict(shared_intermediate_size=64, balance_speed=0.01, overlap=3),
    "fp8, recompute": dict(fp8_dispatch=True, fp8_combine_grad=True, recompute=True),
}


def results(options, dtype, router_dtype, narrowed):
    """Of forward and backward, both with ``narrowed`` active."""
    layer = ExpertParallelMoE(8, 2, 128, 128, std=0.1, **options).to(getattr(torch, dtype))
    layer.router.to(getattr(torch, router_dtype))
    generator = torch.Generator().manual_seed(0)
    x, dout = (torch.randn(24, 128, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    x.requires_grad_()
    with narrowed:
        out, aux = layer(x)
        torch.autograd.backward([out, aux], [dout.to(out.dtype), torch.tensor(0.5)])
        layer.sum_shared_gradients()
        layer.step()
    found = {"out": out, "aux": aux, "dx": x.grad, **dict(layer.named_buffers())}
    return found | {name: weight.grad for name, weight in layer.named_parameters()}


@pytest.mark.parametrize("name", list(LAYERS))
def test_autocast_does_not_reach_between_the_parts(name):
    """All that follows it, the products of router and shared expert, is in its type already."""
    wanted = results(LAYERS[name], "bfloat16", "bfloat16", nullcontext())
    found = results(LAYERS[name], "bfloat16", "bfloat16", torch.autocast("cpu", torch.bfloat16))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@pytest.mark.parametrize("name", list(LAYERS))
def test_autocast_of_float32(name):
    """Experts and router in bf16, while loss and gradients stay what they are."""
    found = results(LAYERS[name], "float32", "float32", torch.autocast("cpu", torch.bfloat16))
    wanted = results(LAYERS[name], "float32", "float32", nullcontext())
    for key, value in wanted.items():
        assert found[key].dtype == (torch.bfloat16 if key == "out" else value.dtype), key
    error = (found["out"].float() - wanted["out"]).norm() / wanted["out"].norm()
    assert 1e-4 < error < 0.2, "it was not in bf16" if error < 0.2 else error
