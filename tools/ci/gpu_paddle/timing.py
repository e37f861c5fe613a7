"""Wall time and GPU time of a step by the driver's own events, the same way in both frameworks.

GPU time is taken with the queue full: behind fills of a large buffer, which keep the GPU busy for longer than the host
needs to queue the steps, nothing waits for the host any more.
"""

import ctypes
import statistics
import time

_driver = ctypes.CDLL("libcuda.so.1")
_HOLD_BYTES = 2 << 30
_HOLDS = 120  # about 60 ms at the speed of an H200's memory


def _call(name, *arguments):
    result = getattr(_driver, name)(*arguments)
    if result:
        raise RuntimeError(f"{name}: CUDA error {result}")


class _Clock:
    def __init__(self, stream: int):
        self.stream, self.events = ctypes.c_void_p(stream), []

    def mark(self):
        event = ctypes.c_void_p()
        _call("cuEventCreate", ctypes.byref(event), 0)
        _call("cuEventRecord", event, self.stream)
        self.events.append(event)

    def between_ms(self, first: int, second: int) -> float:
        found = ctypes.c_float()
        _call("cuEventElapsedTime", ctypes.byref(found), self.events[first], self.events[second])
        return found.value


def wait(stream: int) -> None:
    _call("cuStreamSynchronize", ctypes.c_void_p(stream))


def measure(step, stream: int, steps: int = 30, queued: int = 4) -> dict[str, float]:
    """Medians in ms: ``wall`` with a full queue of ``steps``, ``host`` until a step's call returns, ``gpu`` busy."""
    for _ in range(5):
        step()
    wait(stream)
    walls, hosts = [], []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        queued_at = time.perf_counter()
        wait(stream)
        walls.append((time.perf_counter() - begin) / steps * 1e3)
        hosts.append((queued_at - begin) / steps * 1e3)
    buffer, busy, ahead = ctypes.c_uint64(), [], True
    _call("cuMemAlloc_v2", ctypes.byref(buffer), ctypes.c_size_t(_HOLD_BYTES))
    for _ in range(5):
        clock = _Clock(stream)
        clock.mark()
        for _ in range(_HOLDS):
            _call("cuMemsetD8Async", buffer, ctypes.c_ubyte(0), ctypes.c_size_t(_HOLD_BYTES), clock.stream)
        clock.mark()
        begin = time.perf_counter()
        for _ in range(queued):
            step()
        host_ms = (time.perf_counter() - begin) * 1e3
        clock.mark()
        wait(stream)
        ahead = ahead and host_ms < clock.between_ms(0, 1)
        busy.append(clock.between_ms(1, 2) / queued)
    _call("cuMemFree_v2", buffer)
    found = {"wall": statistics.median(walls), "host": statistics.median(hosts), "gpu": statistics.median(busy)}
    return found | {"queue_was_full": ahead}
