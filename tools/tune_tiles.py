"""Times every tile that sm_90 can have for each grouped GEMM, checks it against the naive engine, and prints the best.

    python tools/tune_tiles.py --csv tiles.csv [--ops up,rows] [--shapes reference]

Run it on an idle Hopper GPU with the ``gpu`` extra installed; the winners belong in ``sonicmoe/gemm/tile_table.py``.
A tile whose numbers are off by more than the storage type explains is thrown out, however fast it is. Choose by the
columns over all shapes: one tile that is good everywhere beats one a shape, since each kernel has to be compiled.
"""

import argparse
import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sonicmoe.config import SonicMoEConfig
from sonicmoe.gemm import grouped, kernel_store
from sonicmoe.gemm.gemm_kernel import GATHERING, GemmKernel, Tile, unsupported

SHAPES = {  # T, H, I, E, K
    "reference": (8192, 3072, 1536, 8, 8),
    "e32": (8192, 3072, 1536, 32, 8),
    "wide": (8192, 4096, 4096, 8, 8),
    "t16k": (16384, 3072, 1536, 8, 8),
    "e128": (32768, 4096, 1024, 128, 8),
    "t1k": (1024, 3072, 1536, 8, 8),
}
CHECK = (700, 512, 384, 6, 4)
# Relative error that rounding to bf16 once explains, with room for another order of summation.
FLOOR = 6e-3

# What the engine launches: a name, the kernel, and the problem it is.
VARIANTS = {
    "up": {"op": "up", "activation": "swiglu"},
    "up_z": {"op": "up_z"},
    "down": {"op": "rows"},
    "dx": {"op": "rows", "transposed": True},
    "down_backward": {"op": "down_backward", "activation": "swiglu"},
    "dw1": {"op": "wgrad", "transposed": True},
    "dw2": {"op": "wgrad"},
    "dw1_main": {"op": "wgrad", "transposed": True, "out": "float32", "accumulate": True},
    "dw2_main": {"op": "wgrad", "out": "float32", "accumulate": True},
}


# Smaller tiles than these read too much for what they multiply.
SIZES = [(128, 128, True), (128, 192, True), (192, 128, True), (128, 256, False), (256, 128, False), (256, 192, False)]


def tiles(op, transposed=False, **_):
    for m, n, pingpong in SIZES:
        for cluster in ((2, 1), (1, 1)) if op in GATHERING else ((2, 1), (1, 2)):
            tile = Tile(m, n, *cluster, pingpong)
            if unsupported(op, tile, transposed=transposed) is None:
                yield tile


