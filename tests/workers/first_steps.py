"""The first steps of a process: bits of the layer's results, one line of JSON a step.

first_steps.py DEVICE CACHE_DIR FP8 T,H,I,E,K
"""

import hashlib
import json
import sys

import torch

from sonicmoe import MoE, SonicMoEConfig
from sonicmoe.enums import ActivationType

STEPS = 4


def digest(tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:16]


def main(device: str, cache_dir: str, use_fp8: str, sizes: str) -> None:
    t, h, i, e, k = (int(size) for size in sizes.split(","))
    torch.manual_seed(0)
    # Drawn on the CPU, so that nothing of the device but the layer decides.
    moe = MoE(e, k, h, i, ActivationType.SWIGLU, False, 0.02).to(torch.bfloat16).to(device)
    x, dout = (torch.randn(t, h).bfloat16().to(device) for _ in range(2))
    x.requires_grad_()
    fp8 = use_fp8 == "1"
    with SonicMoEConfig(use_fp8=fp8, fp8_wgrad=fp8, cache_dir=cache_dir).activate():
        for _ in range(STEPS):
            out, loss = moe(x)
            leaves = {"x": x, **dict(moe.named_parameters())}
            grads = torch.autograd.grad([out, loss], list(leaves.values()), [dout, torch.ones_like(loss)])
            found = dict(zip(leaves, grads, strict=True)) | {"out": out, "loss": loss.reshape(1)}
            print(json.dumps({name: digest(tensor) for name, tensor in found.items()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
