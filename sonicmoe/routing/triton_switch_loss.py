"""The load-balancing loss of ``switch_loss.py`` in Triton: two launches forward, one backward, no atomics: every sum
has its order.

Compiled once for each (E, type of the logits); the number of tokens is no part of a kernel's key.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..launch import beside
from ..triton_launch import launch, next_power_of_2

_WARPS = 4
_ELEMENTS = 1024  # of the logits that one program holds at a time
_PROGRAMS = 128  # at most: each leaves one row of sums for the one program that adds them up
_ROWS_AT_ONCE = 16
_SMALLEST = tl.constexpr(1e-12)


@triton.jit
def _probabilities(logits, row, n_tokens, E: tl.constexpr, LANES: tl.constexpr):
    """Softmax of some rows [ROWS, LANES], 0 in rows and columns that do not exist."""
    expert = tl.arange(0, LANES)[None, :]
    exists = row[:, None] < n_tokens
    value = tl.load(logits + row[:, None] * E + expert, mask=exists & (expert < E), other=float("-inf")).to(tl.float32)
    # A row of nothing but -inf would give NaN where none is meant.
    value = tl.where(exists, value, 0.0)
    power = tl.where(expert < E, tl.exp(value - tl.max(value, axis=1, keep_dims=True)), 0.0)
    return tl.where(exists, power / tl.sum(power, axis=1, keep_dims=True), 0.0)


@triton.jit(do_not_specialize=["n_tokens"])
def _column_sums(logits, partials, n_tokens, E: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Program p adds the probabilities of blocks p, p + programs, ... of ROWS tokens."""
    sums = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(n_tokens, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        sums += _probabilities(logits, row, n_tokens, E, LANES)
    expert = tl.arange(0, LANES)
    tl.store(partials + tl.program_id(0) * E + expert, tl.sum(sums, axis=0), mask=expert < E)


@triton.jit(do_not_specialize=["n_parts"], do_not_specialize_on_alignment=["frequency"])
def _loss(partials, frequency, loss, n_parts, E: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    expert = tl.arange(0, LANES)
    sums = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for first in tl.range(0, n_parts, ROWS):
        part = first + tl.arange(0, ROWS)[:, None]
        at = part * E + expert[None, :]
        sums += tl.load(partials + at, mask=(part < n_parts) & (expert[None, :] < E), other=0.0)
    probs = tl.sum(sums, axis=0)
    slots = tl.load(frequency + expert, mask=expert < E, other=0).to(tl.float32)
    # Each divided by its sum before they are multiplied: the products of the sums would be large.
    probs /= tl.maximum(tl.sum(probs, axis=0), _SMALLEST)
    slots /= tl.maximum(tl.sum(slots, axis=0), _SMALLEST)
    tl.store(loss, E * tl.sum(probs * slots, axis=0))


@triton.jit(do_not_specialize=["n_tokens"], do_not_specialize_on_alignment=["frequency", "dloss"])
def _loss_backward(
    logits, frequency, dloss, dlogits, n_tokens, E: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, LANES)
    probs = _probabilities(logits, row, n_tokens, E, LANES)
    slots = tl.load(frequency + expert, mask=expert < E, other=0).to(tl.float32)
    dprobs = slots / tl.maximum(tl.sum(slots, axis=0), _SMALLEST) * (tl.load(dloss).to(tl.float32) * E / n_tokens)
    value = probs * (dprobs[None, :] - tl.sum(probs * dprobs[None, :], axis=1, keep_dims=True))
    mask = (row[:, None] < n_tokens) & (expert[None, :] < E)
    tl.store(dlogits + row[:, None] * E + expert[None, :], value.to(dlogits.dtype.element_ty), mask=mask)


@cache
def _sizes(n_experts: int) -> dict:
    lanes = next_power_of_2(n_experts)
    return {"E": n_experts, "LANES": lanes, "ROWS": max(1, _ELEMENTS // lanes)}


def switch_loss(logits_TE, frequency_E):
    """0-d float32."""
    n_tokens, n_experts = int(logits_TE.shape[0]), int(logits_TE.shape[1])
    sizes = _sizes(n_experts)
    n_parts = min(-(-n_tokens // sizes["ROWS"]), _PROGRAMS)
    loss = torch.empty([], dtype=torch.float32, device=beside(logits_TE))
    partials = torch.empty([max(n_parts, 1), n_experts], dtype=torch.float32, device=beside(logits_TE))
    if n_parts:
        launch(_column_sums, n_parts, (logits_TE.contiguous(), partials, n_tokens), sizes, num_warps=_WARPS)
    operands = (partials, frequency_E, loss, n_parts)
    launch(_loss, 1, operands, {**sizes, "ROWS": min(_ROWS_AT_ONCE, sizes["ROWS"])}, num_warps=_WARPS)
    return loss


def switch_loss_backward(dloss, logits_TE, frequency_E):
    n_tokens, n_experts = int(logits_TE.shape[0]), int(logits_TE.shape[1])
    logits_TE = logits_TE.contiguous()
    dlogits = torch.empty_like(logits_TE)
    if n_tokens:
        sizes = _sizes(n_experts)
        operands = (logits_TE, frequency_E, dloss, dlogits, n_tokens)
        launch(_loss_backward, -(-n_tokens // sizes["ROWS"]), operands, sizes, num_warps=_WARPS)
    return dlogits
