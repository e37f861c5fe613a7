"""Inputs of quantizers and of kernels over routed rows, and comparisons bit for bit. Only where a real torch is."""

import numpy as np
import torch

from sonicmoe import SonicMoEConfig
from sonicmoe.routing import metadata
from tests.support import fp8_model

TYPES = (torch.bfloat16, torch.float32, torch.float16)
NAIVE = SonicMoEConfig(metadata_backend="naive")
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """Values as integers: a NaN equals itself, and -0 does not equal 0."""
    return tensor.contiguous().view(INTEGER[tensor.element_size()])


def same_bits(left, right) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


def make_routing(rng, n_tokens, topk, n_experts, block, kind, device):
    indices = torch.from_numpy(kind(rng, (n_tokens, topk), n_experts).astype(np.int64)).to(device)
    probs = torch.from_numpy(rng.standard_normal((n_tokens, topk)).astype(np.float32)).to(device)
    return metadata.build(indices, probs, n_experts, block, NAIVE)


KINDS = ("ordinary", "tiny", "large", "zeros", "subnormal", "extreme", "ties", "halves", "holes")


def draw(rng, shape, kind, dtype, device):
    """``shape`` ends with (rows, columns); each row and column has a magnitude of its own where a kind allows it."""
    x = rng.standard_normal(shape)
    if kind in ("tiny", "large"):
        x *= {"tiny": 1e-4, "large": 300.0}[kind]
    if kind == "ordinary":
        x *= 2.0 ** rng.integers(-4, 5, (*shape[:-1], 1)) * 2.0 ** rng.integers(-4, 5, shape[-1])
    if kind == "zeros":
        x *= rng.random(shape) < 0.003  # most blocks are nothing but 0 and -0
    if kind == "subnormal":
        smallest = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}[dtype]
        x = rng.integers(-90, 91, shape) * smallest
    if kind == "extreme":  # the ends of float32: scales from the floor upwards, and quotients that are subnormal
        x *= 2.0 ** rng.integers(-135, 125, (*shape[:-1], 1)) * 2.0 ** -rng.integers(0, 20, shape[-1])
    if kind in ("ties", "halves"):
        # Where a block holds 448, or 224, its scale is a power of two, and what lies halfway between codes stays so.
        middles = (fp8_model.values()[1:] + fp8_model.values()[:-1]) / 2
        around = [np.nextafter(middles.astype(np.float32), np.float32(to)) for to in (0, np.inf)]
        x = rng.choice(np.concatenate([middles, *around, fp8_model.values()]), shape) * rng.choice([-1, 1], shape)
        x = np.where(rng.random(shape) < 0.1, 448.0, x) * (0.5 if kind == "halves" else 1.0)
    if kind == "holes":
        specials = [np.nan, -np.nan, np.inf, -np.inf, -0.0]
        x = np.where(rng.random(shape) < 0.05, rng.choice(specials, shape), x)
        x[..., -1:, :], x[..., -128:] = np.nan, rng.choice(specials[:4], (*shape[:-1], 128))  # whole blocks of them
    with np.errstate(over="ignore"):
        return torch.from_numpy(x.astype(np.float32)).to(device=device, dtype=dtype)


def at_any_address(x):
    """The same values, contiguous, where no load of 16 bytes is possible."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].reshape(x.shape)


def differences(about, found, wanted):
    """Pairs of (data, scale)."""
    return [
        f"{about}: {name} {tuple(one.shape)} for {tuple(other.shape)}"
        for name, one, other in zip(("data", "scale"), found, wanted, strict=True)
        if not same_bits(one, other)
    ]
