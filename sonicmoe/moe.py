"""``MoE``: router and experts as one torch module."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import checks
from .enums import ActivationType, KernelBackendMoE, is_glu
from .functional.kernel_views import refuse_bias
from .functional.switch_loss import switch_loss
from .functional.whole_layer import whole_layer

_CURVES = {
    ActivationType.SILU: F.silu,
    ActivationType.GELU: lambda h: F.gelu(h, approximate="tanh"),
    ActivationType.RELU: F.relu,
    ActivationType.RELU_SQ: lambda h: F.relu(h).square(),
}
_GATES = {
    ActivationType.SWIGLU: ActivationType.SILU,
    ActivationType.GEGLU: ActivationType.GELU,
    ActivationType.REGLU: ActivationType.RELU,
}


class Experts(nn.Module):
    """One projection of all experts: weight [E, out, in] and, on request, bias [E, out]."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, add_bias: bool = True, std: float | None = None
    ):
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if add_bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, mean=0.0, std=0.02 if self.std is None else self.std)
        if self.bias is not None:
            self.bias.zero_()

    def expert(self, number: int, x):
        return F.linear(x, self.weight[number], None if self.bias is None else self.bias[number])

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


class MoE(nn.Module):
    """Top-k routing over experts of two projections.

    Parameters: ``router.weight`` [E, H], ``c_fc.weight`` [E, 2I, H] with rows gate 0, up 0, gate 1, ... ([E, I, H] for
    activations without a gate), ``c_proj.weight`` [E, H, I], and with ``add_bias`` ``c_fc.bias`` and ``c_proj.bias``.
    A weight with a ``main_grad`` has its gradient added there: see ``functional/autograd.py``.
    """

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        activation_function: ActivationType | str,
        add_bias: bool,
        std: float,
    ):
        super().__init__()
        self.num_experts = checks.require_int("num_experts", num_experts)
        self.top_k = checks.require_int("num_experts_per_tok", num_experts_per_tok)
        if self.top_k > self.num_experts:
            raise ValueError(f"num_experts_per_tok: got {self.top_k}, need at most num_experts, {self.num_experts}")
        self.hidden_size = checks.require_int("hidden_size", hidden_size)
        self.intermediate_size = checks.require_int("intermediate_size", intermediate_size)
        self.activation_function = ActivationType.parse(activation_function)
        width = self.intermediate_size * (2 if is_glu(self.activation_function) else 1)
        self.router = nn.Linear(self.hidden_size, self.num_experts, bias=False)
        self.c_fc = Experts(self.num_experts, self.hidden_size, width, add_bias, std)
        self.c_proj = Experts(self.num_experts, self.intermediate_size, self.hidden_size, add_bias, std)

    def forward(
        self,
        hidden_states,
        kernel_backend_moe: KernelBackendMoE | str = KernelBackendMoE.sonicmoe,
        is_inference_mode: bool = False,
    ):
        """(output, aux_loss) for hidden_states [..., H]; output has its shape.

        ``is_inference_mode`` keeps nothing for a backward, and there is no aux_loss (None).
        """
        backend = getattr(kernel_backend_moe, "value", kernel_backend_moe)
        runs = {"sonicmoe": self._fused, "torch": self._plain}
        if backend not in runs:
            why = "; scattermoe is another package, which this one does not use" if backend == "scattermoe" else ""
            raise ValueError(f"kernel_backend_moe: got {backend!r}, need {' or '.join(map(repr, runs))}{why}")
        checks.require_tensor("hidden_states", hidden_states)
        if hidden_states.ndim < 1 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states: got shape {list(hidden_states.shape)}, need [..., H] with H={self.hidden_size}"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_inference_mode):
            return runs[backend](hidden_states, is_inference_mode)

    def _fused(self, x, inference: bool):
        refuse_bias(add_bias=self.c_fc.bias)
        weights = self.router.weight, self.c_fc.weight, self.c_proj.weight
        return whole_layer(x, *weights, self.top_k, self.activation_function, inference)

    def _plain(self, hidden_states, inference: bool):
        """The same function in torch ops that anybody can read, one expert after the other, in any float type."""
        x = hidden_states.reshape(-1, self.hidden_size)
        logits = self.router(x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        values, experts = logits.sort(dim=-1, descending=True, stable=True)
        values, experts = values[:, : self.top_k], experts[:, : self.top_k]
        scores = F.softmax(values.to(wide), dim=-1)
        out, dtype = torch.zeros(x.shape, dtype=wide, device=x.device), x.dtype
        for number in range(self.num_experts):
            token, slot = torch.where(experts == number)
            y = self.c_proj.expert(number, self._activate(self.c_fc.expert(number, x[token])))
            out, dtype = out.index_add(0, token, y.to(wide) * scores[token, slot, None].to(wide)), y.dtype
        frequency = torch.bincount(experts.flatten(), minlength=self.num_experts).to(torch.int32)
        return out.to(dtype).reshape(hidden_states.shape), None if inference else switch_loss(logits, frequency)

    def _activate(self, h):
        if not is_glu(self.activation_function):
            return _CURVES[self.activation_function](h)
        return _CURVES[_GATES[self.activation_function]](h[..., ::2]) * h[..., 1::2]

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, activation_function={self.activation_function.value}"
