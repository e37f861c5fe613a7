"""Where the rows of a call go, and what comes back from where.

T tokens, K slots a token, E experts in all, R ranks. Rank r holds experts r*E/R to (r+1)*E/R. A token goes once to
every rank that holds one of its experts. N_sent rows leave, by (rank, token); N_received come, by (rank they come from,
token there): all orders follow from the indices alone, and so do the bits of every sum.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from .. import checks
from ..routing.metadata import Routing
from . import naive_layout

if find_spec("triton") is not None:
    from . import triton_layout
else:
    triton_layout = None


@dataclass(frozen=True)
class Layout:
    n_tokens: int
    n_topk: int
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    counts: list[int]  # slots of each expert of this rank, from all ranks
    token: Any  # [N_sent] int64: the token of each row that leaves
    copies: Routing  # each token's rows among those that left, in order of the ranks
    slot_source: Any  # [T*K] int64: where in [N_sent*K] a slot's row has it, N_sent*K for a slot without expert

    @property
    def n_received(self) -> int:
        return sum(self.received)


@dataclass(frozen=True)
class Planned:
    layout: Layout
    # [N_sent, 2K] int32 words: a row's experts as the receiver numbers them, -1 for those of other ranks, and the bits
    # of their probs, 0 there.
    side: Any


def experts_of_rank(n_experts: int, rank: int, size: int) -> range:
    """The experts that a rank holds, by their number in the whole layer."""
    checks.require_int("n_experts", n_experts)
    if n_experts % size:
        raise ValueError(f"n_experts: got {n_experts}, need a multiple of {size}, the ranks that share them")
    held = n_experts // size
    return range(rank * held, (rank + 1) * held)


def check_indices(indices) -> None:
    checks.require_tensor("indices", indices)
    checks.require_rank("indices", indices, 2, "[T, K]")
    checks.require_dtype("indices", indices, checks.INT_DTYPES)


def engine_for(tensor):
    """Operators are the definition; on a GPU kernels do the same with fewer launches."""
    return naive_layout if triton_layout is None or checks.is_cpu(tensor) else triton_layout


def make_layouts(pieces, n_experts: int, comm, terms) -> list[Planned]:
    """For ``pieces`` of checked (indices [T,K], probs [T,K] float32), with the ``Terms`` of each. ``indices`` number
    the whole layer's experts; those that are none are sent nowhere.

    All ranks call it together, with as many pieces. The host waits for the device once, for the counts of all.
    """
    held = len(experts_of_rank(n_experts, comm.rank, comm.size))
    begun = [engine_for(indices).begin(indices, probs, n_experts, comm.size) for indices, probs in pieces]
    mine = [part for (counts, _), its in zip(begun, terms, strict=True) for part in (its.column(counts), counts)]
    mine = torch.cat(mine, dim=1)
    told = torch.stack([mine, comm.exchange_counts(mine)]).tolist()  # the one wait
    planned = []
    for number, ((indices, _), (_, finish), its) in enumerate(zip(pieces, begun, terms, strict=True)):
        first = number * (2 + held) + 1
        its.require_same([row[first - 1] for row in told[1]])
        sent, received = ([row[first] for row in table] for table in told)
        counts = [sum(column) for column in zip(*(row[first + 1 : first + 1 + held] for row in told[1]), strict=True)]
        planned.append(_planned(indices, sent, received, counts, finish(sum(sent))))
    return planned


def _planned(indices, sent: list[int], received: list[int], counts: list[int], arrays) -> Planned:
    token, side, copy_row, copy_offset, slot_source = arrays
    n_tokens, n_topk = checks.shape_of(indices)
    size, n_sent = len(sent), sum(sent)
    copies = Routing(  # for the sums over a token's rows a rank is a slot
        expert_offset=None,
        x_gather_idx=None,
        s_scatter_idx=None,
        s_reverse_scatter_idx=copy_row,
        slot_offset=copy_offset,
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
    return Planned(Layout(n_tokens, n_topk, sent, received, counts, token, copies, slot_source), side)
