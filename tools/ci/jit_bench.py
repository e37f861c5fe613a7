#!/usr/bin/env python3
"""Measures the JIT: what a first start, a later start and every call of the host backend cost.

    python tools/ci/jit_bench.py             measure, print a table, compare with tools/ci/baselines.json
    python tools/ci/jit_bench.py --json F    write the figures to F as well (- for standard output)
    python tools/ci/jit_bench.py --update    measure, and make that the baseline

    cold     a new process finds an empty cache: compile and import
    warm     a new process finds the artifact: import
    reload   the same process asks again
    reuse    one call of the host backend on Paddle's CPU, allocation included: T=8192, K=8, E=32, block 128

Cold and warm times are those of ``jit.load`` alone, without the interpreter's and the framework's start. Exits 1 if a
figure is worse than its baseline allows, 2 if nothing can be measured.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASELINES = ROOT / "tools" / "ci" / "baselines.json"
MEANING = {
    "cold": "empty cache, new process: compile and import",
    "warm": "filled cache, new process: import",
    "reload": "second load in one process",
    "reuse": "one call, T=8192 K=8 E=32 block=128",
}
# How much worse than the baseline a figure may be. Another machine, or a busy one, is easily three times slower, and
# what these are to catch, a compilation too many or a slow step in every call, is ten times and more.
FACTORS = {"cold": 5.0, "reload": 8.0, "reuse": 5.0}
# What is promised whatever the machine, in seconds; it stands in the factor's place.
PROMISED = {"warm": 0.050}


def machine() -> dict[str, str]:
    """What a reader needs to judge the figures by."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    # Any of those that the JIT takes: which of them are there is the machine's business.
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    shown = subprocess.run([found, "--version"], capture_output=True, text=True).stdout.splitlines() if found else []
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "compiler": shown[0] if shown else "unknown",
    }


# ---- In a child ------------------------------------------------------------------------------------------------------


def measure_load(cache: Path) -> dict[str, float]:
    """This process's first load of the host extension and, as the median of many, those after it."""
    from sonicmoe import jit

    name = "deepep_topk_metadata"
    host = jit.Extension(name, (f"{name}.cpp",), (f"{name}.h",))
    began = time.perf_counter()
    jit.load(host, cache)
    first = time.perf_counter() - began
    again = []
    for _ in range(1000):
        began = time.perf_counter()
        jit.load(host, cache)
        again.append(time.perf_counter() - began)
    return {"first": first, "again": statistics.median(again)}


def measure_calls(cache: Path, calls: int) -> dict[str, float]:
    import numpy as np
    import paddle

    import sonicmoe.ernie_compat  # noqa: F401  from here on `torch` inside the package is Paddle
    from sonicmoe import SonicMoEConfig
    from sonicmoe.routing import metadata

    rng = np.random.default_rng(0)
    indices = paddle.to_tensor(rng.permuted(np.tile(np.arange(32), (8192, 1)), axis=1)[:, :8])
    probs = paddle.to_tensor(rng.random((8192, 8), dtype=np.float32))
    config = SonicMoEConfig(metadata_backend="host", cache_dir=cache)
    seconds = []
    for number in range(calls + 5):
        began = time.perf_counter()
        metadata.build(indices, probs, 32, 128, config)
        if number >= 5:  # the first ones fill caches
            seconds.append(time.perf_counter() - began)
    return {"call": statistics.median(seconds)}


# ---- The parent ------------------------------------------------------------------------------------------------------


def child(*arguments) -> dict[str, float]:
    """This file again, as a child that measures; its last line is the answer."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SONIC_MOE_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise SystemExit(f"jit_bench: {lines[-1] if lines else 'a child failed without a word'}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(colds: int, warms: int, calls: int) -> dict[str, float]:
    """Seconds by name. Best of the colds, for compilers suffer most from neighbours; medians of the others."""
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder) / f"cache{number}" for number in range(colds)]
        cold = [child("load", cache)["first"] for cache in caches]
        loads = [child("load", caches[0]) for _ in range(warms)]
        return {
            "cold": min(cold),
            "warm": statistics.median(one["first"] for one in loads),
            "reload": statistics.median(one["again"] for one in loads),
            "reuse": child("calls", caches[0], calls)["call"],
        }


def limits(baseline: dict[str, float]) -> dict[str, float]:
    """The most that each figure may be."""
    return {name: PROMISED.get(name) or seconds * FACTORS[name] for name, seconds in baseline.items()}


def show(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.2f} us"


def table(found: dict[str, float], baseline: dict[str, float]) -> tuple[str, list[str]]:
    """(text, names of figures that are too slow)"""
    allowed, slow = limits(baseline), []
    lines = [f"{'':8}{'now':>11}{'baseline':>11}{'allowed':>11}  "]
    for name, seconds in found.items():
        if seconds > allowed.get(name, float("inf")):
            slow.append(name)
        row = "".join(f"{show(value):>11}" for value in (seconds, baseline.get(name), allowed.get(name)))
        lines.append(f"{name:8}{row}  {MEANING[name]}{'   <-- TOO SLOW' if name in slow else ''}")
    return "\n".join(lines), slow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="make what is measured now the baseline")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, - for standard output")
    parser.add_argument("--baselines", type=Path, default=BASELINES, help="compare with this file (%(default)s)")
    parser.add_argument("--colds", type=int, default=2, help="cold starts to take the best of (%(default)s)")
    parser.add_argument("--warms", type=int, default=9, help="warm starts to take the median of (%(default)s)")
    parser.add_argument("--calls", type=int, default=200, help="calls to take the median of (%(default)s)")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.measure:
        what, cache, *more = options.measure
        found = measure_load(Path(cache)) if what == "load" else measure_calls(Path(cache), int(more[0]))
        print(json.dumps(found))
        return 0

    try:
        found = measure(options.colds, options.warms, options.calls)
    except (SystemExit, subprocess.TimeoutExpired) as reason:
        print(reason, file=sys.stderr)
        return 2
    record = {"seconds": {name: float(f"{value:.3g}") for name, value in found.items()}, "machine": machine()}
    if options.update:
        options.baselines.write_text(json.dumps({"jit": record}, indent=2) + "\n")
    baseline = {}
    if options.baselines.exists():
        baseline = json.loads(options.baselines.read_text())["jit"]["seconds"]
    text, slow = table(found, baseline)
    print(text)
    if options.json == "-":
        print(json.dumps(record))
    elif options.json:
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n")
    if not baseline:
        print(f"no baseline in {options.baselines}: run with --update", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
