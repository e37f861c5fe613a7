"""Builds the C++ and CUDA sources in csrc into importable extensions, once for a whole cluster.

    <cache>/ext/<name>-<key>/<name>.so        the artifact; <key> hashes sources, flags, compiler, CUDA, Python, arch
    <cache>/ext/<name>-<key>/manifest.json    its SHA-256, and what it was built with
    <cache>/locks/<name>-<key>.lock           held by the one process that builds; beside the build, so no wipe moves it

A build happens in a folder of its own and is renamed into place whole. A process that dies in the middle leaves a
folder that the next builder removes, and a lock that its kernel has released. Nothing relies on times of files.
An artifact is code that we will run: it is imported only if nobody else could have written it and its hash is right.
"""

import contextlib
import errno
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import cache_safety
from .cache_safety import JitUnavailable, UnsafeCache

LOCK_TIMEOUT_S = 600.0
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Extension:
    """One module: its sources in csrc, compiled by the host compiler, or by nvcc for one arch (``sm_90a``)."""

    name: str
    sources: tuple[str, ...]
    headers: tuple[str, ...] = ()
    arch: str | None = None

    @property
    def module(self) -> str:
        return f"{self.name}_{self.arch or 'host'}"


def source_folder() -> Path:
    """csrc: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise JitUnavailable(f"no csrc folder in {here} or beside it; install sonicmoe with its sources")


def _run(command: list[str], timeout: float | None = None) -> subprocess.CompletedProcess:
    # In English on every machine: the compiler's version is in the key, and its errors are searched for words. Through
    # env, because nothing but config.py looks at the environment.
    english = ["env", "LC_ALL=C", *command]
    return subprocess.run(
        english, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=timeout
    )


@dataclass(frozen=True)
class Compiler:
    path: str
    version: str


@cache
def find_compiler(cuda: bool) -> Compiler | None:
    """The host's C++ compiler, or nvcc; None if there is none."""
    names = ("nvcc", "/usr/local/cuda/bin/nvcc") if cuda else ("c++", "g++", "clang++")
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            shown = _run([path, "--version"], timeout=60)
        except (OSError, subprocess.TimeoutExpired):  # not a program of this machine, or one that hangs
            continue
        if shown.returncode == 0:
            return Compiler(path, " ".join(shown.stdout.split()))
    return None


def _includes() -> list[str]:
    import pybind11  # build-time only: importing an artifact does not need it

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def _flags(ext: Extension) -> list[str]:
    flags = ["-O3", "-std=c++17", "-shared", f"-DSONICMOE_MODULE_NAME={ext.module}"]
    if ext.arch is None:
        return [*flags, "-fPIC", "-fvisibility=hidden"]
    number = ext.arch.removeprefix("sm_")
    target = f"-gencode=arch=compute_{number},code=sm_{number}"
    # Static cudart: the binary then fits any framework's CUDA, and shares its primary context through the driver. The
    # sources side by side: half the time, and the first call of all waits for it.
    inside = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-DSONICMOE_WITH_CUDA"]
    return [*flags, target, "-cudart=static", "--threads=0", *inside]


def _base_key(ext: Extension) -> str:
    """What the artifact is, apart from the tools that make it."""
    digest = hashlib.sha256()
    for name in (*ext.headers, *ext.sources):
        digest.update(f"{name}\0".encode() + (source_folder() / name).read_bytes() + b"\0")
    python = f"{sys.implementation.cache_tag} {importlib.machinery.EXTENSION_SUFFIXES[0]}"
    digest.update(f"{python} {' '.join(_flags(ext))}".encode())
    return digest.hexdigest()[:16]


def _tool_key(compiler: Compiler) -> str:
    return hashlib.sha256(compiler.version.encode()).hexdigest()[:8]


def _candidates(ext: Extension, cache_dir: Path) -> list[Path]:
    """Folders that may hold the artifact: this compiler's, or anyone's where there is no compiler."""
    stem = f"{ext.module}-{_base_key(ext)}"
    compiler = find_compiler(ext.arch is not None)
    if compiler is not None:
        return [cache_dir / "ext" / f"{stem}-{_tool_key(compiler)}"]
    return sorted((cache_dir / "ext").glob(f"{stem}-*"))


def _intact(folder: Path, ext: Extension) -> Path | None:
    """The artifact in ``folder`` if it is whole; None if it is missing, truncated or changed."""
    artifact, manifest = folder / f"{ext.module}.so", folder / _MANIFEST
    try:
        wanted = json.loads(manifest.read_text())["sha256"]
        found = hashlib.sha256(artifact.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return artifact if found == wanted else None


def _import(artifact: Path, ext: Extension):
    for path in (artifact, artifact.parent / _MANIFEST, artifact.parent):
        cache_safety.require_private(path)
    spec = importlib.util.spec_from_file_location(ext.module, artifact)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise JitUnavailable(cache_safety.unloadable(artifact, error, artifact.parent)) from error
    return module


def _compile(ext: Extension, compiler: Compiler, folder: Path) -> None:
    """Artifact and manifest into ``folder``."""
    artifact = folder / f"{ext.module}.so"
    sources = [str(source_folder() / name) for name in ext.sources]
    command = [compiler.path, *_flags(ext), *_includes(), *sources, "-o", str(artifact)]
    done = _run(command)
    if done.returncode:
        # A full disk first: the linker says that in a line without "error", and follows it by one that says nothing.
        lines = done.stderr.splitlines()
        wanted = (os.strerror(errno.ENOSPC).lower(), "error", "")
        found = [line.strip() for word in wanted for line in lines if word in line.lower()]
        first = found[0] if found else f"exit status {done.returncode}"
        raise JitUnavailable(f"{Path(compiler.path).name} could not compile {ext.module}: {first}")
    # Whatever the umask is: a file that others may write is refused when it is loaded.
    artifact.chmod(0o755)
    record = {
        "sha256": hashlib.sha256(artifact.read_bytes()).hexdigest(),
        "compiler": compiler.version,
        "python": sys.version,
        "arch": ext.arch,
    }
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps(record, indent=1))
    manifest.chmod(0o644)


