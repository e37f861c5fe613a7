"""Checks and conversions of what a dispatcher hands over, shared by every entry point."""

from .. import checks
from ..config import SonicMoEConfig
from ..gemm.plan import Plan
from ..launch import arch, is_cuda
from ..routing import metadata
from .fp8_payload import activation_payload


def check_topk(indices, probs, n_tokens: int, names: tuple[str, str], reference) -> None:
    """indices [T,K] int32/int64 and probs [T,K] float32, where x is."""
    index_name, prob_name = names
    for name, tensor in ((index_name, indices), (prob_name, probs)):
        checks.require_tensor(name, tensor)
        checks.require_rank(name, tensor, 2, "[T, K]")
        checks.require_same_place(name, tensor, *reference)
    checks.require_dtype(index_name, indices, checks.INT_DTYPES)
    checks.require_dtype(prob_name, probs, ("float32",))
    topk = checks.shape_of(indices)[1]
    checks.require_shape(index_name, indices, (n_tokens, topk), "[T, K], T rows as in x")
    checks.require_shape(prob_name, probs, (n_tokens, topk), f"[T, K], as {index_name}")


def check_hidden(name: str, x, hidden_size: int) -> None:
    checks.require_tensor(name, x)
    checks.require_rank(name, x, 2, "[T, H]")
    checks.require_shape(name, x, (checks.shape_of(x)[0], hidden_size), "[T, H]")
    checks.require_dtype(name, x, (*checks.FLOAT_DTYPES, checks.FP8_DTYPE))
    checks.require_contiguous(name, x)


def engine_input(names: tuple[str, str, str], x, fp8_data=None, fp8_scale=None, layout: str | None = None):
    """x off the tape: a plain tensor, or the FP8 payload if the dispatch was FP8.

    The payload is either x itself (e4m3), or given beside an x that is there for the tape alone. ``names`` are the
    caller's for x, the FP8 data and the scales.
    """
    x_name, data_name, scale_name = names
    if fp8_data is not None:
        checks.require_tensor(data_name, fp8_data)
        checks.require_shape(data_name, fp8_data, checks.shape_of(x), f"[T, H], as {x_name}")
        checks.require_same_place(data_name, fp8_data, x_name, x)
        return activation_payload(fp8_data.detach(), fp8_scale, data_name, scale_name, layout)
    if checks.dtype_name(x) == checks.FP8_DTYPE:
        return activation_payload(x.detach(), fp8_scale, x_name, scale_name, layout)
    if fp8_scale is not None:
        raise ValueError(
            f"{scale_name}: got scales, but {x_name} is {checks.dtype_name(x)}; they need float8_e4m3fn data"
        )
    if layout is not None:
        raise ValueError(f"{scale_name}: got layout {layout!r} without scales")
    return x.detach()


def check_handle(handle) -> None:
    """What the combine's backward will fill in: a dict, or None for a gradient that is not FP8."""
    if handle is not None and not isinstance(handle, dict):
        raise TypeError(f"fp8_combine_grad_handle: got {type(handle).__name__}, need a dict or None")


def route(indices, probs, counts, n_experts: int, plan: Plan, config: SonicMoEConfig, index_name: str):
    """Routing metadata for one call; ``index_name`` is what its caller calls the indices."""
    if plan.recipe is not None and config.fp8_assume_aligned and counts is not None:
        for expert, count in enumerate(counts):
            if count % plan.row_block:
                raise ValueError(
                    f"tokens_per_expert: got {count} for expert {expert} under SONIC_MOE_FP8_ASSUME_ALIGNED=1, need a "
                    f"multiple of {plan.row_block}"
                )
    return metadata.build(
        indices.detach(), probs.detach(), n_experts, plan.row_block, config, counts, index_name=index_name
    )


def place_facts(tensor) -> dict:
    """What a plan wants to know of a tensor's place: ``cpu`` or the accelerator's type without its number, and for an
    NVIDIA GPU its architecture."""
    kind = checks.place_name(tensor).partition(":")[0]
    return {"device": kind, "arch": arch(tensor) if kind != "cpu" and is_cuda(tensor) else None}
