"""The FP8 stages beside their definition on the same operands: on a GPU, or their own code in the emulator."""

import dataclasses

import torch

from sonicmoe import SonicMoEConfig
from sonicmoe.gemm import naive, sm90_fp8
from sonicmoe.gemm.api import ExpertWeights
from sonicmoe.gemm.plan import make_plan
from sonicmoe.quant import naive as quant
from sonicmoe.quant.formats import QuantTensor
from tests.support.gpu_problems import Problem, require_same_bits

ROUTINGS = ("random", "skewed", "empty")
FILLS = ("add", "float32", "bfloat16", "float16")


class Fp8Problem(Problem):
    def plan(self, cache_dir, **settings):
        """The plan of a Hopper GPU, whatever the tensors are on."""
        settings = {"fp8_wgrad": True, "backend": "naive"} | settings
        config = SonicMoEConfig(
            use_fp8=True, fp8_recipe="sm90", cache_dir=cache_dir, swiglu_clamp=self.clamp, **settings
        )
        storage = str(self.dtype).removeprefix("torch.")
        plan = make_plan(config, self.kind, storage=storage, device=self.device.type)
        return dataclasses.replace(plan, backend="sm90_fp8")

    def route(self, cache_dir, block=128):
        return super().route(cache_dir, block)

    def weights(self, plan):
        fp8 = quant.quantize_weights(self.w1, self.w2, plan.recipe)
        return ExpertWeights(None, None, fp8, self.sizes[3], self.sizes[4])


def require_same_in_pieces(monkeypatch, problem: Fp8Problem, cache_dir) -> None:
    """The same bits of a problem of 640 columns where rows by slot are made in pieces, the last one smaller, from
    another place in each expert's weights, and weight gradients likewise: some columns of dW1, some rows of dW2 or, if
    that lies the other way, columns."""
    routing = problem.route(cache_dir)
    whole = [problem.run(cache_dir, routing, grouped=grouped, overwrite=True) for grouped in (False, True)]
    monkeypatch.setattr(sm90_fp8, "_columns_at_once", lambda n_rows, width, item, unit, room: unit)
    assert sm90_fp8._spans(routing.n_rows, 640, 1) == [(0, 256), (256, 512), (512, 640)]
    for grouped in (False, True):
        require_same_bits(problem.run(cache_dir, routing, grouped=grouped, overwrite=True), whole[grouped])


def values(found) -> torch.Tensor:
    """What a quantized tensor stands for; token-major ones as [C,M]."""
    if isinstance(found, QuantTensor):
        return quant.dequantize(found).double()
    scale = found.scale.transpose(0, 1).repeat_interleave(128, dim=1)
    return (found.data.float() * scale).double()


def distance(found, wanted) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


