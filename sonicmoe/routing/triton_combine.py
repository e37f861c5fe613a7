"""Sums over a token's slots, scores by row and their gradients, in Triton: one launch each, no atomics, no wait.

``sum_slots`` and ``finish_ds`` are ``naive.sum_slots`` and ``naive.scatter_slot_grads`` of this folder, bit for bit
where the partial sums are one column. Compiled once for the static sizes (H, K, number of columns): how many tokens,
slots and rows there are is read at run time and is no part of a kernel's key. That is also why the index arrays must
not be looked at for alignment: they are cut out of one allocation, wherever the counts before them happen to end.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..launch import beside
from ..triton_launch import launch, next_power_of_2

_INDEX_ARRAYS = ["reverse", "slot_offset", "scores", "scatter", "source"]
_THREADS = 128  # of one program
_WARPS = (4, 2, 1)  # or fewer where these would have more columns than there are, at 16 bytes a thread
# At most so many times that for one program, and so many rows at once. A token whose slots are mostly on other ranks
# has one or two rows here: several programs would each wait for its index, and for little.
_PIECES = 7
_IN_FLIGHT = 2
_REGISTERS = 128


@triton.jit(do_not_specialize_on_alignment=_INDEX_ARRAYS)
def _sum_slots(
    rows, reverse, slot_offset, scores, out,
    H: tl.constexpr, APART: tl.constexpr, LANES: tl.constexpr, PIECES: tl.constexpr, IN_FLIGHT: tl.constexpr,
):  # fmt: skip
    """One token's slots added over PIECES times LANES columns, in slot order, from 0 as the definition does."""
    programs: tl.constexpr = (H + LANES * PIECES - 1) // (LANES * PIECES)
    token = tl.program_id(0) // programs
    column = tl.program_id(0) % programs * (LANES * PIECES) + tl.arange(0, LANES)
    first = tl.load(slot_offset + token)
    end = tl.load(slot_offset + token + 1)
    totals = ()
    for _ in tl.static_range(PIECES):
        totals = totals + (tl.zeros([LANES], dtype=tl.float32),)
    for begin in tl.range(first, end, IN_FLIGHT, num_stages=1):
        for number in tl.static_range(IN_FLIGHT):
            slot = begin + number
            row = tl.load(reverse + slot, mask=slot < end, other=0).to(tl.int64)
            if scores is not None:
                score = tl.load(scores + slot, mask=slot < end, other=0.0)
            sums = ()
            for piece in tl.static_range(PIECES):
                at = column + piece * LANES
                part = tl.load(rows + row * H + at, mask=(at < H) & (slot < end), other=0.0).to(tl.float32)
                if scores is not None:
                    part *= score
                sums = sums + (totals[piece] + part,)
            totals = sums
    # A token's own sum is never -0, so adding the 0 of an absent slot has left its bits alone.
    for piece in tl.static_range(PIECES):
        at = column + piece * LANES
        tl.store(out + token.to(tl.int64) * APART + at, totals[piece].to(out.dtype.element_ty), mask=at < H)


