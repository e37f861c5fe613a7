"""How many slots each expert got, in Triton: one launch, no atomics, no wait."""

import torch
import triton
import triton.language as tl

from ..launch import beside
from ..triton_launch import launch


@triton.jit(do_not_specialize=["n_slots"], do_not_specialize_on_alignment=["offset", "scatter"])
def _slots_of_experts(offset, scatter, counts, n_slots, BLOCK: tl.constexpr):
    """One expert: its rows less its pads, which are the last ones and fewer than BLOCK."""
    expert = tl.program_id(0)
    first = tl.load(offset + expert)
    end = tl.load(offset + expert + 1)
    row = end - 1 - tl.arange(0, BLOCK)
    slot = tl.load(scatter + row, mask=row >= first, other=0)
    pads = tl.sum(((row >= first) & (slot >= n_slots)).to(tl.int32))
    tl.store(counts + expert, end - first - pads)


def slots_of_experts(routing):
    """[E] int32, for a block that is a power of two."""
    offset = routing.expert_offset
    counts = torch.empty([routing.n_experts], dtype=torch.int32, device=beside(offset))
    operands = (offset, routing.s_scatter_idx, counts, routing.n_slots)
    launch(_slots_of_experts, routing.n_experts, operands, {"BLOCK": routing.block}, num_warps=1)
    return counts
