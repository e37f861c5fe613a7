"""The router: softmax over the K largest logits of each token. Forward and backward in framework ops are the
definition; on a GPU the Triton kernels run, where they are.

Among equal logits the lower expert comes first, on every backend: a tie is no coin toss, and two ranks agree.
"""

from importlib.util import find_spec

import torch

from .. import checks
from ..launch import beside

if find_spec("triton") is not None:
    from . import triton_topk
else:
    triton_topk = None


def _backend(tensor, config):
    return None if checks.is_cpu(tensor) or config.backend == "naive" else triton_topk


def forward(logits_TE, k: int, config):
    """(scores [T,K] float32, experts [T,K] int32), in order of falling logits."""
    compiled = _backend(logits_TE, config)
    run = topk_softmax_forward if compiled is None else compiled.topk_softmax_forward
    return run(logits_TE, k)


def backward(dscores_TK, scores_TK, indices_TK, n_experts: int, out_dtype, config):
    """dlogits [T,E] in ``out_dtype``; 0 for the experts that were not chosen."""
    compiled = _backend(dscores_TK, config)
    run = topk_softmax_backward if compiled is None else compiled.topk_softmax_backward
    return run(dscores_TK, scores_TK, indices_TK, n_experts, out_dtype)


def topk_softmax_forward(logits, k: int):
    n_tokens, n_experts = [int(size) for size in logits.shape]
    logits = logits.to(torch.float32)
    chosen = torch.argsort(logits, dim=-1, descending=True, stable=True)[:, :k]
    first = torch.arange(n_tokens, dtype=torch.int64, device=beside(logits)).reshape([n_tokens, 1]) * n_experts
    values = logits.reshape([n_tokens * n_experts]).index_select(0, (chosen + first).reshape([n_tokens * k]))
    scores = torch.softmax(values.reshape([n_tokens, k]), dim=-1)
    return scores, chosen.to(torch.int32)


def topk_softmax_backward(dscores, scores, indices, n_experts: int, out_dtype):
    n_tokens, k = [int(size) for size in scores.shape]
    dscores = dscores.to(torch.float32)
    dvalues = scores * (dscores - (dscores * scores).sum(dim=-1, keepdim=True))
    first = torch.arange(n_tokens, dtype=torch.int64, device=beside(scores)).reshape([n_tokens, 1]) * n_experts
    where = (indices.to(torch.int64) + first).reshape([n_tokens * k])
    dlogits = torch.zeros([n_tokens * n_experts], dtype=torch.float32, device=beside(scores))
    return dlogits.scatter(0, where, dvalues.reshape([n_tokens * k])).to(out_dtype).reshape([n_tokens, n_experts])
