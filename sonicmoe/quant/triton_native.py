"""Weights from the layout that checkpoints hold into the one that kernels read, in Triton: one launch for all experts.

per expert or grouped   w1 [.., H, 2I] columns gate|up     w2 [.., I, H]
native                  w1 [E, 2I, H]  rows g0,u0,g1,u1..  w2 [E, H, I]
"""

import math

import torch
import triton
import triton.language as tl

from ..launch import beside
from ..triton_launch import launch

_SIDE = 64
_S = tl.constexpr(_SIDE)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["table", "changed"])
def _to_native(
    like, table, changed, out, first,
    R: tl.constexpr, C: tl.constexpr, HELD: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's [R,C], written as columns become rows. The tensors lie where ``table`` (of
    ``triton_fingerprint``) says, from its row ``first`` on, HELD experts in each; nothing is done where ``changed`` is
    0. ``like`` is one of them and tells their type."""
    across: tl.constexpr = (C + _S - 1) // _S
    down: tl.constexpr = (R + _S - 1) // _S
    expert = tl.program_id(0) // (across * down)
    tensor = first + expert // HELD
    if changed is not None:
        if tl.load(changed + tensor) == 0:
            return
    start = tl.load(table + tensor * 4) - (tl.load(table + tensor * 4 + 3) & 15)
    source = start.to(like.dtype) + (expert % HELD).to(tl.int64) * (R * C)
    row = tl.program_id(0) // across % down * _S + tl.arange(0, _S)
    column = tl.program_id(0) % across * _S + tl.arange(0, _S)
    here = (row < R)[:, None] & (column < C)[None, :]
    value = tl.load(source + row[:, None] * C + column[None, :], mask=here)
    if GATED:
        half: tl.constexpr = C // 2
        target = tl.where(column < half, column * 2, (column - half) * 2 + 1)
    else:
        target = column
    at = out + expert.to(tl.int64) * (R * C) + target[:, None] * R + row[None, :]
    tl.store(at, tl.trans(value).to(out.dtype.element_ty), mask=(column < C)[:, None] & (row < R)[None, :])


def to_native(tensors, first: int, n_experts: int, table, changed, out, gated: bool) -> None:
    """``tensors`` ([R,C] of each expert, or one [E,R,C]) into ``out`` [E,C,R], ``gated`` with gate and up in turns.

    ``table`` is a ``triton_fingerprint.Table`` in which they begin at row ``first``; ``changed`` has a flag for each of
    its rows, or is None where everything is to be written."""
    like = tensors[0]
    n_rows, n_columns = int(like.shape[-2]), int(like.shape[-1])
    tiles = -(-n_rows // _SIDE) * -(-n_columns // _SIDE)
    constants = {"R": n_rows, "C": n_columns, "HELD": n_experts // len(tensors), "GATED": gated}
    launch(_to_native, n_experts * tiles, (like, table.rows, changed, out, first), constants, num_warps=4)


@triton.jit(do_not_specialize_on_alignment=["changed", "epoch", "mark"])
def _count_change(epoch, changed, mark, N: tl.constexpr, LANES: tl.constexpr):
    number = tl.arange(0, LANES)
    any_changed = tl.max(tl.load(changed + number, mask=number < N, other=0))
    now = tl.load(epoch) + any_changed
    tl.store(epoch, now)
    tl.store(mark, now)


def count_change(epoch, changed, mark, n: int) -> None:
    """Add 1 to ``epoch`` if one of the ``n`` flags is set, and note in ``mark`` what it is now."""
    launch(_count_change, 1, (epoch, changed, mark), {"N": n, "LANES": triton.next_power_of_2(n)}, num_warps=1)


_SPOILED = ("a", "b", "c", "d")
_LENGTHS = tuple(f"n_{name}" for name in _SPOILED)
_LANES = 1024
_PROGRAMS = 256  # so few that they cost next to nothing where there is nothing to do


@triton.jit
def _fill_with_nan(out, n, LANES: tl.constexpr):
    lane = tl.arange(0, LANES).to(tl.int64)
    length = n.to(tl.int64)
    nan = tl.full([LANES], float("nan"), tl.float32).to(out.dtype.element_ty)
    apart = tl.num_programs(0).to(tl.int64) * LANES
    begin = tl.program_id(0).to(tl.int64) * LANES
    while begin < length:
        tl.store(out + begin + lane, nan, mask=begin + lane < length)
        begin += apart


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=["epoch", "mark", "told", *_SPOILED])
def _spoil_if_changed(epoch, mark, told, a, b, c, d, n_a, n_b, n_c, n_d, LANES: tl.constexpr):
    if tl.load(epoch) != tl.load(mark):
        tl.store(told, 1)
        if a is not None:
            _fill_with_nan(a, n_a, LANES)
        if b is not None:
            _fill_with_nan(b, n_b, LANES)
        if c is not None:
            _fill_with_nan(c, n_c, LANES)
        if d is not None:
            _fill_with_nan(d, n_d, LANES)


def spoil_if_changed(epoch, mark, told, tensors) -> None:
    """If ``epoch`` is not ``mark`` any more, fill the ``tensors`` (contiguous, up to 4, or None) with NaN and set
    ``told``."""
    given = [None if tensor is None or 0 in tensor.shape else tensor for tensor in tensors]
    given += [None] * (len(_SPOILED) - len(given))
    lengths = [0 if tensor is None else math.prod(tensor.shape) for tensor in given]
    operands = (epoch, mark, told, *given, *lengths)
    launch(_spoil_if_changed, _PROGRAMS, operands, {"LANES": _LANES}, num_warps=4)


def room(n_experts: int, like, dtype):
    """[E,C,R] for tensors like ``like`` [..,R,C]."""
    n_rows, n_columns = int(like.shape[-2]), int(like.shape[-1])
    return torch.empty([n_experts, n_columns, n_rows], dtype=dtype, device=beside(like))
