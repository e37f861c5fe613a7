"""What the README shows runs as it stands there."""

import pathlib
import re
import subprocess
import sys

import pytest

from tests.support import children

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_training_loop_runs(tmp_path):
    loop = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL).group(1)
    script = tmp_path / "loop.py"
    script.write_text(loop, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    promised = re.search(r"print\(node\.last_path\)  # (\S+)", loop).group(1)
    assert done.stdout.split() == [promised]


@pytest.mark.torch
def test_the_layer_for_torch_runs(tmp_path):
    _, layer = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    script = tmp_path / "layer.py"
    script.write_text(layer, encoding="utf-8")
    done = children.python(script, env=children.clean_env([ROOT, children.torch_site()]))
    assert done.stdout.strip() == re.search(r"print\(.*\)  # (.*)", layer).group(1)


def test_every_path_and_target_exists():
    for target in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, flags=re.MULTILINE):
        name = target[0] or target[1]
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), name
    for path in re.findall(r"`((?:docs|examples|tools|sonicmoe)/[\w/.-]+)`", README):
        assert (ROOT / path).exists(), path
