"""Loads extensions in a process of its own and says what came of it, as one line of JSON.

    jit_child.py '{"cache": CACHE, "names": ["one", "two"], ...}'

names     extensions of one source each; "routing" is the real one
csrc      where their sources lie, null for the repository's
start     a file to wait for, so that several children start at once
threads   how many threads ask for each extension, 1 if not given
ahead     extensions that one more thread has begun to build ahead
timeout   seconds to wait for a lock
umask     an octal number, as text
user      an id to become once everything is imported
fail      [function, errno], as ["os.mkdir", "ENOSPC"]: calls of it that write below the cache fail that way
"""

import errno
import importlib
import json
import os
import sys
import sysconfig
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock  # noqa: F401  before this process becomes somebody who may not read it
import pybind11  # noqa: F401

from sonicmoe import jit

_ROUTING = "deepep_topk_metadata"


def extension(name: str) -> jit.Extension:
    if name == "routing":
        return jit.Extension(_ROUTING, (f"{_ROUTING}.cpp",), (f"{_ROUTING}.h",))
    return jit.Extension(name, (f"{name}.cpp",))


def routed(module) -> list[list[int]]:
    """Three tokens of two slots, experts 1 1 . 0 . 1, in blocks of 2: counts, then sorted row -> token."""
    indices, probs = array("i", [1, -1, 0, 1, 7, 1]), array("f", [1, 2, 3, 4, 5, 6])
    sizes = {"offset": 3, "gather": 6, "scatter": 6, "reverse": 4, "slot_offset": 4, "scores": 6, "source": 4}
    out = {name: array("f" if name == "scores" else "i", [9] * size) for name, size in sizes.items()}
    inputs = module.Inputs(indices.buffer_info()[0], False, probs.buffer_info()[0], 3, 2, 2, 2)
    outputs = module.Outputs(*(values.buffer_info()[0] for values in out.values()), 4, 6)
    return [module.build(inputs, outputs, 0, 0, 0), out["gather"].tolist()]


def load(name: str, cache: Path, timeout: float) -> dict:
    began = time.perf_counter()
    try:
        module = jit.load(extension(name), cache, timeout)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "seconds": time.perf_counter() - began}
    seconds = time.perf_counter() - began
    return {"answer": routed(module) if name == "routing" else module.answer(), "seconds": seconds}


def make_fail(function: str, code: int, cache: Path) -> None:
    """As it does on a full or read-only file system."""
    module = importlib.import_module(function.partition(".")[0])
    name = function.partition(".")[2]
    original = getattr(module, name)

    def failing(path, *args, **kwargs):
        writes = function != "io.open" or "w" in args[0]
        if writes and isinstance(path, str | os.PathLike) and Path(path).is_relative_to(cache):
            raise OSError(code, os.strerror(code), os.fspath(path))
        return original(path, *args, **kwargs)

    setattr(module, name, failing)


def become_what_was_asked(request: dict, cache: Path, import_rest) -> None:
    """The keys umask, user, fail and start; ``import_rest`` reads what another user may not."""
    if "umask" in request:
        os.umask(int(request["umask"], 8))
    if "user" in request:
        import_rest()
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    if "fail" in request:
        make_fail(request["fail"][0], getattr(errno, request["fail"][1]), cache)
    while "start" in request and not os.path.exists(request["start"]):
        time.sleep(0.002)


def main(request: dict) -> list[dict]:
    cache = Path(request["cache"])
    if request.get("csrc"):
        jit.source_folder = lambda: Path(request["csrc"])
    become_what_was_asked(request, cache, sysconfig.get_paths)  # reads files of Python's on first use
    asked = [name for name in request["names"] for _ in range(request.get("threads", 1))]
    timeout = request.get("timeout", 120)
    with ThreadPoolExecutor(request.get("threads", 1) + 1) as pool:
        ahead = [pool.submit(jit.build_ahead, extension(name), cache) for name in request.get("ahead", ())]
        found = list(pool.map(lambda name: load(name, cache, timeout), asked))
        for begun in ahead:
            begun.result()
        return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
