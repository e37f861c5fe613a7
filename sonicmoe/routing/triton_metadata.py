"""Routing metadata in Triton: what runs on a GPU where no compiler for csrc is present. Same arrays, four launches.

Tiles are contiguous runs of slots, as in csrc/deepep_topk_metadata.h. A slot's rank among its expert's slots in a tile
is a count over the tile's pairs, so no order of atomics can show.
"""

import torch
import triton
import triton.language as tl

from ..triton_launch import prepare
from .arrays import Arrays, Bound, counts_on_host, sizes

_TILE = 128


@triton.jit
def _experts_of(indices, slot, n_slots, n_experts):
    """Expert of each slot, n_experts for one that is not here. The id is compared at its own width."""
    identity = tl.load(indices + slot, mask=slot < n_slots, other=-1)
    here = (identity >= 0) & (identity < n_experts)
    return tl.where(here, identity, n_experts).to(tl.int32)


@triton.jit
def _count_tiles(indices, tile_count, n_slots, n_experts, n_tiles, BINS: tl.constexpr, TILE: tl.constexpr):
    """tile_count[e, tile] for e < E, and the tile's valid slots in row E."""
    tile = tl.program_id(0)
    slot = tile * TILE + tl.arange(0, TILE)
    expert = _experts_of(indices, slot, n_slots, n_experts)
    count = tl.histogram(expert, BINS)
    e = tl.arange(0, BINS)
    valid = tl.sum((expert < n_experts).to(tl.int32))
    count = tl.where(e == n_experts, valid, count)
    tl.store(tile_count + e * n_tiles + tile, count, mask=e <= n_experts)


