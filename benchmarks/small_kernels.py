"""The small kernels on a GPU: time on the device of one call, beside a copy of as many bytes.

    python benchmarks/small_kernels.py --csv small_kernels.csv

A case is checked against its definition before it is timed. ``gpu_us`` is the time in which the call's kernels ran,
``copy_us`` that of a copy that reads and writes as many bytes together, ``wall_us`` what a call costs back to back.
Data of less than the L2 cache stays in it from call to call, as it does behind the kernel that made it.
"""

import argparse
import csv
import functools
import pathlib
import sys
from types import SimpleNamespace

import torch
from metadata import copy_us, gpu_us, wall_us

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from sonicmoe import SonicMoEConfig
from sonicmoe.gemm import sm90_fp8
from sonicmoe.gemm.plan import make_plan
from sonicmoe.quant import naive as quant
from sonicmoe.quant import triton_fingerprint, triton_quantize
from sonicmoe.routing import metadata, naive, topk, triton_combine, triton_topk

GPU = "cuda"
NAIVE = SonicMoEConfig(metadata_backend="naive")


def routing_of(n_tokens, k, n_experts, share=1.0, block=1):
    """Different experts for each token; a slot is on this rank with probability ``share``."""
    ids = torch.rand(n_tokens, n_experts, device=GPU).argsort(dim=1)[:, :k]
    ids = torch.where(torch.rand(ids.shape, device=GPU) < share, ids, -1)
    return metadata.build(ids, torch.rand(n_tokens, k, device=GPU), n_experts, block, NAIVE)


def sum_slots_cases():
    shapes = [(8192, 8, 3072, 1.0, False), (8192, 8, 3072, 1.0, True), (8192, 8, 7168, 1.0, False)]
    shapes += [(1024, 8, 3072, 1.0, False), (16384, 8, 3072, 0.2, False), (8192, 16, 1536, 1.0, False)]
    shapes += [(8192, 8, 768, 1.0, False), (8192, 8, 1536, 1.0, True), (32768, 8, 1152, 1.0, False)]  # pieces of FP8's
    for n_tokens, k, width, share, weighted in shapes:
        routing = routing_of(n_tokens, k, 64, share)
        rows = torch.randn(routing.n_rows, width, device=GPU).to(torch.bfloat16)
        scores = routing.scores if weighted else None
        call = functools.partial(triton_combine.sum_slots, rows, routing, torch.bfloat16, scores)

        def right(call=call, rows=rows, routing=routing, scores=scores):
            return torch.equal(call(), naive.sum_slots(rows, routing, torch.bfloat16, scores))

        about = f"T={n_tokens} K={k} H={width} slots={routing.n_slots}{' weighted' if weighted else ''}"
        moved = 2 * width * (routing.n_slots + n_tokens) + 4 * routing.n_slots * (2 if weighted else 1)
        yield SimpleNamespace(kernel="sum_slots", shape=about, moved=moved, call=call, right=right)


def finish_ds_cases():
    for n_tokens, k, columns in ((8192, 8, 12), (8192, 8, 24), (65536, 8, 12)):
        routing = routing_of(n_tokens, k, 64)
        parts = torch.randn(routing.n_rows, columns, device=GPU)
        call = functools.partial(triton_combine.finish_ds, parts, routing)

        def right(call=call, parts=parts, routing=routing):
            total = torch.zeros_like(parts[:, 0])
            for column in range(parts.shape[1]):
                total = total + parts[:, column]
            by_slot = total.index_select(0, routing.s_reverse_scatter_idx.long())
            return torch.equal(call(), naive.scatter_slot_grads(by_slot, routing))

        slots = n_tokens * k
        about = f"T={n_tokens} K={k} columns={columns}"
        yield SimpleNamespace(
            kernel="finish_ds", shape=about, moved=slots * 4 * (columns + 3) + 4 * n_tokens, call=call, right=right
        )


