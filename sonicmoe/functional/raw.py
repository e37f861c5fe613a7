"""What the raw functions of ``forward.py`` and ``backward.py`` have in common: their arguments as a stage wants them.

Rows are in sorted order: expert e owns rows ``expert_frequency_offset[e]`` to ``[e+1]``, all of them real.
"""

import torch

from .. import checks
from ..config import SonicMoEConfig
from ..enums import ActivationType, is_glu
from ..gemm.api import ExpertWeights
from ..gemm.plan import Plan
from ..routing.metadata import Routing
from .streams import plan_for


def raw_plan(rows_name: str, rows, activation) -> Plan:
    """A plan for the type of ``rows``. The callers own z and the rest as plain tensors, so there is no FP8 here."""
    config = SonicMoEConfig.current()
    if config.use_fp8:
        raise ValueError(
            f"fp8_mode: got {config.fp8_mode!r}, but the raw functions compute in the type of their tensors; call them "
            "with FP8 off (functional.enable_fp8(False))"
        )
    checks.require_tensor(rows_name, rows)
    return plan_for(rows, activation, config, rows_name)


def any_activation(is_glu_activation: bool) -> ActivationType:
    """For a stage that only needs to know how wide z is."""
    return ActivationType.SWIGLU if is_glu_activation else ActivationType.RELU


def parse_activation(activation_type, is_glu_activation: bool) -> ActivationType:
    kind = ActivationType.parse(activation_type)
    if is_glu(kind) != bool(is_glu_activation):
        raise ValueError(f"is_glu_activation: got {is_glu_activation} with activation_type {kind.value!r}")
    return kind


def refuse_schedule(expert_schedule_order) -> None:
    if expert_schedule_order is not None:
        raise ValueError("expert_schedule_order: got an order, need None: experts are scheduled by the kernels")


def require_rows(plan: Plan, reference, **tensors) -> None:
    """``name=(tensor, shape)``: contiguous, of the storage type, where ``reference`` is."""
    for name, (tensor, shape) in tensors.items():
        checks.require_tensor(name, tensor)
        checks.require_shape(name, tensor, shape, "rows in sorted order, or tokens for x and dout")
        checks.require_dtype(name, tensor, (plan.storage,))
        checks.require_contiguous(name, tensor)
        checks.require_same_place(name, tensor, "the rows", reference)


def weights_of(plan: Plan, reference, w1_EFH=None, w2_EHI=None) -> ExpertWeights:
    """One weight is enough for one stage; sizes come from the one that is there."""
    for name, weight in (("w1", w1_EFH), ("w2", w2_EHI)):
        if weight is not None:
            checks.require_dtype(name, weight, (plan.storage,))
            checks.require_same_place(name, weight, "the rows", reference)
    if w2_EHI is not None:
        _, hidden, intermediate = checks.shape_of(w2_EHI)
    else:
        _, width, hidden = checks.shape_of(w1_EFH)
        intermediate = width // (2 if is_glu(plan.activation) else 1)
    checks.require_layer_sizes(hidden, intermediate, plan.storage, fp8=False)
    return ExpertWeights(_off_tape(w1_EFH), _off_tape(w2_EHI), None, hidden, intermediate)


def _off_tape(weight):
    return None if weight is None else weight.detach()


def require_gradient(name: str, gradient, reference) -> None:
    """A weight gradient that is to be filled: a float tensor where ``reference`` is."""
    checks.require_dtype(name, gradient, checks.FLOAT_DTYPES)
    checks.require_same_place(name, gradient, "the rows", reference)


def routing_of(
    reference,
    n_experts: int,
    expert_frequency_offset,
    n_tokens: int,
    n_rows: int,
    x_gather_idx=None,
    s_scatter_idx=None,
    scores=None,
) -> Routing:
    """A Routing of block 1, where ``reference`` is, with as much in it as the stage reads. Without ``x_gather_idx`` row
    r is token r."""
    offset = expert_frequency_offset
    checks.require_tensor("expert_frequency_offset", offset)
    checks.require_dtype("expert_frequency_offset", offset, checks.INT_DTYPES)
    checks.require_shape("expert_frequency_offset", offset, (n_experts + 1,), "[E + 1], the rows of each expert")
    checks.require_same_place("expert_frequency_offset", offset, "the rows", reference)
    scatter = reverse = None
    if s_scatter_idx is not None:
        scatter = _index("s_scatter_idx", s_scatter_idx, n_rows, reference)
        row = torch.arange(n_rows, dtype=torch.int32, device=offset.device)
        reverse = torch.empty_like(row).scatter_(0, scatter.to(torch.int64), row)
    return Routing(
        expert_offset=offset.to(torch.int32).contiguous(),
        x_gather_idx=None if x_gather_idx is None else _index("x_gather_idx", x_gather_idx, n_rows, reference),
        s_scatter_idx=scatter,
        s_reverse_scatter_idx=reverse,
        slot_offset=None,
        scores=scores,
        score_src_idx=None,
        n_tokens=n_tokens,
        n_topk=None,
        n_experts=n_experts,
        n_slots=n_rows,
        n_rows=n_rows,
        block=1,
        backend="caller",
    )


def _index(name: str, index, n_rows: int, reference):
    checks.require_tensor(name, index)
    checks.require_dtype(name, index, checks.INT_DTYPES)
    checks.require_shape(name, index, (n_rows,), "one entry a row")
    checks.require_same_place(name, index, "the rows", reference)
    return index.to(torch.int32).contiguous()
