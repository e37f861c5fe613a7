"""Expert parallelism on torch: tokens a second on 1, 2 and 4 ranks, and where a step's time goes.

    python benchmarks/ep.py --csv benchmarks/ep.csv               GPUs: T=8192 a rank, H=3072, I=1536, E=32 and 128
    python benchmarks/ep.py --tiny --ranks 1,2 --csv ep.csv       anywhere, on the CPU with gloo

Each number of ranks is a job of its own (torch.distributed.run), with a time limit. Before anything is timed the layer
is compared with one that holds all experts. A row is a median over iterations, of each iteration the slowest rank:

    step        forward and backward of ``ExpertParallelMoE``, router and balance loss too, for each number of pieces
    the parts   dispatch, experts and combine, forward and backward, one after the other on one stream; ``rest`` is what
                a step with one piece takes beyond them
"""

import argparse
import csv
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COLUMNS = (
    "ranks", "tokens", "hidden", "intermediate", "experts", "topk", "payload", "precision", "pieces", "part",
    "milliseconds", "tokens_per_second", "sent_mib", "device", "torch",
)  # fmt: skip
FULL = dict(tokens=8192, hidden=3072, intermediate=1536, topk=8, experts=(32, 128))
TINY = dict(tokens=32, hidden=128, intermediate=128, topk=2, experts=(4, 8))
# What travels, and what the experts compute in. "fp8" travels both ways: tokens forward, gradients of outputs backward.
PROVIDERS = (("bf16", "bf16"), ("fp8", "bf16"), ("bf16", "fp8"), ("fp8", "fp8"))
PIECES = (1, 2)
PARTS = ("dispatch", "experts", "combine", "combine backward", "experts backward", "dispatch backward")
LIMITS = {"bf16": 0.02, "fp8": 0.12}  # relative error against one rank: two roundings apart, or FP8's of gradients


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks, one job each (default: 1,2,4)")
    parser.add_argument("--csv", type=pathlib.Path, required=True, help="rows are added to it")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--experts", help="numbers of experts, as 32,128")
    parser.add_argument("--providers", help="as bf16/bf16,fp8/fp8: payload and experts' precision (default: all four)")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for each job")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.sizes = dict(TINY if args.tiny else FULL)
    if args.experts:
        args.sizes["experts"] = tuple(int(number) for number in args.experts.split(","))
    chosen = [tuple(name.split("/")) for name in args.providers.split(",")] if args.providers else PROVIDERS
    for provider in chosen:
        if provider not in PROVIDERS:
            parser.error(f"--providers: got {'/'.join(provider)}, need some of {['/'.join(p) for p in PROVIDERS]}")
    args.chosen = chosen
    return args


# ---- One rank --------------------------------------------------------------------------------------------------------


class Rank:
    def __init__(self):
        import torch
        import torch.distributed as dist

        self.torch, self.dist = torch, dist
        local = int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            torch.cuda.set_device(local)
            self.device = torch.device("cuda", local)
            self.device_name = torch.cuda.get_device_name(local)
        else:
            self.device, self.device_name = torch.device("cpu"), "cpu"
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        alone = [dist.new_group([rank]) for rank in range(self.size)]
        self.alone = alone[self.rank]

    def layer(self, sizes, experts: int, provider, pieces: int = 1, group=None):
        """With random weights, drawn on the device, and ``main_grad``."""
        from sonicmoe import SonicMoEConfig
        from sonicmoe.ep.torch_layer import ExpertParallelMoE

        payload, precision = provider
        fp8 = payload == "fp8"
        config = SonicMoEConfig(use_fp8=True, fp8_wgrad=True) if precision == "fp8" else SonicMoEConfig()
        with self.device:
            layer = ExpertParallelMoE(
                experts, sizes["topk"], sizes["hidden"], sizes["intermediate"], group=group, overlap=pieces,
                fp8_dispatch=fp8, fp8_combine_grad=fp8, config=config,
            ).to(self.torch.bfloat16)  # fmt: skip
        for weight in (layer.c_fc.weight, layer.c_proj.weight):
            weight.main_grad = self.torch.zeros(weight.shape, dtype=self.torch.float32, device=self.device)
        return layer

    def random(self, *shape, seed: int):
        generator = self.torch.Generator(self.device).manual_seed(1000 * seed + self.rank)
        return self.torch.randn(*shape, generator=generator, device=self.device).to(self.torch.bfloat16)

    def now(self):
        """An event on the stream, or the time."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first, second) -> float:
        """Milliseconds; the device must have got there."""
        return (second - first) * 1e3 if self.device.type == "cpu" else first.elapsed_time(second)

    def wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def slowest(self, milliseconds: list[float]) -> list[float]:
        found = self.torch.tensor(milliseconds, dtype=self.torch.float64, device=self.device)
        self.dist.all_reduce(found, op=self.dist.ReduceOp.MAX)
        return found.tolist()


def check(rank: Rank, provider, sizes) -> None:
    """The layer over all ranks against one that holds all experts, on this rank's tokens."""
    torch = rank.torch
    small = {**sizes, "tokens": min(sizes["tokens"], 256), "hidden": 256, "intermediate": 128}
    found = []
    experts = max(8, rank.size)
    for group in (None, rank.alone):
        layer = rank.layer(small, experts, provider, pieces=2, group=group)
        with torch.no_grad():
            for weight in (layer.c_fc.weight, layer.c_proj.weight):
                weight.mul_(4)  # or the experts hardly matter beside nothing
        x = rank.random(small["tokens"], small["hidden"], seed=1).requires_grad_()
        out, _ = layer(x)
        out.backward(rank.random(*out.shape, seed=2))
        found.append((out.detach(), x.grad))
    for name, value, reference in zip(("out", "dx"), *found, strict=True):
        error = ((value.double() - reference.double()).norm() / reference.double().norm()).item()
        limit = LIMITS["fp8" if "fp8" in provider else "bf16"]
        if not error < limit:
            raise SystemExit(f"{provider}, rank {rank.rank}: {name} is off by {error:.2e}, more than {limit}")


