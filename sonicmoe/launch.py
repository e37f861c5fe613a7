"""Where framework objects become what a kernel launch takes: addresses, raw streams, architectures."""

from functools import cache
from operator import attrgetter

import torch

from . import checks

# By their own names: `from . import` asks for a part that is not loaded yet by the name that the package had first.
from .cuda_driver import capability, current_device, is_device_memory
from .cuda_driver import make_current as make_device_current
from .cuda_driver import multiprocessors as multiprocessors_of
from .plugin_tensor import exported, set_ffi_stream


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


# Under Paddle's proxy tensors have a place. Their ``device`` is not asked for: it raises where a plugin drives the GPU.
UNDER_PADDLE = torch.Tensor.__module__.partition(".")[0] != "torch"

# What ``device=`` of a new tensor takes to put it where another one is.
beside = attrgetter("place" if UNDER_PADDLE else "device")

# torch has none of these.
_stream_at = attrgetter("device.current_stream")(torch) if UNDER_PADDLE else None
_gpu_place = cache(attrgetter("CUDAPlace")(torch)) if UNDER_PADDLE else None
_plugin_place = cache(attrgetter("CustomPlace")(torch)) if UNDER_PADDLE else None
_raw_stream_of = None if UNDER_PADDLE else getattr(getattr(torch, "_C", None), "_cuda_getCurrentRawStream", None)


def device_index(tensor) -> int | None:
    """The number of the tensor's GPU."""
    if not UNDER_PADDLE:
        return tensor.device.index
    place = tensor.place
    return place.custom_device_id() if place.is_custom_place() else place.gpu_device_id()


def current_stream(tensor) -> int:
    """The raw handle of the stream that the framework would launch on, on the tensor's device. 0 is the default one."""
    if _raw_stream_of is not None:
        return _raw_stream_of(tensor.device.index)
    if UNDER_PADDLE:
        return stream_of_place(*_kind_and_number(tensor.place))
    return raw_stream(torch.cuda.current_stream(tensor.device)) or 0


def _kind_and_number(place) -> tuple[str, int]:
    """``gpu`` or what a plugin calls its devices, and the number of one of them. Not from the place's name: that costs
    three times as much."""
    if place.is_custom_place():
        return place.custom_device_type(), place.custom_device_id()
    return "gpu", place.gpu_device_id()


def stream_of_place(kind: str, number: int) -> int:
    """The current stream of a device of Paddle's, by what ``_kind_and_number`` tells."""
    place = _gpu_place(number) if kind == "gpu" else _plugin_place(kind, number)
    return raw_stream(_stream_at(place)) or 0


_cuda_places: dict[tuple[str, int], bool] = {}


def is_cuda(tensor) -> bool:
    """Whether the tensor is on an NVIDIA GPU, be it through a device plugin: then by what the driver says of an address
    there. A tensor without elements has none, so another one is asked for."""
    if not UNDER_PADDLE:
        return tensor.is_cuda
    place = tensor.place
    if not place.is_custom_place():
        return place.is_gpu_place()
    which = _kind_and_number(place)
    if which not in _cuda_places:
        probe = tensor if address(tensor) else torch.empty([1], dtype=torch.uint8, device=place)
        _cuda_places[which] = is_device_memory(address(probe))
    return _cuda_places[which]


def make_current(tensor) -> None:
    """Give this thread the context of the tensor's GPU, where the framework leaves that to its own kernels."""
    if UNDER_PADDLE and not checks.is_cpu(tensor) and is_cuda(tensor):
        index = device_index(tensor)
        if current_device() != index:
            make_device_current(index)


@cache
def _arch(index: int | None) -> str:
    major, minor = capability(index) if UNDER_PADDLE else torch.cuda.get_device_capability(index)
    # The ``a`` targets hold the instructions that exist on one architecture only (wgmma, setmaxnreg).
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def arch(tensor) -> str:
    """The tensor's device as nvcc names it, ``sm_90a``."""
    return _arch(device_index(tensor))


@cache
def _multiprocessors(index: int | None) -> int:
    if UNDER_PADDLE:
        return multiprocessors_of(index)
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor, most: int | None = None) -> int:
    """How many the tensor's device has, or ``most``: a persistent kernel starts so many blocks."""
    there = _multiprocessors(device_index(tensor))
    return there if most is None else min(there, most)


def call_ffi(function, like, *arguments) -> None:
    """Call a TVM-FFI function with tensors where ``like`` is, on the current stream there. TVM-FFI finds all that out
    itself, but for the places of device plugins, whose tensors Paddle does not export."""
    if UNDER_PADDLE and like.place.is_custom_place():
        index, stream = device_index(like), current_stream(like)
        set_ffi_stream(index, stream)
        arguments = exported(arguments, index)
    function(*arguments)


def cut(whole, sizes: list[int]) -> list:
    """A flat tensor as consecutive pieces of its memory. One call where the framework's split copies nothing, slices
    where it does. The pieces know nothing of each other: autograd must have nothing to do with ``whole``."""
    split = getattr(torch, "unsafe_split_with_sizes", None)
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
