"""Train one small Mixture-of-Experts language model in BF16 and in FP8, from the same weights on the same text, for
several seeds.

    python benchmarks/training.py --csv benchmarks/training.csv                        # on a GPU, 200 steps
    python benchmarks/training.py --from-csv benchmarks/training.csv --plot docs/training.png

Weights are bf16 with fp32 masters; the experts' gradients go into fp32 ``main_grad``, in two micro-batches a step, as
training frameworks do it. Single steps scatter, because a rounding more or less sends a few tokens to other experts:
what is compared is the mean training loss of the last 20 steps, and the loss on held-out text. What training in FP8 has
cost is told apart from what a forward in FP8 costs by asking each model in the other precision too.
"""

import argparse
import csv
import itertools
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

LAST, HELD_OUT_BATCHES = 20, 8
PRECISIONS = {
    "bf16": {},
    "fp8": {"use_fp8": True, "fp8_wgrad": True},
    "fp8, bf16 wgrad": {"use_fp8": True, "fp8_wgrad": False},
}
OTHER = {"bf16": "fp8", "fp8": "bf16", "fp8, bf16 wgrad": "bf16"}
COLUMNS = ("seed", "step", "precision", "loss", "held_out", "held_out_in_other", "device")


def make_model(args, seed: int):
    import torch
    import torch.nn.functional as F
    from torch import nn

    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            h = args.hidden
            self.norm1, self.norm2 = nn.RMSNorm(h), nn.RMSNorm(h)
            self.qkv, self.out = nn.Linear(h, 3 * h, bias=False), nn.Linear(h, h, bias=False)
            std = 0.5 * h**-0.5
            self.moe = MoE(args.experts, args.topk, h, args.intermediate, ActivationType.SWIGLU, False, std)

        def forward(self, x):
            b, s, h = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(b, s, 3, args.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(b, s, h))
            found, balance = self.moe(self.norm2(x))
            return x + found, balance

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(256, args.hidden), nn.Embedding(args.seq, args.hidden)
            self.layers = nn.ModuleList(Layer() for _ in range(args.layers))
            self.norm, self.head = nn.RMSNorm(args.hidden), nn.Linear(args.hidden, 256, bias=False)

        def forward(self, text):
            """(nats a byte, sum of the layers' balance losses) for text [B, S + 1]."""
            places = torch.arange(text.shape[1] - 1, device=text.device)
            x, total = self.tokens(text[:, :-1]) + self.places(places), 0.0
            for layer in self.layers:
                x, balance = layer(x)
                total = total + balance
            logits = self.head(self.norm(x)).float()
            return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), total

    torch.manual_seed(seed)
    return Model().to(device=args.device, dtype=torch.bfloat16)


