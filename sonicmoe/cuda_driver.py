"""The few questions that go to the CUDA driver itself, because not every framework that we run under can answer them:
Paddle knows nothing of the GPU behind a device plugin. Nothing here creates a context.
"""

import ctypes
from functools import cache

_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_MULTIPROCESSORS = 16
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_MEMORY_TYPE, _DEVICE_MEMORY = 2, 2  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_MEMORYTYPE_DEVICE


@cache
def _driver():
    """The library; None where there is no NVIDIA driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def _require(result: int, what: str) -> None:
    if result:
        raise RuntimeError(f"{what}: CUDA error {result}")


def is_device_memory(address: int) -> bool:
    """Whether CUDA has given out this address, on a device of its own."""
    found = ctypes.c_uint(0)
    driver = _driver()
    if driver is None:
        return False
    result = driver.cuPointerGetAttribute(ctypes.byref(found), _MEMORY_TYPE, ctypes.c_void_p(address))
    return result == 0 and found.value == _DEVICE_MEMORY


def _attribute(which: int, index: int) -> int:
    found = ctypes.c_int(0)
    _require(_driver().cuDeviceGetAttribute(ctypes.byref(found), which, index), f"attribute {which} of device {index}")
    return found.value


def capability(index: int) -> tuple[int, int]:
    return _attribute(_CAPABILITY[0], index), _attribute(_CAPABILITY[1], index)


def multiprocessors(index: int) -> int:
    return _attribute(_MULTIPROCESSORS, index)


def current_device() -> int | None:
    """The device of this thread's context; None if it has none."""
    found = ctypes.c_int(0)
    return found.value if _driver().cuCtxGetDevice(ctypes.byref(found)) == 0 else None


def make_current(index: int) -> None:
    """Give this thread the device's context: the one that the CUDA runtime uses."""
    context = ctypes.c_void_p(0)
    driver = _driver()
    _require(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), index), f"context of device {index}")
    _require(driver.cuCtxSetCurrent(context), f"context of device {index}")


class Event:
    """A place in one stream that others can wait for."""

    def __init__(self):
        self._handle = ctypes.c_void_p(0)
        _require(_driver().cuEventCreate(ctypes.byref(self._handle), _DISABLE_TIMING), "cuEventCreate")

    def record(self, stream: int) -> None:
        _require(_driver().cuEventRecord(self._handle, ctypes.c_void_p(stream)), "cuEventRecord")

    def wait(self, stream: int) -> None:
        """What is queued on ``stream`` from now on begins after the recorded place."""
        _require(_driver().cuStreamWaitEvent(ctypes.c_void_p(stream), self._handle, 0), "cuStreamWaitEvent")

    def __del__(self):
        if self._handle:
            _driver().cuEventDestroy_v2(self._handle)
