"""The memory that a step of the torch layer needs on Hopper, counted without one."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

# MiB at T,H,I,E,K = 8192,3072,1536,8,8 and the share of what sonic-moe takes there (docs/performance.md).
SHAPE = (8192, 3072, 1536, 8, 8)
PEER = 1084
MOST = {"bf16": 0.9, "bf16 with main_grad": 0.9, "fp8": 0.65, "fp8 with main_grad": 0.65}


def test_peak_beside_sonic_moe():
    env = children.clean_env([children.ROOT, children.torch_site(), triton_runs.triton_site()])
    found = children.answer(children.WORKERS / "layer_peak.py", *map(str, SHAPE), env=env)
    assert sorted(found) == sorted(MOST)
    for name, share in MOST.items():
        assert 0.5 * share * PEER < found[name] <= share * PEER, found