def time_steps(rank: Rank, layer, sizes, args) -> list[float]:
    """Milliseconds of each iteration."""
    x = rank.random(sizes["tokens"], sizes["hidden"], seed=3).requires_grad_()
    dout = rank.random(sizes["tokens"], sizes["hidden"], seed=4)
    marks = []
    for number in range(args.warmup + args.iterations):
        rank.dist.barrier()
        rank.wait()
        first = rank.now()
        out, balance = layer(x)
        rank.torch.autograd.backward([out, balance], [dout, rank.torch.ones_like(balance)])
        second = rank.now()
        rank.wait()
        x.grad = layer.router.weight.grad = None
        if number >= args.warmup:
            marks.append(rank.between(first, second))
    return rank.slowest(marks)


def time_parts(rank: Rank, layer, sizes, args):
    """({part: milliseconds of each iteration}, MiB that leave this rank in the tokens' rows of one dispatch)."""
    from sonicmoe.ep import torch_tape as tape

    torch = rank.torch
    x = rank.random(sizes["tokens"], sizes["hidden"], seed=3).requires_grad_()
    dout = rank.random(sizes["tokens"], sizes["hidden"], seed=4)
    with torch.no_grad():
        probs, indices = layer._choose(layer.router(x))
    probs.requires_grad_()
    found, sent = {part: [] for part in PARTS}, 0
    for number in range(args.warmup + args.iterations):
        rank.dist.barrier()
        rank.wait()
        marks = [rank.now()]
        (call,) = tape.open_calls([(x, probs, indices)], layer.num_experts, layer.transport, layer.wire)
        rows, row_probs = tape.finish_dispatch(tape.begin_dispatch(x, probs, call), x, call)
        marks.append(rank.now())
        rows_in, probs_in = rows.detach().requires_grad_(), row_probs.detach().requires_grad_()
        y = layer._experts(rows_in, probs_in, call)
        marks.append(rank.now())
        y_in = y.detach().requires_grad_()
        out = tape.finish_combine(tape.begin_combine(y_in, call), call)
        marks.append(rank.now())
        (dy,) = torch.autograd.grad(out, y_in, dout)
        marks.append(rank.now())
        torch.autograd.backward(y, dy)  # the weights' gradients with it
        marks.append(rank.now())
        torch.autograd.grad((rows, row_probs), (x, probs), (rows_in.grad, probs_in.grad))
        marks.append(rank.now())
        rank.wait()
        sent = sum(count for peer, count in enumerate(call.layout.sent) if peer != rank.rank)
        if number >= args.warmup:
            for part, first, second in zip(PARTS, marks, marks[1:], strict=False):
                found[part].append(rank.between(first, second))
    width = 1 + 4 / 128 if layer.wire.fp8_dispatch else 2
    return {part: rank.slowest(times) for part, times in found.items()}, sent * sizes["hidden"] * width / 2**20


def measure(rank: Rank, args) -> list[dict]:
    sizes, rows = args.sizes, []
    for provider in args.chosen:
        check(rank, provider, sizes)
        for experts in sizes["experts"]:
            common = {
                "ranks": rank.size, "tokens": sizes["tokens"], "hidden": sizes["hidden"],
                "intermediate": sizes["intermediate"], "experts": experts, "topk": sizes["topk"],
                "payload": provider[0], "precision": provider[1], "device": rank.device_name,
                "torch": rank.torch.__version__,
            }  # fmt: skip

            def add(part, pieces, milliseconds, common=common, **more):
                rows.append({**common, "part": part, "pieces": pieces, "milliseconds": f"{milliseconds:.4f}", **more})
                if rank.rank == 0:
                    print(*(rows[-1].get(name, "") for name in COLUMNS[:12]), flush=True)

            whole, layer = {}, rank.layer(sizes, experts, provider)
            for pieces in PIECES:
                layer.overlap = pieces
                whole[pieces] = statistics.median(time_steps(rank, layer, sizes, args))
                speed = rank.size * sizes["tokens"] / whole[pieces] * 1e3
                add("step", pieces, whole[pieces], tokens_per_second=f"{speed:.0f}")
            parts, sent = time_parts(rank, layer, sizes, args)
            medians = {part: statistics.median(times) for part, times in parts.items()}
            for part, milliseconds in medians.items():
                add(part, 1, milliseconds, **({"sent_mib": f"{sent:.3f}"} if part == "dispatch" else {}))
            add("rest", 1, whole[1] - sum(medians.values()))
    return rows


def work(args) -> None:
    rank = Rank()
    rows = measure(rank, args)
    if rank.rank == 0:
        begins = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            if begins:
                writer.writeheader()
            writer.writerows(rows)
    rank.dist.barrier()
    rank.dist.destroy_process_group()


# ---- All jobs --------------------------------------------------------------------------------------------------------


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    failed = []
    for ranks in args.ranks.split(","):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        command += [str(pathlib.Path(__file__).resolve()), "--worker", *argv]
        child = subprocess.Popen(command, start_new_session=True)
        try:
            status = child.wait(args.limit)
        except subprocess.TimeoutExpired:
            status = f"none after {args.limit:.0f} s"
            child.terminate()  # the launcher ends its ranks
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, 9)
                child.wait()
        if status:
            failed.append(f"{ranks} ranks: status {status}")
            print(f"ep.py: {failed[-1]}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