@dataclass
class Problem:
    """Tensors of one shape, shared by all kernels."""

    shape: tuple

    def __post_init__(self):
        t, h, i, e, k = self.shape
        torch.manual_seed(1)
        m = t * k
        rank = torch.rand(t, e, device="cuda").argsort(dim=1)[:, :k]
        expert, order = rank.reshape(-1).sort(stable=True)
        self.gather = (order // k).to(torch.int32)
        counts = torch.bincount(expert, minlength=e)
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        self.bounds = self.offsets.tolist()

        def normal(*size, scale=1.0):
            return (torch.randn(*size, device="cuda") * scale).to(torch.bfloat16)

        self.x, self.dout = normal(t, h), normal(t, h)
        self.w1, self.w2 = normal(e, 2 * i, h, scale=h**-0.5), normal(e, h, i, scale=i**-0.5)
        self.z, self.a, self.dz = normal(m, 2 * i), normal(m, i), normal(m, 2 * i)
        self.score = torch.rand(m, device="cuda")
        self.y = torch.empty(m, h, device="cuda", dtype=torch.bfloat16)
        self.flops = 2.0 * m * h * i

    def call(self, name, kernel, run):
        """(outputs, a function that launches, FLOPs)."""
        t, h, i, e, k = self.shape
        m = t * k
        gemm = grouped.Loaded(kernel, run)
        if name in ("up", "up_z"):
            z, a = torch.empty_like(self.z), torch.empty_like(self.a)
            if name == "up":
                return (z, a), lambda: grouped.up(gemm, self.x, self.w1, z, a, self.offsets, self.gather), 2
            return (z,), lambda: grouped.up_z(gemm, self.x, self.w1, z, self.offsets, self.gather), 2
        if name == "down":
            return (self.y,), lambda: grouped.rows(gemm, self.a, self.w2, self.y, self.offsets), 1
        if name == "dx":
            w1_t = self.w1.transpose(1, 2)
            return (self.y,), lambda: grouped.rows(gemm, self.dz, w1_t, self.y, self.offsets), 2
        if name == "down_backward":
            dz, pa = torch.empty_like(self.z), torch.empty_like(self.a)
            parts = torch.empty(m, math.ceil(i / kernel.tile.n), device="cuda")
            args = (self.dout, self.w2, self.z, dz, self.score, pa, parts, self.offsets, self.gather)
            return (dz, pa, parts), lambda: grouped.down_backward(gemm, *args), 1
        out = torch.float32 if kernel.out == "float32" else torch.bfloat16
        first = name.startswith("dw1")
        d = torch.zeros(e, 2 * i, h, device="cuda", dtype=out).transpose(1, 2) if first else torch.zeros(
            e, h, i, device="cuda", dtype=out)  # fmt: skip
        left, right = (self.x, self.dz) if first else (self.dout, self.a)
        return (d,), lambda: grouped.wgrad(gemm, left, right, d, self.offsets, self.gather), 2 if first else 1

    def expected(self, name):
        """The same in float32, segment by segment."""
        t, h, i, e, k = self.shape
        rows = {"up": self.x, "up_z": self.x, "down_backward": self.dout}.get(name)
        parts = []
        for e, (lo, hi) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            g = self.gather[lo:hi].long()
            w1, w2 = self.w1[e].float(), self.w2[e].float()
            if name in ("up", "up_z"):
                z = rows[g].float() @ w1.T
                parts.append((z, torch.nn.functional.silu(z[:, 0::2]) * z[:, 1::2])[: 2 if name == "up" else 1])
            elif name == "down":
                parts.append((self.a[lo:hi].float() @ w2.T,))
            elif name == "dx":
                parts.append((self.dz[lo:hi].float() @ w1,))
            elif name == "down_backward":
                d_a, z = rows[g].float() @ w2, self.z[lo:hi].float()
                gate, up, p = z[:, 0::2], z[:, 1::2], self.score[lo:hi, None]
                sig = torch.sigmoid(gate)
                a = gate * sig * up
                dgate, dup = p * d_a * up * sig * (1 + gate * (1 - sig)), p * d_a * gate * sig
                parts.append((torch.stack([dgate, dup], -1).flatten(1), p * a, (d_a * a).sum(1)))
            elif name.startswith("dw1"):
                parts.append((self.x[g].float().T @ self.dz[lo:hi].float(),))
            else:
                parts.append((self.dout[g].float().T @ self.a[lo:hi].float(),))
        join = torch.stack if name.startswith("dw") else torch.cat
        return [join(column) for column in zip(*parts, strict=True)]


def worst_error(found, wanted):
    errors = []
    for f, w in zip(found, wanted, strict=True):
        f = f.float().sum(1) if f.dim() > w.dim() else f.float()
        errors.append(((f - w).norm() / w.norm()).item())
    return max(errors)


def milliseconds(launch, budget_ms):
    """Of one launch in a long row of them: a GPU that has rested runs faster than its power limit lets it go on."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    launch()
    start.record()
    launch()
    end.record()
    end.synchronize()
    rounds = max(3, int(budget_ms / max(start.elapsed_time(end), 0.02)))
    for _ in range(rounds):
        launch()
    start.record()
    for _ in range(rounds):
        launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--ops", default=",".join(VARIANTS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--budget-ms", type=float, default=100.0, help="of one timing, and of its warm-up")
    args = parser.parse_args()

    kernels = [
        (name, GemmKernel(tile=tile, **VARIANTS[name]))
        for name in args.ops.split(",")
        for tile in tiles(**VARIANTS[name])
    ]
    functions = compile_all(kernels)
    checked, rows = Problem(CHECK), []
    wanted = {name: checked.expected(name) for name in args.ops.split(",")}
    for name, kernel in kernels:
        if kernel in functions:
            outputs, launch, _ = checked.call(name, kernel, functions[kernel])
            launch()
            error = worst_error(outputs, wanted[name])
            rows.append({"name": name, "kernel": kernel, "error": error})
            if not error < FLOOR:
                print(f"thrown out: {name} {kernel.tile}: relative error {error:.3g}")
    kept = [row for row in rows if row["error"] < FLOOR]
    for shape in args.shapes.split(","):
        problem = Problem(SHAPES[shape])
        for row in kept:
            _, launch, weight = problem.call(row["name"], row["kernel"], functions[row["kernel"]])
            ms = milliseconds(launch, args.budget_ms)
            row[shape] = weight * problem.flops / ms * 1e-9
        del problem
        torch.cuda.empty_cache()
    report(kept, args)


def compile_all(kernels):
    """A tile that the generator refuses is left out with its reason."""
    cache_dir = SonicMoEConfig.current().cache_dir
    unique = list(dict.fromkeys(kernel for _, kernel in kernels))
    try:
        kernel_store.load(unique, cache_dir)
    except kernel_store.JitUnavailable as reason:
        print(f"not all tiles could be made: {reason}")
    made = kernel_store.present(unique, cache_dir)
    return dict(zip(made, kernel_store.load(made, cache_dir), strict=True))


def report(rows, args):
    shapes = args.shapes.split(",")
    with open(args.csv, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["name", "m", "n", "cluster_m", "cluster_n", "pingpong", "error", *shapes])
        for row in rows:
            tile = row["kernel"].tile
            writer.writerow(
                [row["name"], tile.m, tile.n, tile.cluster_m, tile.cluster_n, int(tile.pingpong), f"{row['error']:.2e}"]
                + [f"{row[shape]:.0f}" for shape in shapes]
            )
    for name in args.ops.split(","):
        mine = [row for row in rows if row["name"] == name]
        mine.sort(key=lambda row: -math.prod(row[shape] for shape in shapes))
        print(f"\n{name}: TFLOP/s by shape ({', '.join(shapes)})")
        for row in mine[:5]:
            tile = row["kernel"].tile
            kind = "pingpong" if tile.pingpong else "coop"
            figures = " ".join(f"{row[shape]:5.0f}" for shape in shapes)
            print(f"  {tile.m}x{tile.n} {kind:8} cluster {tile.cluster_m}x{tile.cluster_n}  {figures}")


if __name__ == "__main__":
    main()
