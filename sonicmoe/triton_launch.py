"""Repeated launches of a Triton kernel without Triton's own look at every argument, which takes several times as long
as the launch itself.

A kernel that has run once is started directly wherever nothing differs that Triton compiles for: the device, the
constants, each tensor's dtype and whether it begins at a multiple of 16 bytes, and each integer's width. Anything else
that it looks at in an integer must be switched off in the kernel (``do_not_specialize``).
"""

import sys

from .launch import current_stream

_compiled: dict[tuple, object] = {}


def next_power_of_2(n: int) -> int:
    """As ``triton.next_power_of_2`` for n > 0, which unwraps its argument first and costs a third of a launch."""
    return 1 << (n - 1).bit_length()


def launch(kernel, blocks: int, operands: tuple, constants: dict, **options) -> None:
    """Run ``blocks`` programs of ``kernel`` on the current stream of the first operand's device.

    ``operands`` (tensors, integers, None) come first in the kernel's signature, then the constants, in its order.
    """
    like = operands[0]
    known = [id(kernel), like.device.index, *constants.values(), *options.values()]
    for operand in operands:
        if operand is None:
            known.append(None)
        elif operand.__class__ is int:
            known.append(-(2**31) <= operand < 2**31)
        else:
            known.append(operand.dtype)
            known.append(operand.data_ptr() % 16 == 0)
    known = tuple(known)
    compiled = _compiled.get(known)
    if compiled is not None:
        arguments, stream = (*operands, *constants.values()), current_stream(like)
        if _hooked():
            compiled[blocks, 1, 1](*arguments, stream=stream)
        else:  # what that does, without what it prepares for hooks
            compiled.run(
                blocks, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
            )
        return
    compiled = kernel[(blocks,)](*operands, **constants, **options)
    if compiled is not None:  # Triton's interpreter compiles nothing
        _require_fit(kernel, operands, constants)
        _compiled[known] = compiled


def _hooked() -> bool:
    """Whether somebody, a profiler for one, wants to hear of launches."""
    runtime = sys.modules["triton.knobs"].runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _require_fit(kernel, operands: tuple, constants: dict) -> None:
    """What this shortcut takes for granted, looked at where a kernel is compiled."""
    if list(kernel.arg_names)[len(operands) :] != list(constants):
        raise TypeError(f"{kernel.__name__}: the constants are {kernel.arg_names[len(operands) :]}, in this order")
    for parameter, operand in zip(kernel.params, operands, strict=False):
        if operand.__class__ is int and not parameter.do_not_specialize:
            raise TypeError(f"{kernel.__name__}: {parameter.name} is an integer and must be in do_not_specialize")
