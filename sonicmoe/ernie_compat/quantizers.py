"""Quantizers that a training framework calls by itself, around the layer."""

import paddle

from .. import checks
from ..config import SonicMoEConfig
from ..quant import api as quant
from ..quant.formats import Recipe, make_recipe
from .autocast import without_autocast


def _recipe(recipe: str | None, iso32: bool | None) -> tuple[Recipe, str]:
    """The recipe, and the backend that the configuration asks for."""
    config = SonicMoEConfig.current()
    name = recipe or ("sm90" if config.fp8_recipe == "auto" else config.fp8_recipe)
    iso32 = config.fp8_iso32_weight if iso32 is None else bool(iso32)
    return make_recipe(name, iso32=iso32, pow2=config.fp8_pow2_scale), config.backend


def quantize_native_fp8_weights(w1, w2, iso32=None, recipe=None):
    """(fp8, transposed_fp8) pairs of both native weights, for ``weight.fp8`` and ``weight.transposed_fp8``:

        (w1_fp8, w1_scale), (w1t_fp8, w1t_scale), (w2_fp8, w2_scale), (w2t_fp8, w2t_scale)

    The recipe is the configuration's unless given; ``iso32`` asks for 32x32 blocks, which the sm100 recipe has.
    """
    for name, weight in (("w1", w1), ("w2", w2)):
        checks.require_tensor(name, weight)
        checks.require_rank(name, weight, 3, "in native layout")
        checks.require_dtype(name, weight, checks.FLOAT_DTYPES)
        if any(size % checks.FP8_ALIGN for size in checks.shape_of(weight)[1:]):
            given = list(checks.shape_of(weight))
            raise ValueError(f"{name}: got shape {given}, need multiples of {checks.FP8_ALIGN} after E for FP8 blocks")
    with paddle.no_grad(), without_autocast():
        copies = quant.quantize_weights(w1.detach(), w2.detach(), *_recipe(recipe, iso32))
    return tuple((q.data, q.scale) for q in (copies.w1, copies.w1_t, copies.w2, copies.w2_t))


def quantize_activation_blockscaled_fast(x, recipe=None):
    """(e4m3 [T,H], scales): float32 [T,H/128] for sm90, UE8M0 bytes [T,H/32] for sm100."""
    checks.require_tensor("x", x)
    checks.require_rank("x", x, 2, "[T, H]")
    checks.require_dtype("x", x, checks.FLOAT_DTYPES)
    hidden = checks.shape_of(x)[1]
    if hidden % checks.FP8_ALIGN:
        raise ValueError(f"x: got {hidden} channels, need a multiple of {checks.FP8_ALIGN} for FP8 blocks")
    with paddle.no_grad(), without_autocast():
        rows = quant.quantize_rows(x.detach(), *_recipe(recipe, False))
    return rows.data, rows.scale
