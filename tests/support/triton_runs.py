"""Children that run Triton kernels without a GPU: in its interpreter, or through its compiler alone."""

import os
from pathlib import Path

import pytest

from tests.support import children

TRITON_SITE_VARIABLE = "SONICMOE_TEST_TRITON_SITE"


def triton_site() -> Path:
    """The folder that holds Triton, and a NumPy for its interpreter; skips the test where there is none."""
    found = os.environ.get(TRITON_SITE_VARIABLE)
    if not found:
        pytest.skip(f"{TRITON_SITE_VARIABLE} is not set: no Triton to run beside the naive definitions")
    site = Path(found).resolve()
    # Named but absent is a broken set-up and no reason to skip.
    assert (site / "triton" / "__init__.py").is_file(), f"{TRITON_SITE_VARIABLE}={found} holds no triton"
    return site


def interpreted(script, *args, timeout=300):
    """The script's answer, with every kernel in Triton's interpreter, on real torch."""
    path = [children.ROOT, triton_site(), children.torch_site()]
    return children.answer(script, *args, env=children.clean_env(path, TRITON_INTERPRET="1"), timeout=timeout)


def compiled(script, *args, folder: Path, torch=True, timeout=300):
    """The script's answer, with Triton's compiler at hand and no GPU; ``folder`` is for what it compiles."""
    path = [children.ROOT, triton_site(), *([children.torch_site()] if torch else [])]
    env = children.clean_env(path, TRITON_CACHE_DIR=folder / "triton", HOME=folder)
    return children.answer(script, *args, env=env, timeout=timeout)