def topk_cases():
    shapes = [(8192, 32, 8), (8192, 64, 8), (8192, 128, 8), (8192, 256, 8), (65536, 64, 8), (65536, 256, 8)]
    for (n_tokens, n_experts, k), dtype in [(s, d) for s in shapes for d in (torch.bfloat16, torch.float32)]:
        logits = torch.randn(n_tokens, n_experts, device=GPU).to(dtype)
        size = logits.element_size()
        forward = functools.partial(triton_topk.topk_softmax_forward, logits, k)
        scores, indices = forward()
        dscores = torch.randn_like(scores)
        backward = functools.partial(triton_topk.topk_softmax_backward, dscores, scores, indices, n_experts, dtype)

        def forward_right(forward=forward, logits=logits, k=k):
            (scores, indices), (wanted, chosen) = forward(), topk.topk_softmax_forward(logits, k)
            return torch.equal(indices, chosen) and float((scores - wanted).norm() / wanted.norm()) < 1e-6

        def backward_right(backward=backward, given=(dscores, scores, indices, n_experts, torch.float32)):
            made, wanted = backward().float(), topk.topk_softmax_backward(*given)
            return float((made - wanted).norm() / wanted.norm()) < 4e-3

        about = f"T={n_tokens} E={n_experts} k={k} {str(dtype)[6:]}"
        moved = n_tokens * (n_experts * size + 8 * k)
        yield SimpleNamespace(kernel="topk", shape=about, moved=moved, call=forward, right=forward_right)
        moved += n_tokens * 4 * k
        yield SimpleNamespace(kernel="topk backward", shape=about, moved=moved, call=backward, right=backward_right)


def fingerprint_cases():
    for name, count, elements, dtype in (
        ("w1 and w2 of 32 experts, stacked", 2, 32 * 3072 * 2304, torch.bfloat16),
        ("64 weights of 3072 x 3072", 64, 3072 * 3072, torch.bfloat16),
        ("64 weights of 3072 x 1536, fp32", 64, 3072 * 1536, torch.float32),
        ("16 weights of 512 x 512", 16, 512 * 512, torch.bfloat16),
    ):
        weights = [torch.randn(elements, device=GPU).to(dtype) for _ in range(count)]
        first = triton_fingerprint.fingerprint(weights)
        call = functools.partial(triton_fingerprint.fingerprint, weights, first.state, first.table)

        def right(call=call, weights=weights):
            same = call().changed.tolist()
            weights[-1][7] *= 2
            changed = call().changed.tolist()
            weights[-1][7] /= 2
            return same == [0] * len(weights) and changed == [0] * (len(weights) - 1) + [1]

        moved = sum(weight.numel() * weight.element_size() for weight in weights)
        yield SimpleNamespace(kernel="fingerprint", shape=name, moved=moved, call=call, right=right)


def same(found, wanted) -> bool:
    """The same bytes, of e4m3 data and of scales."""
    pairs = zip(found, wanted, strict=True)
    return all(torch.equal(*(tensor.reshape([-1]).view(torch.uint8) for tensor in pair)) for pair in pairs)


def quantize_rows_cases():
    shapes = [(8192, 3072, torch.bfloat16), (65536, 3072, torch.bfloat16), (8192, 7168, torch.float32)]
    for n_rows, width, dtype in shapes:
        x = torch.randn(n_rows, width, device=GPU).to(dtype)
        call = functools.partial(triton_quantize.quantize_rows, x)

        def right(call=call, x=x):
            made, wanted = call(), quant.quantize(x, (1, 128))
            return same((made.data, made.scale), (wanted.data, wanted.scale))

        moved = x.numel() * (x.element_size() + 1 + 4 / 128)
        about = f"T={n_rows} C={width} {str(dtype)[6:]}"
        yield SimpleNamespace(kernel="quantize rows", shape=about, moved=int(moved), call=call, right=right)


def dequantize_rows_cases():
    for n_rows, width in ((8192, 3072), (28000, 3072)):
        made = quant.quantize(torch.randn(n_rows, width, device=GPU), (1, 128))
        call = functools.partial(triton_quantize.dequantize_rows, made.data, made.scale, torch.bfloat16)

        def right(call=call, made=made):
            return torch.equal(call(), quant.dequantize(made).bfloat16())

        moved = int(made.data.numel() * (1 + 2 + 4 / 128))
        yield SimpleNamespace(
            kernel="dequantize rows", shape=f"T={n_rows} C={width}", moved=moved, call=call, right=right
        )


