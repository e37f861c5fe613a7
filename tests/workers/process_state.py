"""What an import may change behind everybody's back: the global state of a process, as comparable text."""

import ctypes
import logging
import os
import random
import signal
import sys
import threading
import warnings


def c_environment() -> dict[str, str]:
    """The environment as C code and child processes see it: os.environ misses what a library sets with setenv."""
    entries = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    found, number = {}, 0
    while entries[number]:
        name, _, value = entries[number].decode(errors="replace").partition("=")
        found[name], number = value, number + 1
    return found


def snapshot() -> dict[str, str]:
    return {
        "os.environ": repr(sorted(os.environ.items())),
        "C environment": repr(sorted(c_environment().items())),
        "sys.meta_path": repr(sys.meta_path),
        "sys.path": repr(sys.path),
        "sys.path_hooks": repr(sys.path_hooks),
        "sys.excepthook": repr(sys.excepthook),
        "recursion limit": repr(sys.getrecursionlimit()),
        "warnings.filters": repr(warnings.filters),
        "warnings.showwarning": repr(warnings.showwarning),
        "signal handlers": repr([(number, signal.getsignal(number)) for number in sorted(signal.valid_signals())]),
        "threads": repr(threading.enumerate()),
        "root logger": repr((logging.root.level, logging.root.handlers)),
        "random state": repr(hash(random.getstate())),
        "working directory": os.getcwd(),
    }


def changed(before: dict[str, str]) -> dict[str, list[str]]:
    """{what: [before, after]} of all that differs now."""
    after = snapshot()
    return {name: [before[name], after[name]] for name in before if before[name] != after[name]}


def paddle_state() -> dict[str, str]:
    """Paddle's own global state. Call it after ``import paddle``."""
    import paddle
    from paddle.base import core

    flags = core.globals()
    return {
        **{name: repr(flags[name]) for name in sorted(flags.keys())},
        "default dtype": repr(paddle.get_default_dtype()),
        "device": repr(paddle.get_device()),
        "dynamic mode": repr(paddle.in_dynamic_mode()),
        "gradients": repr(paddle.is_grad_enabled()),
        "seed": repr([state.current_seed() for state in paddle.get_rng_state()]),
        # The first tensor makes a device come up, so none may be made.
        "bytes of tensors ever": repr(core.host_memory_stat_peak_value("Allocated", 0)),
    }
