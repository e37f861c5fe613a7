"""Routing metadata on a GPU: first that all implementations give the same arrays, then what each call costs.

    python benchmarks/metadata.py --check 500 --csv metadata.csv --peer FOLDER

``--peer`` is the folder ``sonicmoe/functional`` of an unpacked sonic-moe wheel: its own Triton metadata is then timed
beside ours. A line's figures are printed only if that configuration's arrays were right.
"""

import argparse
import csv
import functools
import importlib
import pathlib
import statistics
import sys
import time

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from sonicmoe import SonicMoEConfig
from sonicmoe.routing import backends, naive

ARRAYS = (
    "expert_offset",
    "x_gather_idx",
    "s_scatter_idx",
    "s_reverse_scatter_idx",
    "slot_offset",
    "scores",
    "score_src_idx",
)
SHAPES = ((8192, 8, 8), (8192, 8, 32), (8192, 8, 128), (65536, 8, 32))


def distinct_routing(rng, n_tokens, topk, n_experts):
    """Every slot valid, no expert twice in a row: what the peers can take as well."""
    return np.argsort(rng.random((n_tokens, n_experts), dtype=np.float32), axis=1)[:, :topk].astype(np.int32)


def random_routing(rng):
    """Anything a dispatcher may hand over: skew, holes, ids at and above E, nothing at all."""
    n_experts, topk = int(rng.integers(1, 257)), int(rng.integers(1, 17))
    n_tokens = int(rng.choice([0, 1, 7, 64, 500, 4096, 65536], p=[0.05, 0.1, 0.2, 0.25, 0.25, 0.13, 0.02]))
    kind = rng.choice(["uniform", "skew", "holes", "beyond", "one", "empty"], p=[0.25, 0.25, 0.2, 0.2, 0.05, 0.05])
    ids = rng.integers(0, n_experts, (n_tokens, topk))
    if kind == "skew":
        ids = (n_experts * rng.random((n_tokens, topk)) ** 6).astype(np.int64)
    if kind == "one":
        ids[:] = n_experts - 1
    if kind in ("holes", "beyond"):
        ids = np.where(rng.random(ids.shape) < 0.4, -1 if kind == "holes" else n_experts + ids, ids)
    if kind == "empty":
        ids[:] = -1
    return ids.astype(rng.choice([np.int32, np.int64])), n_experts, int(rng.choice([1, 32, 128]))


def same(expected, found) -> list[str]:
    return [name for name in ARRAYS if not torch.equal(expected[name], found[name].cpu())]


def check(rounds: int, seed: int, names) -> None:
    rng = np.random.default_rng(seed)
    for number in range(rounds):
        ids, n_experts, block = random_routing(rng)
        probs = rng.random(ids.shape, dtype=np.float32)
        scales = rng.integers(-(2**31), 2**31, (ids.shape[0], 6)).astype(np.int32)
        on_cpu = [torch.tensor(a) for a in (ids, probs, scales)]
        expected = naive.build(on_cpu[0], on_cpu[1], n_experts, block, on_cpu[2])
        for name in names:
            place = "cpu" if name == "host" else "cuda"
            given = [a.to(place) for a in on_cpu]
            for repeat in range(2):
                counts = expected["counts"] if repeat == 0 else None
                found = run(name, given[0], given[1], n_experts, block, counts, given[2])
                wrong = same(expected, found)
                if not torch.equal(expected["sorted_scales"], found["sorted_scales"].cpu()):
                    wrong.append("sorted_scales")
                if wrong:
                    where = f"routing {number}, ids {ids.shape}, E={n_experts}, block={block}"
                    raise SystemExit(f"{name}, {where}: {wrong}")
    print(f"{rounds} random routings, {', '.join(names)}: all arrays equal the definition's, with and without counts")


CONFIGS = {name: SonicMoEConfig(metadata_backend=name) for name in ("naive", "host", "triton", "cuda")}


def run(name, ids, probs, n_experts, block, counts, scales=None):
    return backends.build(ids, probs, n_experts, block, CONFIGS[name], counts, scales)[1]


