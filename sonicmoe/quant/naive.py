"""FP8 quantization in framework ops: the definition that every kernel is compared with, bit for bit.

    scale = amax / 448          amax over the finite values of the block, never under 2**-126
    data  = e4m3(x * (1/scale)) round to nearest even, saturating; NaN and Inf become NaN

A NaN must stay visible: it is written as e4m3 NaN in its own place, and does not touch its block's scale, so
the other values of the block keep their meaning.
"""

import torch

from ..launch import beside
from .formats import E4M3_MAX, QuantTensor, QuantWeights, Recipe

_E4M3_NAN = 0x7F
_UE8M0_NAN = 255
# Smallest normal float32. With it as floor an all-zero block needs no special case and 1/scale stays finite.
_MIN_SCALE = 2.0**-126


def cast_e4m3(x):
    """float32 -> e4m3, exact and saturating. Frameworks differ on NaN and overflow, so neither is left to them."""
    data = x.clamp(min=-E4M3_MAX, max=E4M3_MAX).to(torch.float8_e4m3fn)
    code = data.view(torch.uint8).to(torch.int32)
    code = torch.where(torch.isfinite(x), code, torch.full_like(code, _E4M3_NAN))
    return code.to(torch.uint8).view(torch.float8_e4m3fn)


def round_up_to_power_of_two(scale):
    """Exponent bytes (int32) of the smallest powers of two not under ``scale`` (positive, normal float32)."""
    bits = scale.contiguous().view(torch.int32)
    exponent = bits >> 23
    return exponent + (bits - (exponent << 23) > 0).to(torch.int32)


def scale_values(scale):
    """Block scales as float32."""
    if scale.dtype != torch.uint8:
        return scale
    byte = scale.to(torch.int32)
    value = (byte << 23).view(torch.float32)
    value = torch.where(byte == 0, torch.full_like(value, 2.0**-127), value)
    return torch.where(byte == _UE8M0_NAN, torch.full_like(value, float("nan")), value)


def _tiles(x, block: tuple[int, int]):
    """[..., R, C] -> [..., R/rows, rows, C/cols, cols]."""
    *lead, r, c = [int(size) for size in x.shape]
    return x.reshape([*lead, r // block[0], block[0], c // block[1], block[1]])


def _times_scale(x, scale, block: tuple[int, int]):
    """x [..., R, C] float32 with each tile multiplied by its own scale."""
    return (_tiles(x, block) * scale.unsqueeze(-1).unsqueeze(-3)).reshape([int(size) for size in x.shape])


def quantize(x, block: tuple[int, int], *, ue8m0: bool = False, pow2: bool = False) -> QuantTensor:
    """Quantize ``x [..., R, C]`` with one scale a (rows, cols) tile; R and C are multiples of the tile."""
    x = x.to(torch.float32)
    rows, cols = block
    *lead, r, c = [int(size) for size in x.shape]
    if r == 0 or 0 in lead:
        scale_dtype = torch.uint8 if ue8m0 else torch.float32
        scale = torch.zeros([*lead, r // rows, c // cols], dtype=scale_dtype, device=beside(x))
        return QuantTensor(torch.zeros([*lead, r, c], dtype=torch.float8_e4m3fn, device=beside(x)), scale, block)
    magnitude = torch.where(torch.isfinite(x), x.abs(), torch.zeros_like(x))
    amax = _tiles(magnitude, block).amax(dim=-1).amax(dim=-2)
    # By a tensor: for a plain number torch on a GPU multiplies by its reciprocal, which may be the next float32.
    scale = (amax / torch.full_like(amax, E4M3_MAX)).clamp(min=_MIN_SCALE)
    if ue8m0 or pow2:
        exponent = round_up_to_power_of_two(scale)
        scale = (exponent << 23).view(torch.float32)
    stored = exponent.to(torch.uint8) if ue8m0 else scale
    data = cast_e4m3(_times_scale(x, 1.0 / scale, block))
    return QuantTensor(data, stored, block)


def dequantize(q: QuantTensor):
    """The float32 values that a QuantTensor stands for."""
    if 0 in [int(size) for size in q.shape]:
        return torch.zeros([int(size) for size in q.shape], dtype=torch.float32, device=beside(q.data))
    return _times_scale(q.data.to(torch.float32), scale_values(q.scale), q.block)


def quantize_rows(x, recipe: Recipe) -> QuantTensor:
    """Activations: one scale for each ``recipe.block`` elements along the last, reduced, dimension."""
    return quantize(x, recipe.row_block, ue8m0=recipe.ue8m0, pow2=recipe.pow2)


def quantize_weight(w_ERC, recipe: Recipe) -> tuple[QuantTensor, QuantTensor]:
    """Both orientations of one weight. Square blocks: the second orientation is the first, transposed."""
    forward = quantize(w_ERC, recipe.weight_block, ue8m0=recipe.ue8m0, pow2=recipe.pow2)
    if recipe.isotropic:
        return forward, transposed(forward)
    swapped = w_ERC.to(torch.float32).transpose(1, 2).contiguous()
    return forward, quantize(swapped, recipe.weight_block, ue8m0=recipe.ue8m0, pow2=recipe.pow2)


def quantize_weights(w1_EFH, w2_EHI, recipe: Recipe) -> QuantWeights:
    """Both orientations of both weights."""
    w1, w1_t = quantize_weight(w1_EFH, recipe)
    w2, w2_t = quantize_weight(w2_EHI, recipe)
    return QuantWeights(w1=w1, w2=w2, w1_t=w1_t, w2_t=w2_t)


def transposed(q: QuantTensor) -> QuantTensor:
    """[E,R,C] -> [E,C,R]: the same bytes in the other order, with storage of their own."""
    data = q.data.view(torch.uint8).to(torch.int32).transpose(1, 2).contiguous().to(torch.uint8)
    scale = q.scale.transpose(1, 2).contiguous()
    return QuantTensor(data.view(torch.float8_e4m3fn), scale, (q.block[1], q.block[0]))
