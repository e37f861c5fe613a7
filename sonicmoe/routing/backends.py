"""Which implementation makes routing metadata. All give the same arrays, bit for bit.

host    C++, on the CPU                    cuda    CUDA, one launch
naive   framework ops, anywhere            triton  where a GPU's machine has no compiler
"""

import warnings
from importlib.util import find_spec

from .. import checks
from ..cache_safety import JitUnavailable
from . import naive, native

if find_spec("triton") is not None:
    from . import triton_metadata
else:
    triton_metadata = None

_FAULTS = {1: "holds an expert more than once", 2: "holds an id under -1"}


def _naive(indices, probs, n_experts, block, counts, cache_dir, scales):
    return naive.build(indices, probs, n_experts, block, scales)


def _triton(indices, *rest):
    if triton_metadata is None:
        raise JitUnavailable("triton is not installed; pip install triton")
    return triton_metadata.build(indices, *rest)


_BUILDERS = {"host": native.build_host, "cuda": native.build_cuda, "triton": _triton, "naive": _naive}
_AUTO = {True: ("host", "naive"), False: ("cuda", "triton")}  # by whether the indices are on the CPU


_said: set[str] = set()


def _say_once(line: str) -> None:
    """Not left to ``warnings``: it forgets what it has said whenever anybody touches its filters."""
    if line not in _said:
        _said.add(line)
        warnings.warn(line, stacklevel=3)


def _choice(config, on_cpu: bool) -> str:
    if config.metadata_backend == "auto" and config.backend == "naive" and not on_cpu:
        return "naive"  # asked for ordinary operators, on a device that need not be CUDA
    return config.metadata_backend


def build(indices, probs, n_experts: int, block: int, config, counts=None, scales=None) -> tuple[str, dict]:
    """(backend, arrays). ``auto`` takes the fastest that can be had and says once why it is not the first choice; a
    backend chosen by name runs or raises."""
    on_cpu = checks.is_cpu(indices)
    chosen = _choice(config, on_cpu)
    if chosen != "auto":
        if (chosen == "host") != on_cpu and chosen not in ("naive", "triton"):
            raise ValueError(f"metadata_backend: got {chosen!r} for indices on {checks.place_name(indices)}")
        return chosen, _BUILDERS[chosen](indices, probs, n_experts, block, counts, config.cache_dir, scales)
    *attempts, last = _AUTO[on_cpu]
    for name in attempts:
        try:
            return name, _BUILDERS[name](indices, probs, n_experts, block, counts, config.cache_dir, scales)
        except JitUnavailable as reason:
            _say_once(f"sonicmoe: routing metadata runs as {last!r}, not {name!r}: {reason}")
    return last, _BUILDERS[last](indices, probs, n_experts, block, counts, config.cache_dir, scales)


def check_rows(indices, n_experts: int, config, index_name: str) -> None:
    """SONIC_MOE_VALIDATE_DISPATCH: the dispatcher's promise, row by row. Waits for the device."""
    try:
        if _choice(config, checks.is_cpu(indices)) in ("naive", "triton"):
            found = naive.check_rows(indices, n_experts)
        else:
            found = native.check_rows(indices, n_experts, config.cache_dir)
    except JitUnavailable:
        found = naive.check_rows(indices, n_experts)
    if found is not None:
        row, fault = found
        raise ValueError(f"{index_name}: row {row} is {indices[row].tolist()}, which {_FAULTS[fault]}")
