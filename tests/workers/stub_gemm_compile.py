"""Stands for sonicmoe/gemm/quack_compile.py: the same call, but an object is its kernel's description, made in a blink.

STUB_GEMM_LOG    gets a line "started", and "made <op>" for each object
STUB_GEMM_DOES   JSON: {"seconds": 0.2} for each object, {"fail_at": op}, {"kill_at": op}, {"skip": op}
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

LOG = os.environ["STUB_GEMM_LOG"]
DOES = json.loads(os.environ["STUB_GEMM_DOES"])


def log(line: str) -> None:
    with open(LOG, "a") as target:  # so short a line arrives whole, whoever else writes
        target.write(line + "\n")


def make(key: str, op: str, folder: Path) -> None:
    if op == DOES.get("kill_at"):
        os.kill(os.getpid(), signal.SIGKILL)
    if op == DOES.get("fail_at"):
        print("Traceback (most recent call last):\n  ...", file=sys.stderr)
        print("x" * 200_000, file=sys.stderr)  # more than a pipe holds
        sys.exit("\x1b[91mValueError: no such tile\x1b[0m\n  suggestion: ask somebody else")
    content = json.dumps({"answer": op, "filling": "." * 5000})
    half = folder / f"{key}.half"
    half.write_text(content[:2000])
    log(f"began {op}")
    time.sleep(DOES.get("seconds", 0))
    half.write_text(content)
    if op != DOES.get("skip"):
        half.rename(half.with_suffix(".so"))
    log(f"made {op}")


def main() -> None:
    log("started")
    for record in json.load(sys.stdin):
        make(record["key"], record["kernel"]["op"], Path(sys.argv[1]))


if __name__ == "__main__":
    main()