def train(precision: str, seed: int, args) -> list[dict]:
    import torch
    from ernie_moe.data import Corpus, standard_text

    from sonicmoe import SonicMoEConfig

    model, corpus = make_model(args, seed), Corpus(standard_text(), args.seq, seed)
    weights = list(model.parameters())
    masters = [weight.detach().float() for weight in weights]
    for layer in model.layers:
        for weight in (layer.moe.c_fc.weight, layer.moe.c_proj.weight):
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    optimizer = torch.optim.AdamW(masters, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    rows = []

    def text(made):
        return torch.from_numpy(made).to(args.device)

    def held_out(precision: str) -> str:
        windows = text(corpus.held_out_batch(HELD_OUT_BATCHES * args.batch)).split(args.batch)
        with torch.no_grad(), SonicMoEConfig(**PRECISIONS[precision]).activate():
            losses = [model(batch)[0] for batch in windows]
        return f"{torch.stack(losses).mean().item():.5f}"

    with SonicMoEConfig(**PRECISIONS[precision]).activate():
        for step in range(args.steps):
            rate = min(1.0, (step + 1) / args.warmup) * (1.0 - 0.9 * step / args.steps)
            optimizer.param_groups[0]["lr"] = args.learning_rate * rate
            losses = []
            for micro in range(args.micro_batches):
                loss, balance = model(text(corpus.batch(step, micro, args.batch // args.micro_batches)))
                ((loss + args.balance * balance) / args.micro_batches).backward()
                losses.append(loss.detach())
            for weight, master in zip(weights, masters, strict=True):
                main_grad = getattr(weight, "main_grad", None)
                master.grad = weight.grad.float() if main_grad is None else main_grad.clone()
                weight.grad = None
                if main_grad is not None:
                    main_grad.zero_()
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            with torch.no_grad():
                for weight, master in zip(weights, masters, strict=True):
                    weight.copy_(master)
            loss = f"{torch.stack(losses).mean().item():.5f}"
            rows.append({"seed": seed, "step": step, "precision": precision, "loss": loss, "device": device})
    return [*rows[:-1], rows[-1] | {"held_out": held_out(precision), "held_out_in_other": held_out(OTHER[precision])}]


def compare(rows: list[dict], bound: float) -> bool:
    """FP8's mean over the seeds is held to the bound; each seed is printed, since one alone says little."""
    seeds, apart = sorted({int(row["seed"]) for row in rows}), {}
    for precision, seed in itertools.product(PRECISIONS, seeds):
        mine = [row for row in rows if row["precision"] == precision and int(row["seed"]) == seed]
        if not mine:
            continue
        last, end = [float(row["loss"]) for row in mine[-LAST:]], mine[-1]
        found = statistics.fmean(last), float(end["held_out"])
        apart[precision, seed] = found
        print(f"seed {seed}, {precision}: training loss {found[0]:.4f}, held out {found[1]:.4f} nats a byte", end="")
        print(f" ({float(end['held_out_in_other']):.4f} in {OTHER[precision]})", end="")
        ratios = [mine / base - 1 for mine, base in zip(found, apart["bf16", seed], strict=True)]
        print("" if precision == "bf16" else f", {ratios[0]:+.2%} and {ratios[1]:+.2%} against BF16")
    ratios = [[apart["fp8", seed][of] / apart["bf16", seed][of] - 1 for seed in seeds] for of in range(2)]
    means = [statistics.fmean(each) for each in ratios]
    said = f"FP8 against BF16, mean of {len(seeds)} seeds: {means[0]:+.2%} and {means[1]:+.2%}, bound {bound:.1%}"
    if len(seeds) > 1:
        errors = [statistics.stdev(each) / len(seeds) ** 0.5 for each in ratios]
        said += f", standard error {errors[0]:.2%} and {errors[1]:.2%}"
    print(said)
    return all(abs(mean) <= bound for mean in means)


def write(rows: list[dict], path: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as target:
        table = csv.DictWriter(target, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = rows[0]["seed"]
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for precision, colour, width in (("bf16", "#f2a65a", 4.0), ("fp8", "#1f3a5f", 1.3)):
        losses = [float(row["loss"]) for row in rows if row["precision"] == precision and row["seed"] == first]
        axis.plot(losses, color=colour, linewidth=width, label=precision.upper())
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss, nats a byte")
    axis.set_title(f"A small MoE language model on one {rows[0]['device']}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("layers", 4), ("hidden", 512), ("intermediate", 512), ("heads", 8), ("experts", 16), ("topk", 4),
        ("steps", 200), ("batch", 64), ("micro-batches", 2), ("seq", 256), ("warmup", 20),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(0 1 2)")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, help="(all)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, metavar="X", help="peak (0.002)")
    parser.add_argument("--balance", type=float, default=0.01, metavar="X", help="weight of the balance loss (0.01)")
    parser.add_argument("--bound", type=float, default=0.005, metavar="X", help="how far FP8's losses may be (0.005)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", metavar="FILE", help="all losses")
    parser.add_argument("--plot", metavar="FILE", help="the curves")
    parser.add_argument("--from-csv", metavar="FILE", help="train nothing; compare and plot this table")
    args = parser.parse_args(argv)
    if not {"bf16", "fp8"} <= set(args.precisions):
        parser.error(f"--precisions: got {' '.join(args.precisions)}, need bf16 and fp8, which are compared")
    if args.from_csv:
        with open(args.from_csv, newline="", encoding="utf-8") as source:
            rows = list(csv.DictReader(source))
    else:
        rows = []
        for seed, precision in itertools.product(args.seeds, args.precisions):
            rows += train(precision, seed, args)
            if args.csv:
                write(rows, args.csv)
    if args.plot:
        plot(rows, args.plot)
    return 0 if compare(rows, args.bound) else 1


if __name__ == "__main__":
    sys.exit(main())
