"""Calls of ``run_sonic_moe`` whose forward and backward are apart."""

from sonicmoe import SonicMoEConfig
from sonicmoe.ernie_compat import run_sonic_moe

from .paddle_runs import native_parameters, tensor

SMALL = {"n_tokens": 12, "n_experts": 3}
RECIPES = {
    "sm90": SonicMoEConfig(use_fp8=True),
    "sm100": SonicMoEConfig(use_fp8=True, fp8_recipe="sm100"),
    "iso32": SonicMoEConfig(use_fp8=True, fp8_recipe="sm100", fp8_iso32_weight=True),
}


class Call:
    """One forward of ``run_sonic_moe``, and its backward when asked."""

    def __init__(self, problem, weights, fp8=False, counts=None, **kwargs):
        self.problem, self.weights = problem, weights
        self.x, self.probs = tensor(problem.x, grad=True), tensor(problem.probs, "float32", grad=True)
        indices = tensor(problem.indices, "int32")
        topk, n_experts = problem.indices.shape[1], problem.n_experts
        self.out = run_sonic_moe(self.x, indices, self.probs, topk, n_experts, *weights, fp8, counts, **kwargs)

    def land(self):
        self.out.backward(tensor(self.problem.dout))
        return self

    def activations(self):
        return {"out": self.out, "dx": self.x.grad, "ds": self.probs.grad}

    def results(self):
        """These and copies of both main_grads as they are now."""
        grads = {f"dw{n + 1}": getattr(w, "main_grad", None) for n, w in enumerate(self.weights)}
        return self.activations() | {name: grad.clone() for name, grad in grads.items() if grad is not None}


def once(problem, fp8=False, **kwargs):
    return Call(problem, native_parameters(problem), fp8, **kwargs).land().results()


def activations_of(results):
    return {name: results[name] for name in ("out", "dx", "ds")}
