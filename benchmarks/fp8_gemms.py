"""The FP8 GEMMs on a GPU one by one, each with its own epilogue: TFLOP/s in a short burst and under load.

    python benchmarks/fp8_gemms.py --csv fp8_gemms.csv

Each result is held against float32 products of the same quantized operands, on one expert, before it is timed. Rows
that only fill segments are not counted as work. ``burst`` is the median of single calls with pauses between them,
``load`` the mean over calls without any, after as many again: the GPU is at its power limit by then.
"""

import argparse
import csv
import dataclasses
import pathlib
import sys
import time
from types import SimpleNamespace

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from sonicmoe import SonicMoEConfig
from sonicmoe.activation import naive as activation
from sonicmoe.enums import ActivationType
from sonicmoe.gemm import sm90_fp8
from sonicmoe.gemm.api import ExpertWeights, GradBuffers
from sonicmoe.gemm.plan import make_plan
from sonicmoe.quant import api, naive, triton_quantize
from sonicmoe.routing import metadata

GPU = "cuda"
SHAPES = ["8192,3072,1536,8,8", "8192,4096,4096,8,8", "8192,3072,1536,32,8", "1024,3072,1536,8,8"]


def problem(t, h, i, e, k):
    """Operands of all six GEMMs at T,H,I,E,K."""
    torch.manual_seed(0)
    config = SonicMoEConfig(use_fp8=True, fp8_recipe="sm90", fp8_wgrad=True, backend="naive")
    plan = make_plan(config, ActivationType.SWIGLU, storage="bfloat16", device=GPU)
    plan = dataclasses.replace(plan, backend="sm90_fp8")
    indices = torch.rand(t, e, device=GPU).argsort(dim=1)[:, :k].to(torch.int32)
    counts = torch.bincount(indices.flatten().long(), minlength=e).tolist()
    routing = metadata.build(indices, torch.rand(t, k, device=GPU), e, 128, SonicMoEConfig(), counts)

    def normal(*size, by=1.0):
        return (torch.randn(*size, device=GPU) * by).to(torch.bfloat16)

    fp8 = api.quantize_weights(normal(e, 2 * i, h, by=h**-0.5), normal(e, h, i, by=i**-0.5), plan.recipe)
    weights = ExpertWeights(None, None, fp8, h, i)
    x, dout = normal(t, h), normal(t, h)
    xq, doutq = (api.quantize_rows(rows, plan.recipe) for rows in (x, dout))
    z, a = sm90_fp8.up_projection(xq, weights, routing, plan, need_a=True)
    kept = naive.QuantTensor(z.data.clone(), z.scale.clone(), z.block)
    dz, pa, _ = sm90_fp8.down_projection_backward(doutq, kept, weights, routing, plan, need_wgrad=True, out=(z, None))
    x_t, dout_t = (sm90_fp8.TokenMajor(*triton_quantize.quantize_tokens(rows, routing)) for rows in (x, dout))
    return SimpleNamespace(**locals())


def token_major(operand, lo, hi):
    scale = operand.scale.T.repeat_interleave(128, dim=1)
    return (operand.data.float() * scale)[:, lo:hi]


