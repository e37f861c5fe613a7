"""What real torch makes of a problem with the same engine, for the Paddle side to compare with, and its times.

torch_side.py parity OUT.npz        {"<problem>/<recipe>/<result>": bits}
torch_side.py time OUT.json         {"<recipe>": times of forward and backward at the reference shape}
"""

import json
import sys

import numpy as np
import torch
from gpu_paddle import timing
from gpu_paddle.problem import RECIPES, REFERENCE, SMALL, inputs

from sonicmoe import SonicMoEConfig, expert_mlp
from sonicmoe.gemm.plan import make_plan
from sonicmoe.launch import arch, current_stream
from sonicmoe.quant.api import WeightCopies
from sonicmoe.routing import metadata


def on_gpu(name, value):
    made = torch.from_numpy(value.view(np.int16) if value.dtype == np.uint16 else value).cuda()
    return made.view(torch.bfloat16) if value.dtype == np.uint16 else made


class Layer:
    """The engine as the torch layer drives it, with weights in native layout."""

    def __init__(self, given, recipe: str):
        self.given = {name: on_gpu(name, value) for name, value in given.items() if name != "counts"}
        self.counts = given["counts"].tolist()
        w1 = self.given["w1"]
        e, h, f = w1.shape
        halves = w1.reshape(e, h, 2, f // 2)
        self.w1 = halves.permute(0, 3, 2, 1).reshape(e, f, h).contiguous()
        self.w2 = self.given["w2"].transpose(1, 2).contiguous()
        self.sizes = int(h), int(f) // 2
        self.config = SonicMoEConfig(**RECIPES[recipe])
        self.plan = make_plan(self.config, "swiglu", storage="bfloat16", device="cuda", arch=arch(w1))
        self.copies = None if self.plan.recipe is None else WeightCopies(self.plan.recipe)
        self.dw1 = torch.zeros(self.w1.shape, dtype=torch.float32, device="cuda")
        self.dw2 = torch.zeros(self.w2.shape, dtype=torch.float32, device="cuda")

    def step(self):
        g, (hidden, intermediate) = self.given, self.sizes
        routing = metadata.build(g["ids"], g["probs"], len(self.counts), self.plan.row_block, self.config, self.counts)
        if self.copies is None:
            weights = expert_mlp.ExpertWeights(self.w1, self.w2, None, hidden, intermediate)
        else:
            fp8 = self.copies.current(self.w1, self.w2)
            weights = expert_mlp.ExpertWeights(None, None, fp8, hidden, intermediate)
        out, saved = expert_mlp.forward(g["x"], routing, weights, self.plan)
        grads = expert_mlp.backward(saved, g["dout"])
        everyone = (True,) * len(self.counts)
        buffers = expert_mlp.GradBuffers(self.dw1, self.dw2, False, everyone, everyone)
        grads.wgrad.accumulate_dw1(buffers)
        grads.wgrad.accumulate_dw2(buffers)
        return out, grads.dx, grads.ds


def results(given, recipe: str) -> dict[str, np.ndarray]:
    layer = Layer(given, recipe)
    with torch.no_grad():
        out, dx, ds = layer.step()
    found = {"out": out, "dx": dx, "ds": ds}
    found["dw1"] = torch.cat([layer.dw1[:, part::2].transpose(1, 2) for part in range(2)], dim=2)
    found["dw2"] = layer.dw2.transpose(1, 2)
    return {
        name: (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).cpu().numpy()
        for name, value in found.items()
    }


def main():
    what, target = sys.argv[1:]
    if what == "parity":
        found = {}
        for problem_name, problem in (("small", SMALL), ("reference", REFERENCE)):
            given = inputs(problem)
            for recipe in RECIPES:
                answer = results(given, recipe)
                found |= {f"{problem_name}/{recipe}/{name}": value for name, value in answer.items()}
        np.savez(target, **found)
        return
    times, given = {}, inputs(REFERENCE)
    for recipe in RECIPES:
        layer = Layer(given, recipe)
        with torch.no_grad():
            times[recipe] = timing.measure(layer.step, current_stream(layer.w1))
    with open(target, "w") as file:
        json.dump(times, file)


if __name__ == "__main__":
    main()
