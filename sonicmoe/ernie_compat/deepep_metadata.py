"""DeepEP's top-k to routing metadata, as the tuple that PaddleFleet takes."""

import paddle

from .. import checks
from ..config import SonicMoEConfig
from ..routing import metadata
from .dispatch import check_topk


def deepep_topk_to_sonic_metadata(indices, probs, tokens_per_expert, E, device=None, block=128):
    """The arrays of ``routing.metadata.Routing`` for ``indices [T,K]`` and ``probs [T,K]``:

        (expert_frequency_offset [E+1], x_gather_idx [TKp], s_scatter_idx [TKp], s_reverse_scatter_idx [TK],
         num_activated_expert_per_token_offset [T+1], router_scores [TKp], TK_padded, total_pad_rows, N_recv,
         score_src_idx [TK])

    ``device`` defaults to where the indices are, and may not differ from it. ``tokens_per_expert`` None counts here.
    """
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
    validate = SonicMoEConfig.current().validate_dispatch
    with paddle.no_grad():
        routing = metadata.build(indices.detach(), probs.detach(), n_experts, block, counts=counts, validate=validate)
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
