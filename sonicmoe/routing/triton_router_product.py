"""The router's product with few tokens, and what its gradient gives back to them, in Triton: one launch each.

A library of GEMMs does both as fast, but to ask it takes the host as long as five launches do, and at few tokens a step
waits for the host. Compiled once for each (E, H, type); the number of tokens is no part of a kernel's key.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..launch import beside
from ..triton_launch import launch, next_power_of_2

DTYPES = ("bfloat16", "float16")  # float32 has ways of its own to be multiplied, and torch's settings for them
# Up to here: with more the GPU is what a step waits for, and loses a little of its time to these.
MOST_TOKENS = 4096
_FEW_EXPERTS = 32  # to which the tokens are nearly all that is read


@triton.jit(do_not_specialize=["n_tokens"])
def _logits(
    x, weight, logits, n_tokens,
    E: tl.constexpr, H: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """TOKENS rows and EXPERTS columns of x @ weight^T, summed along H in one order whatever the number of tokens."""
    across: tl.constexpr = (E + EXPERTS - 1) // EXPERTS
    token = (tl.program_id(0) // across).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(0) % across * EXPERTS + tl.arange(0, EXPERTS)
    exists, known = token < n_tokens, expert < E
    total = tl.zeros([TOKENS, EXPERTS], dtype=tl.float32)
    for begin in tl.range(0, H, STEP, num_stages=4):
        column = begin + tl.arange(0, STEP)
        here = column < H
        left = tl.load(x + token[:, None] * H + column[None, :], mask=exists[:, None] & here[None, :], other=0.0)
        right = tl.load(weight + expert[None, :] * H + column[:, None], mask=known[None, :] & here[:, None], other=0.0)
        total = tl.dot(left, right, total)
    at = logits + token[:, None] * E + expert[None, :]
    tl.store(at, total.to(logits.dtype.element_ty), mask=exists[:, None] & known[None, :])


@triton.jit(do_not_specialize=["n_tokens"])
def _add_product(
    dx, dlogits, weight, n_tokens,
    E: tl.constexpr, H: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx += dlogits @ weight over TOKENS rows and COLUMNS columns, added up in float32 and rounded once."""
    across: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // across).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    exists, here = token < n_tokens, column < H
    at, mask = dx + token[:, None] * H + column[None, :], exists[:, None] & here[None, :]
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for begin in tl.static_range(0, E, EXPERTS):
        expert = begin + tl.arange(0, EXPERTS)
        known = expert < E
        left = tl.load(dlogits + token[:, None] * E + expert[None, :], mask=exists[:, None] & known[None, :], other=0.0)
        right = tl.load(weight + expert[:, None] * H + column[None, :], mask=known[:, None] & here[None, :], other=0.0)
        total = tl.dot(left, right, total)
    tl.store(at, total.to(dx.dtype.element_ty), mask=mask)


@cache
def _sizes(n_experts: int, hidden: int) -> tuple[dict, dict]:
    """The constants of both kernels."""
    experts = max(next_power_of_2(n_experts), 16)  # a product of tensor cores has no fewer
    tokens, step = (32, 128) if n_experts <= _FEW_EXPERTS else (64, 64)
    of_logits = {"E": n_experts, "H": hidden, "EXPERTS": min(experts, 128), "TOKENS": tokens, "STEP": step}
    return of_logits, {"E": n_experts, "H": hidden, "EXPERTS": min(experts, 64), "TOKENS": 64, "COLUMNS": 128}


def logits(x_TH, weight_EH):
    """[T,E] of the type that both have."""
    n_tokens, hidden, n_experts = int(x_TH.shape[0]), int(x_TH.shape[1]), int(weight_EH.shape[0])
    out = torch.empty([n_tokens, n_experts], dtype=x_TH.dtype, device=beside(x_TH))
    if n_tokens:
        sizes, _ = _sizes(n_experts, hidden)
        programs = -(-n_tokens // sizes["TOKENS"]) * -(-n_experts // sizes["EXPERTS"])
        launch(_logits, programs, (x_TH.contiguous(), weight_EH.contiguous(), out, n_tokens), sizes, num_warps=4)
    return out


def add_product(dx_TH, dlogits_TE, weight_EH):
    """dx + dlogits @ weight, all of one type, in the place of dx, which is contiguous."""
    n_tokens, hidden, n_experts = int(dx_TH.shape[0]), int(dx_TH.shape[1]), int(weight_EH.shape[0])
    if n_tokens:
        _, sizes = _sizes(n_experts, hidden)
        programs = -(-n_tokens // sizes["TOKENS"]) * -(-hidden // sizes["COLUMNS"])
        operands = (dx_TH, dlogits_TE.contiguous(), weight_EH.contiguous(), n_tokens)
        launch(_add_product, programs, operands, sizes, num_warps=4)
    return dx_TH
