"""What the tests of the JIT share: extensions that compile in a blink, and compilers that count, wait or fail."""

import json
import os
import shlex
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sonicmoe import jit
from tests.support import children

CHILD = children.WORKERS / "jit_child.py"

# No pybind11: this compiles in under half a second, where the real extension takes eight.
_TINY = """
#include <Python.h>
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, methods};
#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)
PyMODINIT_FUNC INIT(SONICMOE_MODULE_NAME)() { return PyModule_Create(&definition); }
"""


def write_tiny(csrc: Path, name: str = "one", answer: int = 1, extra: str = "") -> jit.Extension:
    """A source whose module answers ``answer()``."""
    csrc.mkdir(exist_ok=True)
    (csrc / f"{name}.cpp").write_text(f"#define ANSWER {answer}\n{extra}\n{_TINY}")
    return jit.Extension(name, (f"{name}.cpp",))


def real_compiler() -> str:
    found = jit.find_compiler(False)
    if found is None:
        pytest.skip("no C++ compiler on PATH: nothing to build with")
    return found.path


@dataclass
class Tools:
    """A folder of compilers to put first on PATH, and the log that they write a line to for each compilation."""

    folder: Path

    @property
    def path(self) -> str:
        return os.pathsep.join([str(self.folder), os.environ["PATH"]])

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def compilations(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def install(self, body: str, version: str | None = None) -> "Tools":
        """``body`` runs for every call but ``--version``, with the file to write in $out."""
        real = shlex.quote(real_compiler())
        shown = f"exec {real} --version" if version is None else f"echo {shlex.quote(version)}; exit 0"
        script = f"""#!/bin/sh
[ "$1" = --version ] && {{ {shown}; }}
echo $$ >> {shlex.quote(str(self.log))}
previous=
for argument in "$@"; do [ "$previous" = -o ] && out=$argument; previous=$argument; done
{body.replace("REAL", real)}
"""
        self.folder.mkdir(exist_ok=True)
        for name in ("c++", "g++", "clang++"):
            (self.folder / name).write_text(script)
            (self.folder / name).chmod(0o755)
        return self


def counting(folder: Path) -> Tools:
    return Tools(folder).install('exec REAL "$@"')


def slow_copy(folder: Path, artifact: Path, seconds: float) -> Tools:
    """Stands for a slow compiler: it leaves half an artifact lying about for a while, then a whole one."""
    half, source = artifact.stat().st_size // 2, shlex.quote(str(artifact))
    body = f'sleep {seconds / 2}; head -c {half} {source} > "$out"; sleep {seconds / 2}; exec cat {source} > "$out"'
    return Tools(folder).install(body, version="slow copy")


def command(cache: Path, *names: str, csrc: Path | None = None, **more) -> list[str]:
    """The command line of a child; ``more`` as jit_child.py describes it."""
    request = {"cache": str(cache), "names": names, "csrc": str(csrc) if csrc else None, **more}
    return [sys.executable, str(CHILD), json.dumps(request)]


def environment(path: str | None = None) -> dict[str, str]:
    return children.clean_env(**({} if path is None else {"PATH": path}))


def ask(cache: Path, *names: str, path: str | None = None, csrc: Path | None = None, **more) -> list[dict]:
    """What a child process of its own gets for each extension that it is asked for."""
    done = children.check(children.run(command(cache, *names, csrc=csrc, **more), env=environment(path)))
    return json.loads(done.stdout.splitlines()[-1])


def answers(found: list[dict]) -> list:
    failed = [one for one in found if "error" in one]
    assert not failed, failed
    return [one["answer"] for one in found]


def failure(found: list[dict], kind: str) -> str:
    """The message of the one failure; a message is one line."""
    (one,) = found
    assert one.get("error") == kind, one
    assert "\n" not in one["message"], one["message"]
    return one["message"]


def built(cache: Path, name: str) -> Path:
    """The one folder that holds ``name``; fails if a dead builder's folder lies beside it."""
    folders = sorted((cache / "ext").iterdir())
    mine = [folder for folder in folders if folder.name.startswith(f"{name}_host-")]
    assert len(mine) == 1 and not [folder for folder in folders if folder.name.startswith(".")], folders
    assert sorted(file.name for file in mine[0].iterdir()) == ["manifest.json", f"{name}_host.so"]
    return mine[0]


def no_compiler(folder: Path) -> str:
    """A PATH without any program."""
    folder.mkdir(exist_ok=True)
    return str(folder)


def is_root() -> bool:
    return os.geteuid() == 0


# Owns nothing anywhere. Root may write wherever it likes, so a read-only cache is one for this user.
NOBODY = 54321


def seen_by_nobody(folder: Path) -> Path:
    """``folder``, if another user can get there at all; skips the test otherwise."""
    for place in (folder, *folder.parents):
        if not place.stat().st_mode & stat.S_IXOTH:
            pytest.skip(f"{place} is closed to other users, and the child of this test runs as one")
    return folder
