"""The float64 oracle is right by itself: its output against loops over single numbers, its gradients against finite
differences of its output. Whatever else compares with it may then trust it."""

import math

import numpy as np
import pytest

from tests.support.oracle import GLU_GATES, curve, reference

T, K, E, H, I = 5, 3, 3, 4, 3
STEP = 1e-6
CLAMP = 0.7
KINDS = [(kind, None) for kind in ("swiglu", "geglu", "reglu", "relu", "relu_sq", "silu", "gelu")] + [("swiglu", CLAMP)]

SCALAR = {
    "silu": lambda v: v / (1.0 + math.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: v if v > 0 else 0.0,
    "relu_sq": lambda v: v * v if v > 0 else 0.0,
}


def problem(kind, seed=0):
    rng = np.random.default_rng(seed)
    width = 2 * I if kind in GLU_GATES else I
    indices = np.array([[rng.permutation(E)[k] if k < 2 else -1 for k in range(K)] for _ in range(T)])
    indices[1] = [-1, E, 1]
    indices[2] = [-1, -7, E + 3]
    return {
        "x": rng.standard_normal((T, H)),
        "w1": rng.standard_normal((E, H, width)),
        "w2": rng.standard_normal((E, I, H)),
        "probs": rng.random((T, K)) + 0.1,
        "indices": indices,
        "dout": rng.standard_normal((T, H)),
    }


def in_loops(x, w1, w2, indices, probs, kind, clamp):
    """out of the definition, one multiplication at a time."""
    out = [[0.0] * H for _ in range(T)]
    for t in range(T):
        for k in range(K):
            e = int(indices[t][k])
            if not 0 <= e < E:
                continue
            h = [sum(x[t][c] * w1[e][c][f] for c in range(H)) for f in range(w1.shape[2])]
            if kind in GLU_GATES:
                gate, up = h[:I], h[I:]
                if clamp is not None:
                    gate, up = [min(g, clamp) for g in gate], [max(-clamp, min(u, clamp)) for u in up]
                a = [SCALAR[GLU_GATES[kind]](g) * u for g, u in zip(gate, up, strict=True)]
            else:
                a = [SCALAR[kind](v) for v in h]
            for c in range(H):
                out[t][c] += probs[t][k] * sum(a[i] * w2[e][i][c] for i in range(I))
    return np.array(out)


@pytest.mark.parametrize("kind, clamp", KINDS)
def test_out_is_the_definition(kind, clamp):
    p = problem(kind)
    arrays = {name: p[name] for name in ("x", "w1", "w2", "indices", "probs")}
    result = reference(**p, kind=kind, clamp=clamp)
    np.testing.assert_allclose(result.out, in_loops(**arrays, kind=kind, clamp=clamp), rtol=1e-12, atol=1e-14)
    assert not result.out[2].any()  # a row without a slot here


@pytest.mark.parametrize("kind, clamp", KINDS)
@pytest.mark.parametrize("name, gradient", [("x", "dx"), ("probs", "ds"), ("w1", "dw1"), ("w2", "dw2")])
def test_gradients_are_finite_differences(kind, clamp, name, gradient):
    p = problem(kind, seed=3)

    def loss(value):
        return float((reference(**{**p, name: value}, kind=kind, clamp=clamp).out * p["dout"]).sum())

    found = getattr(reference(**p, kind=kind, clamp=clamp), gradient)
    expected = np.zeros_like(p[name])
    for where in np.ndindex(*expected.shape):
        above, below = p[name].copy(), p[name].copy()
        above[where] += STEP
        below[where] -= STEP
        expected[where] = (loss(above) - loss(below)) / (2 * STEP)
    # No entry of these problems lies within STEP of a kink of relu or of the clamp: the error would be of order 1.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert np.abs(found).max() > 0.1


def test_the_clamp_is_at_work():
    p = problem("swiglu", seed=3)
    free, bounded = reference(**p), reference(**p, clamp=CLAMP)
    for name in free.NAMES:
        assert np.abs(getattr(free, name) - getattr(bounded, name)).max() > 1e-2, name


def test_ds_is_zero_where_no_expert_is_here():
    p = problem("swiglu")
    ds = reference(**p).ds
    here = (p["indices"] >= 0) & (p["indices"] < E)
    assert not ds[~here].any() and ds[here].all()


@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "relu_sq"])
def test_curves_far_out(name):
    """No overflow and no NaN where exponentials run out of range, and the limits are the plain ones."""
    v = np.array([-1e4, -800.0, 800.0, 1e4])
    with np.errstate(over="raise", invalid="raise"):
        value, slope = curve(name, v)
    if name == "relu_sq":
        np.testing.assert_allclose(value, [0, 0, 800.0**2, 1e8])
        np.testing.assert_allclose(slope, [0, 0, 1600.0, 2e4])
    else:
        np.testing.assert_allclose(value, [0, 0, 800.0, 1e4], atol=1e-12)
        np.testing.assert_allclose(slope, [0, 0, 1, 1], atol=1e-12)


def test_known_values():
    assert curve("silu", np.array(1.0))[0] == pytest.approx(0.7310585786300049, abs=1e-15)
    assert curve("gelu", np.array(1.0))[0] == pytest.approx(0.8411919906082768, abs=1e-15)
