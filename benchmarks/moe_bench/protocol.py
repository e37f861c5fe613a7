"""JSON lines between the runner and one provider's process: a command in, a reply out, everything else into a log."""

import contextlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping


class WorkerFailed(RuntimeError):
    """A command failed, took too long, or the process is gone. The process is not usable any more."""


class Worker:
    """The runner's end."""

    def __init__(self, name: str, command, env: Mapping[str, str], folder: pathlib.Path):
        self.name = name
        self.log = folder / "log"
        self.replies: queue.Queue = queue.Queue()
        self.started = time.perf_counter()
        with self.log.open("a") as log:
            # A group of its own, so that the compilers a provider starts end with it.
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=env,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                process_group=0,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.replies.put(line)
        self.replies.put(None)

    def ask(self, command: str, limit: float, **arguments) -> dict:
        """The reply, or WorkerFailed after ``limit`` seconds or with the error that the process told."""
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.replies.get(timeout=max(limit, 0.0))
        except OSError:
            line = None
        except queue.Empty:
            self.kill()
            raise WorkerFailed(f"{self.name}: {command} took more than {limit:.0f} s") from None
        if line is None:
            self.kill()
            raise WorkerFailed(f"{self.name}: ended during {command}; the end of its log:\n{self.log_tail()}")
        reply = json.loads(line)
        if "error" in reply:
            # A failed launch leaves a CUDA context that answers nothing any more.
            self.kill()
            raise WorkerFailed(f"{self.name}: {command}: {reply['error']}")
        return reply

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                self.ask("exit", 20)
                self.process.wait(20)
            except (WorkerFailed, subprocess.TimeoutExpired):
                pass
        self.kill()

    def kill(self) -> None:
        # Also after a clean end: a compiler it started may still run.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def serve(handlers: Mapping[str, Callable[..., dict]]) -> None:
    """The process's end: answer commands until `exit`, or until the runner is gone."""
    # Libraries print; the line protocol moves to a descriptor that they do not know.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        command = arguments.pop("command")
        try:
            reply = {} if command == "exit" else handlers[command](**arguments)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:2000]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if command == "exit":
            return
