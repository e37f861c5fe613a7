"""Where the torch-facing calls meet torch's own state: its device, the stream they run on, and autocast, which they
run without.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass

import torch

from .. import checks
from ..gemm.plan import Plan, make_plan
from ..launch import arch, current_stream, raw_stream

if torch.Tensor.__module__.partition(".")[0] != "torch":  # Paddle's proxy stands in for it
    raise ImportError(
        "sonicmoe's torch layer needs torch, but in this process `torch` means Paddle; use SonicMoEMlpNode or "
        "run_sonic_moe"
    )


_AS_IT_IS = nullcontext()


def on_stream(stream_id, tensor):
    """Run the block on the tensor's device and on ``stream_id``: a handle, a Stream object, or None for the current
    stream there.

    Another stream than the current one waits for what was queued on that before, and the current one for the block:
    the caller's tensors are safe without events of his own.
    """
    handle = raw_stream(stream_id)
    if not tensor.is_cuda:
        return _AS_IT_IS
    if tensor.device.index != torch.cuda.current_device():
        return _on_device(handle, tensor)
    return _AS_IT_IS if handle is None or handle == current_stream(tensor) else _on_other_stream(handle, tensor)


@contextmanager
def _on_device(handle, tensor):
    with torch.cuda.device(tensor.device), on_stream(handle, tensor):
        yield


@contextmanager
def _on_other_stream(handle, tensor):
    outside = torch.cuda.current_stream(tensor.device)
    inside = torch.cuda.ExternalStream(handle, device=tensor.device)
    inside.wait_stream(outside)
    with torch.cuda.stream(inside):
        yield
    outside.wait_stream(inside)


class InTurns:
    """Memory that calls on several streams write, one call at a time: each one's writing begins after the last one's.
    ``count`` tells how many there were."""

    def __init__(self):
        self.handle = self.stream = self.event = None  # of the last call that was not captured
        self.count = 0
        self._here = None

    def of(self, tensor):
        """Write in the block, on the current stream of the tensor's device."""
        handle = current_stream(tensor)
        # A graph that is being captured can wait for nothing outside it; whoever captures has synchronized before.
        if torch.cuda.is_current_stream_capturing():
            self._here = None
        elif handle == self.handle:
            self._here = handle, self.stream  # to ask torch for the object costs as much as the event
        else:
            self._here = handle, torch.cuda.current_stream(tensor.device)
            if self.event is not None:
                self._here[1].wait_event(self.event)
        self.count += 1
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._here is not None:
            self.handle, self.stream = self._here
            self.event = self.stream.record_event(self.event)


def tensors_in(value) -> list:
    """Those that a tensor, or what the engine makes of several, consists of."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        parts = value
    else:
        parts = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


class Handover:
    """Work whose tensors were made on one stream, and which may be finished on another."""

    def __init__(self, like):
        """On the stream that is current where ``like`` is, behind all that has been queued there so far."""
        self._like, self._handle = like, None
        if like.is_cuda:
            self._handle = current_stream(like)
            self._event = torch.cuda.current_stream(like.device).record_event()

    def take(self, held) -> None:
        """The stream that is current now waits for what made the tensors in ``held``, and their memory for what it will
        read there."""
        if self._handle is None or self._handle == current_stream(self._like):
            return
        here = torch.cuda.current_stream(self._like.device)
        here.wait_event(self._event)
        for tensor in tensors_in(held):
            tensor.record_stream(here)


def plan_for(x, activation, config, x_name: str = "x") -> Plan:
    """A plan for rows like ``x``, a tensor or the facts of one."""
    checks.require_dtype(x_name, x, checks.FLOAT_DTYPES)
    place = x.device.type
    where = {"device": place, "arch": arch(x) if place == "cuda" else None}
    return make_plan(config, activation, storage=checks.dtype_name(x), x_name=x_name, **where)


def without_autocast(tensor):
    """The engine chooses its types itself; autocast would round the float32 steps between them."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


def compute_dtype(x):
    """The type that the experts compute in: x's own, but autocast's where autocast narrows float32."""
    if x.dtype is torch.float32:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return x.dtype


def compute_input(x):
    """x as the experts take it."""
    return in_dtype(x, compute_dtype(x)).contiguous()


def in_dtype(tensor, dtype):
    """``tensor.to(dtype)``, which costs the host as much as a small op even where it has nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
