"""Room for routing metadata: what every compiled backend allocates before it launches."""

from typing import NamedTuple

import torch

from ..launch import address, beside, cut


class Arrays:
    """The seven outputs and the workspace as views of one int32 allocation."""

    def __init__(self, like, n_tokens: int, n_experts: int, n_slots: int, n_rows: int, workspace: int):
        # The offsets, the workspace and the gather first, each at a multiple of 16 bytes as allocations begin: kernels
        # read the second one 16 bytes at a time, and the GEMMs take the others only so.
        offsets = n_experts + 1
        slack, inner = -offsets % 4, workspace + -workspace % 4
        sizes = [offsets, slack + inner, n_rows, n_rows, n_rows, n_slots, n_tokens + 1, n_slots]
        whole = torch.empty(sum(sizes), dtype=torch.int32, device=beside(like))
        offset, hidden, gather, scatter, scores, reverse, slot_offset, source = cut(whole, sizes)
        self.views = {
            "expert_offset": offset,
            "x_gather_idx": gather,
            "s_scatter_idx": scatter,
            "s_reverse_scatter_idx": reverse,
            "slot_offset": slot_offset,
            "scores": scores.view(torch.float32),
            "score_src_idx": source,
        }
        self._hidden, self._workspace = hidden, slice(slack, slack + workspace)
        # By sums and not by asking each view: a call costs 20 us in all, and seven questions would be one of them.
        offset_at = address(whole)
        self.workspace_address = offset_at + 4 * (offsets + slack)
        gather_at = self.workspace_address + 4 * inner
        scatter_at = gather_at + 4 * n_rows
        scores_at = scatter_at + 4 * n_rows
        reverse_at = scores_at + 4 * n_rows
        slot_offset_at = reverse_at + 4 * n_slots
        source_at = slot_offset_at + 4 * n_tokens + 4
        # Of the seven outputs, in the order of ``Routing``'s fields.
        self.addresses = offset_at, gather_at, scatter_at, reverse_at, slot_offset_at, scores_at, source_at

    @property
    def workspace(self):
        # A slice costs a microsecond, and CUDA's kernels take the address.
        return self._hidden[self._workspace]


class Bound(NamedTuple):
    """In the place of counts: S slots in all, of which nobody knows yet how they fall on the experts. Arrays are then
    made for the most rows that there can be, and those behind the last segment are pads."""

    n_slots: int
    n_rows: int


def bound(n_slots: int, n_experts: int, block: int) -> Bound:
    # Each expert that has a slot is filled up with at most block - 1 rows.
    return Bound(n_slots, (n_slots + min(n_experts, n_slots) * (block - 1)) // block * block)


def sizes(counts: list[int] | Bound, block: int) -> tuple[int, int]:
    """(S, M): slots, and rows with every segment filled to a multiple of ``block``."""
    if isinstance(counts, Bound):
        return counts
    return sum(counts), sum([-(-count // block) * block for count in counts])


def counts_on_host(indices, n_experts: int) -> list[int]:
    """Slots of each expert, for callers without counts. Waits for the device."""
    flat = indices.reshape([indices.shape[0] * indices.shape[1]]).to(torch.int64)
    elsewhere = torch.full_like(flat, n_experts)
    expert = torch.where((flat >= 0) & (flat < n_experts), flat, elsewhere)
    return torch.bincount(expert, minlength=n_experts + 1).tolist()[:n_experts]
