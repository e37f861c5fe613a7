"""The MoE layer of this package beside the published sonic-moe: checked, then timed in turns on one GPU.

    python benchmarks/moe.py --site FOLDER --peer-site FOLDER --csv benchmarks/moe.csv --plot docs/moe.png
    python benchmarks/moe.py --site FOLDER --peer-site FOLDER --cold --shapes reference --csv benchmarks/moe.csv
    python benchmarks/moe.py --site FOLDER --providers sonicmoe-bf16 --profile --shapes reference
    python benchmarks/moe.py --from-csv benchmarks/moe.csv --plot docs/moe.png

Each provider runs in a process of its own with its own packages and its own caches; this one needs no torch. Both
processes stay alive with their tensors, and take turns of a fraction of a second. A configuration is timed only if
all its tensors agreed with a float64 reference, and no speed-up is told for one where that did not happen: then, and
if anything else went wrong, the exit status is 1. The table is written after each shape.
"""

import argparse
import pathlib
import shutil
import signal
import sys
import tempfile
import time

from moe_bench import plot
from moe_bench.protocol import Worker, WorkerFailed
from moe_bench.providers import PROVIDERS, Provider, peer_sites
from moe_bench.results import RIGHT, Table, gemm_rows, median_and_range, summary, verdict, worst
from moe_bench.shapes import BACKWARD, BENCHED, CAPTURED, COLD, DENSE, KERNELS, NEW_TOKENS, SHAPES, WARM, Shape


class OutOfTime(Exception):
    """The run's own limit; what was measured until then is in the table."""


def say(line: str) -> None:
    print(line, flush=True)


class Team:
    """The providers' processes. One that failed is started again when it is next needed."""

    def __init__(self, args, folder: pathlib.Path):
        self.args, self.folder = args, folder
        self.deadline = time.monotonic() + args.limit
        # Rows with the same value were measured side by side.
        self.run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.workers: dict[str, Worker] = {}

    def start(self, provider: Provider, folder: pathlib.Path) -> Worker:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sites = self.args.site if provider.in_checkout else peer_sites(self.args.peer_site or "")
        extra = dict(
            pair.split(":", 1)[1].split("=", 1) for pair in self.args.env if pair.startswith(f"{provider.name}:")
        )
        return Worker(provider.name, provider.command, provider.environment(folder, sites, extra), folder)

    def ask(self, name: str, command: str, **arguments) -> dict | None:
        """The reply, or None after a failure, which is said and ends the worker."""
        if name not in self.workers:
            self.workers[name] = self.start(PROVIDERS[name], self.folder / name)
        try:
            return self.bounded(self.workers[name], command, **arguments)
        except WorkerFailed as error:
            say(f"  {error}")
            self.workers.pop(name)
            return None

    def bounded(self, worker: Worker, command: str, **arguments) -> dict:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime
        try:
            return worker.ask(command, min(left, self.args.command_limit), **arguments)
        except WorkerFailed:
            if time.monotonic() >= self.deadline:
                raise OutOfTime from None
            raise

    def load(self, name: str, shape: Shape) -> dict | None:
        packages = list(PROVIDERS[name].packages)
        return self.ask(name, "load", shape=shape.as_list(), seed=self.args.seed, packages=packages)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


def key(kernel: str, provider: str, shape: Shape, loaded: dict) -> dict:
    sizes = dict(zip("THIEK", shape.as_list(), strict=True))
    found = {"device": loaded["device"], "versions": loaded["versions"]}
    return {"kernel": kernel, "provider": provider, **sizes, **found}


def kernels_of(team: Team, name: str) -> tuple[str, ...]:
    captured = (CAPTURED,) if team.args.captured and PROVIDERS[name].captures else ()
    return KERNELS + captured + ((BENCHED,) if team.args.do_bench else ())


def load_and_check(team: Team, names: list[str], shape: Shape) -> tuple[dict, dict]:
    """({provider: its load reply}, {(provider, kernel): verdict}) of those that could be loaded."""
    loaded, verdicts = {}, {}
    for name in names:
        begin = time.perf_counter()
        reply, kernels = team.load(name, shape), kernels_of(team, name)
        if reply is None:
            verdicts |= {(name, kernel): "not run" for kernel in kernels}
            continue
        loaded[name] = reply
        checked = team.ask(name, "check", captured=CAPTURED in kernels)
        verdicts |= {(name, kernel): verdict(kernel, PROVIDERS[name], checked) for kernel in kernels}
        errors = worst(BACKWARD, checked) if checked else "no check"
        say(f"  {name}: loaded and checked in {time.perf_counter() - begin:.1f} s; off by: {errors}")
    if len({tuple(reply["fingerprint"]) for reply in loaded.values()}) > 1:
        verdicts = dict.fromkeys(verdicts, "failed: the providers had different inputs")
    return loaded, verdicts


