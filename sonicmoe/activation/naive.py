"""Activations in framework ops, float32 in and out.

z [M,F] is the up-projection in native column order: g0,u0,g1,u1,... for the GLU kinds (F = 2I), plain for the
others (F = I). ``clamp`` bounds swiglu as ``min(gate, c)`` and ``clip(up, -c, c)``.
"""

import math

import torch

from ..enums import ActivationType, is_glu

_GELU_SCALE = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def _relu(x):
    # clamp, not where(x > 0): a NaN must stay a NaN.
    return x.clamp(min=0.0)


def _relu_slope(x):
    return (x > 0).to(torch.float32)


def _gelu_gate(x):
    # (1 + tanh(u)) / 2, as the sigmoid of 2u: the sum would cancel in the left tail.
    return torch.sigmoid(2.0 * _GELU_SCALE * (x + _GELU_CUBIC * x * x * x))


def _gelu_slope(x):
    gate = _gelu_gate(x)
    steep = gate * (1.0 - gate)
    inner = 2.0 * _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBIC * x * x)
    # Where the gate saturates, ``steep`` is 0 and ``inner`` may be inf: their product is 0, not NaN.
    return gate + x * torch.where(steep > 0.0, steep * inner, steep * 0.0)


def _silu_slope(x):
    sig = torch.sigmoid(x)
    return sig * (1.0 + x * (1.0 - sig))


# kind -> (f, f'); each GLU kind is named by the function on its gate.
_CURVES = {
    ActivationType.SILU: (lambda x: x * torch.sigmoid(x), _silu_slope),
    ActivationType.GELU: (lambda x: x * _gelu_gate(x), _gelu_slope),
    ActivationType.RELU: (_relu, _relu_slope),
    ActivationType.RELU_SQ: (lambda x: _relu(x) * _relu(x), lambda x: 2.0 * _relu(x)),
}
_GATE_OF = {
    ActivationType.SWIGLU: ActivationType.SILU,
    ActivationType.GEGLU: ActivationType.GELU,
    ActivationType.REGLU: ActivationType.RELU,
}


def _split(z, clamp):
    gate, up = z[:, 0::2], z[:, 1::2]
    if clamp is None:
        return gate, up
    return gate.clamp(max=clamp), up.clamp(min=-clamp, max=clamp)


def forward(z, kind: ActivationType, clamp: float | None = None):
    """a [M,I] from z [M,F]."""
    if not is_glu(kind):
        return _CURVES[kind][0](z)
    gate, up = _split(z, clamp)
    return _CURVES[_GATE_OF[kind]][0](gate) * up


def backward(z, da, kind: ActivationType, clamp: float | None = None):
    """dz [M,F] from z and the gradient of a."""
    if not is_glu(kind):
        return da * _CURVES[kind][1](z)
    curve, slope = _CURVES[_GATE_OF[kind]]
    gate, up = _split(z, clamp)
    dgate = da * up * slope(gate)
    dup = da * curve(gate)
    if clamp is not None:
        dgate = dgate * (z[:, 0::2] <= clamp).to(torch.float32)
        dup = dup * (z[:, 1::2].abs() <= clamp).to(torch.float32)
    return torch.stack([dgate, dup], dim=-1).reshape([int(z.shape[0]), int(z.shape[1])])
