"""One MoE problem on a GPU: its tensors, its runs through the engine, and float64's answer."""

from dataclasses import replace

import torch

from sonicmoe import SonicMoEConfig, expert_mlp
from sonicmoe.gemm.api import ExpertWeights, GradBuffers
from sonicmoe.gemm.plan import make_plan
from sonicmoe.launch import arch
from sonicmoe.routing import metadata
from tests.support import floors

NAMES = ("out", "dx", "ds", "dw1", "dw2")
GPU = torch.device("cuda", 0)


class Problem:
    """T tokens, K slots, E experts, H hidden, I intermediate; ids may be holes (-1) or point past the experts."""

    def __init__(
        self, t=700, k=4, e=6, h=512, i=384, kind="swiglu", routing="random", scale=1.0, storage="bfloat16", clamp=None,
        seed=0, device=GPU,
    ):  # fmt: skip
        self.sizes, self.kind, self.clamp, self.device = (t, k, e, h, i), kind, clamp, device
        self.dtype = getattr(torch, storage)
        random = torch.Generator(device=device).manual_seed(seed)

        def normal(*size, by=1.0):
            return (torch.randn(*size, generator=random, device=device) * by).to(self.dtype)

        f = 2 * i if kind in ("swiglu", "geglu", "reglu") else i
        # The scale is on what callers feed; weights keep activations of ordinary size at scale 1.
        self.x, self.dout = normal(t, h, by=scale), normal(t, h, by=scale)
        self.w1, self.w2 = normal(e, f, h, by=h**-0.5), normal(e, h, i, by=i**-0.5)
        self.probs = torch.rand(t, k, generator=random, device=device)
        lean = {"random": 0.0, "skewed": 3.0, "empty": 0.0}[routing]
        noise = torch.rand(t, e, generator=random, device=device)
        noise = noise - lean * torch.arange(e, device=device) / e
        if routing == "empty":
            assert k < e, "all experts are chosen"
            noise[:, 1::2][:, : e - k] -= 10.0  # some are chosen only after all others, so that nobody does
        self.indices = noise.argsort(dim=1, descending=True)[:, :k].to(torch.int32)
        if routing != "random":
            self.indices[torch.rand(t, k, generator=random, device=device) < 0.2] = -1
            self.indices[0, 0] = e + 3

    def config(self, cache_dir, **settings):
        return SonicMoEConfig(cache_dir=cache_dir, swiglu_clamp=self.clamp, **settings)

    def plan(self, cache_dir, **settings):
        storage = str(self.dtype).removeprefix("torch.")
        config = self.config(cache_dir, **settings)
        return make_plan(config, self.kind, storage=storage, device="cuda", arch=arch(self.x))

    def counts(self) -> list[int]:
        """Slots of each expert."""
        e, ids = self.sizes[2], self.indices.cpu()
        return torch.bincount(ids[(ids >= 0) & (ids < e)].long(), minlength=e).tolist()

    def route(self, cache_dir, block=1):
        return metadata.build(self.indices, self.probs, self.sizes[2], block, self.config(cache_dir), self.counts())

    def weights(self, plan=None):
        return ExpertWeights(self.w1, self.w2, None, self.sizes[3], self.sizes[4])

    def buffers(self, grouped=False, experts=None):
        t, k, e, h, i = self.sizes
        experts = experts or (True,) * e
        dw2 = torch.zeros([e, i, h] if grouped else [e, h, i], device=self.device)
        return GradBuffers(torch.zeros_like(self.w1, dtype=torch.float32), dw2, grouped, experts, experts)

    def run(self, cache_dir, routing=None, plan=None, grouped=False, overwrite=False):
        plan = plan or self.plan(cache_dir)
        out, saved = expert_mlp.forward(self.x, routing or self.route(cache_dir), self.weights(plan), plan)
        buffers = replace(self.buffers(grouped), overwrite=overwrite)
        grads = expert_mlp.backward(saved, self.dout)
        grads.wgrad.accumulate_dw1(buffers)
        grads.wgrad.accumulate_dw2(buffers)
        dw2 = buffers.dw2.transpose(1, 2) if grouped else buffers.dw2
        return dict(zip(NAMES, (out, grads.dx, grads.ds, buffers.dw1_EFH, dw2), strict=True))

    def reference(self):
        """float64, expert by expert, by autograd over the definition."""
        t, k, e, h, i = self.sizes
        x, w1, w2, p = (v.double().requires_grad_() for v in (self.x, self.w1, self.w2, self.probs))
        out = torch.zeros(t, h, dtype=torch.float64, device=self.device)
        for number in range(e):
            token, slot = torch.nonzero(self.indices == number, as_tuple=True)
            z = x[token] @ w1[number].T
            a = self.activate(z)
            out = out.index_add(0, token, p[token, slot, None] * (a @ w2[number].T))
        out.backward(self.dout.double())
        return dict(zip(NAMES, (out.detach(), x.grad, p.grad, w1.grad, w2.grad), strict=True))

    def activate(self, z):
        curves = {
            "swiglu": torch.nn.functional.silu, "silu": torch.nn.functional.silu,
            "geglu": lambda v: torch.nn.functional.gelu(v, approximate="tanh"), "reglu": torch.relu,
            "gelu": lambda v: torch.nn.functional.gelu(v, approximate="tanh"), "relu": torch.relu,
            "relu_sq": lambda v: torch.relu(v) ** 2,
        }  # fmt: skip
        if self.kind not in ("swiglu", "geglu", "reglu"):
            return curves[self.kind](z)
        gate, up = z[:, 0::2], z[:, 1::2]
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        return curves[self.kind](gate) * up


def errors(found, wanted):
    return {name: ((found[name].double() - wanted[name]).norm() / wanted[name].norm()).item() for name in NAMES}


def require_floors(found, wanted, bound=None):
    measured = errors(found, wanted)
    bound = bound or floors.BF16
    assert all(measured[name] < bound[name] for name in NAMES), measured


def require_same_bits(found, wanted):
    for name in NAMES:
        assert torch.equal(found[name], wanted[name]), name
