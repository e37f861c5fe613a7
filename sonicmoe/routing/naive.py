"""Routing in framework ops: the definition of the metadata, and data movement whose order is fixed."""

import torch

from ..launch import beside


def _zeros(size, dtype, like):
    return torch.zeros([size], dtype=dtype, device=beside(like))


def _running_sum(counts):
    """[n] -> [n+1] exclusive prefix sums, int64."""
    return torch.cat([_zeros(1, torch.int64, counts), torch.cumsum(counts, dim=0)])


def build(indices, probs, n_experts: int, block: int, scales=None) -> dict:
    """The arrays of ``Routing`` by name, and the counts found, as a host list."""
    arrays = _build(indices, probs, n_experts, block)
    if scales is not None:
        scales = scales.index_select(0, arrays["x_gather_idx"].to(torch.int64))
    return {**arrays, "sorted_scales": scales}


def _build(indices, probs, n_experts: int, block: int) -> dict:
    n_tokens, n_topk = [int(size) for size in indices.shape]
    expert_TK = indices.to(torch.int64).reshape([n_tokens * n_topk])
    valid_TK = (expert_TK >= 0) & (expert_TK < n_experts)
    if n_tokens * n_topk == 0 or not bool(valid_TK.any()):
        return _nothing_routed(indices, n_tokens, n_experts)

    source = torch.nonzero(valid_TK).reshape([-1])  # compact slot -> flat (t,k)
    expert = expert_TK.index_select(0, source)
    n_slots = int(source.shape[0])
    slot = torch.arange(n_slots, dtype=torch.int64, device=beside(indices))
    order = torch.argsort(expert, stable=True)  # real sorted position -> compact slot
    counts = torch.bincount(expert, minlength=n_experts)
    padded = (counts + (block - 1)) // block * block
    start, padded_start = _running_sum(counts), _running_sum(padded)
    n_rows = int(padded_start[n_experts])

    row = slot + (padded_start - start).index_select(0, expert.index_select(0, order))
    is_pad = torch.ones([n_rows], dtype=torch.int64, device=beside(indices))
    is_pad = is_pad.scatter(0, row, torch.zeros_like(row))
    pad_slot = n_slots + torch.cumsum(is_pad, dim=0) - 1
    token = source // n_topk
    per_token = valid_TK.to(torch.int64).reshape([n_tokens, n_topk]).sum(dim=1)
    scores = _zeros(n_rows, torch.float32, probs)
    scores[:n_slots] = probs.to(torch.float32).reshape([n_tokens * n_topk]).index_select(0, source)
    return {
        "expert_offset": padded_start.to(torch.int32),
        "x_gather_idx": torch.zeros_like(is_pad).scatter(0, row, token.index_select(0, order)).to(torch.int32),
        "s_scatter_idx": pad_slot.scatter(0, row, order).to(torch.int32),
        "s_reverse_scatter_idx": torch.zeros_like(order).scatter(0, order, row).to(torch.int32),
        "slot_offset": _running_sum(per_token).to(torch.int32),
        "scores": scores,
        "score_src_idx": source.to(torch.int32),
        "counts": [int(count) for count in counts.tolist()],
    }


def _nothing_routed(like, n_tokens: int, n_experts: int) -> dict:
    """A rank without a valid slot goes through the same code with arrays of the same types and length 0."""
    empty = _zeros(0, torch.int32, like)
    return {
        "expert_offset": _zeros(n_experts + 1, torch.int32, like),
        "x_gather_idx": empty,
        "s_scatter_idx": empty,
        "s_reverse_scatter_idx": empty,
        "slot_offset": _zeros(n_tokens + 1, torch.int32, like),
        "scores": _zeros(0, torch.float32, like),
        "score_src_idx": empty,
        "counts": [0] * n_experts,
    }


def check_rows(indices, n_experts: int) -> tuple[int, int] | None:
    """(row, fault) of the first row that breaks the dispatcher's promise: 1 an expert twice, 2 an id under -1."""
    for number, row in enumerate(indices.tolist()):
        here = [expert for expert in row if 0 <= expert < n_experts]
        if min(row, default=0) < -1:
            return number, 2
        if len(set(here)) != len(here):
            return number, 1
    return None


def sum_slots(rows_MH, routing, dtype, scores=None):
    """[M,H] sorted rows -> [T,H]: each token's slots added in slot order, in float32, rounded once.

    ``scores`` (by compact slot) weighs the rows. One pass for each slot number keeps the order of the additions
    the same whatever the routing is.
    """
    width = int(rows_MH.shape[1])
    total = torch.zeros([routing.n_tokens, width], dtype=torch.float32, device=beside(rows_MH))
    if routing.n_slots == 0:
        return total.to(dtype)
    rows_MH = rows_MH.to(torch.float32)  # not every framework gathers every narrow type
    first = routing.slot_offset[:-1].to(torch.int64)
    count = routing.slot_offset[1:].to(torch.int64) - first
    reverse = routing.s_reverse_scatter_idx.to(torch.int64)
    for number in range(int(count.max())):
        token = torch.nonzero(count > number).reshape([-1])
        slot = first.index_select(0, token) + number
        part = rows_MH.index_select(0, reverse.index_select(0, slot))
        if scores is not None:
            part = part * scores.index_select(0, slot).reshape([-1, 1])
        # Tokens are distinct within a pass, so this is a plain scatter and no order of atomics shows.
        total.index_add_(0, token, part)
    return total.to(dtype)


def scatter_slot_grads(grad_S, routing):
    """[S] gradients of the scores -> [T,K], 0 where no expert of this rank was meant; a list of slots keeps [S]."""
    if routing.n_topk is None:
        return grad_S
    flat = torch.zeros([routing.n_tokens * routing.n_topk], dtype=torch.float32, device=beside(grad_S))
    if routing.n_slots:
        flat = flat.scatter(0, routing.score_src_idx.to(torch.int64), grad_S)
    return flat.reshape([routing.n_tokens, routing.n_topk])
