"""FP8 recipes and the tensor that carries its block scales.

e4m3 data ``[..., R, C]`` has one scale for each ``block = (rows, cols)`` tile: ``scale [..., R/rows, C/cols]``.
Scales are float32, or UE8M0 exponent bytes (value 2**(byte-127), 255 is NaN) kept as uint8, because not every
framework that we run under has a dtype for them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

E4M3_MAX = 448.0
# Row segments of every expert are filled to this many rows under FP8: the tile height of the kernels and the
# longest wgrad block.
FP8_ROW_BLOCK = 128


@dataclass(frozen=True)
class Recipe:
    """How one architecture wants its FP8 operands."""

    name: str
    block: int  # elements along the reduced dimension that share a scale
    weight_rows: int  # rows of a weight that share a scale
    ue8m0: bool  # scales are power-of-two exponent bytes, not float32
    pow2: bool  # float32 scales are rounded up to a power of two

    @property
    def row_block(self) -> tuple[int, int]:
        return (1, self.block)

    @property
    def weight_block(self) -> tuple[int, int]:
        return (self.weight_rows, self.block)

    @property
    def isotropic(self) -> bool:
        """Square weight blocks: the transposed copy's bytes follow from the first."""
        return self.weight_rows == self.block


def make_recipe(name: str, *, iso32: bool = False, pow2: bool = False) -> Recipe:
    if name == "sm90":
        if iso32:
            raise ValueError("fp8_iso32_weight: 32x32 weight blocks belong to recipe 'sm100', got recipe 'sm90'")
        return Recipe("sm90", block=128, weight_rows=128, ue8m0=False, pow2=pow2)
    if name == "sm100":
        return Recipe("sm100", block=32, weight_rows=32 if iso32 else 1, ue8m0=True, pow2=True)
    raise ValueError(f"fp8_recipe: got {name!r}, need 'sm90' or 'sm100'")


@dataclass(eq=False)
class QuantTensor:
    """e4m3 data with its block scales."""

    data: Any
    scale: Any
    block: tuple[int, int]

    @property
    def shape(self):
        return self.data.shape

    def matches(self, recipe: Recipe) -> bool:
        """Whether a row-quantized tensor can be an operand of this recipe as it is."""
        ue8m0 = str(self.scale.dtype).endswith("uint8")
        return self.block == recipe.row_block and ue8m0 == recipe.ue8m0

    def places(self) -> tuple[int, int]:
        """Where the codes and the scales begin."""
        return self.data.data_ptr() or 0, self.scale.data_ptr() or 0

    def taken_apart(self):
        """(tensors, what makes this of them again). The second holds none of them."""
        return (self.data, self.scale), partial(_of_parts, self.block)


def _of_parts(block, data, scale) -> QuantTensor:
    return QuantTensor(data, scale, block)


@dataclass(frozen=True)
class QuantWeights:
    """Both orientations of both weights, each K-major for the GEMM that reads it.

    w1 [E,F,H] and w2 [E,H,I] serve forward; w1_t [E,H,F] and w2_t [E,I,H] serve backward.
    """

    w1: QuantTensor
    w2: QuantTensor
    w1_t: QuantTensor
    w2_t: QuantTensor
