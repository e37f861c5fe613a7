"""Data parallel training on two ranks equals one process with both batches: paddle.distributed.launch, CPU, gloo."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.support import children, floors

WORKER = children.WORKERS / "data_parallel.py"
PROBLEM = dict(n_tokens=96, hidden=128, intermediate=128, n_experts=4, topk=2, routing="holes", seed=21)
LIMIT_S = 120

RECIPES = {
    "bf16": dict(),
    "fp8 sm90": dict(fp8_mode="perf", fp8_recipe="sm90"),
    "fp8 sm100": dict(fp8_mode="perf", fp8_recipe="sm100"),
    "fp8 sm90 with fp8 wgrad": dict(fp8_mode="perf", fp8_recipe="sm90", fp8_wgrad=True),
    "fp8 sm100 with fp8 wgrad": dict(fp8_mode="perf", fp8_recipe="sm100", fp8_wgrad=True),
}
# Under FP8 wgrad 128 tokens share a scale, and which tokens those are depends on the batch: the same gradient to FP8
# precision but not to that of fp32. Everything else is quantized token by token.
ONE_PIECE = [name for name in RECIPES if "wgrad" not in name]
STEPS = 3

# fp32 sums of the same products: the order differs where a batch comes in one piece.
FLOAT32 = 1e-6
# AdamW divides a gradient by its size: where that is next to nothing, fp32 rounding is a part of it.
TRAINED = 1e-4

# What a cluster's scheduler exports; any of these makes Paddle's launcher look for other machines, and wait.
SCHEDULER = {
    "PADDLE_TRAINERS": "198.51.100.1,198.51.100.2,198.51.100.3,198.51.100.4",
    "PADDLE_TRAINERS_NUM": "4",
    "PADDLE_TRAINER_ID": "3",
    "PADDLE_TRAINER_ENDPOINTS": "198.51.100.1:6170,198.51.100.2:6170",
    "PADDLE_CURRENT_ENDPOINT": "198.51.100.1:6170",
    "PADDLE_MASTER": "198.51.100.1:6170",
    "PADDLE_NNODES": "4",
    "PADDLE_CLUSTER_TRAIN": "True",
    "PADDLE_IS_LOCAL": "0",
    "DISTRIBUTED_TRAINER_ENDPOINTS": "198.51.100.1:6170,198.51.100.2:6170",
    "TRAINER_INSTANCES": "198.51.100.1,198.51.100.2",
    "POD_IP": "198.51.100.1",
    "EKS_POD_NAME": "job-0",
    "FLAGS_selected_gpus": "7",
    "http_proxy": "http://198.51.100.1:8080",
    "SONIC_MOE_FP8_MODE": "mem",
}


def case(config, *, whole=False, idle_rank=False, steps=0):
    return dict(config=config, whole=whole, idle_rank=idle_rank, steps=steps)


def cases():
    found = {name: case(config) for name, config in RECIPES.items()}
    found["bf16 with an idle rank"] = case(RECIPES["bf16"], idle_rank=True)
    found |= {f"{name} in one piece": case(RECIPES[name], whole=True) for name in ONE_PIECE}
    return found | {f"training {name}": case(RECIPES[name], steps=STEPS) for name in ("bf16", "fp8 sm90")}


def load(path: Path) -> dict[str, dict[str, np.ndarray]]:
    found, arrays = {}, np.load(path)
    for key in arrays.files:
        name, _, result = key.partition("/")
        found.setdefault(name, {})[result] = arrays[key]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """([rank 0's, rank 1's], one process's) results of all cases, as {case: {name: array}}."""
    folder = tmp_path_factory.mktemp("data_parallel")
    (folder / "alone").mkdir()
    settings = folder / "settings.json"
    settings.write_text(json.dumps(dict(problem=PROBLEM, cases=cases(), limit_s=LIMIT_S)))
    children.python(WORKER, settings, folder / "alone", timeout=LIMIT_S + 30)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SCHEDULER.items():
            patch.setenv(name, value)
        children.launch(WORKER, settings, folder, folder=folder, timeout=LIMIT_S + 30)
    return [load(folder / f"rank{rank}.npz") for rank in (0, 1)], load(folder / "alone" / "rank0.npz")


def test_the_launcher_gets_nothing_of_the_schedulers_environment(monkeypatch):
    for name, value in SCHEDULER.items():
        monkeypatch.setenv(name, value)
    env = children.clean_env()
    assert not set(SCHEDULER) & set(env)
    assert not [value for value in env.values() if "198.51.100." in value]
    assert env["PATH"] == os.environ["PATH"] and env["PYTHONPATH"] == str(children.ROOT)


@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name, settings in cases().items() if not settings["steps"]])
def test_averaged_gradients_are_those_of_one_process(results, name):
    ranks, alone = results
    for weight, reference in alone[name].items():
        assert np.isfinite(reference).all() and np.linalg.norm(reference) > 0, weight
        for rank in ranks:
            error = floors.relative_error(rank[name][weight], reference)
            assert error <= FLOAT32, f"{name}, {weight}: relative error {error:.1e}"
    assert len(alone[name]) == 2 * PROBLEM["n_experts"]


@pytest.mark.dist
def test_the_ranks_had_different_gradients(results):
    """Or else averaging them would be no test: without the second rank's tokens the mean is another one."""
    ranks, _ = results
    for weight, value in ranks[0]["bf16"].items():
        assert floors.relative_error(ranks[0]["bf16 with an idle rank"][weight], value) > 0.1


@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name, settings in cases().items() if settings["steps"]])
def test_training_stays_in_step(results, name):
    (first, second), alone = (rank[name] for rank in results[0]), results[1][name]
    for key, value in first.items():
        assert value.tobytes() == second[key].tobytes(), f"{key}: the ranks' weights drifted apart"
    assert len(first["losses"]) == STEPS
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=FLOAT32)
    weights = [key.removeprefix("after ") for key in alone if key.startswith("after ")]
    assert len(weights) == 2 * PROBLEM["n_experts"] + 1
    for weight in weights:
        moved = floors.relative_error(alone[f"after {weight}"], alone[f"before {weight}"])
        error = floors.relative_error(first[f"after {weight}"], alone[f"after {weight}"])
        assert moved > 100 * TRAINED and error <= TRAINED, f"{weight}: moved {moved:.1e}, error {error:.1e}"


# ---- The launcher's own helpers --------------------------------------------------------------------------------------

HANGING = """
import os, pathlib, subprocess, sys, time
rank = os.environ["PADDLE_TRAINER_ID"]
print(f"rank {rank} waits", flush=True)
# A process of its own session, as a launcher's workers are, and nobody's child once its parent is gone.
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1], f"pids{rank}").write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Whether a process is alive; one that only waits to be collected has no command line any more."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.dist
def test_a_hanging_launch_ends_with_everything_it_started(tmp_path):
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    with pytest.raises(pytest.fail.Exception) as failure:
        children.launch(script, tmp_path, folder=tmp_path, timeout=12)
    text = str(failure.value)
    assert "ran out of time" in text
    assert "--- rank 0\nrank 0 waits" in text and "--- rank 1\nrank 1 waits" in text
    pids = [int(pid) for rank in (0, 1) for pid in (tmp_path / f"pids{rank}").read_text().split()]
    assert len(pids) == 4 and not any(runs(pid) for pid in pids)
