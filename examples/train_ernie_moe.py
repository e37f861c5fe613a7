"""Train a small ERNIE-style Mixture-of-Experts language model with sonicmoe on Paddle, on the CPU.

BF16 and FP8 experts train side by side from the same seed on text that ships with Python. At the end the script
prints both losses and the balance of the experts, and draws them.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import paddle
from ernie_moe.data import Corpus, read_text
from ernie_moe.model import ModelConfig
from ernie_moe.plot import draw
from ernie_moe.trainer import TrainConfig, Trainer

PRECISIONS = ("bf16", "fp8")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default, except where the help text words it itself."""

    def _get_help_string(self, action):
        return action.help if "(default" in action.help else super()._get_help_string(action)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_HelpFormatter)

    what = parser.add_argument_group("what runs the experts")
    what.add_argument(
        "--experts",
        choices=("sonic", "plain"),
        default="sonic",
        help="sonic: SonicMoEMlpNode; plain: the same function in Paddle operators, BF16 only",
    )
    what.add_argument(
        "--precision",
        type=_precisions,
        metavar="LIST",
        help="bf16, fp8 or bf16,fp8: the models to train (default: all that --experts can run)",
    )
    what.add_argument(
        "--recipe",
        choices=("sm90", "sm100"),
        default="sm90",
        help="scales of FP8: Hopper's fp32 1x128 and 128x128, or Blackwell's power-of-two 1x32",
    )

    size = parser.add_argument_group("the model")
    size.add_argument("--layers", type=_at_least(1), default=3, metavar="N", help="layers; the first one is dense")
    size.add_argument(
        "--hidden", type=_at_least(1), default=128, metavar="N", help="channels of a token; a multiple of 128 for FP8"
    )
    size.add_argument(
        "--intermediate",
        type=_at_least(1),
        default=128,
        metavar="N",
        help="channels inside an expert; a multiple of 128 for FP8",
    )
    size.add_argument("--heads", type=_at_least(1), default=4, metavar="N", help="attention heads")
    size.add_argument("--experts-per-layer", type=_at_least(1), default=8, metavar="N", help="experts of an MoE layer")
    size.add_argument("--topk", type=_at_least(1), default=2, metavar="N", help="experts that each token goes to")

    train = parser.add_argument_group("the training")
    train.add_argument("--steps", type=_at_least(1), default=80, metavar="N", help="optimizer steps")
    train.add_argument("--batch", type=_at_least(1), default=16, metavar="N", help="sequences of an optimizer step")
    train.add_argument(
        "--micro-batches",
        type=_at_least(1),
        default=4,
        metavar="N",
        help="parts that a batch is split into; their gradients accumulate",
    )
    train.add_argument("--seq", type=_at_least(1), default=64, metavar="N", help="bytes of a sequence")
    train.add_argument(
        "--learning-rate",
        type=float,
        default=5e-3,
        metavar="X",
        help="peak, after the warm-up; falls to a tenth along a cosine",
    )
    train.add_argument("--warmup", type=_at_least(0), default=10, metavar="N", help="steps of linear warm-up")
    train.add_argument(
        "--balance",
        type=float,
        default=0.05,
        metavar="X",
        help="weight of the loss that keeps the experts evenly loaded",
    )
    train.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N", help="of the initial weights and of the batches"
    )
    train.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to learn (default: Python's language reference, as in help())",
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--output", type=Path, default=Path("ernie_moe_demo.png"), metavar="PNG", help="where the figure goes"
    )
    files.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="save all models and optimizers there, at the end (default: nowhere)",
    )
    files.add_argument(
        "--checkpoint-every",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="save --checkpoint also every N steps; 0 is at the end only",
    )
    files.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="continue from a checkpoint made with the same options, bit for bit (default: start anew)",
    )

    args = parser.parse_args(argv)
    if args.precision is None:
        args.precision = PRECISIONS if args.experts == "sonic" else ("bf16",)
    try:
        model_configs, train_config = build_configs(args)
    except ValueError as error:
        parser.error(str(error))
    if args.checkpoint_every and not args.checkpoint:
        parser.error("--checkpoint-every: needs --checkpoint FILE")
    for name in ("text", "resume"):
        if getattr(args, name) and not getattr(args, name).is_file():
            parser.error(f"--{name}: there is no file {getattr(args, name)}")
    return args, model_configs, train_config


def build_configs(args):
    model_configs = {}
    for precision in args.precision:
        if precision == "fp8" and args.experts == "plain":
            raise ValueError("--precision: got 'fp8', which needs --experts sonic")
        for name in ("hidden", "intermediate"):
            if precision == "fp8" and getattr(args, name) % 128:
                raise ValueError(f"--{name}: got {getattr(args, name)}, FP8 needs a multiple of 128")
        model_configs[precision] = ModelConfig(
            hidden=args.hidden, intermediate=args.intermediate, layers=args.layers, heads=args.heads,
            experts=args.experts_per_layer, topk=args.topk,
            kind=args.experts, precision=precision, recipe=args.recipe,
        )  # fmt: skip
    train_config = TrainConfig(
        steps=args.steps, batch=args.batch, micro_batches=args.micro_batches, learning_rate=args.learning_rate,
        warmup=args.warmup, balance=args.balance, seed=args.seed,
    )  # fmt: skip
    return model_configs, train_config


