"""The activations by themselves: values and slopes to float32's digits, from the smallest z to the largest, in native
column order, and what happens on the very kinks."""

import numpy as np
import paddle
import pytest

import sonicmoe.ernie_compat  # noqa: F401  first: it puts Paddle behind the `import torch` of the next one
from sonicmoe.activation import naive as activation
from sonicmoe.enums import ActivationType, is_glu
from tests.support.fp8_model import interleave, separate
from tests.support.oracle import activate, curve

GLU = [kind for kind in ActivationType if is_glu(kind)]
PLAIN = [kind for kind in ActivationType if not is_glu(kind)]
CLAMPS = [None, 0.5, 7.0]
ALL = [*((kind, None) for kind in ActivationType), *((ActivationType.SWIGLU, clamp) for clamp in CLAMPS[1:])]

# Every scale that float32 has between the two where products of three overflow or underflow, and both signs.
GRID = np.concatenate([sign * 2.0 ** np.arange(-40, 31, 0.37) for sign in (1, -1)] + [np.linspace(-12, 12, 481)])


def forward(z, kind, clamp=None):
    return activation.forward(paddle.to_tensor(np.asarray(z, np.float32)), kind, clamp).numpy()


def backward(z, da, kind, clamp=None):
    z, da = (paddle.to_tensor(np.asarray(v, np.float32)) for v in (z, da))
    return activation.backward(z, da, kind, clamp).numpy()


def inputs(kind, seed=0):
    """z [M,F] in native order and da [M,I] over the whole grid, for the GLU kinds with an up of its own."""
    rng = np.random.default_rng(seed)
    gate = np.float32(rng.permutation(GRID)).reshape(-1, 1)
    da = rng.standard_normal(gate.shape).astype(np.float32)
    if not is_glu(kind):
        return gate, da
    up = (rng.standard_normal(gate.shape) * 2).astype(np.float32)
    return interleave(np.concatenate([gate, up], axis=1)), da


def reference(z, kind, clamp):
    z = np.asarray(z, np.float64)
    return activate(separate(z) if is_glu(kind) else z, kind.value, clamp)


def absolute(kind) -> float:
    """silu, relu and their like are held to relative digits. gelu's tail is 1 + tanh of float32, which cancels."""
    return 3e-6 if kind in (ActivationType.GELU, ActivationType.GEGLU) else 1e-30


@pytest.mark.parametrize("kind, clamp", ALL)
def test_values(kind, clamp):
    z, _ = inputs(kind)
    expected, _ = reference(z, kind, clamp)
    np.testing.assert_allclose(forward(z, kind, clamp), expected, rtol=3e-6, atol=absolute(kind))


@pytest.mark.parametrize("kind, clamp", ALL)
def test_slopes(kind, clamp):
    z, da = inputs(kind)
    expected = reference(z, kind, clamp)[1](da.astype(np.float64))
    expected = interleave(expected) if is_glu(kind) else expected
    np.testing.assert_allclose(backward(z, da, kind, clamp), expected, rtol=1e-5, atol=10 * absolute(kind))


@pytest.mark.parametrize("kind", GLU)
def test_native_columns_are_gate_up_pairs(kind):
    """Column 2i is gate i and 2i+1 is up i: gates of 20 are the identity in every GLU kind, ups are factors."""
    up = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)
    z = interleave(np.concatenate([np.full_like(up, 20.0), up], axis=1))
    np.testing.assert_allclose(forward(z, kind), 20.0 * up, rtol=1e-6)
    dz = backward(z, np.ones_like(up), kind)
    np.testing.assert_allclose(dz[:, 0::2], up, rtol=1e-5)  # dgate = up * 1
    np.testing.assert_allclose(dz[:, 1::2], 20.0 * np.ones_like(up), rtol=1e-6)  # dup = f(gate)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_kinds_keep_their_columns(kind):
    z = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    np.testing.assert_allclose(forward(z, kind), curve(kind.value, z.astype(np.float64))[0], rtol=1e-5, atol=1e-7)
    order = np.random.default_rng(2).permutation(8)
    np.testing.assert_array_equal(forward(z[:, order], kind), forward(z, kind)[:, order])


