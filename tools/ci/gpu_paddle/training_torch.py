"""The demo's model (examples/ernie_moe) in torch, over the same engine: 200 steps from start.npz of ``training.py``.

training_torch.py WORK [DEVICE]         leaves torch_gpu.json
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gpu_paddle import training

from sonicmoe import ActivationType, SonicMoEConfig
from sonicmoe.functional.autograd import apply_experts
from sonicmoe.functional.layer import layer_plan, route, route_topk

HEADS, EXPERTS, TOPK, LAYERS = 4, 8, 2, 3  # of the demo's ModelConfig, which this process cannot import
CONFIG = SonicMoEConfig()


def native_w1(grouped):
    e, h, f = grouped.shape
    return grouped.reshape(e, h, 2, f // 2).permute(0, 3, 2, 1).reshape(e, f, h)


class Model:
    def __init__(self, given, device: str):
        self.weights, prefix = {}, "weight/"
        for name in given.files:
            if name.startswith(prefix) and ".experts." not in name:
                self.weights[name.removeprefix(prefix)] = torch.from_numpy(given[name]).to(device)
        for layer in range(1, LAYERS):
            for kind, native in (("up_gate_proj", native_w1), ("down_proj", lambda w: w.transpose(1, 2))):
                names = [f"weight/blocks.{layer}.mlp.experts.{e}.{kind}.weight" for e in range(EXPERTS)]
                stacked = native(torch.from_numpy(np.stack([given[name] for name in names])))
                weight = stacked.contiguous().to(device, torch.bfloat16).requires_grad_()
                weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
                self.weights[f"blocks.{layer}.mlp.{kind}"] = weight
        for weight in self.weights.values():
            weight.requires_grad_()
        # A float32 weight is its own master.
        self.masters = {n: w if w.dtype == torch.float32 else w.detach().float() for n, w in self.weights.items()}

    def norm(self, x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weights[f"{name}.weight"]

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"]

    def attention(self, x, name):
        b, s, h = x.shape
        d = h // HEADS
        q, k, v = self.linear(x, f"{name}.qkv").reshape(b, s, 3, HEADS, d).permute(2, 0, 3, 1, 4)
        turn = 10000.0 ** (-np.arange(0, d, 2) / d)
        angle = np.arange(s)[:, None] * turn
        cos, sin = (torch.from_numpy(table.astype(np.float32)).to(x.device) for table in (np.cos(angle), np.sin(angle)))

        def rotate(t):
            first, second = t.chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        score = rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(d)
        future = torch.full([s, s], -1e9, device=x.device).triu(1)
        mixed = torch.softmax(score + future, -1) @ v
        return self.linear(mixed.permute(0, 2, 1, 3).reshape(b, s, h), f"{name}.out")

    def experts(self, x, name):
        rows = x.reshape(-1, x.shape[-1])
        logits = self.linear(rows, f"{name}.router.gate")
        scores, indices = route_topk(logits, TOPK, config=CONFIG)
        load = torch.bincount(indices.flatten().long(), minlength=EXPERTS).float()
        balance = EXPERTS * (load / load.sum() * torch.softmax(logits, -1).mean(0)).sum()
        w1, w2 = self.weights[f"{name}.up_gate_proj"], self.weights[f"{name}.down_proj"]
        plan = layer_plan(rows.bfloat16(), w1, w2, ActivationType.SWIGLU, CONFIG)
        with torch.no_grad():
            routing, _ = route(indices, scores.detach(), EXPERTS, plan, CONFIG)
        out = apply_experts(rows.bfloat16(), scores, w1, w2, routing, plan)
        return out.float().reshape(x.shape), balance

    def loss(self, windows):
        """(nats a byte, mean of the balance losses)"""
        x, balances = self.weights["embedding.weight"][windows[:, :-1]], []
        for layer in range(LAYERS):
            name = f"blocks.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.attention_norm"), f"{name}.attention")
            normed = self.norm(x, f"{name}.mlp_norm")
            if layer:
                out, balance = self.experts(normed, f"{name}.mlp")
                balances.append(balance)
            else:
                gate, up = self.linear(normed, f"{name}.mlp.up_gate_proj").chunk(2, -1)
                out = self.linear(F.silu(gate) * up, f"{name}.mlp.down_proj")
            x = x + out
        logits = self.linear(self.norm(x, "norm"), "head")
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()), sum(balances) / len(balances)


def train(given, device: str, steps: int = training.STEPS) -> list[float]:
    model, losses = Model(given, device), []
    names = list(model.masters)
    masters = [model.masters[name] for name in names]
    groups = [
        {"params": [m for m in masters if m.ndim > 1], "weight_decay": 0.1},
        {"params": [m for m in masters if m.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for step in range(steps):
        windows = torch.from_numpy(given["windows"][step].astype(np.int64)).to(device)
        loss, balance = model.loss(windows)
        (loss + float(given["balance"]) * balance).backward()
        for name, master in zip(names, masters, strict=True):
            main_grad = getattr(model.weights[name], "main_grad", None)
            if main_grad is not None:
                master.grad = main_grad.clone()
                main_grad.zero_()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = float(given["rates"][step])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, master in zip(names, masters, strict=True):
                if master is not model.weights[name]:
                    model.weights[name].copy_(master)
        losses.append(float(loss))
    return losses


def main() -> None:
    work, device = Path(sys.argv[1]), (*sys.argv[2:], "cuda")[0]
    training.save(work, "torch_gpu", train(np.load(work / "start.npz"), device))


if __name__ == "__main__":
    main()
