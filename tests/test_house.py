"""The house rules hold in this repository, and each of them notices what it is there for."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("check_house", ROOT / "tools" / "ci" / "check_house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(house, tmp_path):
    """Write the given files below an otherwise clean checkout; return {rule: findings} for the rules that object."""

    def run(files):
        for name, text in {"sonicmoe/__init__.py": "", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return {rule: lines for rule, lines in house.check(tmp_path).items() if lines}

    return run


def test_this_repository_keeps_them(house):
    findings = [line for lines in house.check(ROOT).values() for line in lines]
    assert not findings, "\n".join(findings)


def test_a_clean_tree_passes(check):
    files = {
        "sonicmoe/__init__.py": "from .config import Config\nfrom .moe import MoE\n__version__ = '1'\n",
        "sonicmoe/config.py": "from . import enums\nclass Config: pass\n",
        "sonicmoe/enums.py": "def shift(w_old):\n    w_new = w_old\n    return w_new\n",
        "sonicmoe/gemm/__init__.py": "from .api import run\n",
        "sonicmoe/gemm/api.py": "from ..quant.formats import E4M3\nfrom . import launch\n",
        "sonicmoe/gemm/launch.py": "from .. import config, __version__\n",
        "sonicmoe/quant/formats.py": "from ..config import Config\nE4M3 = Config\n",
        "sonicmoe/expert_mlp.py": "from .gemm import api\nfrom .quant import formats\n",
        "sonicmoe/moe/__init__.py": "import torch\nfrom ..expert_mlp import forward\n",
    }
    assert check(files) == {}


@pytest.mark.parametrize("name", ["csrc/gather.cu", "csrc/gather.h", "tests/test_x.py", "sonicmoe/jit.py", "a.cpp"])
def test_file_length(check, name):
    assert check({name: "\n" * 500}) == {}
    findings = check({name: "\n" * 501})
    assert list(findings) == ["file length"]
    assert findings["file length"][0].startswith(f"{name}:501: 501 lines")


def test_file_length_leaves_environments_and_text_alone(check):
    assert check({".venv/lib/x.py": "\n" * 900, "build/x.py": "\n" * 900, "docs/x.md": "\n" * 900}) == {}


def test_global_statement(check):
    source = "count = 0\ndef f():\n    global count\n    count = 1\n"
    assert check({"sonicmoe/jit.py": source}) == {
        "no global statement": ["sonicmoe/jit.py:3: `global count`: state belongs to a node or a call"]
    }


def test_global_statement_is_for_the_package_only(check):
    assert check({"tests/helper.py": "def f():\n    global count\n    count = 1\n"}) == {}


@pytest.mark.parametrize(
    "files",
    [
        {"sonicmoe/gemm/api_v2.py": ""},
        {"csrc/swiglu_old.cu": ""},
        {"tools/bench_legacy/run.py": ""},
        {"sonicmoe/jit.py": "def compile_new(): pass\n"},
        {"sonicmoe/jit.py": "class Key_V3: pass\n"},
        {"sonicmoe/jit.py": "class Key:\n    def digest_old(self): pass\n"},
        {"sonicmoe/jit.py": "class Key:\n    size_legacy: int = 1\n"},
        {"sonicmoe/jit.py": "a, table_v2 = 1, 2\n"},
        {"tests/helper.py": "oracle_new = None\n"},
    ],
)
def test_leftover_names(check, files):
    assert len(check(files)["no leftover names"]) == 1


@pytest.mark.parametrize("name", ["__new__", "renew", "v2", "threshold", "API_VERSION", "new_node"])
def test_names_that_only_look_like_leftovers(check, name):
    assert check({"sonicmoe/jit.py": f"def {name}(): pass\n"}) == {}


@pytest.mark.parametrize(
    "line",
    [
        "import sonicmoe",
        "import os, sonicmoe.config as c",
        "from sonicmoe import config",
        "from sonicmoe.gemm.api import run",
        "import importlib; importlib.import_module('sonicmoe.config')",
        "def f():\n    import sonicmoe.enums",
    ],
)
def test_absolute_self_import(check, line):
    assert list(check({"sonicmoe/jit.py": line + "\n"})) == ["relative imports"]


def test_absolute_import_is_fine_elsewhere(check):
    files = {"tests/test_x.py": "import sonicmoe\n", "sonicmoe/jit.py": "import sonicmoe_tools\n"}
    assert check(files) == {}


@pytest.mark.parametrize(
    "name, line, words",
    [
        ("sonicmoe/config.py", "from .gemm import api", "config must not know gemm"),
        ("sonicmoe/checks.py", "from . import expert_mlp", "checks must not know expert_mlp"),
        ("sonicmoe/quant/naive.py", "from ..expert_mlp import forward", "quant must not know expert_mlp"),
        ("sonicmoe/gemm/sm90/wgrad.py", "from ...moe import MoE", "gemm must not know moe"),
        ("sonicmoe/gemm/sm90/__init__.py", "from ... import moe", "gemm must not know moe"),
        ("sonicmoe/expert_mlp.py", "from .ernie_compat.node import Node", "expert_mlp must not know ernie_compat"),
        ("sonicmoe/expert_mlp.py", "def f():\n    from .cli import env", "expert_mlp must not know cli"),
        ("sonicmoe/moe/layer.py", "from .. import MoE", "moe must not know __init__"),
        ("sonicmoe/moe/layer.py", "from .... import other", "this import leaves sonicmoe"),
        ("sonicmoe/helpers.py", "", "helpers has no layer yet"),
    ],
)
def test_upward_import(check, name, line, words):
    parts = {f"sonicmoe/{part}.py": "" for part in ("expert_mlp", "moe", "cli", "gemm", "ernie_compat")}
    parts = {path: text for path, text in parts.items() if not name.startswith(path.removesuffix(".py"))}
    findings = check({**parts, name: line + "\n"})
    assert list(findings) == ["one-way imports"]
    assert words in findings["one-way imports"][0]


def test_parts_of_one_layer_may_not_import_each_other(check):
    files = {"sonicmoe/gemm/api.py": "from ..quant import naive\n", "sonicmoe/quant/naive.py": ""}
    assert check(files) == {}
    files["sonicmoe/quant/naive.py"] = "from ..routing import topk\n"
    files["sonicmoe/routing/topk.py"] = "from ..gemm import api\n"
    findings = check(files)["one-way imports"]
    assert len(findings) == 3
    assert any("gemm imports quant, and quant leads back to gemm" in line for line in findings)


@pytest.mark.parametrize(
    ("rule", "source", "words"),
    [
        ("calls that Paddle means otherwise", "import torch\ntorch.zeros([1]).numel()", ":2: .numel(): Paddle gives"),
        ("calls that Paddle means otherwise", "import paddle\ndef f(x):\n    return x.item()", ":3: .item(): it waits"),
        ("calls that Paddle means otherwise", "import torch\na, b = x.split(2, dim=1)", ".split(): Paddle takes"),
        ("calls that Paddle means otherwise", "import torch\na, b = torch.split(x, sizes)", ".split(): Paddle takes"),
        ("calls that Paddle means otherwise", "import torch\nx.as_strided([1], [1], 1)", ".as_strided()"),
        ("calls that Paddle means otherwise", "import torch\nx.element_size()", ".element_size()"),
        ("calls that Paddle means otherwise", "import torch\nx.untyped_storage()", ".untyped_storage(): Paddle lacks"),
        ("devices of tensors", "import torch\ny = torch.empty([1], device=x.device)", ":2: .device: it raises"),
        ("devices of tensors", "def f(x):\n    return x.grad.device", ":2: .device"),
        ("streams", "import torch\ns = torch.cuda.current_stream()", ".current_stream: use launch.current_stream"),
        ("streams", "import paddle\ns = paddle.device.current_stream(name)", ".current_stream"),
        ("streams", "def f(stream):\n    return stream.cuda_stream", ".cuda_stream"),
        ("streams", "def f(given):\n    return given.stream_base.raw_stream", ".raw_stream"),
        ("streams", "def f(stream):\n    return id(stream)", "id() of a stream"),
        ("streams", "def f(call):\n    return int(call.stream_id)", "int() of a stream"),
        ("identity of dtypes", "import torch\nwide = x.dtype is torch.float32", "by identity"),
        ("identity of dtypes", "import torch\nwide = x.dtype is not y.dtype", "by identity"),
        ("identity of dtypes", "def f(x):\n    return x.dtype == 'float32'", "with a string"),
    ],
)
def test_what_only_one_framework_does(check, rule, source, words):
    findings = check({"sonicmoe/jit.py": source + "\n"})
    assert list(findings) == [rule] and any(words in line for line in findings[rule]), findings
    assert check({"sonicmoe/jit.py": "", "sonicmoe/functional/layer.py": source + "\n"}) == {}  # torch's own layer


def test_what_both_frameworks_do(check):
    source = """
import math
import torch
import triton.language as tl
from .launch import beside, current_stream

def f(self, plan, x, pair):
    low, high = tl.split(pair)
    name, number = "a 1".split(), str(x).split(",")
    stream, size, kind = current_stream(x), math.prod(x.shape), self.device or plan.device
    return torch.zeros([2], dtype=torch.float32, device=beside(x)), x.dtype == torch.float32, x.dtype is None
"""
    assert check({"sonicmoe/jit.py": source, "sonicmoe/launch.py": "def f(x):\n    return x.device\n"}) == {}


def test_command_line(house, check, tmp_path, monkeypatch, capsys):
    check({"sonicmoe/jit.py": "import sonicmoe\n"})
    monkeypatch.setattr("sys.argv", ["check_house.py", str(tmp_path)])
    assert house.main() == 1
    assert capsys.readouterr().out == "sonicmoe/jit.py:1: absolute import of sonicmoe: make it relative\n"
