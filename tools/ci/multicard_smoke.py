"""Does expert-parallel training run here? Starts the framework's own launcher and watches its ranks.

    multicard_smoke.py [--framework paddle|torch] [--ranks N] [--steps N] [--limit SECONDS]

Ends with status 0 and one line if every rank got through all steps. Else with status 1, what happened, and the end of
each rank's log: after a rank is gone the others get some time to notice, after ``--limit`` none. Nothing that was
started stays behind.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("multicard_worker.py")

# Names that may pass to the launcher. A scheduler exports PADDLE_TRAINERS, POD_IP, DISTRIBUTED_TRAINER_ENDPOINTS and
# more, and any one of them makes Paddle's launcher wait for other machines, without a word and for ever: so this is a
# list of what is let through and not of what is kept out.
NAMES = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "USE_QUACK_GEMM")
PREFIXES = ("LC_", "LD_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TRITON_", "SONIC_MOE_", "GLOG_", "OMP_", "PYTHON")

GRACE_S = 40  # for the other ranks to end by themselves when one is gone; gloo gives up after 30
MARK = "SONICMOE_MULTICARD_SMOKE"
SHOWN_LINES = 25


def environment(mark: str) -> dict[str, str]:
    passed = {name: value for name, value in os.environ.items() if name in NAMES or name.startswith(PREFIXES)}
    # Paddle's store on libuv, a thread of rank 0, ends that rank now and then when another one hangs up first.
    set_here = {"PYTHONUNBUFFERED": "1", "FLAGS_tcp_store_using_libuv": "0", MARK: mark}
    return {"OMP_NUM_THREADS": "1", **passed, **set_here}


def launcher(framework: str, ranks: int, logs: pathlib.Path) -> list[str]:
    if framework == "torch":
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--redirects", "3"]
        return [sys.executable, "-m", *command, "--log-dir", str(logs)]
    command = ["paddle.distributed.launch", "--nproc_per_node", str(ranks), "--host", "127.0.0.1"]
    command += [] if _paddle_has_gpus(ranks) else ["--backend=gloo"]
    return [sys.executable, "-m", *command, "--log_dir", str(logs)]


def _paddle_has_gpus(ranks: int) -> bool:
    """As the worker asks: with fewer all ranks run on the CPU, where there is no NCCL."""
    import paddle

    return paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() >= ranks


def alive(pid: int) -> bool:
    """An ended process that nobody has waited for yet has no command line."""
    try:
        return bool(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def marked(mark: str) -> list[int]:
    """Every process that inherited our mark, also in a session of its own, as workers of a launcher are."""
    needle, found = f"{MARK}={mark}".encode(), []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if needle in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def end_all(mark: str) -> None:
    for _ in range(20):
        left = marked(mark)
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)


def gone(folder: pathlib.Path, ranks: int) -> list[int]:
    """Ranks that have begun, are no more, and did not get through."""
    found = []
    for rank in range(ranks):
        pid = folder / f"pid.{rank}"
        if pid.exists() and not (folder / f"done.{rank}").exists():
            text = pid.read_text()
            if text and not alive(int(text)):
                found.append(rank)
    return found


def watch(child, folder: pathlib.Path, ranks: int, limit: float, look=lambda: None) -> str | None:
    """What went wrong, or None. ``look`` is called again and again meanwhile."""
    began, lost, lost_at = time.monotonic(), [], 0.0
    while True:
        status, now = child.poll(), time.monotonic()
        if not lost:
            lost, lost_at = gone(folder, ranks), now
        done = [rank for rank in range(ranks) if (folder / f"done.{rank}").exists()]
        if status is not None and not lost and status == 0 and len(done) == ranks:
            return None
        who = f"rank {', '.join(map(str, lost))} ended before its last step"
        if status is not None:
            missing = sorted(set(range(ranks)) - set(done))
            return f"{who}; the job ended by itself" if lost else f"status {status}, without rank {missing}"
        if lost and now - lost_at > GRACE_S:
            return f"{who}; the others were ended after {GRACE_S} s"
        if now - began > limit:
            return f"still running after {limit:.0f} s, ended"
        look()
        time.sleep(0.02)


def show_logs(logs: pathlib.Path) -> None:
    # Paddle's workerlog.N, and torch's stdout.log and stderr.log. Beside them Paddle's launcher lists its environment.
    for path in sorted([*logs.rglob("workerlog.*"), *logs.rglob("std*.log")]):
        lines = path.read_text(errors="replace").strip().splitlines()
        if lines:
            print(f"--- {path.relative_to(logs)}", *lines[-SHOWN_LINES:], sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("paddle", "torch"), default="paddle")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for all of it")
    parser.add_argument("--kill", type=int, nargs=2, metavar=("RANK", "STEP"), help="try what a lost rank does")
    args = parser.parse_args()
    mark, began = uuid.uuid4().hex, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        logs = folder / "logs"
        command = [*launcher(args.framework, args.ranks, logs), str(WORKER), args.framework, name, str(args.steps)]
        command += [str(number) for number in args.kill or ()]
        with (folder / "launcher.log").open("w") as log:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment(mark), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                wrong = watch(child, folder, args.ranks, args.limit)
            finally:
                end_all(mark)
                child.wait()
        seconds = time.monotonic() - began
        if wrong is not None:
            show_logs(logs)
            print("--- launcher", *(folder / "launcher.log").read_text().splitlines()[-SHOWN_LINES:], sep="\n")
            print(f"multicard smoke: {args.framework}, {args.ranks} ranks: FAILED after {seconds:.0f} s: {wrong}")
            return 1
    print(f"multicard smoke: {args.framework}, {args.ranks} ranks, {args.steps} steps: ok in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
