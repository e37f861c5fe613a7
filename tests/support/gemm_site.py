"""The generator of the GEMMs for child processes: it compiles for a GPU that is not there."""

import os
from pathlib import Path

import pytest

from tests.support import children, triton_runs

GEMM_SITE_VARIABLE = "SONICMOE_TEST_GEMM_SITE"


def gemm_site() -> Path:
    """The folder that holds the generator and what it works with; skips the test where there is none."""
    found = os.environ.get(GEMM_SITE_VARIABLE)
    if not found:
        pytest.skip(f"{GEMM_SITE_VARIABLE} is not set: no generator to compile GEMMs with")
    site = Path(found).resolve()
    # Named but absent is a broken set-up and no reason to skip.
    assert (site / "quack" / "__init__.py").is_file(), f"{GEMM_SITE_VARIABLE}={found} holds no generator"
    return site


def environment(folder: Path) -> dict[str, str]:
    """A child's, with the generator, a real torch and Triton, and no GPU; ``folder`` stands for its home."""
    site = gemm_site()
    # cutlass lies deeper, where a .pth file points to in an ordinary installation.
    path = [children.ROOT, site, site / "nvidia_cutlass_dsl" / "dsl_packages"]
    path += [children.torch_site(), triton_runs.triton_site()]
    return children.clean_env(path, CUDA_VISIBLE_DEVICES="", HOME=folder)


def cuobjdump() -> Path:
    """NVIDIA's reader of machine code for GPUs, which Triton brings along."""
    return triton_runs.triton_site() / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
