"""Runs of the Paddle entry points on a Problem, with everything brought back as float32 NumPy."""

import types

import numpy as np
import paddle

from sonicmoe.ernie_compat import (
    SonicMoEMlpNode,
    fused_grouped_w1_to_sonic,
    fused_sonic_w1_to_grouped,
    fused_transpose_w2_layout,
    run_sonic_moe,
)

from .oracle import Result, reference


def array(tensor) -> np.ndarray:
    return tensor.detach().astype("float32").numpy()


def tensor(values, dtype="bfloat16", grad=False):
    made = paddle.to_tensor(np.asarray(values)).astype(dtype)
    made.stop_gradient = not grad
    return made


def parameter(values, dtype="bfloat16"):
    """A real parameter: optimizers, hooks and state dicts treat it as such."""
    values = np.asarray(values, dtype=np.float32)
    made = paddle.create_parameter(list(values.shape), dtype, default_initializer=paddle.nn.initializer.Constant(0.0))
    made.set_value(paddle.to_tensor(values).astype(dtype))
    return made


class Expert(paddle.nn.Layer):
    """What ERNIE's expert offers: two projections with a weight each."""

    def __init__(self, w1, w2, dtype="bfloat16"):
        super().__init__()
        self.up_gate_proj, self.down_proj = paddle.nn.Layer(), paddle.nn.Layer()
        self.up_gate_proj.weight = parameter(w1, dtype)
        self.down_proj.weight = parameter(w2, dtype)


def expert_list(problem, dtype="bfloat16") -> list[Expert]:
    return [Expert(problem.w1[e], problem.w2[e], dtype) for e in range(problem.n_experts)]


def fused_experts(problem, dtype="bfloat16"):
    return types.SimpleNamespace(weight1=parameter(problem.w1, dtype), weight2=parameter(problem.w2, dtype))


def make_node(problem, experts=None, **kwargs) -> SonicMoEMlpNode:
    experts = expert_list(problem) if experts is None else experts
    return SonicMoEMlpNode(
        experts,
        n_experts=problem.n_experts,
        hidden_size=problem.hidden,
        intermediate_size=problem.intermediate,
        **kwargs,
    )


def forward_node(node, problem, *, counts=None, index_dtype="int32", dtype="bfloat16", grad=(True, True), **kwargs):
    """(out, x, probs) with x and probs on the tape as ``grad`` says."""
    x = tensor(problem.x, dtype, grad[0])
    probs = tensor(problem.probs, "float32", grad[1])
    indices = paddle.to_tensor(problem.indices.astype(index_dtype))
    out = node(x, problem.counts if counts is None else counts, indices, probs, **kwargs)
    return out, x, probs


def main_grads(experts) -> tuple[np.ndarray, np.ndarray]:
    """Stacked main_grad of both weights in grouped layout, from a list of experts or a fused object."""
    if hasattr(experts, "weight1"):
        return array(experts.weight1.main_grad), array(experts.weight2.main_grad)
    return (
        np.stack([array(e.up_gate_proj.weight.main_grad) for e in experts]),
        np.stack([array(e.down_proj.weight.main_grad) for e in experts]),
    )


def run_node(problem, experts=None, *, config=None, activation_type="swiglu", **kwargs) -> Result:
    """One forward, backward and step."""
    experts = expert_list(problem) if experts is None else experts
    node = make_node(problem, experts, config=config, activation_type=activation_type)
    out, x, probs = forward_node(node, problem, **kwargs)
    out.backward(tensor(problem.dout, str(out.dtype).rsplit(".", 1)[-1]))
    node.step()
    dw1, dw2 = main_grads(experts)
    return Result(out=array(out), dx=array(x.grad), ds=array(probs.grad), dw1=dw1, dw2=dw2)


def native_parameters(problem, glu=True, dtype="bfloat16"):
    """w1 and w2 as PaddleFleet holds them during compute."""
    w1, w2 = tensor(problem.w1, dtype), tensor(problem.w2, dtype)
    w1 = fused_grouped_w1_to_sonic(w1) if glu else fused_transpose_w2_layout(w1)
    return parameter(array(w1), dtype), parameter(array(fused_transpose_w2_layout(w2)), dtype)


def run_fleet(
    problem, *, weights=None, fp8=False, counts=None, index_dtype="int32", glu=True, dtype="bfloat16", **kwargs
) -> Result:
    """One ``run_sonic_moe`` forward and backward; gradients brought to grouped layout."""
    w1, w2 = native_parameters(problem, glu, dtype) if weights is None else weights
    x, probs = tensor(problem.x, dtype, grad=True), tensor(problem.probs, "float32", grad=True)
    indices = paddle.to_tensor(problem.indices.astype(index_dtype))
    n_experts, topk = problem.n_experts, problem.indices.shape[1]
    out = run_sonic_moe(x, indices, probs, topk, n_experts, w1, w2, fp8=fp8, tokens_per_expert=counts, **kwargs)
    out.backward(tensor(problem.dout, dtype))
    convert = fused_sonic_w1_to_grouped if glu else fused_transpose_w2_layout
    return Result(
        out=array(out),
        dx=array(x.grad),
        ds=array(probs.grad),
        dw1=array(convert(w1.main_grad)),
        dw2=array(w2.main_grad),
    )


def oracle(problem, kind="swiglu", clamp=None, keep_z=None) -> Result:
    p = problem
    return reference(p.x, p.w1, p.w2, p.indices, p.probs, p.dout, kind, clamp, keep_z)