def sum_slots(rows_MH, routing, dtype, scores=None, out=None, first: int = 0):
    """[M,H] sorted rows -> [T,H]: each token's slots added in slot order, in float32, rounded once; 0 without slots.

    ``scores`` (by compact slot) weighs the rows. ``out`` [T,..] of ``dtype`` is written instead of new memory, from
    column ``first`` on.
    """
    width = int(rows_MH.shape[1])
    if out is None:
        out = torch.empty([routing.n_tokens, width], dtype=dtype, device=beside(rows_MH))
    apart = int(out.shape[1])
    if apart != width:
        out = out[:, first : first + width]
    if routing.n_tokens == 0 or width == 0:
        return out
    if routing.n_slots == 0:
        return out.zero_()
    warps, lanes, pieces, in_flight = _share(width, rows_MH.dtype == torch.float32, routing.n_topk)
    launch(
        _sum_slots,
        routing.n_tokens * -(-width // (lanes * pieces)),
        (rows_MH.contiguous(), routing.s_reverse_scatter_idx, routing.slot_offset, scores, out),
        {"H": width, "APART": apart, "LANES": lanes, "PIECES": pieces, "IN_FLIGHT": in_flight},
        num_warps=warps,
        # A multiply-add rounds once where the definition rounds twice.
        enable_fp_fusion=False,
        # Left to itself the assembler saves registers and waits for one row before it asks for the next.
        maxnreg=_REGISTERS,
    )
    return out


@cache
def _share(width: int, wide: bool, n_topk: int | None) -> tuple[int, int, int, int]:
    """(warps, LANES, PIECES, IN_FLIGHT) of ``_sum_slots``: as few lanes beyond the last column as possible."""
    found = []
    for warps in _WARPS:
        lanes = min(warps * 32 * (4 if wide else 8), next_power_of_2(width))
        pieces = _even_share(-(-width // lanes), _PIECES)
        found.append((-width % (lanes * pieces), -warps, lanes, pieces))
    _, warps, lanes, pieces = min(found)
    return -warps, lanes, pieces, _IN_FLIGHT if n_topk is None else _even_share(n_topk, _IN_FLIGHT)


def _even_share(whole: int, limit: int) -> int:
    """What one of as few rounds as possible takes, so that they are alike: 10 by at most 8 are 5 and 5, not 8 and 2."""
    return -(-whole // -(-whole // limit))


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=_INDEX_ARRAYS)
def _scores_by_row(scores, scatter, out, n_rows, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(scatter + row, mask=row < n_rows, other=0)
    tl.store(out + row, tl.load(scores + slot, mask=row < n_rows, other=0.0), mask=row < n_rows)


def scores_by_row(routing):
    """[M] float32: each sorted row's score, 0 for pads."""
    out = torch.empty([routing.n_rows], dtype=torch.float32, device=beside(routing.scores))
    if routing.n_rows:
        operands = (routing.scores, routing.s_scatter_idx, out, routing.n_rows)
        launch(_scores_by_row, -(-routing.n_rows // _THREADS), operands, {"ROWS": _THREADS}, num_warps=_THREADS // 32)
    return out


@triton.jit(do_not_specialize=["n_rows", "n_slots"], do_not_specialize_on_alignment=["gather", "scatter"])
def _gather_without_pads(gather, scatter, out, n_rows, n_slots, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = tl.load(scatter + row, mask=row < n_rows, other=0) < n_slots
    source = tl.where(real, row, row // BLOCK * BLOCK)
    tl.store(out + row, tl.load(gather + source, mask=row < n_rows, other=0), mask=row < n_rows)


def gather_without_pads(routing):
    """``x_gather_idx`` with each pad row's token that of the first row of its block, which is never a pad."""
    out = torch.empty([routing.n_rows], dtype=torch.int32, device=beside(routing.x_gather_idx))
    if routing.n_rows:
        operands = (routing.x_gather_idx, routing.s_scatter_idx, out, routing.n_rows, routing.n_slots)
        constants = {"BLOCK": routing.block, "ROWS": _THREADS}
        launch(_gather_without_pads, -(-routing.n_rows // _THREADS), operands, constants, num_warps=_THREADS // 32)
    return out


@triton.jit(do_not_specialize=["n_tokens"], do_not_specialize_on_alignment=_INDEX_ARRAYS)
def _finish_ds(
    partials, reverse, slot_offset, source, ds,
    n_tokens, K: tl.constexpr, K_LANES: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The rows of TOKENS tokens: the sums to where their slots came from, and 0 to every other place. Without
    ``slot_offset`` each slot is a row of its own."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    number = tl.arange(0, K_LANES)
    if slot_offset is None:
        first = token
        end = tl.where(token < n_tokens, token + 1, token)
    else:
        first = tl.load(slot_offset + token, mask=token < n_tokens, other=0)
        end = tl.load(slot_offset + token + 1, mask=token < n_tokens, other=0)
    slot = first[:, None] + number[None, :]
    here = slot < end[:, None]
    row = tl.load(reverse + slot, mask=here, other=0).to(tl.int64)
    total = tl.zeros([TOKENS, K_LANES], dtype=tl.float32)
    if COLUMNS % 4 == 0:
        # Four at a time, so that a load is of 16 bytes; added one by one all the same.
        four = tl.arange(0, 4)[None, None, :]
        for column in tl.static_range(0, COLUMNS, 4):
            address = partials + row[:, :, None] * COLUMNS + (column + four)
            parts = tl.load(address, mask=here[:, :, None], other=0.0)
            for one in tl.static_range(4):
                total += tl.sum(tl.where(four == one, parts, 0.0), axis=2)
    else:
        for column in tl.static_range(COLUMNS):
            total += tl.load(partials + row * COLUMNS + column, mask=here, other=0.0)
    if slot_offset is None:
        tl.store(ds + slot, total, mask=here)
    else:
        flat = tl.load(source + slot, mask=here, other=0)
        tl.store(ds + flat, total, mask=here)
        # One bit for each place of the token's row that a slot came from: K is at most 32.
        place = tl.where(here, flat - token[:, None] * K, 0)
        taken = tl.sum(tl.where(here, 1 << place, 0), axis=1)
        empty = (((taken[:, None] >> number[None, :]) & 1) == 0) & (number[None, :] < K) & (token[:, None] < n_tokens)
        zero = tl.zeros([TOKENS, K_LANES], dtype=tl.float32)
        tl.store(ds + token[:, None] * K + number[None, :], zero, mask=empty)


def finish_ds(partials_MB, routing):
    """[M,B] float32 parts of the scores' gradients, by sorted row -> [T,K]: each row's parts added from left to right,
    and 0 where no expert of this rank was meant; a list of slots keeps [S]. [M] is taken for one part a row."""
    columns = 1 if len(partials_MB.shape) == 1 else int(partials_MB.shape[1])
    listed = routing.n_topk is None
    n_rows, k = (routing.n_slots, 1) if listed else (routing.n_tokens, routing.n_topk)
    size = [n_rows] if listed else [n_rows, k]
    ds = torch.empty(size, dtype=torch.float32, device=beside(partials_MB))
    if n_rows == 0:
        return ds
    if routing.n_slots == 0:
        return ds.zero_()
    k_lanes = next_power_of_2(k)
    tokens = max(1, _THREADS // k_lanes)
    where = (None, None) if listed else (routing.slot_offset, routing.score_src_idx)
    launch(
        _finish_ds,
        -(-n_rows // tokens),
        (partials_MB.contiguous(), routing.s_reverse_scatter_idx, *where, ds, n_rows),
        {"K": k, "K_LANES": k_lanes, "COLUMNS": columns, "TOKENS": tokens},
        num_warps=_THREADS // 32,
    )
    return ds
