"""Switching one setting on or off for a stretch of code."""

from contextlib import contextmanager

from ..config import SonicMoEConfig


@contextmanager
def enable_fp8(enabled: bool = True):
    """Run the block with FP8 on or off and every other setting as it is. Safe across threads, and nestable."""
    with SonicMoEConfig.current().replace(use_fp8=bool(enabled)).activate():
        yield


@contextmanager
def enable_quack_gemm(enable: bool = True):
    """Run the block with QuACK's grouped GEMMs on or off, as ``USE_QUACK_GEMM`` does for a process."""
    with SonicMoEConfig.current().replace(use_quack_gemm=bool(enable)).activate():
        yield
