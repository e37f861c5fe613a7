"""PaddleFleet's FP8 settings, as its MoE layer fills them in, and what they mean here."""

from dataclasses import dataclass, fields

from ..config import SonicMoEConfig


@dataclass
class FleetFP8Config:
    """Attributes that PaddleFleet sets (first group) and reads (second). ``None`` leaves the configuration's value.

    PaddleFleet sets both ``fuse_y1`` switches, and nothing here depends on them: the activation is quantized where it
    is made, from its float32 value and not from that value rounded to bf16, which is never nearer.
    """

    enabled: bool | None = None
    fp8_wgrad: bool | None = None
    recompute_z: bool | None = None
    swiglu_clamp_value: float | None = None  # None and 0.0: no clamp
    fuse_y1_quant: bool = True
    fuse_y1_bf16_trunc: bool = True

    epilogue_quant: bool = True
    save_z_fp8: bool = True
    fused_gated: bool = True


# What the layer always does; asking for the opposite must not be taken for done.
_FIXED = {"epilogue_quant": True, "save_z_fp8": True, "fused_gated": True}


def resolve(fp8: bool, fp8_config) -> SonicMoEConfig:
    """The configuration of one ``run_sonic_moe`` call. ``fp8`` decides whether FP8 is on; ``fp8_config`` how."""
    if isinstance(fp8_config, SonicMoEConfig):
        # What the environment says yields to the argument; what the caller said must not be taken for done.
        if fp8_config.use_fp8 != bool(fp8) and fp8_config.source_of("use_fp8") == "argument":
            raise ValueError(f"fp8_config.use_fp8: got {fp8_config.use_fp8} with fp8={bool(fp8)}; need the same")
        return fp8_config.replace(use_fp8=bool(fp8))
    config = SonicMoEConfig.current().replace(use_fp8=bool(fp8))
    if fp8_config is None:
        return config
    known = [field.name for field in fields(FleetFP8Config)]
    if not any(hasattr(fp8_config, name) for name in known):
        raise TypeError(
            f"fp8_config: got {type(fp8_config).__name__}, need None, a SonicMoEConfig or an object with some of the "
            f"attributes {known}"
        )
    for name, fixed in _FIXED.items():
        if bool(getattr(fp8_config, name, fixed)) != fixed:
            given = getattr(fp8_config, name)
            raise ValueError(f"fp8_config.{name}: got {given!r}, need {fixed}, which is what runs here")
    enabled = getattr(fp8_config, "enabled", None)
    if enabled is not None and bool(enabled) != bool(fp8):
        raise ValueError(f"fp8_config.enabled: got {enabled!r} with fp8={bool(fp8)}; need the same")
    changes = {}
    for ours, theirs in (("fp8_wgrad", "fp8_wgrad"), ("fp8_recompute_z", "recompute_z")):
        value = getattr(fp8_config, theirs, None)
        if value is not None:
            changes[ours] = bool(value)
    clamp = getattr(fp8_config, "swiglu_clamp_value", None)
    if clamp:  # PaddleFleet writes 0.0 for "no clamp"
        changes["swiglu_clamp"] = clamp
    return config.replace(**changes)
