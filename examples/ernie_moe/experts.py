"""What runs the experts of one MoE block: ``SonicMoEMlpNode``, or the same function in plain Paddle operators.

Both are called as ``run(x_TH, tokens_per_expert, idx_TK, prob_TK)`` and both put the weights' gradients into
``weight.main_grad`` (fp32) when ``run.step()`` is called, so that one optimizer serves either.

Shapes: T tokens, H hidden, I intermediate, E experts, K slots a token, M slots of one expert.
"""

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn


def init_linear(fan_in: int, fan_out: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer without bias whose output has about ``gain`` times its input's magnitude."""
    initializer = nn.initializer.Normal(0.0, gain / math.sqrt(fan_in))
    return nn.Linear(fan_in, fan_out, weight_attr=paddle.ParamAttr(initializer=initializer), bias_attr=False)


class GatedMLP(nn.Layer):
    """SwiGLU MLP in ERNIE's layout: ``up_gate_proj.weight`` [H, 2I] holds the gate's columns, then up's."""

    def __init__(self, hidden: int, intermediate: int, gain: float = 1.0):
        super().__init__()
        self.up_gate_proj = init_linear(hidden, 2 * intermediate)
        self.down_proj = init_linear(intermediate, hidden, gain)

    def forward(self, x_TH):
        gate_TI, up_TI = paddle.chunk(self.up_gate_proj(x_TH), 2, axis=-1)
        return self.down_proj(F.silu(gate_TI) * up_TI)


def bf16_expert(hidden: int, intermediate: int, gain: float = 1.0) -> GatedMLP:
    """One expert. Drawn in fp32 and rounded, because CPU Paddle has no bf16 random generator."""
    expert = GatedMLP(hidden, intermediate, gain)
    expert.to(dtype="bfloat16")
    return expert


class PlainExperts:
    """Gather, two matmuls and a weighted sum for each expert: the yardstick for the node."""

    def __init__(self, experts):
        self.experts = list(experts)
        self._pending = []

    def __call__(self, x_TH, tokens_per_expert, idx_TK, prob_TK):
        x32_TH = x_TH.astype("float32")
        idx_host_TK = idx_TK.numpy()
        rows, outputs = [], []
        for e, expert in enumerate(self.experts):
            w1_HI2, w2_IH = self._fp32_leaf(expert.up_gate_proj.weight), self._fp32_leaf(expert.down_proj.weight)
            slots_M2 = np.argwhere(idx_host_TK == e)
            if len(slots_M2) == 0:
                continue
            slots_M2 = paddle.to_tensor(slots_M2)
            gate_MI, up_MI = paddle.chunk(paddle.gather(x32_TH, slots_M2[:, 0]) @ w1_HI2, 2, axis=-1)
            y_MH = (F.silu(gate_MI) * up_MI) @ w2_IH
            rows.append(slots_M2[:, 0])
            outputs.append(y_MH * paddle.gather_nd(prob_TK, slots_M2).unsqueeze(-1))
        if not rows:
            return paddle.zeros_like(x_TH)
        out_TH = paddle.index_add(paddle.zeros_like(x32_TH), paddle.concat(rows), 0, paddle.concat(outputs))
        return out_TH.astype(x_TH.dtype)

    def step(self):
        """Add the gradients of all calls since the last ``step`` into ``main_grad``."""
        for weight, leaf in self._pending:
            if getattr(weight, "main_grad", None) is None:
                weight.main_grad = paddle.zeros(weight.shape, dtype="float32")
            if leaf.grad is not None:
                weight.main_grad.add_(leaf.grad)
        self._pending = []

    def _fp32_leaf(self, weight):
        """An fp32 copy that autograd ends at. Differentiating the cast would round the gradient to bf16."""
        leaf = weight.detach().astype("float32")
        if paddle.is_grad_enabled():
            leaf.stop_gradient = False
            self._pending.append((weight, leaf))
        return leaf


def make_runner(kind: str, precision: str, recipe: str, experts, hidden: int, intermediate: int):
    """``kind`` is "plain" or "sonic"; ``precision`` "bf16" or "fp8", of which plain operators do only the first."""
    if kind == "plain":
        if precision != "bf16":
            raise ValueError(f"precision: got {precision!r}, plain experts run 'bf16' only")
        return PlainExperts(experts)
    from sonicmoe import ActivationType, SonicMoEConfig
    from sonicmoe.ernie_compat import SonicMoEMlpNode

    if precision == "fp8":
        config = SonicMoEConfig(use_fp8=True, fp8_wgrad=True, fp8_recipe=recipe)
    else:
        config = SonicMoEConfig(use_fp8=False)
    return SonicMoEMlpNode(
        list(experts),
        n_experts=len(experts),
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation_type=ActivationType.SWIGLU,
        config=config,
    )