def quantize_weight_cases():
    shapes = [((32, 3072, 3072), torch.bfloat16), ((32, 3072, 1536), torch.bfloat16), ((4, 512, 512), torch.float32)]
    for shape, dtype in shapes:
        w = (torch.randn(shape, device=GPU) * 0.02).to(dtype)
        call = functools.partial(triton_quantize.quantize_weights, [w])

        def right(call=call, w=w):
            wanted = quant.quantize(w, (128, 128))
            turned = quant.transposed(wanted)
            return same(call()[0], (wanted.data, wanted.scale, turned.data, turned.scale))

        about = f"[E,R,C]={list(shape)} {str(dtype)[6:]}"
        moved = w.numel() * (w.element_size() + 2)
        yield SimpleNamespace(kernel="quantize weight", shape=about, moved=moved, call=call, right=right)


def token_major_cases():
    """``moved`` counts a row each time that it is gathered, though the L2 cache may have it from the last time."""
    config = SonicMoEConfig(use_fp8=True, fp8_recipe="sm90", fp8_wgrad=True)
    plan = make_plan(config, "swiglu", storage="bfloat16", device=GPU, arch="sm_90a")
    shapes = [(8192, 8, 3072, torch.bfloat16), (8192, 8, 3072, torch.float16), (8192, 8, 3072, torch.float8_e4m3fn)]
    shapes += [(32768, 8, 4096, torch.bfloat16), (1024, 8, 3072, torch.bfloat16)]
    for n_tokens, k, width, dtype in shapes:
        routing = routing_of(n_tokens, k, 64, block=128)
        rows = torch.randn(n_tokens, width, device=GPU).to(torch.bfloat16)
        moved = routing.n_slots * width * dtype.itemsize + routing.n_rows * (width * (1 + 4 / 128) + 8)
        if dtype is torch.float8_e4m3fn:
            given = quant.quantize(rows, (1, 128))
            values = quant.dequantize(given)
            moved += routing.n_slots * width / 128 * 4
        else:
            given = rows.to(dtype)
            values = given.float()
        call = functools.partial(sm90_fp8.token_major, given, routing, plan)

        def right(call=call, values=values, routing=routing):
            real = (routing.s_scatter_idx < routing.n_slots).reshape(-1, 1)
            wanted = quant.quantize(torch.where(real, values[routing.x_gather_idx.long()], 0.0).t(), (1, 128))
            made = call()
            return same((made.data, made.scale), (wanted.data, wanted.scale.t()))

        about = f"T={n_tokens} K={k} C={width} {str(dtype)[6:]}"
        yield SimpleNamespace(kernel="token major", shape=about, moved=int(moved), call=call, right=right)


CASES = {"sum_slots": sum_slots_cases, "finish_ds": finish_ds_cases, "topk": topk_cases}
CASES |= {"fingerprint": fingerprint_cases, "quantize_rows": quantize_rows_cases}
CASES |= {"dequantize_rows": dequantize_rows_cases}
CASES |= {"quantize_weight": quantize_weight_cases, "token_major": token_major_cases}


def measure(case, repeats: int) -> dict:
    row = {"kernel": case.kernel, "shape": case.shape, "MB": f"{case.moved / 1e6:.2f}"}
    if not case.right():
        return {**row, "note": "wrong"}
    for _ in range(5):
        case.call()
    gpu, copy = gpu_us(case.call, repeats), copy_us(case.moved)
    figures = {"gpu_us": gpu, "copy_us": copy, "wall_us": wall_us(case.call, repeats, 3)}
    row |= {name: f"{value:.2f}" for name, value in figures.items()}
    return {**row, "GB_s": f"{case.moved / gpu / 1e3:.0f}", "of_copy": f"{copy / gpu:.2f}", "note": ""}


COLUMNS = ("kernel", "shape", "MB", "gpu_us", "copy_us", "wall_us", "GB_s", "of_copy", "note", "device", "torch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="where the table goes as well")
    parser.add_argument("--only", choices=CASES, help="one kernel")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in [args.only] if args.only else CASES:
        for case in CASES[name]():
            row = {**measure(case, args.repeats), **machine}
            rows.append(row)
            figures = "  ".join(f"{row.get(column, ''):>8}" for column in COLUMNS[2:9])
            print(f"{row['kernel']:>15}  {row['shape']:<44}{figures}", flush=True)
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return int(any(row["note"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
