"""Several processes with a device each: collectives of stock Paddle, and expert parallelism over them.

The script for real GPUs, over the stand-ins for CUDA and NCCL."""

import re
import sys

import pytest

from tests.support import children, paddle_plugin

pytestmark = [pytest.mark.dist, pytest.mark.torch]

SCRIPT = children.ROOT / "tools" / "ci" / "gpu_paddle_ranks.py"
WORKER = children.WORKERS / "paddle_rank_apart.py"
LAYERS = ("bf16", "fp8_payload")


def run(plugin, folder, ranks: int, *names, **more) -> children.Done:
    options = ["--plugin", plugin, "--ranks", ranks, "--backend", "naive", "--tiny", "--limit", 100]
    env = children.clean_env(**paddle_plugin.variables(plugin, ranks, folder), **more)
    return children.run([sys.executable, SCRIPT, *options, *names], env=env, timeout=150)


@pytest.mark.parametrize(("ranks", "names"), [(2, ("exact", "movement", "speed", *LAYERS)), (4, ("exact", "movement"))])
def test_ranks(plugin, tmp_path, ranks, names):
    done = children.check(run(plugin, tmp_path, ranks, *names))
    assert re.findall(r"^ok (\w+)", done.stdout, re.M) == list(names)
    assert f"{ranks} ranks: all ok: {len(names)} cases" in done.stdout
    assert not list(tmp_path.glob("nccl-*")), "a communicator was not destroyed"


def test_without_nccl_one_line_says_so(plugin, tmp_path):
    done = run(plugin, tmp_path, 2, "exact", SONICMOE_NCCL="/nowhere/libnccl.so.2")
    assert done.status == 1 and "2 ranks: FAILED" in done.stdout
    said = "sonicmoe_gpu: no NCCL for paddle.distributed: /nowhere/libnccl.so.2: "
    (line,) = {line for line in done.stdout.splitlines() if said in line}
    assert line.endswith("; set SONICMOE_NCCL to the path of libnccl.so.2")


def test_ranks_that_mean_different_calls(plugin, tmp_path):
    """What NCCL would hang on, its stand-in tells: so these tests see it."""
    device = paddle_plugin.variables(plugin, 2, tmp_path)
    children.launch(WORKER, folder=tmp_path, device=device, timeout=100)
    assert (
        "waits for all reduce of 16 bytes from 1, which sent all reduce of 32"
        in (tmp_path / "logs" / "workerlog.0").read_text()
    )