@pytest.mark.parametrize("kind", ActivationType)
def test_no_overflow_far_out(kind):
    """Where exponentials saturate, values go to z or 0 and slopes to 1 or 0; nothing turns into NaN."""
    far = np.array([[-1e9], [-1e4], [-200.0], [200.0], [1e4], [1e9]], np.float32)
    z = far if not is_glu(kind) else interleave(np.concatenate([far, np.ones_like(far)], axis=1))
    value, dz = forward(z, kind), backward(z, np.ones_like(far), kind)
    assert np.isfinite(value).all() and np.isfinite(dz).all()
    if kind is not ActivationType.RELU_SQ:
        np.testing.assert_allclose(value, np.maximum(far, 0), atol=1e-30)
        np.testing.assert_allclose(dz[:, :1], far > 0, atol=1e-30)


@pytest.mark.parametrize("kind, clamp", ALL)
def test_backward_is_linear_in_da(kind, clamp):
    z, da = inputs(kind, seed=3)
    np.testing.assert_array_equal(backward(z, -4 * da, kind, clamp), -4 * backward(z, da, kind, clamp))
    assert not backward(z, np.zeros_like(da), kind, clamp).any()


@pytest.mark.parametrize("kind", [ActivationType.RELU, ActivationType.RELU_SQ, ActivationType.REGLU])
def test_relu_at_zero(kind):
    """The slope at exactly 0 is 0, and so an expert row of zeros gets no gradient through its gate."""
    zero = np.zeros((1, 2 if is_glu(kind) else 1), np.float32)
    if is_glu(kind):
        zero[0, 1] = 3.0
    assert not backward(zero, np.ones((1, 1)), kind).any()


def test_on_the_clamp_the_gradient_passes():
    """min and clip are the identity up to and including the bound. The gate has no lower bound."""
    kind, c = ActivationType.SWIGLU, 0.5
    above = np.nextafter(np.float32(c), np.float32(1))

    def open_sides(gate, up):
        return (backward([[gate, up]], [[1.0]], kind, c)[0] != 0).tolist()

    assert open_sides(c, c) == [True, True]
    assert open_sides(c, -c) == [True, True]
    assert open_sides(above, 0.25) == [False, True]
    assert open_sides(0.25, above) == [True, False]
    assert open_sides(0.25, -above) == [True, False]
    assert open_sides(-3.0, 0.25) == [True, True]
    np.testing.assert_array_equal(forward([[9.0, -9.0]], kind, c), forward([[c, -c]], kind, c))
    assert forward([[-3.0, 1.0]], kind, c)[0, 0] == pytest.approx(-3 / (1 + np.exp(3.0)) * c, rel=1e-6)


@pytest.mark.parametrize("kind, clamp", ALL)
def test_nan_comes_out(kind, clamp):
    z, da = inputs(kind)
    z, da = z[:3].copy(), da[:3].copy()
    z[1, 0] = np.nan
    assert np.isnan(forward(z, kind, clamp)).ravel().tolist() == [False, True, False]
    clean, _ = inputs(kind)
    da[1] = np.nan
    dz = backward(clean[:3], da, kind, clamp)
    assert np.isnan(dz[1]).all() and np.isfinite(dz[[0, 2]]).all()


@pytest.mark.parametrize("kind", ActivationType)
def test_names(kind):
    for given in (kind, kind.value, kind.value.upper()):
        assert ActivationType.parse(given) is kind


@pytest.mark.parametrize("given", ["swish", "", None, 3, "silu "])
def test_unknown_names(given):
    with pytest.raises(ValueError, match="activation_type: got .*need one of"):
        ActivationType.parse(given)
