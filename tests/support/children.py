"""Scripts in child processes: an environment of our choosing, a time limit, and a failure that can be read."""

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "tests" / "workers"
TORCH_SITE_VARIABLE = "SONICMOE_TEST_TORCH_SITE"

# A whitelist, because the other way round does not work: a job's scheduler exports PADDLE_TRAINERS, POD_*,
# DISTRIBUTED_TRAINER_ENDPOINTS and more, and any one of them makes Paddle's launcher wait for other machines for
# ever, without a word. Proxy variables stay out as well: nothing here may leave the loopback interface.
_NAMES = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV")
_PREFIXES = ("LC_", "LD_", "CUDA_", "NVIDIA_", "GLOG_")

# Every process that a child starts inherits this variable, also one in a session of its own, as the workers of
# Paddle's launcher are: killing the child's process group would leave those behind.
_MARK = "SONICMOE_TEST_CHILD"
_SHOWN_LINES = 60


def clean_env(pythonpath=(ROOT,), **more) -> dict[str, str]:
    """The whitelisted part of our environment, one thread a process, and ``pythonpath`` in front of the path."""
    env = {name: value for name, value in os.environ.items() if name in _NAMES or name.startswith(_PREFIXES)}
    # One thread: sums of floats then come out the same on any number of cores.
    env |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    env["PYTHONPATH"] = os.pathsep.join(str(path) for path in pythonpath)
    env["PYTHONFAULTHANDLER"] = "1"
    return env | {name: str(value) for name, value in more.items()}


def torch_site() -> Path:
    """The folder that holds a real torch, for a child's path; skips the test where there is none."""
    found = os.environ.get(TORCH_SITE_VARIABLE)
    if not found:
        pytest.skip(f"{TORCH_SITE_VARIABLE} is not set: no real torch to run beside Paddle")
    site = Path(found).resolve()
    # Named but absent is a broken set-up and no reason to skip.
    assert (site / "torch" / "__init__.py").is_file(), f"{TORCH_SITE_VARIABLE}={found} holds no torch"
    return site


@dataclass
class Done:
    """How a child ended. ``status`` is None where it ran out of time."""

    command: list[str]
    status: int | None
    stdout: str
    stderr: str
    seconds: float
    ended: int  # processes that it left running, ended by us

    def report(self) -> str:
        how = "ran out of time" if self.status is None else f"ended with status {self.status}"
        left = f", leaving {self.ended} processes behind" if self.ended else ""
        head = f"child {how} after {self.seconds:.1f} s{left}: {shlex.join(self.command)[:400]}"
        return "\n".join([head, *section("stdout", self.stdout), *section("stderr", self.stderr)])


def section(title: str, text: str) -> list[str]:
    """A title and the last lines of a log, for an error message."""
    lines = text.strip().splitlines()
    cut = [f"... {len(lines) - _SHOWN_LINES} lines before"] if len(lines) > _SHOWN_LINES else []
    return [f"--- {title}", *cut, *lines[-_SHOWN_LINES:]]


def _end_marked(mark: str) -> int:
    """Kill every process that carries our mark; how many there were."""
    needle, found = f"{_MARK}={mark}".encode(), set()
    for _ in range(20):  # again, because a process that is being killed may have started another
        alive = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                # An ended process that nobody has waited for yet shows an empty environment.
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    alive.append(int(folder.name))
            except OSError:
                continue
        if not alive:
            break
        found.update(alive)
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)
    return len(found)


def run(command, *, env=None, cwd=None, timeout=120) -> Done:
    """Run to its end or to ``timeout``; whatever it started is ended with it."""
    mark = uuid.uuid4().hex
    command = [str(part) for part in command]
    env = {**(clean_env() if env is None else env), _MARK: mark}
    began = time.monotonic()
    child = subprocess.Popen(
        command,
        env=env,
        cwd=cwd or ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    ended, status = 0, None
    try:
        stdout, stderr = child.communicate(timeout=timeout)
        status = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        ended = _end_marked(mark)  # before reading on: what it left behind holds the pipes open
        stdout, stderr = child.communicate()
    finally:
        if child.poll() is None:  # an interrupt of the test itself
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        ended += _end_marked(mark)
    return Done(command, status, stdout, stderr, time.monotonic() - began, ended)


def check(done: Done) -> Done:
    if done.status != 0:
        pytest.fail(done.report(), pytrace=False)
    return done


def python(script, *args, options=(), env=None, cwd=None, timeout=120) -> Done:
    """Run a file (a Path) or source text under this interpreter; a failure fails the test with all that it said."""
    code = [script] if isinstance(script, Path) else ["-c", textwrap.dedent(script)]
    return check(run([sys.executable, *options, *code, *args], env=env, cwd=cwd, timeout=timeout))


def answer(script, *args, **kwargs):
    """The JSON that the script prints as its last line."""
    done = python(script, *args, **kwargs)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        pytest.fail(f"the child's last line is no JSON\n{done.report()}", pytrace=False)


def launch(script: Path, *args, folder: Path, ranks=2, timeout=180, device: dict | None = None) -> Done:
    """Run the script as ``ranks`` processes of Paddle's launcher, on the loopback interface alone. On the CPU, or on a
    device plugin with ``device``, the variables that name it."""
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", ranks]
    command += [] if device else ["--backend", "gloo"]
    command += ["--host", "127.0.0.1", "--log_dir", folder / "logs", script, *args]
    # Its store on libuv, a thread of rank 0, ends that rank now and then when another one hangs up first.
    env = clean_env(FLAGS_tcp_store_using_libuv=0, **(device or {}))
    done = run(command, env=env, cwd=folder, timeout=timeout)
    if done.status != 0 or done.ended:
        logs = sorted((folder / "logs").glob("workerlog.*"))
        shown = [line for log in logs for line in section(f"rank {log.suffix[1:]}", log.read_text(errors="replace"))]
        pytest.fail("\n".join([done.report(), *shown]), pytrace=False)
    return done
