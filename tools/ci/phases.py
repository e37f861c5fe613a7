"""Runs the phases of the suite, counts what they did, and fails if one failed or did nothing.

Started by run_core_tests.sh, which sets up the environment first, or by run_gpu_tests.sh in one that is there.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

import check_house

ROOT = Path(__file__).resolve().parents[2]
# Of a test with several of these marks, the first one listed decides, so each test runs in exactly one phase.
MARKS = ("gpu", "demo", "training", "dist", "torch", "contract")
# Far above what a phase takes; there for the test that waits for ever on another process.
LIMIT_S = 15 * 60
# pytest's exit status when it found nothing to run.
NO_TESTS = 5


@dataclass(frozen=True)
class Phase:
    name: str
    title: str
    marks: str = ""  # pytest's -m expression
    parallel: bool = False  # whether its tests leave room for others beside them
    folder: str = "tests"


def only(mark):
    """Tests that carry this mark and none that ranks before it."""
    return " and ".join([mark, *(f"not {other}" for other in MARKS[: MARKS.index(mark)])])


PHASES = (
    Phase("lint", "lint"),
    Phase("unit", "unit tests", " and ".join(f"not {mark}" for mark in MARKS), parallel=True),
    Phase("contract", "node contracts", only("contract"), parallel=True),
    Phase("torch", "torch parity", only("torch"), parallel=True),
    Phase("dist", "distributed", only("dist")),
    Phase("training", "training runs", only("training"), parallel=True),
    Phase("demo", "demo smoke", only("demo")),
)
FAST = ("lint", "unit", "contract")
# Runs only by its name. From its own folder alone: what other tests import need not be there.
GPU = Phase("gpu", "GPU tests", only("gpu"), folder="tests/gpu")


@dataclass
class Result:
    phase: Phase
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    note: str = ""
    seconds: float = 0.0
    causes: dict[str, list[str]] = field(default_factory=dict)  # what was said, and the tests that it ended

    @property
    def ok(self):
        return not self.failed


def cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_bounded(command, env):
    """Exit status, or None if it ran into the limit. Whatever it started is ended with it."""
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return child.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also after a clean end, on Ctrl-C and on SIGTERM: a launcher's workers may outlive the test that started them.
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()


def run_lint(result):
    ruff = subprocess.run([Path(sys.executable).with_name("ruff"), "check", "--quiet", "."], cwd=ROOT)
    outcomes = [ruff.returncode == 0]
    for findings in check_house.check(ROOT).values():
        print("\n".join(findings), end="\n" if findings else "")
        outcomes.append(not findings)
    result.passed = sum(outcomes)
    result.failed = len(outcomes) - result.passed


def read_report(report, result):
    """Add up pytest's own report; an expected failure counts as skipped there."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return  # it never got so far; the exit status tells
    for suite in suites:
        count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        result.failed += count["failures"] + count["errors"]
        result.skipped += count["skipped"]
        result.passed += max(0, count["tests"] - count["failures"] - count["errors"] - count["skipped"])
        for case in suite.iter("testcase"):
            for said in (*case.iter("failure"), *case.iter("error")):
                name = f"{case.get('classname', '')}::{case.get('name', '')}"
                result.causes.setdefault(said.text or said.get("message", ""), []).append(name)


def run_pytest(result, fast):
    phase = result.phase
    marks = f"({phase.marks}) and not slow" if fast else phase.marks
    workers = min(cpus(), 4) if phase.parallel else 1
    # One thread a process: Paddle's own default, the fastest with tensors of test size, and sums of floats then
    # come out the same on any number of cores.
    env = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "--disable-warnings"]
        command += [f"--junitxml={report}", "-m", marks, phase.folder]
        # A file's tests stay together and in order: they may share an expensive fixture. A crashed worker stays
        # down and the others go on: with restarts, xdist 3.8 hands it the same file again and can wait for ever.
        parallel = ["-n", str(workers), "--dist=loadfile", "--max-worker-restart=0"]
        command += parallel if workers > 1 else ["-p", "no:xdist"]
        status = run_bounded(command, env)
        read_report(report, result)
    if status is None:
        result.note = f"stopped after {LIMIT_S} s"
    elif status not in (0, NO_TESTS) and result.failed == 0:
        result.note = f"pytest ended with status {status}"
    elif result.passed + result.failed == 0:
        result.note = "no test was executed"
    if result.note:
        result.failed += 1  # so that the closing line never says 0 failed of a run that failed


def run_phase(phase, fast):
    print(f"\n== {phase.title}", flush=True)
    result = Result(phase)
    began = time.monotonic()
    if phase.name == "lint":
        run_lint(result)
    else:
        run_pytest(result, fast)
    result.seconds = time.monotonic() - began
    verdict = "ok" if result.ok else "FAILED"
    note = f" ({result.note})" if result.note else ""
    print(f"== {phase.title}: {verdict} in {result.seconds:.1f} s{note}", flush=True)
    return result


def print_causes(results, limit=6, lines=8):
    """What failed and why, at the end, which a log that was cut short still has. Tests that fail alike are one."""
    causes = [(names, said) for result in results for said, names in result.causes.items()]
    for names, said in causes[:limit]:
        print(f"\nFAILED {names[0]}" + (f" and {len(names) - 1} more alike" if len(names) > 1 else ""))
        said = [line[:200] for line in said.splitlines() if line.strip()]
        print("\n".join(f"    {line}" for line in (said if len(said) <= lines else [said[0], *said[1 - lines :]])))
    if len(causes) > limit:
        print(f"\nand {len(causes) - limit} other causes, above")


def print_table(results):
    print(f"\n{'phase':<16}{'result':<8}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>10}")
    for result in results:
        verdict = "ok" if result.ok else "FAILED"
        counts = f"{result.passed:>8}{result.failed:>8}{result.skipped:>8}{result.seconds:>10.1f}"
        print(f"{result.phase.title:<16}{verdict:<8}{counts}  {result.note}".rstrip())
    total = [sum(getattr(result, name) for result in results) for name in ("passed", "failed", "skipped", "seconds")]
    print(f"{'all':<16}{'':<8}{total[0]:>8}{total[1]:>8}{total[2]:>8}{total[3]:>10.1f}")
    print_causes(results)
    print(f"\n{total[0]} passed, {total[1]} failed, {total[2]} skipped", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--phase", choices=[phase.name for phase in (*PHASES, GPU)])
    args = parser.parse_args()
    # End by an exception, so that run_bounded gets to clean up behind itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    names = (args.phase,) if args.phase else FAST if args.fast else tuple(phase.name for phase in PHASES)
    results = [run_phase(phase, args.fast) for phase in (*PHASES, GPU) if phase.name in names]
    print_table(results)
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
