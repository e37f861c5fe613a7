"""Whole jobs: the smoke tool, a lost rank, the demo on two ranks."""

import importlib
import os
import re
import sys

import pytest

from tests.support import children
from tests.test_distributed import SCHEDULER

SMOKE = children.ROOT / "tools" / "ci" / "multicard_smoke.py"
DEMO = children.ROOT / "examples" / "train_ernie_moe_ep.py"

FRAMEWORKS = [
    pytest.param("paddle", marks=pytest.mark.dist),
    pytest.param("torch", marks=[pytest.mark.dist, pytest.mark.torch]),
]


def smoke(framework: str, *options, timeout=120):
    paths = [children.ROOT] + ([children.torch_site()] if framework == "torch" else [])
    # What a scheduler exports is in the tool's own environment, and must not get further.
    env = {**children.clean_env(paths), **SCHEDULER}
    return children.run([sys.executable, SMOKE, "--framework", framework, *options], env=env, timeout=timeout)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_smoke_tool_runs_under_a_schedulers_environment(framework):
    done = children.check(smoke(framework, "--steps", "2"))
    assert re.search(rf"multicard smoke: {framework}, 2 ranks, 2 steps: ok", done.stdout)
    assert done.ended == 0, "processes were left behind"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_killed_rank_ends_the_job_with_a_message(framework):
    """By itself, because the other rank notices: not because the tool lost its patience."""
    done = smoke(framework, "--kill", "1", "2")
    assert done.status == 1 and done.seconds < 60 and done.ended == 0, done.report()
    last = done.stdout.strip().splitlines()[-1]
    assert "FAILED" in last and "rank" in last and "1 ended before its last step; the job ended by itself" in last
    assert "rank 1 step 1 loss" in done.stdout and "rank 1 step 2" not in done.stdout


@pytest.mark.dist
def test_a_job_that_takes_too_long_is_ended():
    done = smoke("paddle", "--steps", "1000000", "--limit", "5")
    assert done.status == 1 and done.seconds < 30 and done.ended == 0, done.report()
    assert "FAILED" in done.stdout and "still running after 5 s, ended" in done.stdout


@pytest.mark.dist
def test_the_demo_on_two_ranks_is_the_demo_on_one(tmp_path):
    options = ("--steps", "4")
    alone = children.python(DEMO, *options, env=children.clean_env())
    ranks = children.launch(DEMO, *options, folder=tmp_path, timeout=120)
    found = [[float(loss) for loss in re.findall(r"step +\d/4  loss ([\d.]+)", run.stdout)] for run in (alone, ranks)]
    assert len(found[0]) == 4 and found[0][-1] < 0.8 * found[0][0]
    assert found[1] == pytest.approx(found[0], rel=3e-3)
    assert "2 ranks, each with 4 of 8 experts of a layer" in ranks.stdout


@pytest.fixture
def multicard_smoke(monkeypatch):
    monkeypatch.syspath_prepend(SMOKE.parent)
    return importlib.import_module("multicard_smoke")


@pytest.mark.parametrize("gpus, on_gloo", [(0, True), (1, True), (2, False), (8, False)])
def test_too_few_gpus_are_none(multicard_smoke, monkeypatch, gpus, on_gloo):
    """A rank then runs on the CPU, whatever Paddle's launcher thinks of the machine."""
    import paddle

    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: gpus)
    assert ("--backend=gloo" in multicard_smoke.launcher("paddle", 2, SMOKE.parent)) == on_gloo


def test_only_named_variables_reach_the_launcher(multicard_smoke, monkeypatch):
    for name, value in (SCHEDULER | {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "0,1"}).items():
        monkeypatch.setenv(name, value)
    env = multicard_smoke.environment("mark")
    assert set(SCHEDULER) & set(env) == {"SONIC_MOE_FP8_MODE"}  # ours, and the user's wish
    assert env["NCCL_DEBUG"] == "INFO" and env["CUDA_VISIBLE_DEVICES"] == "0,1" and env["PATH"] == os.environ["PATH"]
