"""How many slots each expert got. Counting the ids is the definition; a GPU has ways with fewer launches."""

from importlib.util import find_spec

import torch

from .. import checks
from ..launch import beside

if find_spec("triton") is not None:
    from . import triton_counts
else:
    triton_counts = None


def count(ids, n: int):
    """How often each of 0..n-1 occurs, int32 [n]."""
    found = torch.zeros(n, dtype=torch.int32, device=beside(ids))
    return found.scatter_add_(0, ids.to(torch.int64), torch.ones_like(ids, dtype=torch.int32))


def slots_of_experts(routing, expert_ids, config):
    """int32 [E]. ``expert_ids`` are those that ``routing`` was made from, each of them an expert."""
    if triton_counts is not None and config.backend != "naive" and not checks.is_cpu(routing.expert_offset):
        return triton_counts.slots_of_experts(routing)
    if routing.block == 1:
        return torch.diff(routing.expert_offset)
    return count(expert_ids.reshape(-1), routing.n_experts)
