"""The fused stages that a backend provides, and the choice of a backend.

Legend: T tokens, M sorted (padded) rows, S slots, E experts, H hidden, I intermediate, F = 2I for GLU kinds, else I.
An *operand* is a plain tensor, or a ``QuantTensor`` under FP8. A stage is as much as one kernel can do in one go: a
grouped GEMM with its gather and its epilogue. Quantization is part of the epilogue that makes a tensor, so no stage
hands FP8 work to the next one in a wider type.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from ..quant.formats import QuantWeights
from . import naive
from .plan import Plan


@dataclass(frozen=True)
class ExpertWeights:
    """Native layout. Under FP8 only ``fp8`` is read, so the plain tensors may be gone."""

    w1_EFH: Any
    w2_EHI: Any
    fp8: QuantWeights | None
    hidden_size: int
    intermediate_size: int


@dataclass
class GradBuffers:
    """fp32 accumulators that wgrad adds to, in place.

    ``w2_grouped``: dw2 lies as [E,I,H], the layout in which some callers keep ``main_grad``. ``experts1`` and
    ``experts2`` tell which experts take a gradient: a frozen expert's rows are neither computed nor touched.
    """

    dw1_EFH: Any
    dw2: Any
    w2_grouped: bool
    experts1: tuple[bool, ...]
    experts2: tuple[bool, ...]


class Stages(Protocol):
    """What ``sm90_bf16``, ``sm90_fp8`` and the rest implement; ``naive`` is the definition."""

    def prepare_rows(self, x, plan: Plan):
        """[T,H] as a row operand: as it is, quantized once a token, or requantized if the blocks differ."""

    def up_projection(self, x_rows, weights: ExpertWeights, routing, plan: Plan, need_a: bool):
        """(z [M,F] as kept for backward, operand a [M,I] or None): gather, x @ W1^T, activation."""

    def down_projection(self, a, weights: ExpertWeights, routing, plan: Plan):
        """y [M,H] = a @ W2^T."""

    def down_projection_backward(self, dout_rows, z, weights: ExpertWeights, routing, plan: Plan, need_wgrad: bool):
        """(dz, p*a or None, ds [S]): gather dout, dA = dout @ W2, activation backward, score gradient."""

    def up_projection_backward(self, dz, weights: ExpertWeights, routing, plan: Plan):
        """dx by slot [M,H] = dz @ W1."""

    def accumulate_dw1(self, dz, x, routing, plan: Plan, buffers: GradBuffers) -> None:
        """dW1[e] += dz^T x, x gathered."""

    def accumulate_dw2(self, pa, dout, routing, plan: Plan, buffers: GradBuffers) -> None:
        """dW2[e] += dout^T (p*a), dout gathered."""


_BACKENDS = {"naive": naive}


def stages(plan: Plan) -> Stages:
    return _BACKENDS[plan.backend]
