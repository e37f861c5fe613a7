"""Calls of the compiled GEMMs: the argument order of the generator, in one place.

Plain tuples stand for the generator's own argument records, so that a process that trains imports nothing of it. The
stream is the framework's current one on the tensors' device: TVM-FFI takes it from the tensors, ``call_ffi`` where it
cannot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from ..launch import call_ffi, multiprocessors
from .gemm_kernel import GemmKernel

_NO_EPILOGUE = (None, None)  # split-K's two buffers, which an epilogue function always carries behind its own
_WGRAD_EPILOGUE = (None,) * 12
_SWIZZLE = 8  # how many tiles of rows share their columns before the next columns come


@dataclass(frozen=True, eq=False)
class Loaded:
    kernel: GemmKernel
    run: Callable
    multiprocessors: int | None = None  # at most so many; None is all


@cache
def _schedule(blocks: int, cluster: int):
    return (blocks // cluster, None, _SWIZZLE, None, None, None)


def _launch(gemm: Loaded, a, b, d, c, epilogue, segments):
    schedule = _schedule(multiprocessors(d, gemm.multiprocessors), gemm.kernel.tile.cluster)
    call_ffi(gemm.run, d, a, b, d, c, epilogue, schedule, segments, None, None)


def up(gemm: Loaded, x_TH, w1_EFH, z_MF, a_MI, offsets, gather) -> None:
    _launch(gemm, x_TH, w1_EFH, z_MF, None, (a_MI, *_NO_EPILOGUE), (offsets, None, gather, None))


def up_z(gemm: Loaded, x_TH, w1_EFH, z_MF, offsets, gather) -> None:
    _launch(gemm, x_TH, w1_EFH, z_MF, None, _NO_EPILOGUE, (offsets, None, gather, None))


def rows(gemm: Loaded, a_MK, b_ENK, d_MN, offsets) -> None:
    """``b_ENK`` may be the transposed view of an [E,K,N] weight, if the kernel was compiled for that."""
    _launch(gemm, a_MK, b_ENK, d_MN, None, _NO_EPILOGUE, (offsets, None, None, None))


def down_backward(gemm: Loaded, dout_TH, w2_EHI, z_MF, dz_MF, score_M, pa_MI, parts_MB, offsets, gather) -> None:
    """``dz`` may be ``z`` itself: a tile of z is read by the block that writes this tile of dz."""
    epilogue = (score_M, pa_MI, parts_MB, *_NO_EPILOGUE)
    _launch(gemm, dout_TH, w2_EHI.transpose(1, 2), dz_MF, z_MF, epilogue, (offsets, None, gather, None))


def wgrad(gemm: Loaded, left_TC, right_MN, d_ECN, offsets, gather) -> None:
    """d[e] [C,N] = (+=) left[gather]^T @ right over the rows of segment e."""
    segments = (None, offsets, gather, None)
    _launch(gemm, left_TC.transpose(0, 1), right_MN.transpose(0, 1), d_ECN, None, _WGRAD_EPILOGUE, segments)