@triton.jit
def _sum_tiles(tile_count, totals, n_tiles, CHUNK: tl.constexpr):
    """Counts of one expert into exclusive sums over the tiles, in place; the total to ``totals``."""
    expert = tl.program_id(0)
    row = tile_count + expert * n_tiles
    before = tl.zeros([], dtype=tl.int32)
    for first in range(0, n_tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        count = tl.load(row + tile, mask=tile < n_tiles, other=0)
        tl.store(row + tile, before + tl.cumsum(count, 0) - count, mask=tile < n_tiles)
        before += tl.sum(count)
    tl.store(totals + expert, before)


@triton.jit(debug=True)  # or the assertion is left out
def _place_experts(
    totals, expert_offset, x_gather, s_scatter, scores,
    n_experts, n_valid, n_rows, block, BOUNDED: tl.constexpr, BINS: tl.constexpr, PADS: tl.constexpr,
):  # fmt: skip
    """Padded starts of all experts (program 0 writes them), and the pad rows of this program's expert. One program more
    has the rows behind the last segment, if the arrays were made for more than there are."""
    mine = tl.program_id(0)
    e = tl.arange(0, BINS)
    total = tl.load(totals + e, mask=e < n_experts, other=0)
    padded = (total + block - 1) // block * block
    end = tl.cumsum(padded, 0)
    # Nothing has been written to the outputs yet: counts that the ids do not have would lead past their ends.
    rows = tl.sum(padded)
    fits = (tl.sum(total) == n_valid) & ((rows <= n_rows) if BOUNDED else (rows == n_rows))
    tl.device_assert(fits, "sonicmoe: dispatched_indices do not hold the slots that tokens_per_expert count")
    if mine == 0:
        tl.store(expert_offset + e, end - padded, mask=e <= n_experts)
    my_total = tl.sum(tl.where(e == mine, total, 0))
    my_padded = tl.sum(tl.where(e == mine, padded, 0))
    my_start = tl.sum(tl.where(e < mine, padded, 0))
    if mine == n_experts:
        my_padded = n_rows - my_start
    pads_before = my_start - tl.sum(tl.where(e < mine, total, 0))
    for first in range(0, my_padded - my_total, PADS):
        j = first + tl.arange(0, PADS)
        mask = j < my_padded - my_total
        row = my_start + my_total + j
        pad_slot = n_valid + pads_before + j
        tl.store(x_gather + row, tl.zeros([PADS], dtype=tl.int32), mask=mask)
        tl.store(s_scatter + row, pad_slot, mask=mask)
        tl.store(scores + pad_slot, tl.zeros([PADS], dtype=tl.float32), mask=mask)


@triton.jit
def _place_slots(
    indices, probs, tile_count, expert_offset, x_gather, s_scatter, s_reverse, slot_offset, scores, score_src,
    n_slots, n_topk, n_experts, n_tiles, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    i = tl.arange(0, TILE)
    slot = tile * TILE + i
    exists = slot < n_slots
    expert = _experts_of(indices, slot, n_slots, n_experts)
    valid = expert < n_experts
    # One pair for each two slots of the tile: those of the same expert that come first are the rank.
    pairs = (expert[:, None] == expert[None, :]) & (i[None, :] < i[:, None])
    rank = tl.sum(pairs.to(tl.int32), axis=1)
    before = tl.load(tile_count + expert * n_tiles + tile, mask=valid, other=0)
    row = tl.load(expert_offset + expert, mask=valid, other=0) + before + rank
    one = valid.to(tl.int32)
    compact = tl.load(tile_count + n_experts * n_tiles + tile) + tl.cumsum(one, 0) - one
    token = slot // n_topk
    tl.store(x_gather + row, token, mask=valid)
    tl.store(s_scatter + row, compact, mask=valid)
    tl.store(s_reverse + compact, row, mask=valid)
    tl.store(scores + compact, tl.load(probs + slot, mask=valid, other=0.0), mask=valid)
    tl.store(score_src + compact, slot, mask=valid)
    tl.store(slot_offset + token, compact, mask=exists & (slot == token * n_topk))
    tl.store(slot_offset + token + 1, compact + one, mask=slot == n_slots - 1)


def build(indices, probs, n_experts: int, block: int, counts, cache_dir=None, scales=None) -> dict:
    """The arrays of ``Routing`` by name. Counts from the host cost no wait; without them the ids are counted first. A
    count that the ids do not have stops the device with a message."""
    indices, probs = indices.contiguous(), probs.contiguous()
    n_tokens, n_topk = indices.shape
    total = n_tokens * n_topk
    n_tiles = -(-total // _TILE)
    if (n_experts + 1) * n_tiles >= 2**31:
        raise ValueError(f"dispatched_indices: {total} slots by {n_experts} experts are more than 32-bit tables hold")
    counts = counts_on_host(indices, n_experts) if counts is None else counts
    n_slots, n_rows = sizes(counts, block)
    arrays = Arrays(indices, n_tokens, n_experts, n_slots, n_rows, (n_experts + 1) * (n_tiles + 1))
    views = arrays.views
    if total == 0:
        views["expert_offset"].zero_()
        views["slot_offset"].zero_()
    else:
        prepare(indices)
        bins = triton.next_power_of_2(n_experts + 1)
        totals, tile_count = arrays.workspace[: n_experts + 1], arrays.workspace[n_experts + 1 :]
        _count_tiles[(n_tiles,)](indices, tile_count, total, n_experts, n_tiles, BINS=bins, TILE=_TILE)
        _sum_tiles[(n_experts + 1,)](tile_count, totals, n_tiles, CHUNK=1024)
        _place_experts[(n_experts + 1,)](
            totals,
            views["expert_offset"],
            views["x_gather_idx"],
            views["s_scatter_idx"],
            views["scores"],
            n_experts,
            n_slots,
            n_rows,
            block,
            BOUNDED=isinstance(counts, Bound),
            BINS=bins,
            PADS=128,
            sanitize_overflow=False,  # no assertion but ours
        )
        _place_slots[(n_tiles,)](
            indices,
            probs,
            tile_count,
            views["expert_offset"],
            views["x_gather_idx"],
            views["s_scatter_idx"],
            views["s_reverse_scatter_idx"],
            views["slot_offset"],
            views["scores"],
            views["score_src_idx"],
            total,
            n_topk,
            n_experts,
            n_tiles,
            TILE=_TILE,
        )
    sorted_scales = None if scales is None else scales.index_select(0, views["x_gather_idx"].to(torch.int64))
    return {**views, "counts": None, "sorted_scales": sorted_scales}
