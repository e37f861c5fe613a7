"""Where framework objects become what a kernel launch takes: addresses, raw streams, architectures."""

from functools import cache

import torch


def raw_stream(stream) -> int | None:
    """The raw handle of what callers pass as ``stream_id``: a handle, a Stream object of either framework, or None.

    None and 0 mean the framework's current stream. An object without a handle is an error: taking its ``id`` for a
    stream has put kernels on the wrong queue before.
    """
    if stream is None:
        return None
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream or None
    base = getattr(stream, "stream_base", stream)
    for name in ("raw_stream", "cuda_stream"):
        handle = getattr(base, name, None)
        if isinstance(handle, int):
            return handle or None
    raise TypeError(f"stream_id: got {type(stream).__name__}, need an integer handle, a Stream object or None")


_raw_stream_of = getattr(getattr(torch, "_C", None), "_cuda_getCurrentRawStream", None)


def current_stream(tensor) -> int:
    """The raw handle of the stream that the framework would launch on, on the tensor's device. 0 is the default one."""
    if _raw_stream_of is not None:
        return _raw_stream_of(tensor.device.index)
    return raw_stream(torch.cuda.current_stream(tensor.device)) or 0


@cache
def _arch(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    # The ``a`` targets hold the instructions that exist on one architecture only (wgmma, setmaxnreg).
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def arch(tensor) -> str:
    """The tensor's device as nvcc names it, ``sm_90a``."""
    return _arch(tensor.device.index)


@cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor, most: int | None = None) -> int:
    """How many the tensor's device has, or ``most``: a persistent kernel starts so many blocks."""
    there = _multiprocessors(tensor.device.index)
    return there if most is None else min(there, most)


def cut(whole, sizes: list[int]) -> list:
    """A flat tensor as consecutive views. One call where the framework's split makes views, slices where it copies."""
    split = getattr(torch, "split_with_sizes", None)
    if split is not None:
        return split(whole, sizes)
    views, start = [], 0
    for size in sizes:
        # Not as_strided: Paddle counts its offset in bytes.
        views.append(whole[start : start + size])
        start += size
    return views


def address(tensor) -> int:
    """Where a tensor's data begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr() or 0
