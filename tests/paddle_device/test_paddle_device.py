"""The device plugin for stock Paddle, over its stand-in for CUDA: what it must do anywhere, and the node on it."""

import sys
from pathlib import Path

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch  # a minute or so: not for the quick suite

BUILD = children.ROOT / "tools" / "build_paddle_device.py"
CASES = children.ROOT / "tools" / "ci" / "gpu_paddle" / "cases.py"
RIG = children.WORKERS / "paddle_device_rig.py"
INTERPRETED = children.WORKERS / "paddle_device_interpreted.py"
DEVICE = "sonicmoe_gpu:0"

CHECKS = ("views_read", "views_written", "memory_comes_back", "too_much_is_an_error", "two_devices")
CHECKS += ("blocks_are_handed_out_again", "layer_on_another_device", "streams_and_events", "counters")
CHECKS += ("under_autocast", "expert_parallel_under_autocast", "copies_on_another_device")
NODE = ("numerics", "edges", "layers", "one_forward_one_backward", "recompute", "weights_that_change")
NODE += ("weights_that_move", "weights_that_change_in_flight", "adamw", "checkpoint", "two_streams")


def environment(plugin: Path, *more: Path, **variables) -> dict[str, str]:
    path = [children.ROOT, children.ROOT / "tools" / "ci", *more]
    return children.clean_env(path, CUSTOM_DEVICE_ROOT=plugin, **variables)


@pytest.fixture(scope="module")
def rig(plugin):
    return children.answer(RIG, "rig", options=["-W", "ignore"], env=environment(plugin, FLAGS_free_idle_chunk="1"))


def test_each_check_is_listed_here(rig):
    assert sorted(rig) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_rig(rig, check):
    if rig[check] is not None:
        pytest.fail(rig[check], pytrace=False)


def test_a_first_call_without_a_token(plugin):
    assert children.answer(RIG, "empty", options=["-W", "ignore"], env=environment(plugin)) == {"empty": None}


def said(done) -> dict[str, str]:
    """{case: ok or FAILED}"""
    lines = [line.split() for line in done.stdout.splitlines()]
    return {line[1]: line[0] for line in lines if line and line[0] in ("ok", "FAILED")}


def test_node(plugin, tmp_path):
    """The cases of the suite for a real GPU, on the naive engine."""
    options = ["--backend", "naive", "--tiny", "--recipes", "bf16", "fp8_wgrad", "--"]
    done = children.python(CASES, *options, DEVICE, tmp_path, *NODE, env=environment(plugin), timeout=400)
    assert said(done) == dict.fromkeys(NODE, "ok")


def test_weight_copies_of_a_gpu(plugin, tmp_path):
    """Made by the kernels, in Triton's interpreter."""
    names = ["weights_that_move", "weights_that_change_in_flight", "weights_in_another_type"]
    options = ["--backend", "naive", "--tiny", "--recipes", "fp8", "--"]
    env = environment(plugin, triton_runs.triton_site(), TRITON_INTERPRET="1")
    done = children.python(INTERPRETED, *options, DEVICE, tmp_path, *names, env=env, timeout=400)
    assert said(done) == dict.fromkeys(names, "ok")
    assert "fp8 behind step() exact, fp8 NaN" in done.stdout


def test_without_a_compiler_the_build_says_so(tmp_path):
    env = children.clean_env(PATH=str(tmp_path))
    command = [sys.executable, BUILD, tmp_path / "out", "--stand-in"]
    done = children.run(command, env=env)
    assert done.status == 1 and "none of c++, g++ is on PATH" in done.stderr, done.stderr