def time_in_turns(team: Team, names: list[str], kernel: str) -> dict[str, list[dict]]:
    turns: dict[str, list[dict]] = {name: [] for name in names}
    # A turn of do_bench is a median already, and has a rest before it.
    for _ in range(min(team.args.rounds, 3) if kernel == BENCHED else team.args.rounds):
        for name in list(turns):
            reply = team.ask(name, "time", kernel=kernel, seconds=team.args.seconds)
            if reply is None:
                # Its worker is gone, and with it what was loaded.
                del turns[name]
            else:
                turns[name].append(reply)
    return turns


def figures_of(turns: list[dict], shape: Shape, kernel: str) -> dict:
    wall, low, high = median_and_range(turn["wall_ms"] for turn in turns)
    event, _, _ = median_and_range(turn["event_ms"] for turn in turns)
    found = {"wall_ms": wall, "wall_low": low, "wall_high": high, "event_ms": event}
    return found | {"rounds": len(turns), "tflops": shape.flops(kernel) / wall / 1e9}


def time_dense(team: Team, loaded: dict, shape: Shape, table: Table) -> None:
    """torch's own dense products, in the process of whoever is there, as a row of torch's."""
    name = next((name for name in loaded if name in team.workers), None)
    turns = time_in_turns(team, [name], DENSE)[name] if name else []
    if turns:
        found = figures_of(turns, shape, DENSE)
        table.put(key(DENSE, "torch", shape, loaded[name]) | found | {"run": team.run})
        say(f"  {DENSE} by torch: {found['wall_ms']:.2f} ms, {found['tflops']:.0f} TFLOP/s")


def measure_shape(team: Team, names: list[str], shape: Shape, table: Table) -> list[dict]:
    """Checks, times and memory of one shape, into the table and back as rows."""
    loaded, verdicts = load_and_check(team, names, shape)
    rows = []
    for kernel in (*KERNELS, CAPTURED, BENCHED):
        mine = {name: reply for name, reply in loaded.items() if kernel in kernels_of(team, name)}
        right = [name for name in mine if verdicts[name, kernel] == RIGHT and name in team.workers]
        turns = time_in_turns(team, right, kernel)
        for name, reply in mine.items():
            row = key(kernel, name, shape, reply) | {"check": verdicts[name, kernel], "run": team.run}
            if turns.get(name):
                row |= figures_of(turns[name], shape, kernel)
                if kernel in KERNELS:  # a graph's memory is taken before
                    row |= team.ask(name, "memory", kernel=kernel) or {}
            rows.append(table.put(row))
    if team.args.dense:
        time_dense(team, loaded, shape, table)
    # A provider that could not even be loaded has no versions, so no row in the table, but it is told.
    nothing = {"device": next((reply["device"] for reply in loaded.values()), "no device"), "versions": ""}
    for name in names:
        if name not in loaded:
            rows += [Table().put(key(kernel, name, shape, nothing) | {"check": "not run"}) for kernel in KERNELS]
    return rows


def add_busy(team: Team, names: list[str], shape: Shape, rows: list[dict], table: Table) -> None:
    """GPU time into rows that were timed. After all timing: a profiler that once was on slows later launches."""
    for name in names:
        mine = [row for row in rows if row["provider"] == name and row["wall_ms"] and row["kernel"] != BENCHED]
        if not mine or team.load(name, shape) is None:
            continue
        for row in mine:
            reply = team.ask(name, "busy", kernel=row["kernel"])
            if reply is None:
                break
            row |= {name: f"{reply[name]:.1f}" for name in ("gpu_us", "span_us")}
            row["launches"] = f"{reply['launches']:.0f}"
            table.put(row)


