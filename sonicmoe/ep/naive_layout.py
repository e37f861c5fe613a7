"""What leaves a rank, in operators of the framework: the definition.

``begin(indices, probs, n_experts, size)`` returns what this rank tells each other one, [R, 1+E/R] int64: how many rows
it sends there, and how many slots for each expert there; and a function that takes their sum, N_sent, and returns

    token        [N_sent] int64: whose row it is; rows by (rank, token)
    side         [N_sent,2K] int32 words: its experts as the receiver numbers them, -1 for others; their probs, or 0
    copy_row     [N_sent] int32: the rows again, by (token, rank)
    copy_offset  [T+1] int32: where each token's begin there
    slot_source  [T*K] int64: row * K + k of the row that has slot k, N_sent*K for a slot without expert
"""

import torch

from .. import checks
from ..launch import beside
from .words import to_words


def begin(indices, probs, n_experts: int, size: int):
    held = n_experts // size
    n_tokens, n_topk = checks.shape_of(indices)
    place = beside(indices)
    expert = indices.to(torch.int64)
    is_one = (expert >= 0) & (expert < n_experts)
    owner = torch.where(is_one, expert // held, torch.full_like(expert, size))  # [T,K]
    ranks = torch.arange(size, dtype=torch.int64, device=place)
    goes_RT = (owner.unsqueeze(0) == ranks.reshape([size, 1, 1])).to(torch.int64).sum(dim=-1) > 0
    rows_R = goes_RT.to(torch.int64).sum(dim=1)
    slots_E = _histogram(torch.where(is_one, expert, torch.full_like(expert, n_experts)), n_experts)

    def finish(n_sent: int):
        stays = 1 - goes_RT.to(torch.int64).reshape([size * n_tokens])
        flat = torch.argsort(stays, stable=True)[:n_sent]  # (rank, token) of each row that leaves
        token, target = flat % max(n_tokens, 1), flat // max(n_tokens, 1)
        ids = expert.index_select(0, token) - (target * held).reshape([n_sent, 1])
        here = (ids >= 0) & (ids < held)
        there = probs.index_select(0, token)
        ids = torch.where(here, ids, torch.full_like(ids, -1)).to(torch.int32)
        side = torch.cat([ids, to_words(torch.where(here, there, torch.zeros_like(there)))], dim=1)
        row_RT = torch.cumsum(1 - stays, dim=0) - 1
        first = torch.zeros([1], dtype=torch.int64, device=place)
        copy_offset = torch.cat([first, torch.cumsum(goes_RT.to(torch.int64).sum(dim=0), dim=0)]).to(torch.int32)
        copy_row = torch.argsort(token, stable=True).to(torch.int32)
        return token, side, copy_row, copy_offset, _slot_source(owner, is_one, row_RT, n_sent)

    return torch.cat([rows_R.reshape([size, 1]), slots_E.reshape([size, held])], dim=1), finish


def to_slots(values_NK, slot_source):
    """[T*K] float32: each slot's value from its row, 0 for a slot without one."""
    none = torch.zeros([1], dtype=torch.float32, device=beside(values_NK))
    n_rows, n_topk = checks.shape_of(values_NK)
    return torch.cat([values_NK.reshape([n_rows * n_topk]), none]).index_select(0, slot_source)


def _histogram(values, n: int):
    """How often each of 0..n-1 occurs, int64 [n], without a wait and without atomics."""
    ordered = torch.sort(values.reshape([-1]))
    ordered = ordered if hasattr(ordered, "shape") else ordered[0]
    bounds = torch.searchsorted(ordered, torch.arange(n + 1, dtype=torch.int64, device=beside(values)))
    return (bounds[1:] - bounds[:-1]).to(torch.int64)


def _slot_source(owner, is_one, row_RT, n_sent: int):
    n_tokens, n_topk = checks.shape_of(owner)
    n_slots = n_tokens * n_topk
    if n_slots == 0:
        return torch.zeros([0], dtype=torch.int64, device=beside(owner))
    number = torch.arange(n_slots, dtype=torch.int64, device=beside(owner)).reshape([n_tokens, n_topk])
    asked = torch.where(is_one, owner * n_tokens + number // n_topk, torch.zeros_like(owner))
    row = row_RT.index_select(0, asked.reshape([n_slots])).reshape([n_tokens, n_topk])
    return torch.where(is_one, row * n_topk + number % n_topk, torch.full_like(row, n_sent * n_topk)).reshape([n_slots])
