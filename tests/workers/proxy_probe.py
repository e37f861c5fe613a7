"""Does the steps named on its command line in order, then prints as JSON what `torch` means to whom.

proxy_probe.py '["user torch", "enable global", "import ernie_compat", "run node"]'
"""

import importlib
import json
import os
import sys


class UserCode:
    """The user's own module: neither in sonicmoe nor in anything that the proxy was asked to cover."""

    torch = None  # as imported before anything else

    @staticmethod
    def import_torch():
        import torch

        return torch


def enable(scope):
    import paddle

    paddle.enable_compat(scope=scope)


def hide(*names):
    """Make Paddle one that does not have these public names (dotted, below ``paddle``)."""
    import paddle

    for name in names:
        holder, _, last = f"paddle.{name}".rpartition(".")
        holder = paddle if holder == "paddle" else sys.modules[holder]
        delattr(holder, last)


def without_silent():
    """A Paddle whose ``enable_compat`` knows only ``scope``."""
    import paddle

    real = paddle.enable_compat
    paddle.enable_compat = lambda *, scope=None: real(scope=scope)


def run_node(root="sonicmoe"):
    """One training step, BF16 and FP8, on Paddle tensors; the outputs must be those of the oracle."""
    import numpy as np
    import paddle

    from tests.support import floors, oracle, problems

    package = importlib.import_module(root)
    problem = problems.make_problem(n_tokens=8)
    right = oracle.reference(problem.x, problem.w1, problem.w2, problem.indices, problem.probs, problem.dout)
    for fp8 in (False, True):
        weights = type("Experts", (), {})()
        for name, values in (("weight1", problem.w1), ("weight2", problem.w2)):
            zero = paddle.nn.initializer.Constant(0.0)
            weight = paddle.create_parameter(list(values.shape), "bfloat16", default_initializer=zero)
            weight.set_value(paddle.to_tensor(values).astype("bfloat16"))
            setattr(weights, name, weight)
        sizes = (problem.n_experts, problem.hidden, problem.intermediate)
        node = package.SonicMoEMlpNode(weights, *sizes, config=package.SonicMoEConfig(use_fp8=fp8))
        x = paddle.to_tensor(problem.x).astype("bfloat16")
        x.stop_gradient = False
        out = node(x, problem.counts, paddle.to_tensor(problem.indices), paddle.to_tensor(problem.probs))
        assert isinstance(out, paddle.Tensor), type(out)
        out.backward(paddle.to_tensor(problem.dout).astype("bfloat16"))
        node.step()
        found = {"out": out, "dx": x.grad, "dw1": weights.weight1.main_grad, "dw2": weights.weight2.main_grad}
        for name, value in found.items():
            error = floors.relative_error(value.detach().astype("float32").numpy(), getattr(right, name))
            assert error < (floors.FP8_RELATIVE if fp8 else 0.01), (fp8, name, error)
            assert np.isfinite(error)


def use_torch():
    """What somebody does with the real torch beside us; the optimizer makes torch load most of itself."""
    torch = UserCode.import_torch()
    import torch.nn.functional as functional

    layer = torch.nn.Linear(2, 1)
    step = torch.optim.AdamW(layer.parameters())
    functional.relu(layer(torch.ones(3, 2)) + 9.0).sum().backward()
    assert layer.weight.grad.tolist() == [[3.0, 3.0]]
    step.step()


def remember_torch():
    UserCode.torch = UserCode.import_torch()


def ensure():
    importlib.import_module("sonicmoe.ernie_compat.torch_proxy").ensure()


STEPS = {
    "user torch": remember_torch,
    "use torch": use_torch,
    "enable scope": lambda: enable({"sonicmoe", "quack", "triton"}),
    "enable elsewhere": lambda: enable({"somebody_else"}),
    "enable global": lambda: enable(None),
    "hide enable_compat": lambda: hide("enable_compat"),
    "hide enable_torch_proxy": lambda: hide("compat.enable_torch_proxy"),
    "hide silent": without_silent,
    "import sonicmoe": lambda: importlib.import_module("sonicmoe"),
    "import ernie_compat": lambda: importlib.import_module("sonicmoe.ernie_compat"),
    "import renamed": lambda: importlib.import_module("vendor_ops.sonicmoe.ernie_compat"),
    "import engine": lambda: importlib.import_module("sonicmoe.expert_mlp"),
    "import quantizer": lambda: importlib.import_module("sonicmoe.quant.naive"),
    "ensure": ensure,
    "run node": run_node,
    "run renamed": lambda: run_node("vendor_ops.sonicmoe"),
}


def meaning(module):
    """What goes by the name of torch: "paddle", "torch" or None."""
    if module is None:
        return None
    paddle = sys.modules.get("paddle")
    return "paddle" if paddle is not None and module.Tensor is paddle.Tensor else "torch"


def ours(name):
    return name.startswith(("sonicmoe.", "vendor_ops.sonicmoe."))


def report():
    # Its own packages: others there (setuptools, typing_extensions) are as good as any and may be loaded by Paddle.
    site = os.environ.get("PROBE_TORCH_SITE")
    folders = tuple(os.path.join(site, name, "") for name in ("torch", "torchgen", "functorch")) if site else ()
    modules = sorted(sys.modules.items())
    found = {
        "ours": {name: meaning(vars(m)["torch"]) for name, m in modules if ours(name) and "torch" in vars(m)},
        "real torch": [name for name, m in modules if str(getattr(m, "__file__", None) or "").startswith(folders)],
        "finders": sum(type(finder).__name__ == "TorchProxyMetaFinder" for finder in sys.meta_path),
    }
    try:
        torch = UserCode.import_torch()
    except ImportError:
        torch = None
    found["user's torch"] = meaning(torch)
    found["same torch as before"] = UserCode.torch is None or torch is UserCode.torch
    return found


def main():
    errors = []
    for step in json.loads(sys.argv[1]):
        try:
            STEPS[step]()
        except ImportError as error:
            errors.append([step, f"{type(error).__name__}: {error}"])
    print(json.dumps({**report(), "errors": errors}))


if __name__ == "__main__":
    main()
