"""What one call of the engine does, decided once, before anything runs."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..config import HashedOnce
from ..enums import ActivationType, is_glu
from ..quant.formats import FP8_ROW_BLOCK, Recipe, make_recipe


@dataclass(frozen=True)
class Plan(HashedOnce):
    """Forward and backward of one call follow the same plan, whatever the configuration is by then."""

    activation: ActivationType
    clamp: float | None
    storage: str  # dtype of x, out and the stored activations: bfloat16, float16 or float32
    recipe: Recipe | None  # None: no FP8
    fp8_wgrad: bool
    recompute_z: bool
    stagewise: bool
    device: str
    backend: str
    cache_dir: Path  # where compiled kernels are kept
    multiprocessors: int | None  # at most so many for a GEMM; None is all

    __hash__ = HashedOnce.__hash__

    @property
    def row_block(self) -> int:
        """Rows that an expert's segment is filled to."""
        return 1 if self.recipe is None else FP8_ROW_BLOCK

    def width(self, intermediate_size: int) -> int:
        """Columns of the up-projection."""
        return intermediate_size * (2 if is_glu(self.activation) else 1)

    @property
    def path(self) -> str:
        """What runs, for people: ``cpu/naive/fp8-sm90+fp8_wgrad``."""
        if self.recipe is None:
            kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.storage]
        else:
            kind = f"fp8-{self.recipe.name}" + ("+iso32" if self.recipe.weight_rows == 32 else "")
            kind += "+pow2" if self.recipe.pow2 and not self.recipe.ue8m0 else ""
            kind += "+fp8_wgrad" if self.fp8_wgrad else "+bf16_wgrad"
        kind += "+recompute_z" if self.recompute_z else ""
        kind += "+stagewise" if self.stagewise else ""
        return f"{self.device}/{self.backend}/{kind}"


def make_plan(config, activation, *, storage: str, device: str, arch: str | None = None, x_name: str = "x") -> Plan:
    """Read the configuration once. ``device`` is the place's type: ``cpu``, or an accelerator's name; ``arch`` what
    nvcc calls the accelerator."""
    return _plan(config, ActivationType.parse(activation), storage, device, arch, x_name)


@lru_cache(maxsize=256)
def _plan(config, kind: ActivationType, storage: str, device: str, arch: str | None, x_name: str) -> Plan:
    if config.swiglu_clamp is not None and kind is not ActivationType.SWIGLU:
        raise ValueError(f"swiglu_clamp: got {config.swiglu_clamp} with activation {kind.value!r}, which has no clamp")
    recipe = None
    if config.use_fp8:
        if storage == "float32":
            raise TypeError(f"{x_name}: got dtype float32 under FP8, need bfloat16 or float16")
        name = "sm90" if config.fp8_recipe == "auto" else config.fp8_recipe
        recipe = make_recipe(name, iso32=config.fp8_iso32_weight, pow2=config.fp8_pow2_scale)
    return Plan(
        activation=kind,
        clamp=config.swiglu_clamp,
        storage=storage,
        recipe=recipe,
        fp8_wgrad=recipe is not None and config.fp8_wgrad,
        recompute_z=recipe is not None and config.fp8_recompute_z,
        stagewise=config.stagewise,
        device=device,
        backend=_backend(config, recipe, kind, storage, device, arch),
        cache_dir=config.cache_dir,
        multiprocessors=config.gemm_multiprocessors,
    )


def _backend(config, recipe, activation, storage: str, device: str, arch: str | None) -> str:
    if device == "cpu" or config.backend == "naive":
        return "naive"
    if arch == "sm_90a" and storage != "float32":
        if recipe is None:
            return "sm90_bf16"
        if recipe.name == "sm90" and activation is ActivationType.SWIGLU:
            return "sm90_fp8"
    kind = storage if recipe is None else f"FP8 ({recipe.name}) with {activation.value}"
    raise ValueError(
        f"device: got {device}{f' ({arch})' if arch else ''}, and this version has no kernels for {kind} there; set "
        "backend='naive' in SonicMoEConfig to run the reference engine, or use bfloat16 or float16 on Hopper, "
        "under FP8 with swiglu and the sm90 recipe"
    )
