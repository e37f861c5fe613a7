"""Compiled GEMMs: made by child processes that need no GPU, kept as shared libraries, loaded by TVM-FFI.

    <cache>/gemm/<tools>/<key>.so       one kernel; <key> says what it computes, <tools> what made it and for which CPU
    <cache>/gemm/<tools>/<key>.json     its SHA-256 and its description
    <cache>/locks/gemm-<tools>.lock     held by the one process that compiles; the others wait and then find

The rules are those of ``jit.py``: nothing half-written under a final name, nothing run that another user could have
written or whose hash is wrong, one clear line where something cannot be had.
"""

import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from .. import cache_safety
from ..cache_safety import JitUnavailable, UnsafeCache
from ..jit import LOCK_TIMEOUT_S, build_lock
from .gemm_kernel import GemmKernel

_CHILD = Path(__file__).with_name("quack_compile.py")
_TOOLS = ("quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi")
# The generator's compiler comes for either CUDA under one version, and a driver for 12 may not take what 13 made.
_COMPILERS = ("nvidia-cutlass-dsl-libs-cu12", "nvidia-cutlass-dsl-libs-cu13")
_RUNTIME, _FUNCTION = "libcute_dsl_runtime.so", "gemm"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tool_versions() -> tuple[str, ...]:
    found = {name: _version(name) for name in (*_TOOLS, *_COMPILERS)}
    for name in _TOOLS:
        if found[name] is None:
            raise JitUnavailable(f"{name} is not installed; pip install 'sonicmoe[gpu]'")
    return tuple(f"{name} {version}" for name, version in found.items())


@cache
def _host() -> str:
    """The CPU's own instructions: an object holds the code that launches its kernel, made for the CPU that compiled it.
    Another machine on the same cache may lack some of these and would be killed by the first it meets."""
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        about = ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", about, re.MULTILINE)
    return " ".join([platform.machine(), *sorted(found[1].split() if found else [])])


def _tools_as_they_are() -> str:
    text = " ".join([*_tool_versions(), _host()]).encode() + b"\0" + _CHILD.read_bytes()
    return hashlib.sha256(text).hexdigest()[:16]


_tool_key = cache(_tools_as_they_are)


def _folder(cache_dir: Path) -> Path:
    return cache_dir / "gemm" / _tool_key()


def _intact(folder: Path, kernel: GemmKernel) -> bool:
    try:
        wanted = json.loads((folder / f"{kernel.key()}.json").read_text())["sha256"]
        return hashlib.sha256((folder / f"{kernel.key()}.so").read_bytes()).hexdigest() == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False


def present(kernels: list[GemmKernel], cache_dir: Path) -> list[GemmKernel]:
    """Those that are compiled already."""
    return [kernel for kernel in kernels if _intact(_folder(cache_dir), kernel)]


def _name(kernel: GemmKernel) -> str:
    facts = (kernel.activation, kernel.storage, kernel.arch)
    return f"{kernel.op} {kernel.tile.m}x{kernel.tile.n} ({', '.join(fact for fact in facts if fact)})"


@dataclass(frozen=True)
class _Share:
    """The kernels of one child. It is asked and answers through files: a pipe would stop it once it has said much, or
    us once it has died."""

    kernels: list[GemmKernel]
    scratch: Path
    number: int

    def start(self) -> subprocess.Popen:
        arch = self.kernels[0].arch
        command = [
            "env", "CUDA_VISIBLE_DEVICES=", f"QUACK_ARCH={arch.removeprefix('sm_').rstrip('af')}",
            f"CUTE_DSL_ARCH={arch}", sys.executable, "-P", str(_CHILD), str(self.scratch),
        ]  # fmt: skip
        asked, said = self.scratch / f"{self.number}.asked", self._said
        asked.write_text(json.dumps([{"key": kernel.key(), "kernel": asdict(kernel)} for kernel in self.kernels]))
        with asked.open() as stdin, said.open("w") as stderr:
            return subprocess.Popen(command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=stderr)

    @property
    def _said(self) -> Path:
        return self.scratch / f"{self.number}.said"

    def failure(self, status: int) -> str | None:
        """The kernel that the child ended at, and its last words. Children make their kernels in order."""
        for kernel in self.kernels:
            if not (self.scratch / f"{kernel.key()}.so").exists():
                return f"{_name(kernel)}: {self._last_words(status)}"
        return None

    def _last_words(self, status: int) -> str:
        if status < 0:
            return f"its compiler was ended by {signal.Signals(-status).name}"
        plain = re.sub(r"\x1b\[[0-9;]*m", "", self._said.read_text(errors="replace"))  # the generator writes in colour
        lines = [line.strip() for line in plain.splitlines() if line.strip()]
        # What follows an error in its own words is advice.
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or [f"exit status {status}"])[-1]


