"""Rounds of processes that all want the same extension, one of which is killed. A line of JSON for each round.

    jit_storm.py FOLDER CSRC ROUNDS PROCESSES SEED SECONDS

The processes are forks of this one, which has imported everything and loaded nothing: starting eight interpreters
fifty times over would take minutes. SECONDS is what a build takes, and so the span that kills are spread over.
"""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import filelock  # noqa: F401  imported once, here

from sonicmoe import jit

ONE = jit.Extension("one", ("one.cpp",))


def answer(cache: Path) -> str:
    try:
        return str(jit.load(ONE, cache, timeout=60).answer())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fork(cache: Path, begin: int, gate: int) -> tuple[int, int]:
    """(pid, pipe to read its answer from) of a process that starts when nobody holds ``gate`` any more."""
    result, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)  # a group with its compiler
        os.close(gate)
        os.read(begin, 1)
        os.write(write, answer(cache).encode())
        os._exit(0)
    os.close(write)
    return pid, result


def holder(cache: Path, limit: float) -> int | None:
    """The process that builds, as its lock says."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        for note in (cache / "locks").glob("*.holder"):
            found = re.match(r"process (\d+) on host", note.read_text())
            if found:
                return int(found[1])
        time.sleep(0.001)
    return None


def play(cache: Path, processes: int, rng: random.Random, seconds: float) -> dict:
    begin, gate = os.pipe()
    children = dict(fork(cache, begin, gate) for _ in range(processes))
    os.close(begin)
    os.close(gate)
    # Half of the kills meet the builder while it builds, the others anybody at any time.
    aimed = rng.random() < 0.5
    victim = holder(cache, 10) if aimed else rng.choice(list(children))
    time.sleep(rng.uniform(0, seconds if aimed else 1.5 * seconds))
    # With its compiler, as a scheduler ends a job; or alone, as the kernel does when memory runs out.
    group = rng.random() < 0.5
    (os.killpg if group else os.kill)(victim, signal.SIGKILL)
    answers = {pid: read_all(result) for pid, result in children.items()}
    statuses = {pid: os.waitpid(pid, 0)[1] for pid in children}
    killed = statuses[victim] == signal.SIGKILL
    return {
        "aimed": aimed,
        "group": group,
        "killed": killed,
        "answers": [text for pid, text in answers.items() if not (pid == victim and killed)],
        "next": answer_of_next(cache),
    }


def read_all(pipe: int) -> str:
    with os.fdopen(pipe) as file:
        return file.read()


def answer_of_next(cache: Path) -> str:
    """One more process, after the storm."""
    begin, gate = os.pipe()
    pid, result = fork(cache, begin, gate)
    os.close(gate)
    os.close(begin)
    text = read_all(result)
    os.waitpid(pid, 0)
    return text


def main():
    folder, csrc = Path(sys.argv[1]), Path(sys.argv[2])
    rounds, processes, seed = (int(text) for text in sys.argv[3:6])
    jit.source_folder = lambda: csrc
    rng = random.Random(seed)
    for number in range(rounds):
        print(json.dumps(play(folder / f"cache{number}", processes, rng, float(sys.argv[6]))), flush=True)


if __name__ == "__main__":
    main()
