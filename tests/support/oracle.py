"""The function of the layer in float64 NumPy, written from its definition and from nothing in the package.

Arrays are in grouped (checkpoint) layout: w1 [E,H,F] with columns gate|up for the GLU kinds, w2 [E,I,H].
"""

import math
from dataclasses import dataclass

import numpy as np

GLU_GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


@dataclass
class Result:
    out: np.ndarray
    dx: np.ndarray
    ds: np.ndarray
    dw1: np.ndarray
    dw2: np.ndarray

    NAMES = ("out", "dx", "ds", "dw1", "dw2")


def _sigmoid(v):
    return np.where(v >= 0, 1.0 / (1.0 + np.exp(-np.abs(v))), np.exp(-np.abs(v)) / (1.0 + np.exp(-np.abs(v))))


def curve(name, v):
    """f(v) and f'(v)."""
    if name == "silu":
        s = _sigmoid(v)
        return v * s, s * (1 + v * (1 - s))
    if name == "gelu":
        c = math.sqrt(2 / math.pi)
        t = np.tanh(c * (v + 0.044715 * v**3))
        return 0.5 * v * (1 + t), 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * c * (1 + 3 * 0.044715 * v * v)
    if name == "relu":
        return np.maximum(v, 0), (v > 0).astype(np.float64)
    if name == "relu_sq":
        return np.maximum(v, 0) ** 2, 2 * np.maximum(v, 0)
    raise ValueError(name)


def activate(h_MF, kind, clamp=None):
    """a [M,I] and a function from da to dh."""
    if kind not in GLU_GATES:
        value, slope = curve(kind, h_MF)
        return value, lambda da: da * slope
    width = h_MF.shape[1] // 2
    raw_gate, raw_up = h_MF[:, :width], h_MF[:, width:]
    gate, up = raw_gate, raw_up
    gate_open = up_open = 1.0
    if clamp is not None:
        gate, up = np.minimum(raw_gate, clamp), np.clip(raw_up, -clamp, clamp)
        gate_open, up_open = raw_gate <= clamp, np.abs(raw_up) <= clamp
    value, slope = curve(GLU_GATES[kind], gate)
    return value * up, lambda da: np.concatenate([da * up * slope * gate_open, da * value * up_open], axis=1)


def reference(x, w1, w2, indices, probs, dout, kind="swiglu", clamp=None, keep_z=None) -> Result:
    """``keep_z`` is what storage does to z between forward and backward; None: nothing. Where a slope jumps (at a
    clamp), a rounding of z decides which side counts, and no storage of z in that type can do better."""
    x, w1, w2, probs, dout = (np.asarray(v, dtype=np.float64) for v in (x, w1, w2, probs, dout))
    n_experts = w1.shape[0]
    result = Result(
        out=np.zeros_like(x),
        dx=np.zeros_like(x),
        ds=np.zeros(probs.shape),
        dw1=np.zeros_like(w1),
        dw2=np.zeros_like(w2),
    )
    for e in range(n_experts):
        t, k = np.nonzero(np.asarray(indices) == e)
        if len(t) == 0:
            continue
        p = probs[t, k][:, None]
        z = x[t] @ w1[e]
        a, pull = activate(z, kind, clamp)
        np.add.at(result.out, t, p * (a @ w2[e]))
        if keep_z is not None:
            a, pull = activate(keep_z(z), kind, clamp)
        d_a = dout[t] @ w2[e].T
        result.ds[t, k] = (d_a * a).sum(axis=1)
        dz = pull(p * d_a)
        result.dw2[e] = (p * a).T @ dout[t]
        result.dw1[e] = x[t].T @ dz
        np.add.at(result.dx, t, dz @ w1[e].T)
    return result
