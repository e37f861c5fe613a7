"""The most memory that a forward and backward of the torch layer has at a time, as on Hopper but for kernels that do
nothing: allocations do not depend on what these compute. Prints {"fp8" or "bf16", with main_grad or not: MiB} as JSON.

    layer_peak.py T H I E K
"""

import json
import sys
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from sonicmoe import MoE, SonicMoEConfig, launch, triton_launch
from sonicmoe.enums import ActivationType
from sonicmoe.functional import layer, router, streams, whole_layer
from sonicmoe.gemm import kernel_store, plan, sm90_fp8
from sonicmoe.routing import native

MIB = 2**20
MULTIPROCESSORS = 132


def nothing(*_, **__):
    return None


class Kernels:
    """Of the JIT's modules: records of arguments are these themselves, and every launch does nothing."""

    Inputs = Outputs = staticmethod(lambda *given: given)
    Gemms = staticmethod(lambda *given: Kernels())
    workspace_words = staticmethod(lambda n_experts: 128 * n_experts)

    def __getattr__(self, name):
        return nothing


def replace_everywhere(old, new) -> None:
    """Also where modules have imported it by its name."""
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "sonicmoe"]:
        for name in [name for name, value in vars(module).items() if value is old]:
            setattr(module, name, new)


def pretend_to_be_hopper() -> None:
    make_plan = plan.make_plan
    hopper = {"device": "cuda", "arch": "sm_90a"}
    replace_everywhere(make_plan, lambda *args, **given: make_plan(*args, **{**given, **hopper}))
    replace_everywhere(launch.arch, lambda tensor: "sm_90a")
    replace_everywhere(launch.current_stream, lambda tensor: 0)
    replace_everywhere(launch.multiprocessors, lambda tensor, most=None: MULTIPROCESSORS)
    replace_everywhere(launch.checks.is_cpu, lambda tensor: False)
    replace_everywhere(layer.build_ahead, nothing)
    replace_everywhere(triton_launch.launch, nothing)
    replace_everywhere(triton_launch.launch_repeatable, lambda *_, **__: nothing)
    sm90_fp8._module = native._module = lambda target, cache_dir: Kernels()
    kernel_store.load = lambda kernels, cache_dir: [nothing] * len(kernels)
    stream = SimpleNamespace(wait_event=nothing, record_event=nothing)
    streams.torch.cuda.current_stream = lambda device=None: stream
    streams.torch.cuda.is_current_stream_capturing = lambda: False
    # The router's two products are torch's own with many tokens: not wanted here, and slow.
    router.F = SimpleNamespace(linear=lambda x, weight: x.new_empty([x.shape[0], weight.shape[0]]))
    whole_layer.plus_product = lambda dx, *_: dx


def peak(moe, x, dout, config) -> int:
    """Bytes above parameters, inputs and what lives on between steps."""

    def step():
        with config.activate():
            moe(x)[0].backward(dout)
        for tensor in (x, *moe.parameters()):
            tensor.grad = None

    step()  # copies of weights
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = most = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def main() -> None:
    n_tokens, hidden, intermediate, n_experts, topk = map(int, sys.argv[1:])
    pretend_to_be_hopper()
    moe = MoE(n_experts, topk, hidden, intermediate, ActivationType.SWIGLU, False, 0.02).to(torch.bfloat16)
    x, dout = (torch.empty([n_tokens, hidden], dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    found = {}
    for kind, config in (("bf16", SonicMoEConfig()), ("fp8", SonicMoEConfig(use_fp8=True, fp8_wgrad=True))):
        for name in (kind, f"{kind} with main_grad"):
            for weight in (moe.c_fc.weight, moe.c_proj.weight):
                weight.main_grad = torch.empty(weight.shape) if name != kind else None
            found[name] = peak(moe, x, dout, config) / MIB
    print(json.dumps(found))


if __name__ == "__main__":
    main()
