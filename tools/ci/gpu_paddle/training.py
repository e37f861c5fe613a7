"""200 steps of the demo's model in Paddle, and what became of them in other processes: curves, a table, a figure.

    training.py start WORK               initial weights and all batches (start.npz), on the CPU
    training.py paddle_cpu WORK          the steps on the CPU (paddle_cpu.json); some minutes
    training.py compare WORK CSV         the table of all curves in WORK, held to the bounds
    training.py plot CSV PNG             the figure, from the table alone

Every curve starts from the weights and sees the batches of start.npz, and says which file that was. In BF16.
"""

import csv
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))

STEPS, BATCH, SEQ, LAST = 200, 16, 64, 20
CURVES = {"paddle_gpu": "Paddle, GPU", "torch_gpu": "torch, GPU", "paddle_cpu": "Paddle, CPU"}
# The first loss comes from equal weights: its forwards differ by roundings of bf16, 2^-9 each, which the mean over 1024
# tokens brings down.
FIRST = 2e-3
# Later a rounding more or less sends tokens to other experts, and every run goes its own way. How far is measured: the
# same run on the CPU, with each expert's weights moved by less than a rounding, ends SPREAD away, in the mean of the
# last 20 steps. Two runs that both do so are apart by the root of 2 of that; three deviations are allowed.
SPREAD = 5e-3
FINAL = 3 * 2**0.5 * SPREAD


def model_and_training():
    from ernie_moe.model import ModelConfig
    from ernie_moe.trainer import TrainConfig

    return ModelConfig(), TrainConfig(steps=STEPS, batch=BATCH, micro_batches=1)


class Windows:
    """The batches of start.npz, as the demo's trainer asks for them."""

    def __init__(self, windows: np.ndarray):
        self.windows = windows

    def batch(self, step: int, micro: int, size: int) -> np.ndarray:
        return self.windows[step].astype(np.int64)


def start(work: Path) -> None:
    import paddle
    from ernie_moe.data import Corpus, standard_text
    from ernie_moe.trainer import Trainer

    paddle.set_device("cpu")
    model_config, config = model_and_training()
    corpus = Corpus(standard_text(), SEQ, config.seed)
    model = Trainer(model_config, config, corpus).model
    arrays = {f"weight/{name}": p.astype("float32").numpy() for name, p in model.named_parameters()}
    windows = np.stack([corpus.batch(step, 0, BATCH) for step in range(STEPS)]).astype(np.uint8)
    rates = np.array([config.learning_rate_at(step) for step in range(STEPS)])
    np.savez(work / "start.npz", windows=windows, rates=rates, balance=config.balance, **arrays)


def run(work: Path, name: str, moved: float = 0.0, steps: int = STEPS, **settings) -> list[float]:
    """The losses, on Paddle's current device; ``moved`` shifts the experts' weights by that part of themselves."""
    import paddle
    from ernie_moe.optimizer import MainGradAdamW
    from ernie_moe.trainer import Trainer

    given = np.load(work / "start.npz")
    trainer = Trainer(*model_and_training(), Windows(given["windows"]))
    for parameter_name, parameter in trainer.model.named_parameters():
        value = given[f"weight/{parameter_name}"]
        if moved and ".experts." in parameter_name:
            value = value * (1 + moved * np.random.default_rng(1).standard_normal(value.shape)).astype(np.float32)
        parameter.set_value(paddle.to_tensor(value, place=paddle.CPUPlace()).astype(parameter.dtype))
    trainer.optimizer = MainGradAdamW(trainer.model.named_parameters())
    for runner in trainer.model.expert_runners():
        runner.config = replace(runner.config, **settings)
    for _ in range(steps):
        trainer.step()
    save(work, name, trainer.losses)
    return trainer.losses


def digest(work: Path) -> str:
    return hashlib.sha256((work / "start.npz").read_bytes()).hexdigest()


def save(work: Path, name: str, losses: list[float]) -> None:
    (work / f"{name}.json").write_text(json.dumps({"start": digest(work), "losses": losses}))


def curves(work: Path) -> dict[str, list[float]]:
    found, wanted = {}, digest(work)
    for name in CURVES:
        if (work / f"{name}.json").exists():
            curve = json.loads((work / f"{name}.json").read_text())
            assert curve["start"] == wanted, f"{name}.json is of another start.npz; make it anew"
            found[name] = curve["losses"]
    return found


def compare(found: dict[str, list[float]]) -> str:
    """What is said of the curves; raises where two are further apart than the bounds."""
    finals = {name: float(np.mean(losses[-LAST:])) for name, losses in found.items()}
    for name, losses in found.items():
        assert len(losses) == STEPS and np.isfinite(losses).all(), f"{name}: {len(losses)} steps, or no numbers"
        assert finals[name] < 0.8 * losses[0], f"{name}: from {losses[0]:.4f} to {finals[name]:.4f}: it learnt little"
    base = finals["paddle_gpu"]
    for name, final in finals.items():
        first = abs(found[name][0] / found["paddle_gpu"][0] - 1)
        assert first <= FIRST, f"{name}: the first loss is {first:.2e} away, more than {FIRST:.0e}"
        apart = abs(final / base - 1)
        assert apart <= FINAL, f"{name}: the last {LAST} losses are {apart:.2e} away, more than {FINAL:.1e}"
    return ", ".join(f"{name} {final:.4f} ({final / base - 1:+.2%})" for name, final in finals.items())


def write(found: dict[str, list[float]], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as target:
        table = csv.writer(target)
        table.writerow(["step", *found])
        rows = zip(range(STEPS), *found.values(), strict=True)
        table.writerows([step, *(f"{loss:.5f}" for loss in losses)] for step, *losses in rows)


def plot(table: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(table, newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    looks = {"paddle_cpu": ("#c9c9c9", 5.0), "torch_gpu": ("#f2a65a", 3.0), "paddle_gpu": ("#1f3a5f", 1.2)}
    for name, (colour, width) in looks.items():
        if name in rows[0]:
            axis.plot([float(row[name]) for row in rows], color=colour, linewidth=width, label=CURVES[name])
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss, nats a byte")
    axis.set_title("The demo's model in BF16, from the same weights on the same text", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(picture, dpi=130)


def main() -> None:
    what, *paths = sys.argv[1:]
    paths = [Path(path) for path in paths]
    if what == "start":
        start(*paths)
    elif what == "paddle_cpu":
        if not (paths[0] / "start.npz").exists():
            start(paths[0])
        run(paths[0], what)
    elif what == "compare":
        found = curves(paths[0])
        write(found, paths[1])
        print(compare(found))
    elif what == "plot":
        plot(*paths)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
