"""Rows of tokens quantized along sorted order, ``sm90_fp8.token_major``, beside the definition: in the emulator, or on
a GPU. Each check returns what differed, as lines. For processes with a real torch."""

import dataclasses
import itertools

import numpy as np
import torch

from sonicmoe import SonicMoEConfig
from sonicmoe.gemm import sm90_fp8
from sonicmoe.gemm.plan import make_plan
from sonicmoe.quant import naive
from sonicmoe.quant.formats import QuantTensor
from tests.support.drawn import KINDS, TYPES, at_any_address, differences, draw, make_routing
from tests.workers.jit_routings import distinct, elsewhere, holes, nothing, skewed, uniform

ROUTINGS = [
    # T, K, E, kind
    (150, 2, 2, uniform),
    (40, 3, 3, holes),
    (130, 1, 1, distinct),
    (70, 4, 6, elsewhere),
    (65, 2, 4, skewed),
    (6, 3, 4, nothing),
    (0, 2, 4, uniform),
]


def wanted_tokens(values, routing, pow2):
    """(data [C,M], scale [M/128,C]) of float32 values of rows."""
    real = (routing.s_scatter_idx < routing.n_slots).reshape(-1, 1)
    sorted_rows = torch.where(real, values[routing.x_gather_idx.long()], 0.0)
    q = naive.quantize(sorted_rows.t().contiguous(), (1, 128), pow2=pow2)
    return q.data, q.scale.t().contiguous()


def plan_of(device, cache_dir, pow2=False):
    config = SonicMoEConfig(
        use_fp8=True, fp8_recipe="sm90", fp8_wgrad=True, fp8_pow2_scale=pow2, backend="naive", cache_dir=cache_dir
    )
    plan = make_plan(config, "swiglu", storage="bfloat16", device=torch.device(device).type)
    return dataclasses.replace(plan, backend="sm90_fp8")


def token_cases(device, widths, shapes, kinds):
    """(routing, drawn rows, pow2, about), three kinds a routing; the row that pads point at is NaN."""
    turns = itertools.cycle(kinds)
    for number, (n_tokens, topk, n_experts, routed) in enumerate(shape for shape in shapes for _ in range(3)):
        kind = next(turns)
        rng = np.random.default_rng(number)
        routing = make_routing(rng, n_tokens, topk, n_experts, 128, routed, device)
        width, dtype = widths[number % len(widths)], TYPES[(number + number // len(kinds)) % 3]
        for pow2 in (False, True):
            rows = draw(rng, (n_tokens, width), kind, dtype, device)
            if n_tokens:
                rows[0] = float("nan")
            about = f"tokens T={n_tokens} M={routing.n_rows} {routed.__name__} C={width} {kind} {dtype} pow2={pow2}"
            yield routing, rows, pow2, about


def both(made):
    return made.data, made.scale


def check_token_major(device, cache_dir, widths=(128, 384), shapes=ROUTINGS, kinds=KINDS):
    found = []
    for routing, rows, pow2, about in token_cases(device, widths, shapes, kinds):
        plan, wanted = plan_of(device, cache_dir, pow2), wanted_tokens(rows.float(), routing, pow2)
        for given in (rows, at_any_address(rows)):
            found += differences(about, both(sm90_fp8.token_major(given, routing, plan)), wanted)
        some = sm90_fp8.token_major(rows, routing, plan, (128, rows.shape[1]))
        found += differences(f"{about} from 128 on", both(some), (wanted[0][128:], wanted[1][:, 128:].contiguous()))
    return found


def check_token_major_of_fp8(
    device, cache_dir, widths=(128, 384), shapes=ROUTINGS, kinds=("ordinary", "holes", "extreme")
):
    """What came as e4m3: every code, scales of any size, and scales that are NaN or infinite."""
    found = []
    for routing, drawn, pow2, about in token_cases(device, widths, shapes, kinds):
        codes = np.random.default_rng(len(drawn)).integers(0, 256, drawn.shape, dtype=np.uint8)
        data = torch.from_numpy(codes).to(device).view(torch.float8_e4m3fn)
        rows = QuantTensor(data, drawn[:, ::128].float().abs().contiguous(), (1, 128))
        plan, wanted = plan_of(device, cache_dir, pow2), wanted_tokens(naive.dequantize(rows), routing, pow2)
        found += differences(f"{about} of FP8", both(sm90_fp8.token_major(rows, routing, plan)), wanted)
        some = sm90_fp8.token_major(rows, routing, plan, (0, 128))
        wanted = wanted[0][:128], wanted[1][:, :128].contiguous()
        found += differences(f"{about} of FP8 up to 128", both(some), wanted)
    return found