def _at_least(lowest):
    def integer(text):  # argparse says "invalid integer value" where int() fails
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"got {value}, need at least {lowest}")
        return value

    return integer


def _precisions(text):
    chosen = tuple(part.strip() for part in text.split(","))
    if not set(chosen) <= set(PRECISIONS) or len(set(chosen)) != len(chosen):
        raise argparse.ArgumentTypeError(f"got {text!r}, need one or both of bf16,fp8")
    return chosen


class Progress:
    """A bar on a terminal; elsewhere one plain line for each tenth of the run."""

    def __init__(self, total, done):
        self.total, self.bar = total, None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc="training", unit="step", dynamic_ncols=True)

    def advance(self, step, losses):
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        if self.bar:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update()
        elif step == 1 or step * 10 // self.total != (step - 1) * 10 // self.total:
            print(f"step {step:>4}/{self.total}  loss {shown}", flush=True)

    def close(self):
        if self.bar:
            self.bar.close()


def settings_of(model_configs, train_config, args):
    """What a checkpoint must agree on with the run that resumes from it."""
    models = {name: asdict(config) for name, config in model_configs.items()}
    return {"models": models, "training": asdict(train_config), "seq": args.seq}


def _flat(settings, prefix=""):
    """Nested dictionaries as one, with dotted keys."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def save(path, trainers, settings):
    """Through a second file, so that an interruption leaves the previous checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    state = {name: trainer.state_dict() for name, trainer in trainers.items()}
    paddle.save({"settings": settings, "trainers": state}, str(partial))
    partial.replace(path)


def resume(path, trainers, settings):
    state = paddle.load(str(path))
    then, now = _flat(state["settings"]), _flat(settings)
    changed = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
    if changed:
        lines = [f"  {key}: {then.get(key)}, now {now.get(key)}" for key in changed]
        sys.exit("\n".join([f"--resume: {path} was made with other options:", *lines]))
    for name, trainer in trainers.items():
        trainer.set_state_dict(state["trainers"][name])


def train(trainers, args, settings):
    """All models in turn at each step. Returns nothing: the trainers hold the history."""
    first = next(iter(trainers.values()))
    evaluate_every = max(1, args.steps // 5)
    progress = Progress(args.steps, first.step_count)
    if first.step_count == 0:
        for trainer in trainers.values():
            trainer.evaluate()
    while first.step_count < args.steps:
        losses = {name: trainer.step() for name, trainer in trainers.items()}
        step = first.step_count
        if step % evaluate_every == 0 or step == args.steps:
            for trainer in trainers.values():
                trainer.evaluate()
        progress.advance(step, losses)
        is_last = step == args.steps
        if args.checkpoint and (is_last or (args.checkpoint_every and step % args.checkpoint_every == 0)):
            save(args.checkpoint, trainers, settings)
    progress.close()


def report(trainers, unigram):
    print(f"\n{'':6} {'train':>8} {'held out':>9} {'seconds':>8}   busiest and idlest expert (1 = even share)")
    for name, trainer in trainers.items():
        recent_LE = np.sum(trainer.loads[-max(1, len(trainer.loads) // 10) :], axis=0)
        relative_LE = recent_LE.shape[1] * recent_LE / recent_LE.sum(-1, keepdims=True)
        spread = ", ".join(f"layer {i + 2}: {load.max():.2f} {load.min():.2f}" for i, load in enumerate(relative_LE))
        held_out = trainer.held_out[-1][1]
        print(f"{name:6} {trainer.final_train_loss():8.4f} {held_out:9.4f} {trainer.seconds:8.1f}   {spread}")
    print(f"losses in nats a byte; guessing from byte frequencies alone: {unigram:.4f}")
    if len(trainers) == 2:
        (name_a, a), (name_b, b) = trainers.items()
        in_training = b.final_train_loss() / a.final_train_loss() - 1
        held_out = b.held_out[-1][1] / a.held_out[-1][1] - 1
        print(f"{name_b} over {name_a}: train {in_training:+.3%}, held out {held_out:+.3%}")


def main(argv=None):
    args, model_configs, train_config = parse_arguments(argv)
    started = time.perf_counter()
    try:
        corpus = Corpus(read_text(args.text), args.seq, args.seed)
    except ValueError as error:
        sys.exit(f"train_ernie_moe.py: {error}")
    unigram = corpus.unigram_entropy()
    trainers = {name: Trainer(config, train_config, corpus) for name, config in model_configs.items()}
    settings = settings_of(model_configs, train_config, args)
    if args.resume:
        resume(args.resume, trainers, settings)
    model = next(iter(trainers.values())).model
    parameters = sum(int(np.prod(p.shape)) for p in model.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {args.layers} layers, {args.experts_per_layer} experts, "
        f"top {args.topk}, run by {args.experts}; {len(corpus.train)} bytes to learn, {len(corpus.held_out)} held out",
        flush=True,
    )
    train(trainers, args, settings)
    report(trainers, unigram)
    title = (
        f"ERNIE-style MoE, {args.layers} layers, {args.experts_per_layer} experts, top {args.topk}, "
        f"{args.batch * args.seq} bytes a step"
        + (f", FP8 recipe {args.recipe}" if "fp8" in trainers and args.experts == "sonic" else "")
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(trainers, title, unigram, args.output)
    print(f"{time.perf_counter() - started:.0f} s in all; wrote {args.output}")


if __name__ == "__main__":
    main()