def _compile(kernels: list[GemmKernel], scratch: Path) -> None:
    """Spread over one process a core. All of them are waited for, whatever happens to one."""
    count = min(len(kernels), len(os.sched_getaffinity(0)))
    shares = [_Share(kernels[number::count], scratch, number) for number in range(count)]
    children = [share.start() for share in shares]
    statuses = [child.wait() for child in children]
    for share, status in zip(shares, statuses, strict=True):
        failure = share.failure(status)
        if failure is not None:
            raise JitUnavailable(f"compiling GEMM kernels failed at {failure}")


def _install(kernel: GemmKernel, scratch: Path, folder: Path) -> None:
    """The record last: a library without one counts as absent."""
    made = scratch / f"{kernel.key()}.so"
    record = {"sha256": hashlib.sha256(made.read_bytes()).hexdigest(), "kernel": asdict(kernel)}
    note = scratch / f"{kernel.key()}.json"
    note.write_text(json.dumps(record, indent=1))
    (folder / note.name).unlink(missing_ok=True)
    for path in (made, note):
        path.chmod(0o644)
        path.replace(folder / path.name)


def _build_missing(kernels: list[GemmKernel], cache_dir: Path) -> None:
    folder = _folder(cache_dir)
    cache_safety.make_private(cache_dir, "gemm", "locks")
    cache_safety.make_private(folder)
    with build_lock(cache_dir / "locks" / f"gemm-{_tool_key()}.lock", LOCK_TIMEOUT_S):
        missing = [kernel for kernel in kernels if not _intact(folder, kernel)]
        if not missing:
            return  # another process made them while we waited
        for orphan in folder.glob(".scratch-*"):  # we hold the lock: its maker is dead
            shutil.rmtree(orphan, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder, ignore_cleanup_errors=True) as made_in:
            scratch = Path(made_in)
            try:
                _compile(missing, scratch)
            finally:
                # Our key is from when this process began, and children run what is installed now.
                unchanged = _tools_as_they_are() == _tool_key()
                for kernel in missing:
                    # Also of a set in which another one failed.
                    if unchanged and (scratch / f"{kernel.key()}.so").exists():
                        _install(kernel, scratch, folder)
        if not unchanged:
            raise JitUnavailable("the generator of GEMM kernels was replaced while this process ran; start again")


@cache
def _runtime() -> ctypes.CDLL:
    """The library of the generator's that its kernels call. Loaded by its path, it is found by those that ask for it by
    name, and nothing of the generator itself need be imported."""
    for package in reversed(_COMPILERS):
        try:
            files = metadata.files(package) or ()
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == _RUNTIME and "stubs" not in file.parts:
                path = str(file.locate())
                try:
                    return ctypes.CDLL(path)
                except OSError as error:
                    raise JitUnavailable(f"{path} does not load: {error}; pip install 'sonicmoe[gpu]' anew") from error
    raise JitUnavailable(f"{_RUNTIME} is in neither {' nor '.join(_COMPILERS)}; pip install 'sonicmoe[gpu]'")


def _open(folder: Path, kernel: GemmKernel):
    from tvm_ffi import load_module  # a GPU machine's package; nothing else here needs it

    _runtime()
    path = folder / f"{kernel.key()}.so"
    for place in (path, path.with_suffix(".json"), folder):
        cache_safety.require_private(place)
    try:
        return load_module(str(path))[_FUNCTION]
    except RuntimeError as error:
        raise JitUnavailable(cache_safety.unloadable(path, error, path)) from error


_loaded: dict[tuple[GemmKernel, Path], object] = {}
_loading = threading.Lock()


def load(kernels: list[GemmKernel], cache_dir: Path) -> list:
    """The functions of ``kernels``, in order. What is missing is compiled first, all of it at the same time."""
    wanted = [(kernel, cache_dir) for kernel in kernels]
    if not all(key in _loaded for key in wanted):
        with _loading:
            _load_missing([kernel for kernel, _ in wanted if (kernel, cache_dir) not in _loaded], cache_dir)
    return [_loaded[key] for key in wanted]


def build_ahead(kernels: list[GemmKernel], cache_dir: Path) -> None:
    """Compile what ``load`` would find missing, for it to find: loads nothing, and holds up nobody's ``load``."""
    if not all(_intact(_folder(cache_dir), kernel) for kernel in kernels):
        _build_missing(list(dict.fromkeys(kernels)), cache_dir)


def _load_missing(kernels: list[GemmKernel], cache_dir: Path) -> None:
    kernels = list(dict.fromkeys(kernels))
    try:
        folder = _folder(cache_dir)
        if not all(_intact(folder, kernel) for kernel in kernels):
            _build_missing(kernels, cache_dir)
        for kernel in kernels:
            _loaded[kernel, cache_dir] = _open(folder, kernel)
    except UnsafeCache:
        raise
    except ImportError as error:
        raise JitUnavailable(f"cannot load GEMM kernels: {error}; pip install 'sonicmoe[gpu]'") from error
    except OSError as error:
        raise JitUnavailable(
            f"cannot keep GEMM kernels in {cache_dir}: {error.strerror or error}; set SONIC_MOE_CACHE_DIR to a folder "
            "with room that can be written"
        ) from error
