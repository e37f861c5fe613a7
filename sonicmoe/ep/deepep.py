"""DeepEP's buffer in the place of ``AllToAll``: the same three calls, for torch on GPUs.

Written to DeepEP's published interface (``get_dispatch_layout``, ``dispatch``, ``combine`` of its normal kernels). Rows
are bf16, or e4m3 with float32 scales for 128 channels, which is what ``Wire`` sends.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .. import checks
from ..quant.formats import QuantTensor
from .communicator import OfProcesses
from .layout import experts_of_rank
from .transport import Dispatched


@dataclass(frozen=True)
class Handle:
    """What DeepEP needs to go the same way again, or back."""

    n_received: int
    hidden: int
    here: Any  # [N,K] bool: which slots are this rank's
    given: Any


class DeepEp(OfProcesses):
    name = "deepep"

    def __init__(self, group=None):
        try:
            import deep_ep
        except ImportError as error:
            raise ImportError(f"transport: got 'deepep', but deep_ep cannot be imported: {error}") from error
        self._library, self._group = deep_ep, dist.group.WORLD if group is None else group
        self._buffer, self._row_bytes = None, 0

    def _buffer_for(self, hidden: int):
        """Made at the first call, by all ranks together, and again for wider rows."""
        if self._row_bytes < 2 * hidden:
            kind, size = self._library.Buffer, dist.get_world_size(self._group)
            configs = kind.get_dispatch_config(size), kind.get_combine_config(size)
            near = max(config.get_nvl_buffer_size_hint(2 * hidden, size) for config in configs)
            far = max(config.get_rdma_buffer_size_hint(2 * hidden, size) for config in configs)
            self._buffer, self._row_bytes = kind(self._group, near, far), 2 * hidden
        return self._buffer

    def plan(self, pieces, n_experts: int, terms) -> list[tuple]:
        """DeepEP itself plans each dispatch, and nobody compares the ranks' ``terms``."""
        experts_of_rank(n_experts, dist.get_rank(self._group), dist.get_world_size(self._group))
        return [(indices, probs, n_experts) for indices, probs in pieces]

    def begin_dispatch(self, x, planned: tuple):
        indices, probs, n_experts = planned
        rows, hidden = _rows(x), int(x.shape[1])
        is_one = (indices >= 0) & (indices < n_experts)
        ids = torch.where(is_one, indices, torch.full_like(indices, -1)).to(torch.int64)
        buffer = self._buffer_for(hidden)
        per_rank, per_node, per_expert, goes, _ = buffer.get_dispatch_layout(ids, n_experts)
        found, found_ids, found_probs, counts, handle, event = buffer.dispatch(
            rows, topk_idx=ids, topk_weights=probs.contiguous(), num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node, num_tokens_per_expert=per_expert, is_token_in_rank=goes,
            async_finish=True,
        )  # fmt: skip

        def wait() -> Dispatched:
            event.current_stream_wait()
            kept = Handle(int(found_ids.shape[0]), hidden, found_ids >= 0, handle)
            return Dispatched(_as_given(found), found_ids.to(torch.int32), found_probs, list(counts), kept)

        return wait

    def begin_dispatch_again(self, rows, layout: Handle):
        found, _, _, _, _, event = self._buffer.dispatch(_rows(rows), handle=layout.given, async_finish=True)

        def wait():
            event.current_stream_wait()
            return _as_given(found)

        return wait

    def begin_combine(self, rows, layout: Handle, slots=None):
        given = rows
        if rows is None:  # it carries weights only beside rows
            shape = [layout.n_received, layout.hidden]
            given = torch.zeros(shape, dtype=torch.bfloat16, device=slots.device)
        if slots is not None:  # it adds them up over the ranks
            slots = torch.where(layout.here, slots, torch.zeros_like(slots))
        out, back, event = self._buffer.combine(_rows(given), layout.given, topk_weights=slots, async_finish=True)

        def wait():
            event.current_stream_wait()
            return None if rows is None else out, back

        return wait


def _rows(x):
    """As DeepEP takes them."""
    if isinstance(x, QuantTensor):
        return x.data.contiguous(), x.scale.contiguous()
    checks.require_dtype("x", x, ("bfloat16",))
    return x.contiguous()


def _as_given(rows):
    return QuantTensor(*rows, (1, 128)) if isinstance(rows, tuple) else rows
