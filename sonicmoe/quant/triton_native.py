"""Weights from the layout that checkpoints hold into the one that kernels read, in Triton: one launch for all experts.

per expert or grouped   w1 [.., H, 2I] columns gate|up     w2 [.., I, H]
native                  w1 [E, 2I, H]  rows g0,u0,g1,u1..  w2 [E, H, I]
"""

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


@triton.jit(do_not_specialize_on_alignment=["changed", "epoch"])
def _count_change(epoch, changed, N: tl.constexpr, LANES: tl.constexpr):
    number = tl.arange(0, LANES)
    any_changed = tl.max(tl.load(changed + number, mask=number < N, other=0))
    tl.store(epoch, tl.load(epoch) + any_changed)


def count_change(epoch, changed, n: int) -> None:
    """Add 1 to ``epoch`` if one of the ``n`` flags is set."""
    launch(_count_change, 1, (epoch, changed), {"N": n, "LANES": triton.next_power_of_2(n)}, num_warps=1)


def room(n_experts: int, like, dtype):
    """[E,C,R] for tensors like ``like`` [..,R,C]."""
    n_rows, n_columns = int(like.shape[-2]), int(like.shape[-1])
    return torch.empty([n_experts, n_columns, n_rows], dtype=dtype, device=beside(like))
