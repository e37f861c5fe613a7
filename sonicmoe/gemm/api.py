"""The fused stages that a backend provides, and the choice of a backend.

Legend: T tokens, M sorted (padded) rows, S slots, E experts, H hidden, I intermediate, F = 2I for GLU kinds, else I.
An *operand* is a plain tensor, or a ``QuantTensor`` under FP8. A stage is as much as one kernel can do in one go: a
grouped GEMM with its gather and its epilogue. Quantization is part of the epilogue that makes a tensor, so no stage
hands FP8 work to the next one in a wider type.
"""

import contextlib
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from ..quant.formats import QuantWeights
from . import naive, sm90_bf16, sm90_fp8
from .plan import Plan


@dataclass(eq=False)
class ExpertWeights:
    """Native layout. Under FP8 only ``fp8`` is read, so the plain tensors may be gone."""

    w1_EFH: Any
    w2_EHI: Any
    fp8: QuantWeights | None
    hidden_size: int
    intermediate_size: int
    watch: Any = None  # quant.native_copies.Watch, where these are copies that somebody may write again


@dataclass
class GradBuffers:
    """Where wgrad goes, in place: fp32 accumulators that it adds to, or with ``overwrite`` tensors that it fills.

    ``w2_grouped``: dw2 lies as [E,I,H], the layout in which some callers keep ``main_grad``. ``experts1`` and
    ``experts2`` tell which experts take a gradient: a frozen expert's rows are neither computed nor touched.
    ``overwrite``: the buffers hold anything, NaN included, and their dtype is the caller's choice: sums are taken in
    fp32 and rounded to it once, and an expert without tokens gets zeros.
    """

    dw1_EFH: Any
    dw2: Any
    w2_grouped: bool
    experts1: tuple[bool, ...]
    experts2: tuple[bool, ...]
    overwrite: bool = False


class Stages(Protocol):
    """What ``sm90_bf16``, ``sm90_fp8`` and the rest implement; ``naive`` is the definition.

    ``out``: contiguous tensors of the results' shapes and of the storage type, in the order of the results, for a
    caller who has them already; None (the whole or a member) where the stage allocates. Never given under FP8.
    """

    def build_ahead(self, plan: Plan, arch: str) -> None:
        """Compile what calls under ``plan`` launch and the cache does not hold. For another thread than theirs."""

    def prepare_rows(self, x, plan: Plan):
        """[T,H] as a row operand: as it is, quantized once a token, or requantized if the blocks differ."""

    def up_projection(self, x_rows, weights: ExpertWeights, routing, plan: Plan, need_a: bool, out=None):
        """(z [M,F] as kept for backward, operand a [M,I] or None): gather, x @ W1^T, activation."""

    def down_projection(self, a, weights: ExpertWeights, routing, plan: Plan, out=None):
        """y [M,H] = a @ W2^T."""

    def down_projection_backward(
        self, dout_rows, z, weights: ExpertWeights, routing, plan: Plan, need_wgrad: bool, out=None
    ):
        """(dz, p*a or None, parts of ds): gather dout, dA = dout @ W2, activation backward, score gradient.

        ``out`` is (dz, p*a). The parts are for ``score_gradient`` alone. ``OVERWRITES_Z`` of a backend tells whether dz
        may come back in z's memory.
        """

    def score_gradient(self, ds_parts, routing, plan: Plan):
        """ds [T,K] float32, 0 where no expert of this rank was meant."""

    def up_projection_backward(self, dz, weights: ExpertWeights, routing, plan: Plan, out=None):
        """dx by slot [M,H] = dz @ W1."""

    def sum_slots(self, rows, routing, plan: Plan, scores=None):
        """[T,H] of the storage type: each token's rows of [M,H], weighed by ``scores``, added in slot order."""

    def summed_down_projection(self, take_a, weights: ExpertWeights, routing, plan: Plan):
        """out [T,H]: ``down_projection``, then ``sum_slots`` by score. What lies between need never be whole.

        ``take_a`` hands a over, once: nobody else holds it, so it is gone before the sums need memory.
        """

    def summed_up_projection_backward(self, dz, weights: ExpertWeights, routing, plan: Plan):
        """dx [T,H]: ``up_projection_backward``, then ``sum_slots``."""

    def after_dx(self, dz):
        """What dW1 alone needs of dz. ``DX_FIRST`` of a backend tells whether dx comes before the weight gradients."""

    def accumulate_dw1(self, dz, x, routing, plan: Plan, buffers: GradBuffers) -> None:
        """dW1[e] += dz^T x, x gathered; ``=`` under ``buffers.overwrite``."""

    def accumulate_dw2(self, pa, dout, routing, plan: Plan, buffers: GradBuffers) -> None:
        """dW2[e] += dout^T (p*a), dout gathered; ``=`` under ``buffers.overwrite``."""


_BACKENDS = {"naive": naive, "sm90_bf16": sm90_bf16, "sm90_fp8": sm90_fp8}


def stages(plan: Plan) -> Stages:
    return _BACKENDS[plan.backend]


@cache
def build_ahead(plan: Plan, arch: str) -> None:
    """Begin to compile what is missing, once a plan, and return at once: the calls themselves come to their GEMMs only
    after other compilers have run, one by one, and wait for this then as they would for another process."""
    threading.Thread(target=_build_quietly, args=(plan, arch), name="sonicmoe-build", daemon=True).start()


def _build_quietly(plan: Plan, arch: str) -> None:
    # What goes wrong here goes wrong again in the call, which says so.
    with contextlib.suppress(Exception):
        stages(plan).build_ahead(plan, arch)
