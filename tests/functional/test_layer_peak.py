"""The memory that a step of the torch layer needs on Hopper, counted without one."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

# MiB at T,H,I,E,K = 8192,3072,1536,8,8 and the share of what sonic-moe takes there (docs/performance.md).
SHAPE = (8192, 3072, 1536, 8, 8)
PEER = 1084
MOST = {"bf16": 0.9, "bf16 with main_grad": 0.9, "fp8": 0.65, "fp8 with main_grad": 0.65}


def peaks(shape) -> dict[str, float]:
    env = children.clean_env([children.ROOT, children.torch_site(), triton_runs.triton_site()])
    return children.answer(children.WORKERS / "layer_peak.py", *map(str, shape), env=env)


def test_peak_beside_sonic_moe():
    found = peaks(SHAPE)
    assert sorted(found) == sorted(MOST)
    for name, share in MOST.items():
        assert 0.5 * share * PEER < found[name] <= share * PEER, found


@pytest.mark.parametrize("shape", [(8192, 3072, 1536, 32, 8), (32768, 4096, 1024, 128, 8)])
def test_fp8_takes_less_than_16_bits_with_many_experts(shape):
    """Where new gradients are the most of it, and FP8 makes few pieces of what is large besides."""
    found = peaks(shape)
    for how in ("", " with main_grad"):
        assert 0.5 * found[f"bf16{how}"] < found[f"fp8{how}"] < found[f"bf16{how}"], found
