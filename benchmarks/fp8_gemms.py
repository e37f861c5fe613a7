"""The FP8 GEMMs on a GPU one by one, each with its own epilogue, under load: TFLOP/s, clock and power.

    python benchmarks/fp8_gemms.py --csv benchmarks/fp8_gemms.csv --deepgemm FOLDER --cutlass FOLDER

Each result is held against float32 products of the same quantized operands, on one expert, before it is timed. Rows
that only fill segments are not counted as work. Times are means over calls without a pause, after half as many again:
the GPU is at its power limit by then. With checkouts of DeepGEMM and CUTLASS, DeepGEMM's GEMMs take turns with ours, on
the same operands; of its tiles the fastest is shown.
"""

import argparse
import csv
import dataclasses
import pathlib
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import deepgemm
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from sonicmoe import SonicMoEConfig
from sonicmoe.activation import naive as activation
from sonicmoe.enums import ActivationType
from sonicmoe.gemm import sm90_fp8
from sonicmoe.gemm.api import ExpertWeights
from sonicmoe.gemm.plan import make_plan
from sonicmoe.quant import api, naive
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
    x_t, dout_t = (sm90_fp8.token_major(rows, routing, plan) for rows in (x, dout))
    return SimpleNamespace(**locals())


def token_major(operand, lo, hi):
    scale = operand.scale.T.repeat_interleave(128, dim=1)
    return (operand.data.float() * scale)[:, lo:hi]


def wgrad_operands(p) -> dict:
    """Added to a float32 buffer, or stored in 16 bits."""
    dw1, dw2 = (p.dz.wgrad, p.x_t), (p.dout_t, p.pa)
    return {"dw1": dw1, "dw2": dw2, "dw1_stored": dw1, "dw2_stored": dw2}


def row_operands(p) -> dict:
    """Rows, gathered or not, and the weights that they are multiplied by."""
    fp8 = p.fp8
    rows = {
        "up": (p.xq, fp8.w1),
        "down": (p.a, fp8.w2),
        "down_backward": (p.doutq, fp8.w2_t),
        "dx": (p.dz.rows, fp8.w1_t),
    }
    token = p.routing.x_gather_idx.long()
    real = (p.routing.s_scatter_idx < p.routing.n_slots)[:, None]
    for name in ("up", "down_backward"):
        a, weight = rows[name]
        data = (a.data.view(torch.uint8)[token] * real).view(torch.float8_e4m3fn)
        rows[name] = naive.QuantTensor(data, a.scale[token] * real, a.block), weight
    return rows


def product(p, name):
    """The GEMM without its epilogue, of the first expert, in float32."""
    lo, hi = p.routing.expert_offset[:2].tolist()
    if name in wgrad_operands(p):
        left, right = wgrad_operands(p)[name]
        return token_major(left, lo, hi) @ token_major(right, lo, hi).T
    rows, weight = row_operands(p)[name]
    return (
        naive.dequantize(rows)[lo:hi]
        @ naive.dequantize(naive.QuantTensor(weight.data[0], weight.scale[0], weight.block)).T
    )


def cases(p):
    """(name, call, units of T*K*H*I multiply-adds, result of the call on the first expert, the same from a product)."""
    routing, plan, weights = p.routing, p.plan, p.weights
    lo, hi = routing.expert_offset[:2].tolist()
    dw1, dw2 = (torch.zeros(p.e, *size, device=GPU) for size in ((2 * p.i, p.h), (p.h, p.i)))

    def plain(product):
        return product

    def first_rows(rows):
        return rows[lo:hi]

    def up():
        return sm90_fp8.up_projection(p.xq, weights, routing, plan, need_a=True)

    def first_a(found):
        return naive.dequantize(found[1])[lo:hi]

    def swiglu(z):
        return activation.forward(z, ActivationType.SWIGLU)

    def down_backward():
        # Beside z, not over it: this is done again and again.
        places = {"need_wgrad": True, "out": (p.z, None)}
        return sm90_fp8.down_projection_backward(p.doutq, p.kept, weights, routing, plan, **places)

    def first_pa(found):
        return token_major(found[1], lo, hi)

    def pa(_):
        scores = routing.scores[routing.s_scatter_idx[lo:hi].long()]
        return (scores[:, None] * swiglu(naive.dequantize(p.kept)[lo:hi])).T

    def dw(name, target):
        left, right = wgrad_operands(p)[name]
        overwrite = target.dtype is not torch.float32
        return lambda: sm90_fp8._wgrad(left, right, target, routing, plan, overwrite) or target

    def first(found):
        return found[0]

    yield "up", up, 2, first_a, swiglu
    yield "down", lambda: sm90_fp8.down_projection(p.a, weights, routing, plan), 1, first_rows, plain
    yield "down_backward", down_backward, 1, first_pa, pa
    yield "dx", lambda: sm90_fp8.up_projection_backward(p.dz, weights, routing, plan), 2, first_rows, plain
    yield "dw1", dw("dw1", dw1), 2, first, plain
    yield "dw2", dw("dw2", dw2), 1, first, plain
    yield "dw1_stored", dw("dw1_stored", dw1.bfloat16()), 2, first, plain
    yield "dw2_stored", dw("dw2_stored", dw2.bfloat16()), 1, first, plain


