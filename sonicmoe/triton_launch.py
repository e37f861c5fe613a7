"""Repeated launches of a Triton kernel without Triton's own look at every argument, which takes several times as long
as the launch itself.

A kernel that has run once is started directly wherever nothing differs that Triton compiles for: the device, the
constants, each tensor's dtype and whether it begins at a multiple of 16 bytes, and each integer's width. Anything else
that it looks at in an integer must be switched off in the kernel (``do_not_specialize``).
"""

import sys
from functools import cache

from . import cuda_driver
from .checks import is_cpu, place_name
from .launch import UNDER_PADDLE, current_stream, device_index, is_cuda, make_current, stream_of_place

# Whose launcher is known to the letter: which arguments it hands on, and which two memories it makes room for before.
_KNOWN_LAUNCHERS = ("3.6.",)


class _Started:
    """A compiled kernel and how to start it here: ``start(blocks, 1, 1, stream, *fixed, *arguments)``."""

    def __init__(self, compiled):
        self.compiled, self.start, self.fixed = compiled, None, ()

    def look_up(self) -> None:
        """Not before the first start: a kernel has no launcher until it is loaded. ``start`` comes last, because
        another thread takes it for the sign that all is there."""
        compiled = self.compiled
        run, rest = compiled.run, (compiled.packed_metadata, None, None, None)
        if type(run).__name__ == "CudaLauncher" and sys.modules["triton"].__version__.startswith(_KNOWN_LAUNCHERS):
            if run.global_scratch_size == run.profile_scratch_size == 0:
                self.fixed = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest)
                self.start = run.launch
                return
        self.fixed, self.start = (compiled.function, *rest), run


_compiled: dict[tuple, _Started] = {}
_OFF = "begins at no multiple of 16 bytes"  # behind the dtype of such a tensor in a key of these


def next_power_of_2(n: int) -> int:
    """As ``triton.next_power_of_2`` for n > 0, which unwraps its argument first and costs a third of a launch."""
    return 1 << (n - 1).bit_length()


@cache
def _answer_for_paddle(kind: str) -> None:
    """Triton asks torch for the device, its capability and the stream, and under Paddle's proxy takes Paddle's answers.
    Of a plugin's devices Paddle knows too little to answer; so these are ours. ``kind`` is what their places are called
    without a number."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    ours = CudaDriver()
    ours.get_current_device = cuda_driver.current_device
    ours.set_current_device = cuda_driver.make_current
    ours.get_device_capability = cuda_driver.capability
    ours.get_current_stream = lambda index: stream_of_place(kind, index)
    driver.set_active(ours)


def prepare(like) -> None:
    """Before Triton itself launches a kernel: see that it finds the tensor's device and stream."""
    if UNDER_PADDLE and not is_cpu(like) and is_cuda(like) and not sys.modules["triton.knobs"].runtime.interpret:
        _answer_for_paddle(place_name(like).partition(":")[0])
        make_current(like)


class Again:
    """A launch to be done again with the same operands in the same places. It keeps nothing of these alive, and does
    not look at them: whoever has it must know that they are still there."""

    def __init__(self, started: _Started, blocks: int, operands: tuple, constants: dict):
        plain = [o if o is None or o.__class__ is int else o.data_ptr() for o in operands]
        self.started, self.blocks, self.arguments = started, blocks, (*plain, *constants.values())

    def __call__(self, stream: int) -> None:
        started = self.started
        if _hooked():
            started.compiled[self.blocks, 1, 1](*self.arguments, stream=stream)
            return
        if started.start is None:
            started.look_up()
        started.start(self.blocks, 1, 1, stream, *started.fixed, *self.arguments)


def launch_repeatable(kernel, blocks: int, operands: tuple, constants: dict, **options) -> Again | None:
    """``launch``, and what does it again. None in Triton's interpreter."""
    started = launch(kernel, blocks, operands, constants, **options)
    return None if started is None else Again(started, blocks, operands, constants)


def launch(kernel, blocks: int, operands: tuple, constants: dict, **options) -> _Started | None:
    """Run ``blocks`` programs of ``kernel`` on the current stream of the first operand's device.

    ``operands`` (tensors, integers, None) come first in the kernel's signature, then the constants, in its order.
    """
    like, settings = operands[0], constants.values()
    known = [id(kernel), device_index(like), *settings, *options.values()]
    # Addresses for tensors: the launcher would ask each tensor again, and then the driver about the answer.
    plain = []
    for operand in operands:
        if operand is None:
            known.append(None)
            plain.append(None)
        elif operand.__class__ is int:
            known.append(-(2**31) <= operand < 2**31)
            plain.append(operand)
        else:
            start = operand.data_ptr()
            known.append(operand.dtype)
            if start % 16:
                known.append(_OFF)
            plain.append(start)
    known = tuple(known)
    found = _compiled.get(known)
    if found is not None:
        stream = current_stream(like)
        if _hooked():
            found.compiled[blocks, 1, 1](*operands, *settings, stream=stream)
            return found
        # What that does, without what it prepares for hooks.
        if found.start is None:
            found.look_up()
        found.start(blocks, 1, 1, stream, *found.fixed, *plain, *settings)
        return found
    prepare(like)
    compiled = kernel[(blocks,)](*operands, **constants, **options)
    if compiled is not None:  # Triton's interpreter compiles nothing
        _require_fit(kernel, operands, constants)
        found = _compiled[known] = _Started(compiled)
    return found


def _hooked():
    """Whether somebody, a profiler for one, wants to hear of launches."""
    runtime = sys.modules["triton.knobs"].runtime
    return runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls


def _require_fit(kernel, operands: tuple, constants: dict) -> None:
    """What this shortcut takes for granted, looked at where a kernel is compiled."""
    if list(kernel.arg_names)[len(operands) :] != list(constants):
        raise TypeError(f"{kernel.__name__}: the constants are {kernel.arg_names[len(operands) :]}, in this order")
    for parameter, operand in zip(kernel.params, operands, strict=False):
        if operand.__class__ is int and not parameter.do_not_specialize:
            raise TypeError(f"{kernel.__name__}: {parameter.name} is an integer and must be in do_not_specialize")
