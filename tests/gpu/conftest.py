"""What only a GPU can show. Where there is none, nothing in this folder is collected, and one line says so."""

from importlib import metadata

import numpy as np
import pytest


def why_not() -> str | None:
    # By its distribution, not by an import: inside other tests' processes Paddle's proxy answers to torch's name.
    try:
        metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "no torch is installed"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device"


REASON = why_not()
collect_ignore_glob = ["test_*.py"] if REASON else []


def pytest_terminal_summary(terminalreporter):
    if REASON:
        terminalreporter.write_line(f"tests/gpu: left out, {REASON}")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Built into once for all files: nvcc takes its time."""
    return tmp_path_factory.mktemp("cache") / "sonicmoe"


@pytest.fixture
def rng(request):
    """Every test draws its own numbers, the same ones each time."""
    return np.random.default_rng(list(request.node.name.encode()))
