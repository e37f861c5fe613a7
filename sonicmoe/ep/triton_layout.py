"""``naive_layout`` in Triton: two launches, no atomics, and nothing that needs the counts on the host first.

Tokens are cut into blocks. The first launch counts each block's rows by rank and slots by expert; the second adds up
what lies before a block, which gives each of its rows a place, and writes everything. Arrays of rows are made for the
most that can leave, so both run while the counts travel.
"""

import torch
import triton
import triton.language as tl

from .. import checks
from ..launch import beside, cut
from ..triton_launch import launch, next_power_of_2

_PAIRS = 1024  # tokens times ranks of one program
_TOKENS = 64  # at most


@triton.jit
def _expert_of(indices, slot, exists, n_experts):
    """n_experts for a slot without one. The id is compared at its own width."""
    identity = tl.load(indices + slot, mask=exists, other=-1)
    return tl.where((identity >= 0) & (identity < n_experts), identity, n_experts).to(tl.int32)


@triton.jit
def _goes(indices, token, n_tokens, n_experts, held, K: tl.constexpr, RANKS: tl.constexpr):
    """[tokens, RANKS]: 1 where the rank holds one of the token's experts."""
    rank = tl.arange(0, RANKS)
    goes = (token[:, None] < 0) & (rank[None, :] < 0)
    for k in range(K):
        expert = _expert_of(indices, token.to(tl.int64) * K + k, token < n_tokens, n_experts)
        goes |= (expert < n_experts)[:, None] & ((expert // held)[:, None] == rank[None, :])
    return goes.to(tl.int32)


@triton.jit(
    do_not_specialize=["n_tokens", "n_experts", "held"],
    do_not_specialize_on_alignment=["indices", "block_rows", "block_slots"],
)
def _count_blocks(
    indices, block_rows, block_slots, n_tokens, n_experts, held,
    K: tl.constexpr, RANKS: tl.constexpr, BINS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Rows to each rank [blocks,RANKS] and slots of each expert [blocks,BINS]."""
    block = tl.program_id(0).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.sum(_goes(indices, token, n_tokens, n_experts, held, K, RANKS), axis=0)
    tl.store(block_rows + block * RANKS + tl.arange(0, RANKS), rows)
    slots = tl.zeros([BINS], dtype=tl.int32)
    for k in range(K):
        slots += tl.histogram(_expert_of(indices, token.to(tl.int64) * K + k, token < n_tokens, n_experts), BINS)
    tl.store(block_slots + block * BINS + tl.arange(0, BINS), slots)


@triton.jit
def _tell(block_rows, block_slots, counts, first, n_blocks, n_experts, held,
          RANKS: tl.constexpr, BINS: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """What the ranks are told of EXPERTS experts, and by the first of these programs of rows."""
    rank, expert = tl.arange(0, RANKS), first + tl.arange(0, EXPERTS)
    rows, slots = tl.zeros([RANKS], dtype=tl.int64), tl.zeros([EXPERTS], dtype=tl.int64)
    for begin in range(0, n_blocks, CHUNK):
        block = (begin + tl.arange(0, CHUNK)).to(tl.int64)[:, None]
        rows += tl.sum(tl.load(block_rows + block * RANKS + rank[None, :], mask=block < n_blocks, other=0), axis=0)
        there = (block < n_blocks) & (expert < n_experts)[None, :]
        slots += tl.sum(tl.load(block_slots + block * BINS + expert[None, :], mask=there, other=0), axis=0)
    tl.store(counts + expert // held * (1 + held) + 1 + expert % held, slots, mask=expert < n_experts)
    if first == 0:
        tl.store(counts + rank * (1 + held), rows, mask=rank < n_experts // held)


@triton.jit(
    do_not_specialize=["n_tokens", "n_experts", "held", "n_blocks"],
    # Most are cut out of one allocation, wherever the one before ends.
    do_not_specialize_on_alignment=[
        "indices",
        "probs",
        "block_rows",
        "block_slots",
        "counts",
        "token_of",
        "copy_row",
        "copy_offset",
        "slot_source",
    ],
)
def _place_rows(
    indices, probs, block_rows, block_slots, counts, token_of, side, copy_row, copy_offset, slot_source,
    n_tokens, n_experts, held, n_blocks,
    K: tl.constexpr, RANKS: tl.constexpr, BINS: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    mine = tl.program_id(0)
    if mine >= n_blocks:
        first = (mine - n_blocks) * EXPERTS
        _tell(block_rows, block_slots, counts, first, n_blocks, n_experts, held, RANKS, BINS, EXPERTS, CHUNK)
        return
    rank = tl.arange(0, RANKS)
    before, total = tl.zeros([RANKS], dtype=tl.int32), tl.zeros([RANKS], dtype=tl.int32)
    for begin in range(0, n_blocks, CHUNK):
        block = begin + tl.arange(0, CHUNK)[:, None]
        rows = tl.load(block_rows + block.to(tl.int64) * RANKS + rank[None, :], mask=block < n_blocks, other=0)
        total += tl.sum(rows, axis=0)
        before += tl.sum(tl.where(block < mine, rows, 0), axis=0)
    token = mine * TOKENS + tl.arange(0, TOKENS)
    exists = token < n_tokens
    goes = _goes(indices, token, n_tokens, n_experts, held, K, RANKS)
    row = (tl.cumsum(total, 0) - total + before)[None, :] + tl.cumsum(goes, 0) - goes
    copies = tl.sum(goes, axis=1)
    end = tl.sum(before) + tl.cumsum(copies, 0)
    if mine == 0:
        tl.store(copy_offset, 0)
    tl.store(copy_offset + 1 + token, end, mask=exists)
    there = goes > 0
    tl.store(copy_row + (end - copies)[:, None] + tl.cumsum(goes, 1) - goes, row, mask=there)
    tl.store(token_of + row, tl.zeros_like(row).to(tl.int64) + token[:, None], mask=there)
    none = tl.sum(total).to(tl.int64) * K
    at = side + row.to(tl.int64) * (2 * K)
    for k in range(K):
        slot = token.to(tl.int64) * K + k
        expert = _expert_of(indices, slot, exists, n_experts)
        prob = tl.load(probs + slot, mask=exists, other=0.0).to(tl.int32, bitcast=True)
        is_one = expert < n_experts
        here = is_one[:, None] & ((expert // held)[:, None] == rank[None, :])
        tl.store(at + k, tl.where(here, (expert % held)[:, None], -1), mask=there)
        tl.store(at + K + k, tl.where(here, prob[:, None], 0), mask=there)
        its_row = tl.sum(tl.where(here, row, 0), axis=1).to(tl.int64)
        tl.store(slot_source + slot, tl.where(is_one, its_row * K + k, none), mask=exists)


def begin(indices, probs, n_experts: int, size: int):
    """See ``naive_layout``."""
    indices, probs, place = indices.contiguous(), probs.contiguous(), beside(indices)
    n_tokens, n_topk = checks.shape_of(indices)
    held, most = n_experts // size, n_tokens * min(size, n_topk)
    ranks, bins = next_power_of_2(size), next_power_of_2(n_experts + 1)
    tokens = max(min(_PAIRS // ranks, _TOKENS), 1)
    n_blocks = max(-(-n_tokens // tokens), 1)
    if most >= 2**31:
        raise ValueError(f"indices: {n_tokens} tokens that may go to {min(size, n_topk)} ranks each are too many rows")

    def room(dtype, *pieces):
        return cut(torch.empty([sum(pieces)], dtype=dtype, device=place), list(pieces))

    counts, token, slot_source = room(torch.int64, size * (1 + held), most, n_tokens * n_topk)
    block_rows, block_slots, copy_row, copy_offset = room(
        torch.int32, n_blocks * ranks, n_blocks * bins, most, n_tokens + 1
    )
    side = torch.empty([most, 2 * n_topk], dtype=torch.int32, device=place)
    sizes = {"K": n_topk, "RANKS": ranks, "BINS": bins, "TOKENS": tokens}
    launch(_count_blocks, n_blocks, (indices, block_rows, block_slots, n_tokens, n_experts, held), sizes)
    experts = min(bins, 64)
    launch(
        _place_rows,
        n_blocks + -(-n_experts // experts),
        (indices, probs, block_rows, block_slots, counts, token, side, copy_row, copy_offset, slot_source,
         n_tokens, n_experts, held, n_blocks),
        {**sizes, "EXPERTS": experts, "CHUNK": max(1, 2048 // max(ranks, experts))},
    )  # fmt: skip
    counts = counts.reshape([size, 1 + held])
    return counts, lambda n_sent: (token[:n_sent], side[:n_sent], copy_row[:n_sent], copy_offset, slot_source)


@triton.jit(do_not_specialize=["n_slots", "n_values"], do_not_specialize_on_alignment=["values", "slot_source"])
def _to_slots(values, slot_source, out, n_slots, n_values, SLOTS: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    source = tl.load(slot_source + slot, mask=slot < n_slots, other=0)
    tl.store(out + slot, tl.load(values + source, mask=source < n_values, other=0.0), mask=slot < n_slots)


def to_slots(values_NK, slot_source):
    """See ``naive_layout``."""
    n_slots = checks.shape_of(slot_source)[0]
    out = torch.empty([n_slots], dtype=torch.float32, device=beside(slot_source))
    if n_slots:
        n_rows, n_topk = checks.shape_of(values_NK)
        operands = (values_NK.contiguous(), slot_source, out, n_slots, n_rows * n_topk)
        launch(_to_slots, -(-n_slots // 512), operands, {"SLOTS": 512})
    return out
