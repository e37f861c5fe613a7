"""e4m3 and the FP8 layer in NumPy, written from the formats' definitions and from nothing in the package.

Products are summed in float64, so what is left between this model and an engine is fp32 summation, the bf16 rounding of
results, and the few e4m3 roundings that those tip over: well under a percent. Against the oracle both are off by what
the format costs.
"""

import functools
from dataclasses import dataclass

import numpy as np

from .oracle import GLU_GATES, Result, activate

E4M3_MAX = 448.0
NAN_CODE = 0x7F
TOKEN_BLOCK = 128  # under FP8 an expert's rows are filled to a multiple of this


@dataclass(frozen=True)
class Recipe:
    """Blocks along the reduced dimension, rows of a weight tile, and whether scales are powers of two."""

    block: int
    weight_rows: int
    pow2: bool


SM90 = Recipe(128, 128, False)
SM90_POW2 = Recipe(128, 128, True)
SM100 = Recipe(32, 1, True)
SM100_ISO32 = Recipe(32, 32, True)


@functools.cache
def values() -> np.ndarray:
    """The 127 finite values that codes 0..0x7E stand for: 4 exponent bits of bias 7, 3 mantissa bits."""
    code = np.arange(NAN_CODE)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


def encode(x) -> np.ndarray:
    """uint8 codes: nearest, ties to the even code, saturating at 448; NaN and Inf are NaN without a sign."""
    with np.errstate(invalid="ignore"):  # a signalling NaN says so when it is widened
        x = np.asarray(x, dtype=np.float64)
    magnitude = np.abs(np.where(np.isfinite(x), x, 0.0))
    middles = (values()[1:] + values()[:-1]) / 2
    below, up_to = (np.searchsorted(middles, magnitude, side=side) for side in ("left", "right"))
    # The two differ only on a middle, where one of the neighbours is even.
    code = np.where(below % 2 == 0, below, up_to)
    code = np.where(np.signbit(x), code | 0x80, code)
    return np.where(np.isfinite(x), code, NAN_CODE).astype(np.uint8)


def decode(code) -> np.ndarray:
    code = np.asarray(code, dtype=np.uint8)
    magnitude = np.append(values(), np.nan)[code & 0x7F]
    return np.where(code & 0x80, -magnitude, magnitude)


def spread(scale, block) -> np.ndarray:
    return scale.repeat(block[0], axis=-2).repeat(block[1], axis=-1)


def scales(x, block, pow2=False) -> np.ndarray:
    """float32 scales [..., R/rows, C/cols]: amax / 448 of the finite values, at least 2**-126, rounded up if asked."""
    *lead, r, c = x.shape
    magnitude = np.abs(np.where(np.isfinite(x), x, np.float32(0)))
    tiles = magnitude.reshape(*lead, r // block[0], block[0], c // block[1], block[1])
    scale = np.maximum(tiles.max(axis=(-3, -1)) / np.float32(E4M3_MAX), np.float32(2.0**-126))
    if pow2:
        mantissa, exponent = np.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
        scale = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent)).astype(np.float32)
    return scale


def quantize(x, block, pow2=False) -> tuple[np.ndarray, np.ndarray]:
    """Codes [..., R, C] and scales of float32 x, in float32 arithmetic."""
    x = np.asarray(x, dtype=np.float32)
    scale = scales(x, block, pow2)
    with np.errstate(invalid="ignore", over="ignore"):
        return encode(x * spread(np.float32(1) / scale, block)), scale


def nearest(x) -> np.ndarray:
    """decode(encode(x)) of finite x by arithmetic, for the many values of a layer: 8 steps an octave, ties to even."""
    x = np.clip(x, -E4M3_MAX, E4M3_MAX)
    _, exponent = np.frexp(x)
    step = np.ldexp(np.float32(1), np.maximum(exponent, -5) - 4)
    return np.rint(x / step) * step


def rounded(x, block, pow2=False) -> np.ndarray:
    """Finite x as it is after a way through e4m3, in float64."""
    x = np.asarray(x, dtype=np.float32)
    if 0 in x.shape:
        return x.astype(np.float64)
    scale = scales(x, block, pow2)
    return nearest(x * spread(np.float32(1) / scale, block)) * spread(scale.astype(np.float64), block)


def rows(x, recipe: Recipe) -> np.ndarray:
    return rounded(x, (1, recipe.block), recipe.pow2)


def weight(w, recipe: Recipe) -> np.ndarray:
    """A weight [N,K] whose dimension K is summed over."""
    return rounded(w, (recipe.weight_rows, recipe.block), recipe.pow2)


def interleave(grouped) -> np.ndarray:
    """Columns gate|up -> g0,u0,g1,u1,..: the order in which z and dz are cut into blocks."""
    width = grouped.shape[-1] // 2
    return np.stack([grouped[..., :width], grouped[..., width:]], axis=-1).reshape(grouped.shape)


def separate(native) -> np.ndarray:
    return np.concatenate([native[..., 0::2], native[..., 1::2]], axis=-1)


def _along_tokens(x_mC, recipe: Recipe) -> np.ndarray:
    padded = np.pad(x_mC, ((0, -len(x_mC) % TOKEN_BLOCK), (0, 0)))
    return rows(padded.T.astype(np.float32), recipe).T[: len(x_mC)]


def layer(problem, recipe: Recipe, fp8_wgrad: bool, kind="swiglu", clamp=None) -> Result:
    """The layer with every rounding to e4m3 that the recipe prescribes, and no other rounding."""
    order, back = (interleave, separate) if kind in GLU_GATES else (lambda v: v, lambda v: v)
    token_major = (lambda v: _along_tokens(v, recipe)) if fp8_wgrad else (lambda v: v)
    x, dout = problem.x.astype(np.float64), problem.dout.astype(np.float64)
    x_rows, dout_rows = rows(x, recipe), rows(dout, recipe)
    w1, w2 = order(problem.w1), problem.w2
    result = Result(np.zeros_like(x), np.zeros_like(x), np.zeros(problem.probs.shape), *map(np.zeros_like, (w1, w2)))
    result.dw1, result.dw2 = result.dw1.astype(np.float64), result.dw2.astype(np.float64)
    for e in range(problem.n_experts):
        t, k = np.nonzero(problem.indices == e)
        if len(t) == 0:
            continue
        p = problem.probs[t, k][:, None].astype(np.float64)
        z = x_rows[t] @ weight(w1[e].T, recipe).T
        a, _ = activate(back(z), kind, clamp)
        np.add.at(result.out, t, p * (rows(a, recipe) @ weight(w2[e].T, recipe).T))
        # Backward sees z as it was kept, and so another a than forward multiplied.
        a, pull = activate(back(rows(z, recipe)), kind, clamp)
        d_a = dout_rows[t] @ weight(w2[e], recipe).T
        result.ds[t, k] = (d_a * a).sum(axis=1)
        dz = order(pull(p * d_a))
        np.add.at(result.dx, t, rows(dz, recipe) @ weight(w1[e], recipe).T)
        result.dw1[e] = back(token_major(x[t]).T @ token_major(dz))
        result.dw2[e] = token_major(p * a).T @ token_major(dout[t])
    return result
