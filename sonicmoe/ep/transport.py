"""Moves rows between ranks: three calls, each begun and waited for apart, after one that plans them for all pieces.

dispatch        each token to the ranks of its experts, with its slots there
dispatch again  other rows of the same tokens the same way: the gradients of what combine returned
combine         rows back to their tokens, added in order of the ranks: outputs, or gradients of what dispatch sent
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from .. import checks
from ..quant.formats import QuantTensor
from ..routing import naive
from .layout import Layout, Planned, engine_for, make_layouts
from .words import from_words, to_words

if find_spec("triton") is not None:
    from ..routing import triton_combine
else:
    triton_combine = None


@dataclass(frozen=True)
class Dispatched:
    """What a rank got, as contract and engine want it."""

    x: Any  # [N,H], or a QuantTensor
    indices: Any  # [N,K] int32, -1 for experts of other ranks
    probs: Any  # [N,K] float32, 0 there
    counts: list[int]  # slots of each expert of this rank
    layout: Layout


class AllToAll:
    """Over a ``Communicator``."""

    name = "alltoall"

    def __init__(self, comm):
        self.comm = comm

    def plan(self, pieces, n_experts: int, terms) -> list[Planned]:
        """For ``pieces`` of (indices [T,K], probs [T,K]), each of which is then dispatched."""
        return make_layouts(pieces, n_experts, self.comm, terms)

    def begin_dispatch(self, x, planned: Planned):
        """x [T,H] or its QuantTensor. Returns what waits for the ``Dispatched``."""
        layout = planned.layout
        wait_rows = self._begin_rows(x, layout, [planned.side])

        def wait() -> Dispatched:
            rows, (ids, probs) = wait_rows([layout.n_topk] * 2)
            return Dispatched(rows, ids, from_words(probs, "float32"), layout.counts, layout)

        return wait

    def begin_dispatch_again(self, rows, layout: Layout):
        """rows [T,H] or its QuantTensor. Returns what waits for the rows [N,H] that came."""
        wait_rows = self._begin_rows(rows, layout, [])
        return lambda: wait_rows([])[0]

    def _begin_rows(self, x, layout: Layout, beside: list):
        """The tokens' rows on their way, and ``beside`` them [N,words] each; scales ride with the latter."""
        quantized = isinstance(x, QuantTensor)
        data = x.data if quantized else x
        dtype = checks.dtype_name(data)
        if quantized:
            beside = [*beside, to_words(x.scale).index_select(0, layout.token)]
        rows = self._begin(to_words(data).index_select(0, layout.token), layout.sent, layout.received)
        if len(beside) > 1:
            beside = [torch.cat(beside, dim=1)]
        side = self._begin(beside[0], layout.sent, layout.received) if beside else None

        def wait(widths: list[int]):
            found = from_words(rows.wait(), dtype)
            parts = [] if side is None else side.wait()
            if quantized:
                widths = [*widths, int(parts.shape[1]) - sum(widths)]
            parts = _columns(parts, widths)
            if quantized:
                found = QuantTensor(found, from_words(parts.pop(), "float32"), x.block)
            return found, parts

        return wait

    def begin_combine(self, rows, layout: Layout, slots=None):
        """rows [N,H] and ``slots`` [N,K] float32, either may be None. Returns what waits for both: [T,H] added up by
        token, and [T,K], each from the one rank that has it."""
        rows_back, slots_back = (self._begin_back(part, layout) for part in (rows, slots))

        def wait():
            out = None if rows_back is None else _sum_by_token(rows_back(), layout)
            return out, None if slots_back is None else _to_slots(slots_back(), layout)

        return wait

    def _begin_back(self, rows, layout: Layout):
        if rows is None:
            return None
        dtype, flight = checks.dtype_name(rows), self._begin(to_words(rows), layout.received, layout.sent)
        return lambda: from_words(flight.wait(), dtype)

    def _begin(self, words, sent, received):
        return self.comm.begin_exchange(words, sent, received)


def _columns(words, widths: list[int]) -> list:
    """Side by side no more; each in memory of its own."""
    parts, first = [], 0
    for width in widths:
        parts.append(words[:, first : first + width].clone())
        first += width
    return parts


def _sum_by_token(rows, layout: Layout):
    """In float32, rounded once; 0 for a token that went nowhere."""
    run = naive.sum_slots if triton_combine is None or checks.is_cpu(rows) else triton_combine.sum_slots
    return run(rows, layout.copies, rows.dtype)


def _to_slots(values_NK, layout: Layout):
    found = engine_for(values_NK).to_slots(values_NK, layout.slot_source)
    return found.reshape([layout.n_tokens, layout.n_topk])
