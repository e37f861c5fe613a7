"""Where the rows of one call go, and what comes back from where.

T tokens, K slots a token, E experts in all, R ranks. Rank r holds experts r*E/R to (r+1)*E/R. A token goes once to
every rank that holds one of its experts. N_sent rows leave, by (rank, token); N_received come, by (rank they come from,
token there): all orders follow from the indices alone, and so do the bits of every sum.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .. import checks
from ..launch import beside
from ..routing.metadata import Routing


@dataclass(frozen=True)
class Layout:
    n_tokens: int
    n_topk: int
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    counts: list[int]  # slots of each expert of this rank, from all ranks
    token: Any  # [N_sent] int64: the token of each row that leaves
    local_ids: Any  # [N_sent,K] int32: its experts as the receiver numbers them, -1 for those of other ranks
    probs_here: Any  # [N_sent,K] bool: which of its slots are the receiver's
    copies: Routing  # each token's rows among those that left, in order of the ranks
    slot_source: Any  # [T*K] int64: where in [N_sent*K] a slot's row has it, N_sent*K for a slot without expert

    @property
    def n_received(self) -> int:
        return sum(self.received)


def experts_of_rank(n_experts: int, rank: int, size: int) -> range:
    """The experts that a rank holds, by their number in the whole layer."""
    if n_experts % size:
        raise ValueError(f"n_experts: got {n_experts}, need a multiple of {size}, the ranks that share them")
    held = n_experts // size
    return range(rank * held, (rank + 1) * held)


def check_indices(indices) -> None:
    checks.require_tensor("indices", indices)
    checks.require_rank("indices", indices, 2, "[T, K]")
    checks.require_dtype("indices", indices, checks.INT_DTYPES)


def make_layout(indices, n_experts: int, comm) -> Layout:
    """``indices`` [T,K] number the experts of the whole layer; those that are none are sent nowhere.

    All ranks call it together. The host waits for the device once, for the counts.
    """
    check_indices(indices)
    held, size = len(experts_of_rank(n_experts, comm.rank, comm.size)), comm.size
    n_tokens, n_topk = checks.shape_of(indices)
    place = beside(indices)
    expert = indices.to(torch.int64)
    is_one = (expert >= 0) & (expert < n_experts)
    owner = torch.where(is_one, expert // held, torch.full_like(expert, size))  # [T,K]
    ranks = torch.arange(size, dtype=torch.int64, device=place)
    goes_RT = (owner.unsqueeze(0) == ranks.reshape([size, 1, 1])).to(torch.int64).sum(dim=-1) > 0
    rows_R = goes_RT.to(torch.int64).sum(dim=1)
    slots_E = _histogram(torch.where(is_one, expert, torch.full_like(expert, n_experts)), n_experts)

    mine = torch.cat([rows_R.reshape([size, 1]), slots_E.reshape([size, held])], dim=1)
    theirs = comm.exchange_counts(mine)
    told = torch.cat([rows_R, theirs[:, 0], theirs[:, 1:].sum(dim=0)])
    told = [int(count) for count in told.tolist()]  # the one wait
    sent, received, counts = told[:size], told[size : 2 * size], told[2 * size :]

    n_sent = sum(sent)
    stays = 1 - goes_RT.to(torch.int64).reshape([size * n_tokens])
    flat = torch.argsort(stays, stable=True)[:n_sent]  # (rank, token) of each row that leaves
    token, target = flat % max(n_tokens, 1), flat // max(n_tokens, 1)
    ids = expert.index_select(0, token) - (target * held).reshape([n_sent, 1])
    here = (ids >= 0) & (ids < held)
    row_RT = torch.cumsum(1 - stays, dim=0) - 1
    return Layout(
        n_tokens=n_tokens,
        n_topk=n_topk,
        sent=sent,
        received=received,
        counts=counts,
        token=token,
        local_ids=torch.where(here, ids, torch.full_like(ids, -1)).to(torch.int32),
        probs_here=here,
        copies=_copies(goes_RT, token, n_sent, n_topk),
        slot_source=_slot_source(owner, is_one, row_RT, n_sent),
    )


def _histogram(values, n: int):
    """How often each of 0..n-1 occurs, int64 [n], without a wait and without atomics."""
    ordered = torch.sort(values.reshape([-1]))
    ordered = ordered if hasattr(ordered, "shape") else ordered[0]
    bounds = torch.searchsorted(ordered, torch.arange(n + 1, dtype=torch.int64, device=beside(values)))
    return (bounds[1:] - bounds[:-1]).to(torch.int64)


def _copies(goes_RT, token, n_sent: int, n_topk: int) -> Routing:
    """What the sums over a token's rows read: for them a rank is a slot."""
    size, n_tokens = checks.shape_of(goes_RT)
    copies_T = goes_RT.to(torch.int64).sum(dim=0)
    first = torch.zeros([1], dtype=torch.int64, device=beside(token))
    return Routing(
        expert_offset=None,
        x_gather_idx=None,
        s_scatter_idx=None,
        s_reverse_scatter_idx=torch.argsort(token, stable=True).to(torch.int32),
        slot_offset=torch.cat([first, torch.cumsum(copies_T, dim=0)]).to(torch.int32),
        scores=None,
        score_src_idx=None,
        n_tokens=n_tokens,
        n_topk=min(size, n_topk),
        n_experts=size,
        n_slots=n_sent,
        n_rows=n_sent,
        block=1,
        backend="layout",
    )


def _slot_source(owner, is_one, row_RT, n_sent: int):
    n_tokens, n_topk = checks.shape_of(owner)
    n_slots = n_tokens * n_topk
    if n_slots == 0:
        return torch.zeros([0], dtype=torch.int64, device=beside(owner))
    number = torch.arange(n_slots, dtype=torch.int64, device=beside(owner)).reshape([n_tokens, n_topk])
    asked = torch.where(is_one, owner * n_tokens + number // n_topk, torch.zeros_like(owner))
    row = row_RT.index_select(0, asked.reshape([n_slots])).reshape([n_tokens, n_topk])
    return torch.where(is_one, row * n_topk + number % n_topk, torch.full_like(row, n_sent * n_topk)).reshape([n_slots])
