"""Expert-parallel runs of ``tests/workers/expert_parallel.py`` under either launcher, with a time limit, and their
results."""

import json
import sys
from pathlib import Path

import numpy as np

from tests.support import children, paddle_plugin

WORKER = children.WORKERS / "expert_parallel.py"
LIMIT_S = 150
_MOVEMENT = dict(
    kind="movement", hidden=128, topk=3, dtype="bfloat16", index_dtype="int32", wire={}, routing="uniform", frozen=None,
    backward=False, autocast=False, seed=3,
)  # fmt: skip
_TRAINING = dict(
    kind="training", hidden=128, intermediate=64, n_experts=8, topk=2, n_tokens=96, std=0.08, steps=30, seed=7,
    micro_batches=1, skewed=False, whole=True, rows=None, frozen_router=False, layer={}, config=None, steer=None,
    save=None, load=None, copied=False,
)  # fmt: skip


def movement(**changes) -> dict:
    return {**_MOVEMENT, **changes}


def disagreement(odd: dict, **changes) -> dict:
    """The last rank does otherwise."""
    return movement(kind="disagreement", odd=odd, **changes)


def frozen(parts: int, frozen_router: bool, layer: dict) -> dict:
    """The last rank has frozen its experts."""
    return training(parts, kind="frozen", frozen_router=frozen_router, layer=layer)


def training(parts: int, **changes) -> dict:
    return {**_TRAINING, "parts": parts, **changes}


def run(framework: str, ranks: int, cases: dict, folder: Path, limit_s: int = LIMIT_S, plugin=None) -> list[dict]:
    """{case: {name: array}} of each rank. ``ranks`` 0 is a process without a launcher. On the CPU, or with ``plugin``
    on Paddle's device plugin that lies there, over its stand-ins."""
    folder.mkdir(parents=True)
    settings = folder / "settings.json"
    named = {name: {**case, "name": name} for name, case in cases.items()}
    settings.write_text(json.dumps(dict(cases=named, limit_s=limit_s - 15)))
    arguments = (framework, settings, folder)
    if framework == "torch":
        env = children.clean_env([children.ROOT, children.torch_site()])
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks else []
        done = children.run([sys.executable, *launcher, WORKER, *arguments], env=env, cwd=folder, timeout=limit_s)
        children.check(done)
    elif ranks:
        device = paddle_plugin.variables(plugin, ranks, folder) if plugin else None
        children.launch(WORKER, *arguments, folder=folder, ranks=ranks, timeout=limit_s, device=device)
    else:
        children.python(WORKER, *arguments, timeout=limit_s)
    return [_load(folder / f"rank{rank}.npz") for rank in range(max(ranks, 1))]


def _load(path: Path) -> dict[str, dict[str, np.ndarray]]:
    found, arrays = {}, np.load(path)
    for key in arrays.files:
        name, _, result = key.partition("/")
        found.setdefault(name, {})[result] = arrays[key]
    return found
