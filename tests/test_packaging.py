"""What is handed out: an sdist that the tests run from, and a wheel that compiles its kernels wherever it lies."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from tests.support import children
from tests.workers import jit_tools

# Of a checkout alone: nothing that is handed out refers to them.
_LEFT_OUT = ("HANDOFF.md", ".gitignore", ".ci/", ".githooks/")


def tracked() -> list[str]:
    if not (children.ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("only a checkout knows which of its files are the project's")
    shown = subprocess.run(["git", "ls-files", "-z"], cwd=children.ROOT, capture_output=True, text=True, check=True)
    return [name for name in shown.stdout.split("\0") if name and (children.ROOT / name).exists()]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy to build in, which leaves its own files behind."""
    folder = tmp_path_factory.mktemp("tree") / "sonicmoe"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(children.ROOT / name, folder / name)
    return folder


def setup(tree: Path, *command) -> None:
    children.check(
        children.run([sys.executable, "setup.py", "--quiet", *command], cwd=tree, env=children.clean_env(()))
    )


def test_sdist_holds_all_that_the_tests_and_the_readme_refer_to(tree, tmp_path):
    setup(tree, "sdist", "--dist-dir", tmp_path)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {name for name in tracked() if not name.startswith(_LEFT_OUT)}
    assert wanted <= held, sorted(wanted - held)


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    pytest.importorskip("setuptools.command.bdist_wheel")
    folder = tmp_path_factory.mktemp("wheel")
    setup(tree, "bdist_wheel", "--dist-dir", folder)
    (made,) = folder.iterdir()
    return made


def test_wheel_asks_for_a_filelock_that_takes_what_we_give_it(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        needs = message_from_bytes(opened.read(name)).get_all("Requires-Dist")
    assert "filelock>=3.10" in needs, needs


@pytest.mark.slow
def test_wheel_builds_its_extension_outside_the_repository(wheel, tmp_path):
    jit_tools.real_compiler()
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "site")
    script = """
        import json, sys
        import sonicmoe
        from sonicmoe import jit

        name = "deepep_topk_metadata"
        module = jit.load(jit.Extension(name, (f"{name}.cpp",), (f"{name}.h",)), sys.argv[1])
        csrc = jit.source_folder()
        print(json.dumps([sonicmoe.__file__, str(csrc), sorted(path.name for path in csrc.rglob("*") if path.is_file()),
                          module.sizes([1, 2], 4)]))
    """
    env, cache = children.clean_env([tmp_path / "site"]), tmp_path / "cache"
    package, csrc, files, sizes = children.answer(script, cache, env=env, cwd=tmp_path)
    assert package == os.path.realpath(tmp_path / "site" / "sonicmoe" / "__init__.py")
    assert csrc == str(Path(package).with_name("csrc")) and sizes == [3, 8]
    assert files == sorted(Path(name).name for name in tracked() if name.startswith("csrc/"))
