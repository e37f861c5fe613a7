"""Processes that begin with what others have compiled, some at a time: the same bits from the first step on.

A router's gradient once was off in one process out of dozens, and right in every step of the others.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.first_steps import STEPS

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
ROUNDS, AT_ONCE = 3, 4
SIZES = "8192,3072,1536,8,8"


def start(device, cache_dir, use_fp8, sizes):
    about = [device, str(cache_dir), str(int(use_fp8)), sizes]
    command = [sys.executable, "-m", "tests.workers.first_steps", *about]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def steps(process) -> list[dict]:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return [json.loads(line) for line in said.splitlines()]


def require_same_steps(device, cache_dir, use_fp8, sizes=SIZES):
    about = device, cache_dir, use_fp8, sizes
    first, *others = steps(start(*about))
    assert len(others) == STEPS - 1 and all(other == first for other in others)
    for _ in range(ROUNDS):
        for process in [start(*about) for _ in range(AT_ONCE)]:
            assert steps(process) == [first] * STEPS


@pytest.mark.parametrize("use_fp8", [False, True], ids=["bf16", "fp8"])
def test_every_process_starts_right(cache_dir, use_fp8):
    require_same_steps("cuda", cache_dir, use_fp8)
