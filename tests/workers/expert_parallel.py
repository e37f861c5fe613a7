"""One rank of expert-parallel runs, or all of it in one process, on either framework.

    expert_parallel.py paddle|torch SETTINGS.json FOLDER

Runs every case of SETTINGS and writes ``FOLDER/rank<N>.npz``. A process that a launcher started is one rank and takes
its part of each batch; without a launcher one process holds all experts and takes every part, one after the other. The
layer is driven through ``Paddle`` or ``Torch``, which hide how the two spell things.
"""

import faulthandler
import json
import sys
from pathlib import Path

import numpy as np

from tests.workers import ep_frameworks, ep_movement

RATE, AUX_WEIGHT, BATCHES = 2e-3, 0.01, 2


def batch(case, step: int, micro: int) -> np.ndarray:
    """[T,H] of all ranks together: a few batches in turn, so that there is something to learn."""
    rng = np.random.default_rng([case["seed"], step % BATCHES, micro])
    x = rng.standard_normal((case["n_tokens"], case["hidden"])).astype(np.float32)
    if case["skewed"]:  # all tokens have much in common, so the router sends them to few experts
        x = 0.5 * x + np.random.default_rng(5).standard_normal(case["hidden"]).astype(np.float32)
    return x


def parts_of(case, rank: int, size: int) -> list[slice]:
    """This process's rows of a batch, part by part. ``rows``: how many each rank has, if not alike many."""
    whole = case["n_tokens"]
    rows = case["rows"] or [whole // case["parts"]] * case["parts"]
    bounds = np.concatenate([[0], np.cumsum(rows)])
    assert bounds[-1] == whole and size in (1, len(rows))
    every = [slice(int(lo), int(hi)) for lo, hi in zip(bounds, bounds[1:], strict=False)]
    return [slice(0, whole)] if case["whole"] and size == 1 else every if size == 1 else [every[rank]]


class Adam:
    """On fp32 masters, which are rounded into the layer's weights. NumPy: the same on either side."""

    def __init__(self, weights: dict):
        self.masters, self.step = dict(weights), 0
        self.means, self.squares = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))

    def update(self, gradients: dict) -> dict:
        self.step += 1
        for name, gradient in gradients.items():
            self.means[name] = np.float32(0.9) * self.means[name] + np.float32(0.1) * gradient
            self.squares[name] = np.float32(0.95) * self.squares[name] + np.float32(0.05) * gradient**2
            mean, square = self.means[name] / (1 - 0.9**self.step), self.squares[name] / (1 - 0.95**self.step)
            self.masters[name] = (self.masters[name] - RATE * mean / (np.sqrt(square) + 1e-6)).astype(np.float32)
        return self.masters


def train(framework, case, folder: Path) -> dict:
    """Losses of each step, gradients of the first and weights after the last."""
    made = framework.make_layer(case)
    rank, size = framework.rank, framework.size
    optimizer, losses, first, found = Adam(framework.weights(made)), [], 0, {}
    if case["load"]:
        first = framework.load_checkpoint(made, optimizer, folder.parent / case["load"])
    for step in range(first, case["steps"]):
        total, share = 0.0, 0
        for micro in range(case["micro_batches"]):
            x = batch(case, step, micro)
            for rows in parts_of(case, rank, size):
                share = (rows.stop - rows.start) / case["n_tokens"] / case["micro_batches"]
                total += framework.forward_backward(made, x[rows], np.roll(x, 1, axis=1)[rows], share, AUX_WEIGHT)
        losses.append(framework.sum_of(total))
        gradients = framework.gradients(made)
        if step == first:
            found |= {f"gradient {name}": gradient for name, gradient in gradients.items()}
        if case["frozen_router"]:
            gradients.pop("router")
        framework.set_weights(made, optimizer.update(gradients))
        if case["save"] == step + 1:
            framework.save_checkpoint(made, optimizer, folder.parent / case["name"])
    found |= {"losses": np.array(losses)}
    return found | {f"weight {name}": value for name, value in framework.weights(made).items()}


def main():
    settings, folder = json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    # A rank that waits for ever for another one says where, in its log, and ends.
    faulthandler.dump_traceback_later(settings["limit_s"], exit=True)
    framework = ep_frameworks.start(sys.argv[1])
    found = {}
    kinds = {"movement": ep_movement.move, "disagreement": ep_movement.disagree, "outside": ep_movement.outside}
    kinds["frozen"] = ep_movement.freeze_some
    for name, case in settings["cases"].items():
        run = kinds.get(case["kind"], train)
        found |= {f"{name}/{key}": value for key, value in run(framework, case, folder).items()}
    np.savez(folder / f"rank{framework.rank}.npz", **found)
    framework.finish()


if __name__ == "__main__":
    main()