def measure(team: Team, names: list[str], shapes: list[Shape], table: Table) -> list[dict]:
    by_shape: dict[Shape, list[dict]] = {}
    try:
        for shape in shapes:
            say(f"T,H,I,E,K {shape}")
            by_shape[shape] = measure_shape(team, names, shape, table)
            table.write(team.args.csv)
            say("\n".join(f"  {line}" for line in summary(by_shape[shape])[0]))
        for shape, rows in by_shape.items() if not team.args.no_busy else ():
            add_busy(team, names, shape, rows, table)
            table.write(team.args.csv)
    except OutOfTime:
        missing = ", ".join(str(shape) for shape in shapes if shape not in by_shape)
        say(f"stopped at the limit of {team.args.limit:.0f} s; not finished: {missing or 'GPU times'}")
        raise
    finally:
        table.write(team.args.csv)
        found = [row for rows in by_shape.values() for row in rows]
        say("\n".join(summary(found)[0]))
    return found


def files_below(folder: pathlib.Path) -> set[pathlib.Path]:
    return {path for part in ("cache", "home") for path in (folder / part).rglob("*") if path.is_file()}


def cold(team: Team, name: str, shape: Shape, table: Table) -> bool:
    """A first process with empty caches, another token count in it, and a second process with what the first left."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"cold-{name}-", dir=team.folder))
    other = Shape(shape.tokens - shape.tokens // 8 + 1, *shape.as_list()[1:])
    given = {"seed": team.args.seed, "packages": list(PROVIDERS[name].packages)}
    right = True

    def note(row: dict, worker: Worker) -> bool:
        # In the table before the check, which may take longer than the run's limit.
        table.put(row | {"check": "not run"})
        row["check"] = verdict(BACKWARD, PROVIDERS[name], team.bounded(worker, "check"))
        table.put(row)
        say(f"  {name}, {row['kernel']}: {row['seconds']:.2f} s, {row['new_files']} new files; {row['note']}")
        if row["check"] != RIGHT:
            say(f"  {name}: {row['check']}")
        return row["check"] == RIGHT

    for kernel in (COLD, WARM):
        before = files_below(folder)
        worker = team.start(PROVIDERS[name], folder)
        try:
            loaded = team.bounded(worker, "load", shape=shape.as_list(), **given)
            first = team.bounded(worker, "first", kernel=BACKWARD)
            row = key(kernel, name, shape, loaded) | {"seconds": time.perf_counter() - worker.started, "run": team.run}
            row["new_files"] = len(files_below(folder) - before)
            row["note"] = f"from process start to the first result; {first['seconds']:.2f} s of it in the first step"
            right = note(row, worker) and right
            if kernel == COLD:
                before = files_below(folder)
                loaded = team.bounded(worker, "load", shape=other.as_list(), **given)
                first, second = (team.bounded(worker, "first", kernel=BACKWARD) for _ in range(2))
                row = key(NEW_TOKENS, name, other, loaded) | {"seconds": first["seconds"], "run": team.run}
                row["new_files"] = len(files_below(folder) - before)
                row["note"] = f"first step after T={shape.tokens}; the next takes {second['seconds']:.4f} s"
                right = note(row, worker) and right
        finally:
            worker.close()
            table.write(team.args.csv)
    shutil.rmtree(folder, ignore_errors=True)
    return right


def profile(team: Team, name: str, shape: Shape) -> bool:
    """Print where the GPU's time goes in one forward and backward. No figures without a right result."""
    loaded, verdicts = load_and_check(team, [name], shape)
    if verdicts[name, BACKWARD] != RIGHT:
        say(f"{name}, {shape}: {verdicts[name, BACKWARD]}")
        return False
    reply = team.ask(name, "busy", kernel=BACKWARD)
    if reply is None:
        return False
    busy = reply["gpu_us"]
    say(f"{name}, {BACKWARD}, T,H,I,E,K {shape}, {loaded[name]['device']}: GPU busy {busy:.1f} us")
    say("  GEMM          us  TFLOP/s  kernel")
    gemms = gemm_rows(shape, name, reply["sequence"])
    for gemm, us, rate, kernel in gemms:
        say(f"  {gemm:<7}{us:>9.1f}{rate:>9.0f}  {kernel[:90]}")
    spent = sum(us for _, us, _, _ in gemms)
    say(
        f"  {'all':<7}{spent:>9.1f}{shape.flops(BACKWARD) / spent / 1e6:>9.0f}"
        if gemms
        else "  steps differ in their launches"
    )
    say("  launches       us   share  kernel")
    ranked = sorted(reply["totals"].items(), key=lambda item: -item[1][1])
    for kernel, (launches, us) in ranked[: team.args.top]:
        say(f"  {launches:>8.1f}{us:>9.1f}{us / busy:>8.1%}  {kernel[:110]}")
    rest = sum(us for _, (_, us) in ranked[team.args.top :])
    say(f"  {len(ranked[team.args.top :]):>8} other kernels: {rest:.1f} us")
    return True


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--providers", help=f"comma-separated, of {', '.join(PROVIDERS)}; default: all")
    parser.add_argument("--site", action="append", default=[], metavar="FOLDER", help="packages this checkout needs")
    parser.add_argument(
        "--peer-site", metavar="FOLDER", help="packages of the published sonic-moe, and nothing of ours"
    )
    parser.add_argument("--shapes", help=f"comma-separated, of {', '.join(SHAPES)}; default: all, unless --shape")
    parser.add_argument("--shape", action="append", default=[], type=Shape.parse, metavar="T,H,I,E,K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each provider (7)")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a turn (0.15)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for the whole run (3600)")
    parser.add_argument("--command-limit", type=float, default=900, help="seconds for one command of a worker (900)")
    parser.add_argument(
        "--cache", metavar="FOLDER", help="keep the providers' caches here; default: a fresh folder, removed"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="PROVIDER:NAME=VALUE", help="for that provider alone"
    )
    parser.add_argument("--captured", action="store_true", help="ours as a CUDA graph as well")
    parser.add_argument("--do-bench", action="store_true", help="a step as Triton's do_bench times it as well")
    parser.add_argument(
        "--dense", action="store_true", help="torch's dense products of the same sizes as well, and nothing else"
    )
    parser.add_argument("--no-busy", action="store_true", help="leave the GPU times out")
    parser.add_argument(
        "--cold", action="store_true", help="cold and warm start and a new token count, instead of times"
    )
    parser.add_argument("--profile", action="store_true", help="GPU time by kernel, instead of times")
    parser.add_argument("--top", type=int, default=12, help="kernels that --profile lists (12)")
    parser.add_argument("--csv", metavar="FILE", help="the table: rows with the same key are replaced, others kept")
    parser.add_argument("--plot", metavar="FILE", help="a bar chart of the table")
    parser.add_argument("--from-csv", metavar="FILE", help="measure nothing; print and plot this table")
    args = parser.parse_args(argv)
    args.names = args.providers.split(",") if args.providers else list(PROVIDERS)
    for given, known in ((args.names, PROVIDERS), (args.shapes.split(",") if args.shapes else [], SHAPES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    if args.shapes or not args.shape:
        args.shape = [SHAPES[name] for name in (args.shapes.split(",") if args.shapes else SHAPES)] + args.shape
    for pair in args.env:
        if not (pair.partition(":")[0] in PROVIDERS and "=" in pair):
            parser.error(f"--env: got {pair!r}, need PROVIDER:NAME=VALUE")
    if not args.from_csv and not args.peer_site and any(not PROVIDERS[name].in_checkout for name in args.names):
        parser.error("--peer-site is needed, or --providers without the peer")
    return args


def main(argv=None) -> int:
    args = arguments(argv)
    if args.from_csv:
        table = Table.read(args.from_csv)
        lines, refused = summary(table.rows.values())
        say("\n".join(lines))
        if args.plot:
            say(plot.chart(table.rows.values(), args.plot))
        return 1 if refused else 0
    # What ends this process from outside must end the workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = pathlib.Path(args.cache or tempfile.mkdtemp(prefix="moe-bench-")).resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    table, team, good = Table.read(args.csv), Team(args, folder), True
    try:
        if args.profile:
            for shape in args.shape:
                for name in args.names:
                    good = profile(team, name, shape) and good
        elif args.cold:
            for shape in args.shape:
                for name in args.names:
                    try:
                        good = cold(team, name, shape, table) and good
                    except WorkerFailed as error:
                        say(f"  {error}")
                        good = False
        else:
            good = not summary(measure(team, args.names, args.shape, table))[1]
    except OutOfTime:
        good = False
    finally:
        team.close()
        if not args.cache:
            shutil.rmtree(folder, ignore_errors=True)
    if args.plot:
        say(plot.chart(table.rows.values(), args.plot))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