def once_us(call) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    call()
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) * 1e3


def under_load(call, seconds: float) -> dict:
    """Its time, and the GPU's clock and power meanwhile."""
    times = max(3, round(seconds * 1e6 / once_us(call)))
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits", "-lms", "50"]
    query += ["-i", f"GPU-{torch.cuda.get_device_properties(0).uuid}"]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as watch:
        for _ in range(times // 2):  # it takes its time to begin as well
            call()
        torch.cuda.synchronize()
        events[0].record()
        for _ in range(times):
            call()
        events[1].record()
        torch.cuda.synchronize()
        watch.terminate()
        seen = [line.split(",") for line in watch.stdout.read().splitlines()]
    seen = [(float(clock), float(power)) for clock, power in seen[len(seen) // 3 : -1]]
    mhz, watts = (round(sum(values) / len(values)) for values in zip(*seen, strict=True)) if seen else (0, 0)
    return {"us": events[0].elapsed_time(events[1]) * 1e3 / times, "mhz": mhz, "watts": watts}


def relative(found, wanted) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def their_calls(theirs, p, name):
    """(columns of a tile, call, result for the first expert) of DeepGEMM's, which are products without an epilogue."""
    operands = wgrad_operands(p)
    return theirs.wgrad(name, *operands[name]) if name in operands else theirs.rows(name, *row_operands(p)[name])


def write(path: str | None, rows: list[dict]) -> None:
    if path is None:
        return
    with open(path, "w", newline="", encoding="utf-8") as target:
        names = ["kernel", "shape", "provider", "tile", "error", "us", "tflops", "mhz", "watts", "device"]
        table = csv.DictWriter(target, names)
        table.writeheader()
        table.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="T,H,I,E,K")
    parser.add_argument("--only", nargs="+", metavar="GEMM", help="some of them, by name")
    parser.add_argument("--seconds", type=float, default=0.6, help="length of a measurement (0.6)")
    parser.add_argument("--deepgemm", metavar="FOLDER", help="a checkout of DeepGEMM")
    parser.add_argument("--cutlass", metavar="FOLDER", help="a checkout of CUTLASS")
    parser.add_argument("--csv", help="write the table here")
    args = parser.parse_args()
    if (args.deepgemm is None) != (args.cutlass is None):
        parser.error("--deepgemm and --cutlass go together")
    device, rows, wrong = torch.cuda.get_device_name(), [], 0

    def measure(provider, tile, name, shape, call, error, units):
        t, h, i, e, k = map(int, shape.split(","))
        row = {"kernel": name, "shape": shape, "provider": provider, "tile": tile, "error": f"{error:.1e}"}
        # One quantization of a result is 2.6%.
        if not error < 0.035:
            print(f"{provider} {name} {shape}: WRONG, off by {error:.1e}; not timed")
            return row
        found = under_load(call, args.seconds)
        row |= {"us": f"{found['us']:.1f}", "tflops": f"{2 * units * t * k * h * i / found['us'] / 1e6:.0f}"}
        return row | {"mhz": found["mhz"], "watts": found["watts"]}

    with tempfile.TemporaryDirectory() as folder:
        if args.deepgemm:
            sizes = {tuple(map(int, shape.split(",")[1:4])) for shape in args.shapes}
            blocks = torch.cuda.get_device_properties(0).multi_processor_count
            deepgemm.build(args.deepgemm, args.cutlass, sizes, blocks, folder)
        for shape in args.shapes:
            p = problem(*map(int, shape.split(",")))
            theirs = deepgemm.DeepGemm(p, folder) if args.deepgemm else None
            for name, call, units, result, wanted in cases(p):
                if args.only and name not in args.only:
                    continue
                plain = product(p, name)
                error = relative(result(call()), wanted(plain))
                found = [measure("sonicmoe", "", name, shape, call, error, units)]
                wrong += "us" not in found[0]
                if theirs is not None and not name.endswith("_stored"):
                    timed = []
                    for tile, their_call, first in their_calls(theirs, p, name):
                        their_call()
                        timed.append(measure("deepgemm", tile, name, shape, their_call, relative(first, plain), units))
                    found.append(min(timed, key=lambda row: float(row.get("us", "inf"))))
                for row in found:
                    print("  ".join(f"{value:>14}" for value in row.values()), flush=True)
                rows += [row | {"device": device} for row in found]
            del p, theirs
            write(args.csv, rows)  # what there is stays if the next shape is cut off
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
