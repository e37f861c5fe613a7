"""The shortcut around Triton's launcher: when it is taken, with what, and what it refuses."""

import sys
import weakref
from types import SimpleNamespace

import pytest

from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe import triton_launch


class Compiled:
    """As Triton's: started by hand, or by Triton's own runner."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.started, self.heard = [], 0

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        assert (function, metadata, launch_metadata, enter, leave) == ("function", "metadata", None, None, None)
        self.started.append(((x, y, z), args, stream))

    def __getitem__(self, grid):
        def runner(*args, stream):
            self.started.append((grid, args, stream))
            self.heard += 1

        return runner


class Kernel:
    """Two tensors, an integer and a constant. Compiles for every launch that comes to it."""

    __name__ = "kernel"
    arg_names = ("x", "y", "n", "WIDTH")

    def __init__(self, specialized=False, compiles=True):
        names = self.arg_names
        self.params = [SimpleNamespace(name=name, do_not_specialize=not specialized) for name in names]
        self.compiles, self.made = compiles, []

    def __getitem__(self, grid):
        def run(*args, **named):
            self.made.append(Compiled() if self.compiles else None)
            return self.made[-1]

        return run


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    if not torch:
        return
    monkeypatch.setattr(triton_launch, "_compiled", {})
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setitem(sys.modules, "triton.knobs", SimpleNamespace(runtime=hooks))
    monkeypatch.setattr(triton_launch, "current_stream", lambda tensor: 7)


def test_a_second_launch_starts_what_was_compiled():
    kernel, x, y = Kernel(), torch.zeros(8), torch.ones(8)
    triton_launch.launch(kernel, 3, (x, y, 5), {"WIDTH": 4}, num_warps=2)
    assert len(kernel.made) == 1 and kernel.made[0].started == []
    triton_launch.launch(kernel, 9, (y, x, 16), {"WIDTH": 4}, num_warps=2)
    (started,) = kernel.made[0].started
    assert len(kernel.made) == 1
    grid, args, stream = started
    assert grid == (9, 1, 1) and args == (y.data_ptr(), x.data_ptr(), 16, 4) and stream == 7


def test_who_listens_to_launches_hears_of_them():
    kernel, arguments = Kernel(), ((torch.zeros(8), torch.ones(8), 5), {"WIDTH": 4})
    for _ in range(2):
        triton_launch.launch(kernel, 3, *arguments)
    assert kernel.made[0].heard == 0
    sys.modules["triton.knobs"].runtime.launch_exit_hook.calls.append(print)
    triton_launch.launch(kernel, 3, *arguments)
    assert kernel.made[0].heard == 1 and len(kernel.made[0].started) == 2


def first_call(y=None, n=5, WIDTH=4, num_warps=2):
    return (torch.zeros(8), torch.zeros(8) if y is None else y, n), {"WIDTH": WIDTH}, {"num_warps": num_warps}


DIFFERENT = {
    "dtype": lambda: {"y": torch.zeros(8, dtype=torch.int32)},
    "alignment": lambda: {"y": torch.zeros(9)[1:]},
    "absent": lambda: {"y": False},
    "wide integer": lambda: {"n": 2**31},
    "constant": lambda: {"WIDTH": 8},
    "option": lambda: {"num_warps": 4},
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_what_triton_compiles_for_is_asked_of_triton(difference):
    kernel, changes = Kernel(), DIFFERENT[difference]()
    for operands, constants, options in (first_call(), first_call(**changes)):
        operands = tuple(None if operand is False else operand for operand in operands)
        triton_launch.launch(kernel, 1, operands, constants, **options)
    assert len(kernel.made) == 2 and kernel.made[0].started == []


def test_two_kernels_are_two():
    first, second = Kernel(), Kernel()
    for kernel in (first, second):
        triton_launch.launch(kernel, 1, (torch.zeros(8), None, 5), {"WIDTH": 4})
    assert len(first.made) == len(second.made) == 1


def test_a_launch_again_is_the_same_on_another_stream():
    kernel, x, y = Kernel(), torch.zeros(8), torch.ones(8)
    again = triton_launch.launch_repeatable(kernel, 3, (x, None, 5), {"WIDTH": 4})
    other = triton_launch.launch_repeatable(kernel, 9, (x, y, 5), {"WIDTH": 4})
    for stream in (7, 8):
        again(stream)
    other(9)
    (first, second), (third,) = (compiled.started for compiled in kernel.made)
    assert first == ((3, 1, 1), (x.data_ptr(), None, 5, 4), 7) and second == (*first[:2], 8)
    assert third == ((9, 1, 1), (x.data_ptr(), y.data_ptr(), 5, 4), 9)
    sys.modules["triton.knobs"].runtime.launch_enter_hook.calls.append(print)
    again(7)
    assert kernel.made[0].heard == 1 and kernel.made[0].started[-1] == first


def test_what_launches_again_keeps_no_tensor_alive():
    x = torch.zeros(8)
    gone = weakref.ref(x)
    again = triton_launch.launch_repeatable(Kernel(), 3, (x, None, 5), {"WIDTH": 4})
    del x
    assert again is not None and gone() is None


def test_the_interpreter_is_asked_each_time():
    assert triton_launch.launch_repeatable(Kernel(compiles=False), 1, (torch.zeros(8), None, 5), {"WIDTH": 4}) is None
    kernel = Kernel(compiles=False)
    for _ in range(3):
        triton_launch.launch(kernel, 1, (torch.zeros(8), None, 5), {"WIDTH": 4})
    assert len(kernel.made) == 3


def test_an_integer_that_triton_looks_into_is_refused():
    with pytest.raises(TypeError, match="n is an integer and must be in do_not_specialize"):
        triton_launch.launch(Kernel(specialized=True), 1, (torch.zeros(8), None, 5), {"WIDTH": 4})


def test_constants_in_another_order_are_refused():
    with pytest.raises(TypeError, match="the constants are"):
        triton_launch.launch(Kernel(), 1, (torch.zeros(8), None), {"WIDTH": 4, "n": 5})
