"""Room for routing metadata: what every compiled backend allocates before it launches."""

from itertools import accumulate

import torch

from ..gemm.launch import address, cut


class Arrays:
    """The seven outputs and the workspace as views of one int32 allocation."""

    def __init__(self, like, n_tokens: int, n_experts: int, n_slots: int, n_rows: int, workspace: int):
        sizes = [n_rows, n_rows, n_rows, n_experts + 1, n_slots, n_tokens + 1, n_slots, workspace]
        whole = torch.empty([sum(sizes)], dtype=torch.int32, device=like.device)
        gather, scatter, scores, offset, reverse, slot_offset, source, self.workspace = cut(whole, sizes)
        self.views = dict(
            expert_offset=offset,
            x_gather_idx=gather,
            s_scatter_idx=scatter,
            s_reverse_scatter_idx=reverse,
            slot_offset=slot_offset,
            scores=scores.view(torch.float32),
            score_src_idx=source,
        )
        base, starts = address(whole), list(accumulate(sizes, initial=0))
        # Of the seven outputs, in the order of ``Routing``'s fields.
        self.addresses = [base + 4 * starts[number] for number in (3, 0, 1, 4, 5, 2, 6)]
        self.workspace_address = base + 4 * starts[7]


def sizes(counts: list[int], block: int) -> tuple[int, int]:
    """(S, M): slots, and rows with every segment filled to a multiple of ``block``."""
    return sum(counts), sum([-(-count // block) * block for count in counts])


def counts_on_host(indices, n_experts: int) -> list[int]:
    """Slots of each expert, for callers without counts. Waits for the device."""
    flat = indices.reshape([indices.shape[0] * indices.shape[1]]).to(torch.int64)
    elsewhere = torch.full_like(flat, n_experts)
    expert = torch.where((flat >= 0) & (flat < n_experts), flat, elsewhere)
    return torch.bincount(expert, minlength=n_experts + 1).tolist()[:n_experts]
