"""Routing of slots that come as a list: any number of (token, expert, score) for each token."""

import dataclasses

import torch

from ..config import SonicMoEConfig
from ..launch import beside
from .metadata import Routing
from .metadata import build as build_routing


def order_by_token(tokens):
    """[S] int64: the slots by token, a token's own in the order of the list: compact order, as ``build`` wants it."""
    return torch.argsort(tokens, stable=True)


def build(tokens, experts, scores, n_tokens: int, n_experts: int, block: int, config: SonicMoEConfig) -> Routing:
    """Metadata for S slots, each [S] and ordered by token: ``tokens`` and ``experts`` (int32 or int64, 0 <= token < T,
    0 <= expert < E), ``scores`` float32. Waits for nothing.
    """
    n_slots = int(tokens.shape[0])
    # Each slot as a row of its own with one expert: sorted rows and compact slots are then those of the list.
    column = [n_slots, 1]
    experts, scores = experts.reshape(column), scores.reshape(column)
    rows = build_routing(experts, scores, n_experts, block, config, index_name="expert_indices", all_valid=True)
    per_token = torch.zeros([n_tokens], dtype=torch.int64, device=beside(tokens))
    tokens = tokens.to(torch.int64)
    per_token = per_token.scatter_add(0, tokens, torch.ones_like(tokens))
    first = torch.zeros([1], dtype=torch.int64, device=beside(tokens))
    return dataclasses.replace(
        rows,
        x_gather_idx=_tokens_of_rows(rows, tokens),
        slot_offset=torch.cat([first, torch.cumsum(per_token, dim=0)]).to(torch.int32),
        n_tokens=n_tokens,
        n_topk=None,
    )


def _tokens_of_rows(rows: Routing, tokens):
    """[M] token of each sorted row; pads keep row 0."""
    if rows.n_slots == 0:
        return rows.x_gather_idx
    token = tokens.index_select(0, rows.x_gather_idx.to(torch.int64)).to(torch.int32)
    if rows.n_pad_rows == 0:
        return token
    return torch.where(rows.s_scatter_idx < rows.n_slots, token, torch.zeros_like(token))