def _build(ext: Extension, cache_dir: Path, timeout: float) -> Path:
    """Build under the lock, unless somebody did so while we waited for it."""
    compiler = find_compiler(ext.arch is not None)
    if compiler is None:
        wanted = "nvcc" if ext.arch else "a C++ compiler (g++ or clang++)"
        raise JitUnavailable(f"{wanted} is not on PATH and {cache_dir} holds no build of {ext.module}; install it")
    final = _candidates(ext, cache_dir)[0]
    with build_lock(cache_dir / "locks" / f"{final.name}.lock", timeout):
        if final.exists():
            cache_safety.require_private(final)
            artifact = _intact(final, ext)
            if artifact is not None:
                return artifact
        # We hold the lock, so a folder like this belongs to a builder that died.
        for orphan in final.parent.glob(f".{final.name}-*"):
            shutil.rmtree(orphan, ignore_errors=True)
        scratch, aside = (final.parent / f".{final.name}-{uuid.uuid4().hex}" for _ in range(2))
        scratch.mkdir(mode=0o700)
        try:
            _compile(ext, compiler, scratch)
            if _candidates(ext, cache_dir)[0] != final:
                raise JitUnavailable(f"the sources of {ext.module} changed while they were compiled; start again")
            if final.exists():  # truncated or changed: out of the way in one step
                final.rename(aside)
            scratch.rename(final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
        return final / f"{ext.module}.so"


@contextlib.contextmanager
def build_lock(path: Path, timeout: float):
    """A lock between processes, which says who holds it when waiting for it takes too long."""
    from filelock import FileLock, Timeout

    holder = path.with_suffix(".holder")
    lock = FileLock(path, timeout=timeout, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        try:
            who = holder.read_text(encoding="utf-8", errors="replace")
        except OSError:
            who = "an unknown process"
        raise JitUnavailable(f"waited {timeout:g} s for {path}, held by {who}; end it if it hangs") from None
    try:
        # One line, whatever a script is called: a note must not stop a build.
        command = " ".join(" ".join(sys.argv[:2]).split())
        note = f"process {os.getpid()} on host {socket.gethostname()} ({command})"
        holder.write_text(note, encoding="utf-8", errors="backslashreplace")
        yield
    finally:
        lock.release()


# Failures stay as well: a layer asks before every expert call, and a build that failed once must not run each time.
_loaded: dict[tuple[Extension, Path], object] = {}
_loading = threading.Lock()
# A process that was forked while a thread loads has the lock without the thread that would let it go.
os.register_at_fork(after_in_child=_loading._at_fork_reinit)


def load(ext: Extension, cache_dir, timeout: float = LOCK_TIMEOUT_S):
    """The extension as a module: from this process, from the cache, or built.

    ``JitUnavailable`` says in one line why it cannot be had; ``UnsafeCache`` that the cache is not ours alone.
    """
    cache_dir = Path(cache_dir)
    key = (ext, cache_dir)
    with _loading:
        if key not in _loaded:
            try:
                _loaded[key] = _load(ext, cache_dir, timeout)
            except JitUnavailable as reason:
                _loaded[key] = reason
        found = _loaded[key]
    if isinstance(found, JitUnavailable):
        raise JitUnavailable(str(found))
    return found


def build_ahead(ext: Extension, cache_dir, timeout: float = LOCK_TIMEOUT_S) -> None:
    """Compile what ``load`` would find missing, for it to find: loads nothing, and holds up nobody's ``load``."""
    cache_dir = Path(cache_dir)
    if all(_intact(folder, ext) is None for folder in _candidates(ext, cache_dir)):
        cache_safety.make_private(cache_dir, "ext", "locks")
        _build(ext, cache_dir, timeout)


def _load(ext: Extension, cache_dir: Path, timeout: float):
    unloadable = None
    try:
        for folder in _candidates(ext, cache_dir):
            artifact = _intact(folder, ext)
            if artifact is not None:
                try:
                    return _import(artifact, ext)
                except JitUnavailable as reason:  # without a compiler, that of another machine may still load
                    unloadable = reason
        if unloadable is not None:
            raise unloadable
        cache_safety.make_private(cache_dir, "ext", "locks")
        return _import(_build(ext, cache_dir, timeout), ext)
    except (JitUnavailable, UnsafeCache):
        raise
    except ImportError as error:
        raise JitUnavailable(f"cannot build {ext.module}: {error}; pip install pybind11 filelock") from error
    except OSError as error:  # full disk, read-only file system, no permission
        reason = error.strerror or str(error)
        raise JitUnavailable(
            f"cannot build {ext.module} in {cache_dir}: {reason}; set SONIC_MOE_CACHE_DIR to a folder with room that "
            "can be written"
        ) from error