class Stages:
    """A problem with what its stages read. ``sums`` bounds the error of a sum, ``codes`` how many codes may fall on the
    other side of a rounding because of it."""

    def __init__(self, problem: Fp8Problem, cache_dir, sums: float, codes: float):
        self.problem, self.sums, self.codes = problem, sums, codes
        self.plan, self.routing = problem.plan(cache_dir), problem.route(cache_dir)
        self.weights = problem.weights(self.plan)

    def rows(self, name: str) -> QuantTensor:
        return quant.quantize_rows(getattr(self.problem, name), self.plan.recipe)

    def require_codes(self, found, wanted, narrow=False):
        assert found.scale.shape == wanted.scale.shape
        # Where the largest of a block was rounded to bfloat16 first, it may have fallen on the other side as well.
        assert distance(found.scale, wanted.scale) < self.sums + (self.codes**0.5 / 256 if narrow else 0)
        steps = (found.data.view(torch.uint8).int() - wanted.data.view(torch.uint8).int()).abs()
        assert (steps > 0).float().mean().item() <= self.codes
        assert (steps > 1).float().mean().item() <= self.codes / 8  # a step from one binade to the next, or across 0
        # A step is at most an eighth of a value.
        assert distance(values(found), values(wanted)) <= self.codes**0.5 / 8 + self.sums

    def compare_up(self):
        x = self.rows("x")
        z, a = sm90_fp8.up_projection(x, self.weights, self.routing, self.plan, need_a=True)
        wanted_z, wanted_a = naive.up_projection(x, self.weights, self.routing, self.plan, need_a=True)
        self.require_codes(z, wanted_z)
        self.require_codes(a, wanted_a)
        alone, nothing = sm90_fp8.up_projection(x, self.weights, self.routing, self.plan, need_a=False)
        assert nothing is None and torch.equal(alone.data.view(torch.uint8), z.data.view(torch.uint8))
        assert torch.equal(alone.scale, z.scale)

    def compare_rows(self, storage: str):
        plan = dataclasses.replace(self.plan, storage=storage)
        a = torch.randn(self.routing.n_rows, self.problem.sizes[4], device=self.problem.device)
        a = quant.quantize_rows(a, plan.recipe)
        y = sm90_fp8.down_projection(a, self.weights, self.routing, plan)
        wanted = naive.down_projection(a, self.weights, self.routing, dataclasses.replace(plan, storage="float32"))
        assert y.dtype == getattr(torch, storage)
        assert distance(y, wanted) < (2e-3 if storage == "bfloat16" else 3e-4) + self.sums

    def compare_down_backward(self, fp8_wgrad: bool):
        plan, routing = dataclasses.replace(self.plan, fp8_wgrad=fp8_wgrad), self.routing
        dout = self.rows("dout")
        z, _ = naive.up_projection(self.rows("x"), self.weights, routing, plan, need_a=False)
        wanted_dz, wanted_pa, wanted_ds = naive.down_projection_backward(dout, z, self.weights, routing, plan, True)
        dz, pa, parts = sm90_fp8.down_projection_backward(dout, z, self.weights, routing, plan, need_wgrad=True)
        assert dz.rows is z, "dz takes z's place"

        def quantized(rows):  # the kernel keeps dz and p*a in bfloat16 until it knows their scales
            return quant.quantize_rows(rows.to(torch.bfloat16).float().contiguous(), plan.recipe)

        self.require_codes(dz.rows, quantized(wanted_dz), narrow=True)
        for found, rows in ((dz.wgrad, wanted_dz), (pa, wanted_pa)):
            if fp8_wgrad:
                wanted = quantized(rows.transpose(0, 1))
                wanted = sm90_fp8.TokenMajor(wanted.data, wanted.scale.transpose(0, 1))
                self.require_codes(found, wanted, narrow=True)
            else:
                assert found.dtype == self.problem.dtype and distance(found, rows) < 2e-3 + self.sums
        ds = sm90_fp8.score_gradient(parts, routing, plan)
        assert distance(ds, naive.score_gradient(wanted_ds, routing, plan)) < self.sums

    def compare_wgrad(self, fill: str):
        (_, _, e, h, i), m, plan = self.problem.sizes, self.routing.n_rows, self.plan
        rows = [torch.randn(m, columns, device=self.problem.device) for columns in (h, i)]
        quantized = [quant.quantize_rows(part.transpose(0, 1).contiguous(), plan.recipe) for part in rows]
        left, right = (sm90_fp8.TokenMajor(q.data, q.scale.transpose(0, 1).contiguous()) for q in quantized)
        bounds = self.routing.expert_offset.tolist()
        parts = [values(left)[:, lo:hi] @ values(right)[:, lo:hi].T for lo, hi in zip(bounds, bounds[1:], strict=False)]
        wanted = torch.stack(parts)
        if fill == "add":
            target = torch.full([e, h, i], 2.0, device=self.problem.device)
            sm90_fp8._wgrad(left, right, target, self.routing, plan, overwrite=False)
            target -= 2.0
        else:
            target = torch.full([e, h, i], float("nan"), dtype=getattr(torch, fill), device=self.problem.device)
            sm90_fp8._wgrad(left, right, target, self.routing, plan, overwrite=True)
        assert distance(target, wanted) < (2e-3 if fill.endswith("16") else 0) + self.sums
        empty = [expert for expert in range(e) if bounds[expert] == bounds[expert + 1]]
        assert not target[empty].any()