def torch_sort_build(ids, probs, n_experts):
    """What one writes without a kernel: argsort, bincount, cumsum."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    reverse = torch.empty_like(order)
    reverse[order] = torch.arange(order.numel(), device=ids.device)
    offset = torch.zeros(n_experts + 1, dtype=torch.int32, device=ids.device)
    offset[1:] = torch.bincount(flat, minlength=n_experts).cumsum(0)
    return {
        "expert_offset": offset,
        "x_gather_idx": (order // ids.shape[1]).int(),
        "s_scatter_idx": order.int(),
        "s_reverse_scatter_idx": reverse.int(),
        "scores": probs.reshape(-1),
    }


def peer_builder(folder):
    """The peer's metadata as a function of the same inputs."""
    sys.path.insert(0, folder)
    kernel = importlib.import_module("triton_kernels").TC_topk_router_metadata_triton

    def build(ids, probs, n_experts):
        n = ids.numel()
        frequency = torch.empty(n_experts, dtype=torch.int32, device=ids.device)
        offset = torch.empty(n_experts + 1, dtype=torch.int32, device=ids.device)
        gather, scatter, reverse = (torch.empty(n, dtype=torch.int32, device=ids.device) for _ in range(3))
        kernel(ids, n_experts, frequency, offset, gather, scatter, reverse)
        return {
            "expert_offset": offset,
            "x_gather_idx": gather,
            "s_scatter_idx": scatter,
            "s_reverse_scatter_idx": reverse,
            "scores": probs.reshape(-1),
        }

    return build


def gpu_us(call, repeats=50) -> float:
    """Time in which at least one kernel ran, a call. Kernels that overlap count once."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / repeats


def wall_us(call, repeats=300, rounds=7) -> float:
    """Back to back, until the device is done: what a call costs whichever side is slower. Median of rounds."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) / repeats * 1e6)
    return statistics.median(found)


def copy_us(n_bytes: int) -> float:
    """How long the device takes to move so many bytes: the floor for any implementation."""
    source = torch.empty(max(n_bytes // 2, 4), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return gpu_us(lambda: target.copy_(source))


def providers(peer: str | None, ids, probs, n_experts, counts) -> dict:
    """Name -> a call without arguments."""
    ours = {"cuda": 1, "cuda, block 128": 128, "triton": 1}
    calls = {
        f"sonicmoe {name}": functools.partial(run, name.split(",")[0], ids, probs, n_experts, block, counts)
        for name, block in ours.items()
    }
    calls["torch argsort+bincount"] = functools.partial(torch_sort_build, ids, probs, n_experts)
    if peer:
        calls["sonic-moe triton"] = functools.partial(peer_builder(peer), ids, probs, n_experts)
    return calls


def time_all(peer: str | None, seed: int):
    rng = np.random.default_rng(seed)
    for n_tokens, topk, n_experts in SHAPES:
        ids_host = distinct_routing(rng, n_tokens, topk, n_experts)
        ids, probs = torch.tensor(ids_host).cuda(), torch.rand(n_tokens, topk, device="cuda")
        counts = np.bincount(ids_host.ravel(), minlength=n_experts).tolist()
        slots = n_tokens * topk
        # Read ids and probs, write four index arrays, scores, and the token offsets.
        moved = 4 * (2 * slots + 5 * slots + n_tokens)
        floor = copy_us(moved)
        for provider, call in providers(peer, ids, probs, n_experts, counts).items():
            found = call()
            block = 128 if "128" in provider else 1
            expected = naive.build(ids.cpu(), probs.cpu(), n_experts, block)
            wrong = [n for n in ARRAYS if n in found and not torch.equal(found[n].cpu(), expected[n])]
            for _ in range(10):
                call()
            row = {"T": n_tokens, "K": topk, "E": n_experts, "provider": provider}
            if wrong:
                yield {**row, "gpu_us": "", "wall_us": "", "copy_us": "", "note": f"wrong: {' '.join(wrong)}"}
                continue
            figures = {"gpu_us": gpu_us(call), "wall_us": wall_us(call), "copy_us": floor}
            yield {**row, **{k: f"{v:.1f}" for k, v in figures.items()}, "note": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=int, default=200, metavar="N", help="random routings to compare first")
    parser.add_argument("--backends", default="host,triton,cuda", help="which to compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", help="sonicmoe/functional of an unpacked sonic-moe wheel")
    parser.add_argument("--csv", help="where the table goes; without it nothing is timed")
    args = parser.parse_args()
    check(args.check, args.seed, args.backends.split(","))
    if not args.csv:
        return
    rows = []
    device = torch.cuda.get_device_name()
    for row in time_all(args.peer, args.seed):
        rows.append({**row, "device": device, "torch": torch.__version__})
        print("  ".join(f"{v!s:>24}" if k == "provider" else f"{v!s:>8}" for k, v in row.items()), flush=True)
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
