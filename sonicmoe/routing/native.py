"""Routing metadata by compiled code: C++ on the CPU, CUDA on an NVIDIA GPU. See csrc/deepep_topk_metadata.h.

A call that knows its counts waits for nothing.
"""

from functools import cache

import torch

from .. import checks, jit
from ..launch import address, arch, beside, current_stream
from .arrays import Arrays, Bound, counts_on_host

_NAME = "deepep_topk_metadata"
_HEADERS = (f"{_NAME}.h",)
HOST = jit.Extension(_NAME, (f"{_NAME}.cpp",), _HEADERS)


def cuda_extension(target: str) -> jit.Extension:
    headers = (*_HEADERS, f"{_NAME}_steps.cuh", f"{_NAME}_few.cuh")
    return jit.Extension(_NAME, (f"{_NAME}.cpp", f"{_NAME}.cu"), headers, target)


@cache
def _module(target: str | None, cache_dir):
    """Looked up before every expert call, so short of ``jit.load``'s own bookkeeping."""
    return jit.load(HOST if target is None else cuda_extension(target), cache_dir)


def _inputs(module, indices, probs, n_experts: int, block: int):
    n_tokens, n_topk = indices.shape
    wide = indices.dtype == torch.int64
    return module.Inputs(address(indices), wide, address(probs), n_tokens, n_topk, n_experts, block)


def build_host(indices, probs, n_experts: int, block: int, counts, cache_dir, scales=None) -> dict:
    """The arrays of ``Routing`` by name; ``counts`` are those found, ``sorted_scales`` the scales' rows if given."""
    module = _module(None, cache_dir)
    indices, probs = indices.contiguous(), probs.contiguous()
    inputs = _inputs(module, indices, probs, n_experts, block)
    found = module.count(inputs)
    n_slots, n_rows = module.sizes(found, block)
    arrays = Arrays(indices, int(indices.shape[0]), n_experts, n_slots, n_rows, 0)
    source, target, words = _scale_rows(scales, n_rows)
    module.build(inputs, module.Outputs(*arrays.addresses, n_slots, n_rows), address(source), address(target), words)
    return arrays.views | {"counts": found, "sorted_scales": target}


def build_cuda(indices, probs, n_experts: int, block: int, counts, cache_dir, scales=None) -> dict:
    """The same on a GPU: one launch on the current stream. Counts from the host cost no wait; without them the ids
    are counted first, which waits once; a ``Bound`` says how much room there is to be. A count that the ids do not
    have stops the device with a message."""
    module = _module(arch(indices), cache_dir)
    indices, probs = indices.contiguous(), probs.contiguous()
    n_tokens, n_topk = indices.shape
    counts = counts_on_host(indices, n_experts) if counts is None else counts
    bounded = isinstance(counts, Bound)
    n_slots, n_rows = counts if bounded else module.sizes(counts, block)
    arrays = Arrays(indices, n_tokens, n_experts, n_slots, n_rows, module.workspace_words(n_experts))
    source, target, words = _scale_rows(scales, n_rows)
    if n_tokens * n_topk == 0:
        arrays.views["expert_offset"].zero_()
        arrays.views["slot_offset"].zero_()
    module.launch(
        _inputs(module, indices, probs, n_experts, block),
        module.Outputs(*arrays.addresses, n_slots, n_rows, bounded),
        address(source),
        address(target),
        words,
        arrays.workspace_address,
        current_stream(indices),
    )
    arrays.views["counts"], arrays.views["sorted_scales"] = None, target
    return arrays.views


def _scale_rows(scales, n_rows: int):
    """(source, target, words): dispatch scales of 4-byte words and room for them in sorted order."""
    if scales is None:
        return None, None, 0
    words = int(scales.shape[1])
    source = scales.contiguous()
    return source, torch.empty([n_rows, words], dtype=scales.dtype, device=beside(scales)), words


def check_rows(indices, n_experts: int, cache_dir) -> tuple[int, int] | None:
    """(row, fault) of the first row that breaks the dispatcher's promise, or None. Waits for the device."""
    module = _module(None if checks.is_cpu(indices) else arch(indices), cache_dir)
    indices = indices.contiguous()
    inputs = _inputs(module, indices, indices, n_experts, 1)
    if checks.is_cpu(indices):
        verdict = module.check(inputs)
    else:
        found = torch.zeros([1], dtype=torch.int64, device=beside(indices))
        module.launch_check(inputs, address(found), current_stream(indices))
        verdict = int(found[0])
    return None if verdict < 0 else (verdict // 4, verdict % 4)
