"""Routing metadata: from a dispatcher's top-k to the arrays that the grouped kernels read.

T tokens, K slots a token, E experts. A slot (t,k) is *valid* when 0 <= idx[t,k] < E. S valid slots in all.
*Compact* order numbers the valid slots by (t,k). *Sorted* order numbers them by (expert, t, k), with each non-empty
expert's segment filled to a multiple of ``block`` by pad rows: M rows in all. Pad rows gather row 0 and score 0.
"""

from dataclasses import dataclass, field
from typing import Any

from ..config import SonicMoEConfig
from . import backends
from .arrays import bound, counts_on_host

# csrc/deepep_topk_metadata.h has the same two: what one backend cannot do, none does.
MAX_EXPERTS = 1024
MAX_TOPK = 32


@dataclass(frozen=True)
class Routing:
    """One dispatch. Index arrays are int32; offsets into sorted rows are padded offsets."""

    expert_offset: Any  # [E+1] sorted row where each expert begins
    x_gather_idx: Any  # [M] sorted row -> token (pads: 0)
    s_scatter_idx: Any  # [M] sorted row -> compact slot (pads: S, S+1, ...)
    s_reverse_scatter_idx: Any  # [S] compact slot -> sorted row
    slot_offset: Any  # [T+1] token -> its first compact slot
    scores: Any  # [M] float32, by compact slot; 0 from S on
    score_src_idx: Any  # [S] compact slot -> flat (t,k)
    n_tokens: int
    n_topk: int | None  # K; None for slots that came as a list, any number a token: ds is [S] in compact order then
    n_experts: int
    n_slots: int  # S
    n_rows: int  # M
    block: int
    backend: str  # which implementation made this
    sorted_scales: Any = None  # [M, words] the dispatch scales of each row's token, if scales were given
    # What engines have made of this for themselves, by keys of their own; a changed copy of this begins without.
    kept: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def n_pad_rows(self) -> int:
        return self.n_rows - self.n_slots


def build(
    indices,
    probs,
    n_experts: int,
    block: int,
    config: SonicMoEConfig,
    counts: list[int] | None = None,
    scales=None,
    index_name: str = "dispatched_indices",
    all_valid: bool = False,
) -> Routing:
    """Metadata for ``indices [T,K]`` (int32 or int64; negative or >= E means not here) and ``probs [T,K]``.

    ``counts`` are the dispatcher's real tokens per expert. They size the arrays, so counts that the indices do not
    have are an error: here on the CPU and under SONIC_MOE_VALIDATE_DISPATCH, else on a GPU a message and a stopped
    device. ``scales`` [T, words] of 4-byte words come back in sorted order. ``all_valid`` promises that every id is an
    expert: without counts the compiled backends then make arrays for the most rows that there can be, and wait for
    nothing.
    """
    n_tokens, n_topk = int(indices.shape[0]), int(indices.shape[1])
    if n_tokens * n_topk >= 2**31 or n_topk > MAX_TOPK:
        raise ValueError(
            f"{index_name}: got shape {[n_tokens, n_topk]}, need at most {MAX_TOPK} columns and under 2**31 slots"
        )
    if not 1 <= n_experts <= MAX_EXPERTS:
        raise ValueError(f"n_experts: got {n_experts}, need 1 to {MAX_EXPERTS}")
    if block < 1:
        raise ValueError(f"block: got {block}, need at least 1")
    if counts is not None and sum(counts) > n_tokens * n_topk:
        raise ValueError(
            f"tokens_per_expert: got a sum of {sum(counts)}, but {index_name} {[n_tokens, n_topk]} have room for "
            f"{n_tokens * n_topk} slots"
        )
    if config.validate_dispatch:
        backends.check_rows(indices, n_experts, config, index_name)
        _check_counts(counts_on_host(indices, n_experts), counts, n_tokens * n_topk, all_valid, index_name)
    sizing = counts
    if all_valid and counts is None:
        sizing = bound(n_tokens * n_topk, n_experts, block)
    backend, arrays = backends.build(indices, probs, n_experts, block, config, sizing, scales)
    found = arrays.pop("counts")
    if found is not None:
        _check_counts(found, counts, n_tokens * n_topk, all_valid, index_name)
    return Routing(
        **arrays,
        n_tokens=n_tokens,
        n_topk=n_topk,
        n_experts=n_experts,
        n_slots=int(arrays["score_src_idx"].shape[0]),
        n_rows=int(arrays["x_gather_idx"].shape[0]),
        block=block,
        backend=backend,
    )


def _check_counts(found: list[int], counts: list[int] | None, n_slots: int, all_valid: bool, index_name: str) -> None:
    """What the ids have, against what the caller said of them."""
    if all_valid and sum(found) != n_slots:
        raise ValueError(f"{index_name}: {n_slots - sum(found)} of {n_slots} ids are not in 0 to {len(found) - 1}")
    if counts is not None and found != counts:
        expert = next(e for e in range(len(found)) if found[e] != counts[e])
        raise ValueError(
            f"tokens_per_expert: got {counts[expert]} for expert {expert} (sum {sum(counts)}), but {index_name} "
            f"hold {found[expert]} slots for it (sum {sum(found)})"
        )
