"""Asks the store of compiled GEMMs for kernels, in a process of its own, and says what came of it as a line of JSON.

    gemm_store_child.py '{"cache": CACHE, "ops": ["up", "rows"], ...}'

ops       one kernel each; the answer of its object is its own op
start     a file to wait for, so that several children start at once
threads   how many threads ask for all of them, 1 if not given
ahead     kernels that one more thread has begun to build ahead
umask     an octal number, as text
user      an id to become once everything is imported
fail      [function, errno], as ["os.mkdir", "ENOSPC"]: calls of it that write below the cache fail that way
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock  # noqa: F401  before this process becomes somebody who may not read it

from sonicmoe.gemm import kernel_store
from sonicmoe.gemm.gemm_kernel import GemmKernel, Tile
from tests.workers.jit_child import become_what_was_asked

STUB = Path(__file__).with_name("stub_gemm_compile.py")


def kernel_of(op: str) -> GemmKernel:
    return GemmKernel(op, Tile(128, 192), activation="swiglu")


def load(ops: list[str], cache: Path) -> dict:
    kernels = [kernel_of(op) for op in ops]
    try:
        found = kernel_store.load(kernels, cache)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"answer": found, "present": len(kernel_store.present(kernels, cache))}


def import_rest() -> None:
    import tvm_ffi  # noqa: F401

    kernel_store._tool_key()


def main(request: dict) -> list[dict]:
    kernel_store._CHILD = STUB
    cache = Path(request["cache"])
    become_what_was_asked(request, cache, import_rest)
    threads = request.get("threads", 1)
    with ThreadPoolExecutor(threads + 1) as pool:
        ahead = pool.submit(kernel_store.build_ahead, [kernel_of(op) for op in request.get("ahead", ())], cache)
        found = list(pool.map(lambda _: load(request["ops"], cache), range(threads)))
        ahead.result()
        return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
