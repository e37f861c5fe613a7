"""DeepEP's top-k to routing metadata, as the tuple that PaddleFleet takes."""

import paddle

from .. import checks
from ..config import SonicMoEConfig
from ..launch import make_current
from ..routing import metadata
from .autocast import without_autocast
from .dispatch import check_topk
from .fp8_payload import packed_scale_words


def deepep_topk_to_sonic_metadata(indices, probs, tokens_per_expert, E, device=None, block=128):
    """The arrays of ``routing.metadata.Routing`` for ``indices [T,K]`` and ``probs [T,K]``:

        (expert_frequency_offset [E+1], x_gather_idx [TKp], s_scatter_idx [TKp], s_reverse_scatter_idx [TK],
         num_activated_expert_per_token_offset [T+1], router_scores [TKp], TK_padded, total_pad_rows, N_recv,
         score_src_idx [TK])

    ``device`` defaults to where the indices are, and may not differ from it. ``tokens_per_expert`` None counts here.
    """
    return _as_tuple(_routing(indices, probs, tokens_per_expert, E, device, block, None))


def deepep_topk_to_sonic_metadata_with_scales(
    indices, probs, tokens_per_expert, E, raw_scales, cols, device=None, block=128
):
    """The same tuple and, as its eleventh part, the dispatch scales in sorted order [TKp, cols/128], packed by the
    kernels that make the rest: float32 as they are, UE8M0 as int32 words of four bytes, low byte first. Pad rows hold
    row 0's. ``raw_scales`` in any carrier that ``fp8_payload`` lists, for rows of ``cols`` channels.
    """
    checks.require_tensor("raw_scales", raw_scales)
    checks.require_tensor("indices", indices)
    checks.require_same_place("raw_scales", raw_scales, "indices", indices)
    words = packed_scale_words(raw_scales, int(indices.shape[0]), checks.require_int("cols", cols), "raw_scales")
    routing = _routing(indices, probs, tokens_per_expert, E, device, block, words)
    return (*_as_tuple(routing), routing.sorted_scales)


def _routing(indices, probs, tokens_per_expert, E, device, block, scales):
    n_experts = checks.require_int("E", E)
    block = checks.require_int("block", block)
    checks.require_tensor("indices", indices)
    checks.require_rank("indices", indices, 2, "[T, K]")
    n_tokens = checks.shape_of(indices)[0]
    check_topk(indices, probs, n_tokens, ("indices", "probs"), ("indices", indices))
    if device is not None:
        wanted, found = _device_type(device), checks.place_name(indices).partition(":")[0]
        if wanted != found:
            raise ValueError(f"device: got {device}, need {found}, where indices is")
    counts = None if tokens_per_expert is None else checks.host_counts(tokens_per_expert, n_experts)
    make_current(indices)
    with paddle.no_grad(), without_autocast():
        routing = metadata.build(
            indices.detach(), probs.detach(), n_experts, block, SonicMoEConfig.current(), counts, scales, "indices"
        )
    return routing


def _as_tuple(routing):
    return (
        routing.expert_offset,
        routing.x_gather_idx,
        routing.s_scatter_idx,
        routing.s_reverse_scatter_idx,
        routing.slot_offset,
        routing.scores,
        routing.n_rows,
        routing.n_pad_rows,
        routing.n_tokens,
        routing.score_src_idx,
    )


def _device_type(device) -> str:
    """``cuda:0``, a Place or a device object, as the word that places are named by here."""
    word = str(device).removeprefix("Place(").removesuffix(")").partition(":")[0]
    return "gpu" if word == "cuda" else word
