"""What tests of the store of compiled GEMMs share: a generator that is not there, and children that ask the store."""

import _ctypes
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import children
from tests.workers import jit_tools

CHILD = children.WORKERS / "gemm_store_child.py"
VERSIONS = {"quack-kernels": "0.6.5", "nvidia-cutlass-dsl": "4.8.1", "apache-tvm-ffi": "0.1.15"}
_LOADER = """
import json
from pathlib import Path

def load_module(path):
    return {"gemm": json.loads(Path(path).read_text())["answer"]}
"""
_LIBS, _RUNTIME = "nvidia-cutlass-dsl-libs-cu12", "nvidia_cutlass_dsl/cu12/lib/libcute_dsl_runtime.so"


def write_site(folder: Path, versions=VERSIONS) -> Path:
    """A folder for a child's path: the generator's versions, and a loader of the stub's objects."""
    folder.mkdir(parents=True)
    (folder / "tvm_ffi.py").write_text(_LOADER)
    runtime = folder / _RUNTIME
    runtime.parent.mkdir(parents=True)
    shutil.copy(_ctypes.__file__, runtime)  # a library that can be loaded
    for name, version in {_LIBS: "4.8.1", **versions}.items():
        about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        stub = _RUNTIME.replace("/lib/", "/lib/stubs/another-machine/")
        (about / "RECORD").write_text(f"{stub},,\n{_RUNTIME},,\n" if name == _LIBS else "")
    return folder


@dataclass
class Store:
    """A cache, and children that ask it; ``does`` as stub_gemm_compile.py describes it, ``more`` as its asker does."""

    cache: Path
    site: Path
    log: Path
    more: dict = field(default_factory=dict)

    def command(self, *ops: str, **more) -> list[str]:
        return [sys.executable, str(CHILD), json.dumps({"cache": str(self.cache), "ops": ops, **self.more, **more})]

    def environment(self, **does) -> dict[str, str]:
        path = [children.ROOT, self.site]
        return children.clean_env(path, STUB_GEMM_LOG=self.log, STUB_GEMM_DOES=json.dumps(does))

    def ask(self, *ops: str, does=None, **more) -> list[dict]:
        command, env = self.command(*ops, **more), self.environment(**(does or {}))
        return json.loads(children.check(children.run(command, env=env)).stdout.splitlines()[-1])

    def loads(self, *ops: str, **more) -> None:
        """Asked, it gives the functions of these kernels in this order."""
        assert self.ask(*ops, **more) == [{"answer": list(ops), "present": len(ops)}]

    def refuses(self, *ops: str, kind="JitUnavailable", **more) -> str:
        """Asked, it says why not, in one line."""
        return jit_tools.failure(self.ask(*ops, **more), kind)

    def start(self, *ops: str, does=None, **more) -> subprocess.Popen:
        """A child that is not waited for, in a group with the compilers that it starts."""
        command, env = self.command(*ops, **more), self.environment(**(does or {}))
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def at_once(self, requests, start: Path, **more) -> list[list[dict]]:
        """One child for each request, all let go at the same moment."""
        running = [self.start(*ops, start=str(start), **more) for ops in requests]
        time.sleep(0.2)  # most of them wait by now; those that do not come late, which is as good a case
        start.touch()
        try:
            return [json.loads(child.communicate(timeout=100)[0].splitlines()[-1]) for child in running]
        finally:
            for child in running:
                child.kill()
                child.wait()

    def logged(self, word: str) -> list[str]:
        """What follows ``word`` in the compilers' log, sorted."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return sorted(line.removeprefix(word).strip() for line in lines if line.startswith(word))

    def made(self) -> list[str]:
        return self.logged("made")

    def folder(self) -> Path:
        """The one folder of the tools; fails where a build has left anything but libraries and their records."""
        (folder,) = (self.cache / "gemm").iterdir()
        assert all(path.suffix in (".so", ".json") for path in folder.iterdir()), list(folder.iterdir())
        return folder

    def file(self, op: str, suffix: str) -> Path:
        (found,) = [path for path in self.folder().glob("*.json") if json.loads(path.read_text())["kernel"]["op"] == op]
        return found.with_suffix(suffix)
