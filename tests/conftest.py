"""Shared set-up: no flag of the caller's environment reaches a test, and uninitialised memory is never zero."""

import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# `tests.support` is imported by that name, from whatever folder pytest was started in.
sys.path.insert(0, str(ROOT))

from tests.support.paddle_plugin import plugin  # noqa: E402, F401

# Hooks: tests of the torch layer run in a child process that has torch.
from tests.support.torch_child import poisoned_torch, pytest_pyfunc_call, pytest_runtest_logreport  # noqa: E402, F401


@pytest.fixture(autouse=True)
def _clean_flags(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SONIC_MOE_") or name == "USE_QUACK_GEMM":
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """``empty`` gives NaN (or a large integer), so that reading what nobody wrote shows in every result."""
    paddle = sys.modules.get("paddle")
    if paddle is None:
        return

    def poison(tensor):
        dtype = str(tensor.dtype).rsplit(".", 1)[-1]
        if dtype in ("float32", "float64", "float16", "bfloat16"):
            # Paddle's fill_ takes no NaN.
            tensor.set_value(paddle.full(tensor.shape, float("nan"), dtype=dtype))
        elif dtype in ("int32", "int64"):
            tensor.set_value(paddle.full(tensor.shape, 2**30, dtype=dtype))
        return tensor

    ours = [module for name, module in list(sys.modules.items()) if name.startswith("sonicmoe.")]
    modules = [paddle] + [module.torch for module in ours if hasattr(module, "torch")]
    for name in ("empty", "empty_like"):
        original = getattr(paddle, name)
        for module in modules:
            monkeypatch.setattr(
                module, name, lambda *a, _original=original, **k: poison(_original(*a, **k)), raising=False
            )
