"""Compiles GEMMs for Hopper without a GPU, through the calls that users make, and launches each as far as CUDA.

    gemm_compile.py CACHE CUOBJDUMP      prints what came of it as JSON

The engine runs on stubs (tests/support/gemm_stubs.py). Where a kernel is compiled, its stub first hands the arguments
of the launch to the kernel itself, with tensors that claim to be on a GPU: their addresses are looked at for alignment
and nothing else, since CUDA finds no device.
"""

import ctypes
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import tvm_ffi

from sonicmoe import SonicMoEConfig, expert_mlp
from sonicmoe.gemm import kernel_store, sm90_bf16
from sonicmoe.gemm.api import ExpertWeights, GradBuffers
from sonicmoe.gemm.plan import make_plan
from sonicmoe.routing import metadata
from tests.support import gemm_stubs

CACHE = Path(sys.argv[1])
_CUDA = 2  # kDLCUDA


# ---- Launches without a device ---------------------------------------------------------------------------------------


class ClaimsToBeOnAGpu:
    """A CPU tensor whose DLPack record names a GPU."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return (_CUDA, 0)

    def __dlpack__(self, **_):
        capsule = torch.utils.dlpack.to_dlpack(self.tensor)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        record = pointer(capsule, b"dltensor")  # begins with the address, then the device's type
        ctypes.c_int32.from_address(record + ctypes.sizeof(ctypes.c_void_p)).value = _CUDA
        return capsule


def claimed(argument):
    if isinstance(argument, tuple):
        return tuple(map(claimed, argument))
    return tvm_ffi.from_dlpack(ClaimsToBeOnAGpu(argument)) if isinstance(argument, torch.Tensor) else argument


def refusal(run, arguments) -> str | None:
    """None if the kernel took the arguments and got as far as CUDA, else what it had against them."""
    try:
        run(*map(claimed, arguments))
    except Exception as error:
        return None if "Cuda Runtime Error" in str(error) else f"{type(error).__name__}: {error}"
    return "it ran, where there is no GPU"


class Checked:
    """A stub that asks the compiled kernel first."""

    def __init__(self, kernel, run, log):
        self.stub, self.run, self.launches, self.refusals = gemm_stubs.Stub(kernel, log), run, 0, []

    def __call__(self, *arguments):
        self.launches, self.arguments = self.launches + 1, arguments
        found = refusal(self.run, arguments)
        if found:
            self.refusals.append(found)
        self.stub(*arguments)


def misuses(up: Checked) -> dict:
    """How the kernel of the up-projection answers to wrong arguments: without that, its silence would say nothing."""
    a, b, d, c, epilogue, schedule, (offsets, _, gather, _), *scales = up.arguments
    segments = (offsets, None, gather, None)

    def answer(a=a, b=b, epilogue=epilogue, segments=segments):
        return refusal(up.run, (a, b, d, c, epilogue, schedule, segments, *scales))

    return {
        "nothing": answer(),
        "another type": answer(a=a.float()),
        "transposed": answer(b=b.transpose(1, 2).contiguous().transpose(1, 2)),
        "misaligned": answer(a=torch.empty(a.numel() + 1, dtype=a.dtype)[1:].view_as(a)),
        "a result too few": answer(epilogue=epilogue[1:]),
        "segments of the summed dimension": answer(segments=(None, offsets, gather, None)),
        "a row too few": answer(segments=(offsets, None, gather[1:], None)),
        "wide indices": answer(segments=(offsets, None, gather.long(), None)),
    }


# ---- What is compiled, and what is launched --------------------------------------------------------------------------


def plan_of(kind="swiglu", storage="bfloat16", **settings):
    config = SonicMoEConfig(cache_dir=CACHE, **settings)
    return make_plan(config, kind, storage=storage, device="cuda", arch="sm_90a")


PLANS = {
    "swiglu": plan_of(),
    "relu": plan_of("relu"),
    "fp16 geglu": plan_of("geglu", "float16"),
    "clamp": plan_of(swiglu_clamp=7.0),
}
# All that the first plan needs; of the others what differs most from it.
OPS = {
    "swiglu": ("up", "up_z", "rows", "down_backward", "wgrad"),
    "relu": ("up", "down_backward"),
    "fp16 geglu": ("up", "down_backward"),
    "clamp": ("up", "down_backward"),
}
# Tokens, slots a token, experts, H, I: ordinary; the smallest; I that no tile divides, and experts without a row.
SIZES = ((48, 2, 5, 64, 160), (1, 1, 1, 64, 64), (3, 2, 40, 128, 72))


def kernels_of(plan):
    """What the engine asks for, without loading it."""
    asked, load = [], kernel_store.load
    kernel_store.load = lambda kernels, cache_dir: asked.extend(kernels) or [None] * len(kernels)
    sm90_bf16.kernels.__wrapped__(plan)
    kernel_store.load = load
    return asked


def run_engine(plan, t, k, e, h, i):
    """Forward, backward twice (the second computes z anew), and each way of a weight gradient."""
    dtype = getattr(torch, plan.storage)

    def normal(*size):
        return torch.randn(*size).to(dtype)

    x, dout, w1, w2 = normal(t, h), normal(t, h), normal(e, plan.width(i), h), normal(e, h, i)
    indices = torch.rand(t, e).argsort(dim=1)[:, :k].to(torch.int32)
    routing = metadata.build(indices, torch.rand(t, k), e, 1, SonicMoEConfig())
    _, saved = expert_mlp.forward(x, routing, ExpertWeights(w1, w2, None, h, i), plan)
    expert_mlp.backward(saved, dout)
    wgrad = expert_mlp.backward(saved, dout).wgrad
    everyone = (True,) * e
    for grouped in (False, True):
        for target, overwrite in ((torch.float32, False), (dtype, True)):
            dw2 = torch.zeros([e, i, h] if grouped else [e, h, i], dtype=target)
            buffers = GradBuffers(torch.zeros(w1.shape, dtype=target), dw2, grouped, everyone, everyone, overwrite)
            wgrad.accumulate_dw1(buffers)
            wgrad.accumulate_dw2(buffers)


# ---- The machine code ------------------------------------------------------------------------------------------------


def machine_code(kernel) -> dict:
    """What is in a kernel's library: the GPU's code is an ELF file inside that of the host."""
    path = kernel_store._folder(CACHE) / f"{kernel.key()}.so"
    content = path.read_bytes()
    cubin = path.with_suffix(".cubin")
    cubin.write_bytes(content[content.index(b"\x7fELF", 4) :])
    shown = subprocess.run([sys.argv[2], "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    code = subprocess.run([sys.argv[2], "-sass", cubin], capture_output=True, text=True, check=True).stdout
    cubin.unlink()
    ((stack, local),) = re.findall(r"STACK:(\d+).*LOCAL:(\d+)", shown)
    return {
        "instructions": hashlib.sha256("".join(re.findall(r"/\* (0x[0-9a-f]+) \*/", code)).encode()).hexdigest(),
        "machine": re.search(r"code for (\S+)", code)[1],
        "spilled_bytes": int(stack) + int(local),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "adds_in_the_store": "UTMAREDG" in code,
        "tensor_core_products": len(re.findall(r"\bHGMMA\b", code)),
    }


def main():
    wanted = [(name, kernel) for name, plan in PLANS.items() for kernel in kernels_of(plan) if kernel.op in OPS[name]]
    kernels = [kernel for _, kernel in wanted]
    functions = kernel_store.load(kernels, CACHE)
    assert "cutlass" not in sys.modules  # the process that trains imports nothing of the generator
    log = gemm_stubs.Log()
    checked = {kernel: Checked(kernel, run, log) for kernel, run in zip(kernels, functions, strict=True)}

    def load(asked, cache_dir):
        return [checked.get(kernel) or gemm_stubs.Stub(kernel, log) for kernel in asked]

    kernel_store.load, sm90_bf16.combine = load, lambda: gemm_stubs.Combine(log)
    processors = SimpleNamespace(multi_processor_count=gemm_stubs.MULTIPROCESSORS)
    torch.cuda.get_device_properties = lambda index: processors
    for plan in PLANS.values():
        for sizes in SIZES:
            run_engine(plan, *sizes)
    answer = {
        "tools": kernel_store._tool_versions(),
        "kernels": [
            {
                "plan": name,
                "launches": checked[kernel].launches,
                "refusals": checked[kernel].refusals[:1],
                **dataclasses.asdict(kernel),
                **machine_code(kernel),
            }
            for name, kernel in wanted
        ],
        "misuses": misuses(checked[kernels[0]]),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
