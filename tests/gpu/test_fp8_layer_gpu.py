"""The torch layer under FP8 on Hopper: it follows its weights, waits for nothing, and trains."""

import gc
import time

import pytest
import torch

from sonicmoe import KernelBackendMoE, MoE, SonicMoEConfig, functional
from sonicmoe.enums import ActivationType
from sonicmoe.functional import fp8_weights
from tests.support import floors

pytestmark = pytest.mark.gpu
GPU = "cuda"
NAMES = ("out", "x", "router.weight", "c_fc.weight", "c_proj.weight")


def layer(t=700, e=6, k=3, h=512, i=384, seed=0):
    torch.manual_seed(seed)
    with torch.device(GPU):
        moe = MoE(e, k, h, i, ActivationType.SWIGLU, False, 0.05).to(torch.bfloat16)
        return moe, torch.randn(t, h).bfloat16().requires_grad_(), torch.randn(t, h).bfloat16()


def step(moe, x, dout, **settings):
    """Output and gradients by name."""
    with settings["config"].activate():
        out, _ = moe(x)
        found = torch.autograd.grad(out, [x, *moe.parameters()], dout)
    return dict(zip(NAMES, (out.detach(), *found), strict=True))


@pytest.fixture(params=[True, False], ids=["fp8_wgrad", "bf16_wgrad"])
def config(request, cache_dir):
    return SonicMoEConfig(use_fp8=True, fp8_wgrad=request.param, cache_dir=cache_dir)


def wanted(moe, x, dout):
    out, _ = moe(x, kernel_backend_moe=KernelBackendMoE.torch)
    found = torch.autograd.grad(out, [x, *moe.parameters()], dout)
    return dict(zip(NAMES, (out.detach(), *found), strict=True))


def require_near(found, expected):
    for name in NAMES:
        error = ((found[name] - expected[name]).double().norm() / expected[name].double().norm()).item()
        bound = floors.sampled(floors.FP8_RELATIVE, 700 * 3) if name == "router.weight" else floors.FP8_RELATIVE
        assert error < bound, (name, error)


def test_step_beside_plain_torch(config):
    moe, x, dout = layer()
    require_near(step(moe, x, dout, config=config), wanted(moe, x, dout))


@pytest.mark.parametrize("change", ["optimizer", "data", "swap"])
def test_copies_follow_the_weights(config, change):
    """Also a write that no version counter sees, and weights that come back."""
    moe, x, dout = layer()
    before = step(moe, x, dout, config=config)
    kept = [p.detach().clone() for p in moe.parameters()]
    if change == "optimizer":
        optimizer = torch.optim.SGD(moe.parameters(), lr=30.0)
        for p, name in zip(moe.parameters(), NAMES[2:], strict=True):
            p.grad = before[name]
        optimizer.step()
        optimizer.zero_grad()
    else:
        for p in list(moe.parameters())[1:]:
            p.data.mul_(-1.5)
    require_near(step(moe, x, dout, config=config), wanted(moe, x, dout))
    if change == "swap":
        for p, old in zip(moe.parameters(), kept, strict=True):
            p.data.copy_(old)
        again = step(moe, x, dout, config=config)
        assert all(torch.equal(again[name], before[name]) for name in NAMES)


def test_backward_sees_weights_that_came_back(config):
    """Other weights for one forward, between another forward and its backward."""
    moe, x, dout = layer()
    expected = step(moe, x, dout, config=config)
    with config.activate():
        out, _ = moe(x)
        kept = moe.c_proj.weight.detach().clone()
        moe.c_proj.weight.data.mul_(-3.0)
        with torch.no_grad():
            moe(x)
        moe.c_proj.weight.data.copy_(kept)
        found = torch.autograd.grad(out, [x, *moe.parameters()], dout)
    assert all(torch.equal(one, expected[name]) for one, name in zip(found, NAMES[1:], strict=True))


def memory_at_rest() -> int:
    """Autograd's own thread lets go of what it had a while after backward has returned, on a busy host."""
    gc.collect()
    seen = [torch.cuda.memory_allocated()]
    while len(seen) < 5 or len(set(seen[-5:])) > 1:
        time.sleep(0.05)
        seen.append(torch.cuda.memory_allocated())
    return seen[-1]


def test_copies_are_shared_and_go_with_their_weights(config):
    functional.clear_all_fp8_weight_caches()
    moe, x, dout = layer()
    step(moe, x, dout, config=config)
    held = memory_at_rest()
    step(moe, x, dout, config=config)
    assert memory_at_rest() == held and len(fp8_weights._kept) == 1
    del moe
    assert len(fp8_weights._kept) == 0


def test_waits_for_nothing(config):
    moe, x, dout = layer()
    step(moe, x, dout, config=config)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(moe, x, dout, config=config)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_follows_the_weights(config):
    """A captured step, replayed after the weights changed and after they changed back."""
    moe, x, dout = layer()
    expected = step(moe, x, dout, config=config)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step(moe, x, dout, config=config)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(moe, x, dout, config=config)
    for factor in (1.0, -2.0, -0.5):
        with torch.no_grad():
            moe.c_proj.weight.mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        if factor == -2.0:
            assert not torch.equal(found["out"], expected["out"])
            require_near(found, wanted(moe, x, dout))
        else:
            assert all(torch.equal(found[name], expected[name]) for name in NAMES), factor


def test_two_streams(config):
    """Copies that one stream makes are whole before another reads them."""
    moe, x, dout = layer(h=2048, i=1024)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for number in range(6):
        with torch.no_grad():
            moe.c_fc.weight.mul_(1.1)
        found = []
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(step(moe, x, dout, config=config))
        torch.cuda.synchronize()
        assert all(torch.equal(found[0][name], found[1][name]) for name in NAMES), number


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("use_fp8", [True, False], ids=["fp8", "bf16"])
def test_another_gpu_than_the_current_one(cache_dir, use_fp8):
    """Nobody has to make a layer's GPU the current one first."""
    config = SonicMoEConfig(use_fp8=use_fp8, fp8_wgrad=use_fp8, cache_dir=cache_dir)
    moe, x, dout = layer()
    first = step(moe, x, dout, config=config)
    there = torch.device(GPU, 1)
    moe, x, dout = moe.to(there), x.detach().to(there).requires_grad_(), dout.to(there)
    found = step(moe, x, dout, config=config)
    assert torch.cuda.current_device() == 0
    assert all(found[name].device == there and torch.equal(found[name].cpu(), first[name].cpu()) for name in NAMES)