def cases(p):
    """(name, call, units of T*K*H*I multiply-adds, result of the call and what it should be, on the first expert)."""
    routing, plan, weights, fp8 = p.routing, p.plan, p.weights, p.fp8
    lo, hi = routing.expert_offset[:2].tolist()
    token = routing.x_gather_idx[lo:hi].long()
    real = (routing.s_scatter_idx[lo:hi] < routing.n_slots)[:, None]
    experts = (True,) * p.e
    buffers = GradBuffers(
        torch.zeros(p.e, 2 * p.i, p.h, device=GPU), torch.zeros(p.e, p.h, p.i, device=GPU), False, experts, experts
    )

    def first(q):
        return naive.dequantize(q)[lo:hi]

    def weight(q):
        return naive.dequantize(naive.QuantTensor(q.data[0], q.scale[0], q.block))

    def up():
        return sm90_fp8.up_projection(p.xq, weights, routing, plan, need_a=True)

    def wanted_a():
        z = (naive.dequantize(p.xq)[token] * real) @ weight(fp8.w1).T
        return activation.forward(z, ActivationType.SWIGLU)

    def down_backward():
        # Beside z, not over it: this is done again and again.
        places = {"need_wgrad": True, "out": (p.z, None)}
        return sm90_fp8.down_projection_backward(p.doutq, p.kept, weights, routing, plan, **places)

    def wanted_pa():
        scores = routing.scores[routing.s_scatter_idx[lo:hi].long()]
        return (scores[:, None] * activation.forward(first(p.kept), ActivationType.SWIGLU)).T

    def dw(left, right, target):
        return lambda: sm90_fp8._wgrad(left, right, target, routing, plan, overwrite=False) or target

    def wanted_dw(left, right):
        return token_major(left, lo, hi) @ token_major(right, lo, hi).T

    yield "up", up, 2, lambda found: first(found[1]), wanted_a
    yield (
        "down", lambda: sm90_fp8.down_projection(p.a, weights, routing, plan), 1, lambda found: found[lo:hi],
        lambda: first(p.a) @ weight(fp8.w2).T,
    )  # fmt: skip
    yield "down_backward", down_backward, 1, lambda found: token_major(found[1], lo, hi), wanted_pa
    yield (
        "dx", lambda: sm90_fp8.up_projection_backward(p.dz, weights, routing, plan), 2, lambda found: found[lo:hi],
        lambda: first(p.dz.rows) @ weight(fp8.w1_t).T,
    )  # fmt: skip
    yield (
        "dw1", dw(p.dz.wgrad, p.x_t, buffers.dw1_EFH), 2, lambda found: found[0],
        lambda: wanted_dw(p.dz.wgrad, p.x_t),
    )  # fmt: skip
    yield "dw2", dw(p.dout_t, p.pa, buffers.dw2), 1, lambda found: found[0], lambda: wanted_dw(p.dout_t, p.pa)


def burst_us(call, times=15) -> float:
    found = []
    for _ in range(times):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        time.sleep(0.02)
        events[0].record()
        call()
        events[1].record()
        torch.cuda.synchronize()
        found.append(events[0].elapsed_time(events[1]) * 1e3)
    return sorted(found)[times // 2]


def load_us(call, seconds: float) -> float:
    times = max(3, round(seconds * 1e6 / burst_us(call, 3)))
    for _ in range(2):  # the first time brings the GPU to its limit
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(times):
            call()
        events[1].record()
        torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) * 1e3 / times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="T,H,I,E,K")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a measurement under load (0.5)")
    parser.add_argument("--csv", help="write the table here")
    args = parser.parse_args()
    device, rows, wrong = torch.cuda.get_device_name(), [], 0
    for shape in args.shapes:
        sizes = [int(size) for size in shape.split(",")]
        p = problem(*sizes)
        t, h, i, e, k = sizes
        for name, call, units, result, wanted in cases(p):
            found, expected = result(call()), wanted()
            error = ((found.float() - expected).norm() / expected.norm()).item()
            row = {"kernel": name, "shape": shape, "device": device, "error": f"{error:.1e}"}
            # One quantization of a result is 2.6%.
            if not error < 0.035:
                wrong += 1
                print(f"{name} {shape}: WRONG, off by {error:.1e}; not timed")
            else:
                flops = 2 * units * t * k * h * i
                burst, load = burst_us(call), load_us(call, args.seconds)
                row |= {"burst_us": f"{burst:.1f}", "load_us": f"{load:.1f}"}
                row |= {"burst_tflops": f"{flops / burst / 1e6:.0f}", "load_tflops": f"{flops / load / 1e6:.0f}"}
                print("  ".join(f"{value:>14}" if key != "device" else "" for key, value in row.items()))
            rows.append(row)
        del p
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as target:
            names = ["kernel", "shape", "device", "error", "burst_us", "load_us", "burst_tflops", "load_tflops"]
            table = csv.DictWriter(target, names)
            table.writeheader()
            table.writerows(rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
