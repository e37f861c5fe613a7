"""Layout conversion moves bytes and nothing else, into storage of its own; the kernels' view is the native layout."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonicmoe.ernie_compat import fused_grouped_w1_to_sonic, fused_sonic_w1_to_grouped, fused_transpose_w2_layout
from tests.support.lifecycle import bits
from tests.support.paddle_runs import parameter

# numpy's name for the words of each type: NumPy knows no bfloat16, and only bytes are moved.
WORDS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
SHAPES = [(2, 3, 4), (1, 8, 8), (4, 1, 2), (3, 2, 1), (1, 1, 1), (5, 128, 64), (1, 128, 1), (1, 1, 7)]  # E, H, I


def words(shape, dtype, seed=0):
    """Every bit pattern, NaN payloads and negative zeros among them."""
    bytes_each = np.dtype(WORDS[dtype]).itemsize
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2 ** (8 * bytes_each), shape, dtype=np.uint64).astype(WORDS[dtype])


def as_tensor(codes, dtype):
    if dtype == "float32":
        return paddle.to_tensor(codes.view(np.int32)).view(paddle.float32)
    return paddle.to_tensor(codes.view(np.int16)).view(getattr(paddle, dtype))


def codes_of(tensor, dtype):
    return np.frombuffer(bits(tensor), WORDS[dtype]).reshape(tensor.shape)


def check_all_three(experts, hidden, intermediate, dtype, seed=0):
    grouped1 = words((experts, hidden, 2 * intermediate), dtype, seed)
    grouped2 = words((experts, intermediate, hidden), dtype, seed + 1)
    w1, w2 = as_tensor(grouped1, dtype), as_tensor(grouped2, dtype)
    native1, native2 = fused_grouped_w1_to_sonic(w1), fused_transpose_w2_layout(w2)

    expected = np.empty((experts, 2 * intermediate, hidden), WORDS[dtype])
    expected[:, 0::2] = grouped1[:, :, :intermediate].swapaxes(1, 2)
    expected[:, 1::2] = grouped1[:, :, intermediate:].swapaxes(1, 2)
    assert (codes_of(native1, dtype) == expected).all()
    assert (codes_of(native2, dtype) == grouped2.swapaxes(1, 2)).all()

    back1, back2 = fused_sonic_w1_to_grouped(native1), fused_transpose_w2_layout(native2)
    assert (codes_of(back1, dtype) == grouped1).all()
    assert (codes_of(back2, dtype) == grouped2).all()

    for source, made in ((w1, native1), (w2, native2), (native1, back1), (native2, back2)):
        assert made.dtype == source.dtype and made.is_contiguous()
        assert made.data_ptr() != source.data_ptr(), f"{list(source.shape)}: shares storage with what it was made from"
        before = bits(source)
        made.fill_(7.0)
        assert bits(source) == before


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(shape, dtype):
    check_all_three(*shape, dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.sampled_from(list(WORDS)), st.integers(0, 99))
def test_there_and_back_of_any_shape(experts, hidden, intermediate, dtype, seed):
    check_all_three(experts, hidden, intermediate, dtype, seed)


def test_of_a_parameter_and_of_a_view():
    """Checkpoint code converts parameters; sharding code converts slices of a larger buffer."""
    values = np.random.default_rng(0).standard_normal((3, 8, 12)).astype(np.float32)
    param, expected = parameter(values, "float32"), fused_grouped_w1_to_sonic(paddle.to_tensor(values))
    assert bits(fused_grouped_w1_to_sonic(param)) == bits(expected)
    assert not param.stop_gradient and param.grad is None
    flat = paddle.concat([paddle.zeros([5]), paddle.to_tensor(values.ravel())])
    view = flat[5:].reshape([3, 8, 12])
    assert view.data_ptr() == flat.data_ptr() + 20
    assert bits(fused_grouped_w1_to_sonic(view)) == bits(expected)
    transposed = paddle.to_tensor(np.ascontiguousarray(values.swapaxes(1, 2))).transpose([0, 2, 1])
    assert not transposed.is_contiguous()
    assert bits(fused_grouped_w1_to_sonic(transposed)) == bits(expected)


@pytest.mark.parametrize("shape", [(2, 8, 4), (1, 16, 8), (3, 5, 7)], ids=str)
def test_the_kernel_view_is_the_native_layout(shape):
    """[2I, H, E] and [H, I, E] in stride order (2,0,1): native storage under other names, so nothing is copied."""
    experts, hidden, intermediate = shape
    width = 2 * intermediate
    grouped = np.arange(experts * hidden * width, dtype=np.float32).reshape(experts, hidden, width)
    native = fused_grouped_w1_to_sonic(paddle.to_tensor(grouped))
    view = native.transpose([1, 2, 0])
    assert view.data_ptr() == native.data_ptr()
    assert list(view.shape) == [2 * intermediate, hidden, experts]
    assert list(view.strides) == [hidden, 1, 2 * intermediate * hidden]
    found = view.numpy()
    for e in range(experts):
        assert (found[0::2, :, e] == grouped[e, :, :intermediate].T).all(), "gate rows"
        assert (found[1::2, :, e] == grouped[e, :, intermediate:].T).all(), "up rows"

    grouped = np.arange(experts * hidden * intermediate, dtype=np.float32).reshape(experts, intermediate, hidden)
    native = fused_transpose_w2_layout(paddle.to_tensor(grouped))
    view = native.transpose([1, 2, 0])
    assert view.data_ptr() == native.data_ptr()
    assert list(view.shape) == [hidden, intermediate, experts]
    assert list(view.strides) == [intermediate, 1, hidden * intermediate]
    assert (view.numpy() == grouped.transpose(2, 1, 0)).all()


FUNCTIONS = (fused_grouped_w1_to_sonic, fused_sonic_w1_to_grouped, fused_transpose_w2_layout)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_what_they_refuse(function):
    with pytest.raises(TypeError, match="^weight: got NoneType, need a tensor$"):
        function(None)
    with pytest.raises(TypeError, match="^weight: got ndarray, need a tensor$"):
        function(np.zeros([1, 2, 2], np.float32))
    with pytest.raises(ValueError, match=r"^weight: got shape \[4, 4\], need 3 dimensions \[E, "):
        function(paddle.zeros([4, 4]))


@pytest.mark.parametrize("function", FUNCTIONS[:2], ids=lambda f: f.__name__)
def test_gate_and_up_need_an_even_dimension(function):
    with pytest.raises(ValueError, match=r"^weight: got shape \[2, 3, 3\], need an even .* gate and up$"):
        function(paddle.zeros([2, 3, 3]))
