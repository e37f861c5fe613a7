"""Stands in for DeepEP on the CPU: its published calls, done by gathering everything everywhere.

It takes what the kernels take and no more: types, shapes and which arguments go together.
"""

import torch
import torch.distributed as dist


class Config:
    def get_nvl_buffer_size_hint(self, row_bytes, ranks):
        return 1 << 20

    def get_rdma_buffer_size_hint(self, row_bytes, ranks):
        return 0


class Event:
    def __init__(self):
        self.waited = False

    def current_stream_wait(self):
        self.waited = True


def _everyones(value, group):
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group)
    return found


class Buffer:
    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    get_dispatch_config = get_combine_config = staticmethod(lambda ranks: Config())

    def get_dispatch_layout(self, topk_idx, num_experts):
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        held = num_experts // self.size
        goes = torch.stack([((topk_idx >= 0) & (topk_idx // held == r)).any(1) for r in range(self.size)], 1)
        per_expert = torch.stack([(topk_idx == e).sum() for e in range(num_experts)]).int()
        return goes.sum(0).int(), None, per_expert, goes, Event()

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
        num_tokens_per_expert=None, topk_idx=None, topk_weights=None, async_finish=False,
    ):  # fmt: skip
        self._check_rows(x)
        parts = x if isinstance(x, tuple) else (x,)
        if handle is not None:
            assert topk_idx is None and topk_weights is None and num_tokens_per_rank is None
            goes = handle["mine"]
        else:
            assert topk_weights.dtype == torch.float32 and num_tokens_per_rank.dtype == torch.int32
            goes = is_token_in_rank
        sent = _everyones([part.view(torch.uint8)[goes[:, r]] for r in range(self.size) for part in parts], self.group)
        came = [torch.cat([s[self.rank * len(parts) + n] for s in sent]).view(p.dtype) for n, p in enumerate(parts)]
        found = tuple(came) if isinstance(x, tuple) else came[0]
        if handle is not None:
            return found, None, None, None, None, Event()
        held = len(num_tokens_per_expert) // self.size
        every = _everyones((topk_idx, topk_weights, goes), self.group)
        ids = torch.cat([i[g[:, self.rank]] for i, _, g in every])
        probs = torch.cat([w[g[:, self.rank]] for _, w, g in every])
        here = (ids >= 0) & (ids // held == self.rank)
        ids = torch.where(here, ids - self.rank * held, -1)
        counts = [int((ids == e).sum()) for e in range(held)]
        handle = {"mine": goes, "every": [g for _, _, g in every]}
        return found, ids, torch.where(here, probs, 0.0), counts, handle, Event()

    def combine(self, x, handle, topk_weights=None, async_finish=False):
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.dim() == 2
        lengths = [int(g[:, self.rank].sum()) for g in handle["every"]]
        assert sum(lengths) == x.shape[0]
        every = _everyones(
            (x.split(lengths), None if topk_weights is None else topk_weights.split(lengths)), self.group
        )
        mine = handle["mine"]
        out = torch.zeros(mine.shape[0], x.shape[1])
        back = None if topk_weights is None else torch.zeros(mine.shape[0], topk_weights.shape[1])
        for r, (rows, weights) in enumerate(every):
            out[mine[:, r]] += rows[self.rank].float()
            if back is not None:
                back[mine[:, r]] += weights[self.rank]
        return out.to(x.dtype), back, Event()

    @staticmethod
    def _check_rows(x):
        if isinstance(x, tuple):
            data, scale = x
            assert data.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
            assert scale.shape == (data.shape[0], data.shape[1] // 128) and data.is_contiguous()
        else:
            assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.dim() == 2
