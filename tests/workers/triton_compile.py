"""Compiles the small Triton kernels for an H100 or H200 on a machine without one, through the calls that users make.

    triton_compile.py torch|paddle     prints {kernel: {"compiled": how often, "faults": what its code lacks}} as JSON

A driver that only names the target takes the place of CUDA's, and each launch ends where it would begin.
"""

import json
import random
import re
import sys
from types import SimpleNamespace


class NamesTheTarget:
    """The part of Triton's driver that compiling asks for."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class AlwaysAskTriton(dict):
    """In the place of the launcher's memory: what it would start again must be what Triton would."""

    def get(self, known):
        return None

    def __setitem__(self, known, started):
        same = self.setdefault(known, started).compiled is started.compiled
        assert same, f"the launcher takes two kernels for one: {known}"


def compile_only() -> dict:
    """From here on launches compile: {kernel's name: what was compiled for it, each once}."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from sonicmoe import triton_launch

    triton_launch._compiled = AlwaysAskTriton()
    made, run = {}, JITFunction.run

    def compile_and_return(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found = made.setdefault(self.fn.__name__, [])
        if not any(kernel is other for other in found):
            found.append(kernel)
        return kernel

    driver.set_active(NamesTheTarget())
    JITFunction.run = compile_and_return
    return made


# How many tokens, and how many slots and rows beside: 1 and multiples of 16 are what Triton looks for in arguments.
TOKENS = (17, 1, 2, 16, 32, 160, 3, 255, 4096, 1)


def routing_of(torch, n_tokens, topk, draw, block=1):
    """Shapes and addresses are all that counts. The index arrays are cut out of one allocation at any word, as
    ``Arrays`` of sonicmoe/routing does it."""
    n_slots = max(1, draw.randint(0, n_tokens * topk))
    n_rows = -(-(n_slots + draw.randint(0, 40)) // block) * block
    whole = torch.zeros([5 * (n_rows + n_tokens + 50)], dtype=torch.int32)

    def cut(size, start=[0]):  # noqa: B006  the running end is what it is for
        start[0] += draw.randint(0, 5)
        begin, start[0] = start[0], start[0] + size
        return whole[begin : start[0]]

    return SimpleNamespace(
        n_tokens=n_tokens,
        n_topk=topk,
        n_slots=n_slots,
        n_rows=n_rows,
        n_experts=32,
        block=block,
        expert_offset=cut(33),
        s_reverse_scatter_idx=cut(n_slots),
        slot_offset=cut(n_tokens + 1),
        score_src_idx=cut(n_slots),
        scores=cut(n_rows).view(torch.float32),
        x_gather_idx=cut(n_rows),
        s_scatter_idx=cut(n_rows),
    )


def call_everything(torch, n_tokens, draw):
    """One model's calls: H=3072, K=8, E=32."""
    from sonicmoe.ep import triton_layout
    from sonicmoe.quant import triton_fingerprint, triton_native, triton_quantize
    from sonicmoe.routing import (
        triton_combine,
        triton_counts,
        triton_router_product,
        triton_router_weight,
        triton_switch_loss,
        triton_topk,
    )

    routing = routing_of(torch, n_tokens, 8, draw)
    rows = torch.zeros([routing.n_rows, 3072], dtype=torch.bfloat16)
    triton_combine.sum_slots(rows, routing, torch.bfloat16, routing.scores)
    triton_combine.finish_ds(torch.zeros([routing.n_rows, 12], dtype=torch.float32), routing)
    triton_combine.scores_by_row(routing)
    logits = torch.zeros([n_tokens, 32], dtype=torch.float32)
    scores, indices = triton_topk.topk_softmax_forward(logits, 8)
    triton_topk.topk_softmax_backward(scores, scores, indices, 32, torch.float32)
    triton_layout.begin(indices, scores, 32, 4)
    triton_layout.to_slots(scores, torch.zeros([n_tokens * 8], dtype=torch.int64))
    frequency = torch.zeros([40], dtype=torch.int32)[draw.randint(0, 7) :]
    loss = triton_switch_loss.switch_loss(logits, frequency)
    triton_switch_loss.switch_loss_backward(loss, logits, frequency)
    flat = torch.zeros([16 * n_tokens + 7], dtype=torch.bfloat16)
    weights = [flat[start:] for start in range(draw.randint(1, 5))]
    first = triton_fingerprint.fingerprint(weights)
    triton_fingerprint.fingerprint(weights, first.state, first.table)
    experts = [torch.zeros([256, 3072], dtype=torch.bfloat16) for _ in range(2)]
    table, room = triton_fingerprint.fingerprint(experts).table, triton_native.room(2, experts[0], torch.bfloat16)
    flags = torch.zeros([8], dtype=torch.int32)[draw.randint(0, 5) :]
    triton_native.to_native(experts, draw.randint(0, 3), 2, table, flags, room, True)
    triton_native.count_change(flags[1:], flags, flags[2:], 2)
    triton_native.spoil_if_changed(flags[1:], flags, flags[2:], (rows, routing.scores, logits))
    x = torch.zeros([n_tokens, 3072], dtype=torch.bfloat16)
    triton_router_weight.gradient(logits, x, torch.bfloat16)
    router = torch.zeros([32, 3072], dtype=torch.bfloat16)
    triton_router_product.add_product(x, triton_router_product.logits(x, router), router)
    quantized = triton_quantize.quantize_rows(x)
    triton_quantize.dequantize_rows(quantized.data, quantized.scale, torch.bfloat16)
    weights = [torch.zeros([2, *size], dtype=torch.bfloat16) for size in ((256, 3072), (3072, 128))]
    flags = torch.zeros([8], dtype=torch.int32)[draw.randint(0, 5) :][:2]
    triton_quantize.quantize_weights(weights, False, None, flags)
    padded = routing_of(torch, n_tokens, 8, draw, 128)
    triton_combine.gather_without_pads(padded)
    triton_counts.slots_of_experts(padded)


def variants(torch):
    """Other models, types and limits: only that they compile."""
    from sonicmoe.ep import triton_layout
    from sonicmoe.quant import triton_quantize
    from sonicmoe.routing import triton_combine, triton_router_product, triton_router_weight, triton_topk

    draw = random.Random(1)
    for n_experts, n_ranks, k in ((1024, 128, 32), (8, 1, 1), (256, 256, 8)):
        indices, probs = torch.zeros([5, k], dtype=torch.int64), torch.zeros([5, k], dtype=torch.float32)
        triton_layout.begin(indices, probs, n_experts, n_ranks)
    for topk, width, dtype in ((32, 7168, torch.bfloat16), (10, 2048, torch.float32), (1, 100, torch.float16)):
        routing = routing_of(torch, 5, topk, draw)
        triton_combine.sum_slots(torch.zeros([routing.n_rows, width], dtype=dtype), routing, dtype)
        routing.n_topk = None  # a list of slots
        triton_combine.sum_slots(torch.zeros([routing.n_rows, width], dtype=dtype), routing, dtype)
        triton_combine.finish_ds(torch.zeros([routing.n_rows, 5], dtype=torch.float32), routing)
    for n_experts, k, dtype in ((1024, 32, torch.float32), (160, 6, torch.bfloat16), (8, 2, torch.float16)):
        scores, indices = triton_topk.topk_softmax_forward(torch.zeros([5, n_experts], dtype=dtype), k)
        triton_topk.topk_softmax_backward(scores, scores, indices, n_experts, dtype)
        triton_router_weight.gradient(
            torch.zeros([5, n_experts], dtype=dtype), torch.zeros([5, 1000], dtype=dtype), dtype
        )
        if dtype != torch.float32:
            x, router = torch.zeros([5, 1000], dtype=dtype), torch.zeros([n_experts, 1000], dtype=dtype)
            triton_router_product.add_product(x, triton_router_product.logits(x, router), router)
    routing = routing_of(torch, 5, 2, draw, 128)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        triton_quantize.quantize_rows(torch.zeros([5, 256], dtype=dtype), pow2=True)
        triton_quantize.quantize_weights([torch.zeros([1, 128, 256], dtype=dtype)], pow2=True)
    payload = torch.zeros([5, 256], dtype=torch.float8_e4m3fn), torch.zeros([5, 2], dtype=torch.float32)
    for dtype in (torch.float16, torch.float32):
        triton_quantize.dequantize_rows(*payload, dtype)


# They count programs; no sum that anybody reads is made by them. Who counts has published what it wrote, and sees what
# those before it wrote.
ATOMICS = {"_hash_parts": {"atom.global.gpu.acq_rel.add": 1, "atom.global.gpu.relaxed.add": 1}}


def faults(kernel) -> list[str]:
    """What the code for sm_90 must have, and must not."""
    # A histogram counts in shared memory: integers, whose sum is the same in any order.
    code = re.sub(r"atom\.shared\.add\.[su]32", "", kernel.asm["ptx"])
    found = [] if ".target sm_90" in code else ["not for sm_90"]
    if len(kernel.asm["cubin"]) < 1000:
        found.append("no machine code")
    found += [f"has {word}" for word in (" red.", "st.local") if word in code]
    wanted = ATOMICS.get(kernel.metadata.name, {})
    if code.count("atom.") != sum(wanted.values()) or any(code.count(word) != n for word, n in wanted.items()):
        found.append(f"{code.count('atom.')} atomics, not {wanted}")
    # What the assembler moves there when registers run out, the code before it does not show.
    return found + (["spills registers"] if "STL" in kernel.asm["sass"] else [])


# Of 16 bytes, in what call_everything compiles.
WIDE_LOADS = {"_sum_slots": 6, "_finish_ds": 3, "_hash_parts": 8, "_topk_softmax": 1}
WIDE_LOADS |= {"_quantize_rows": 4, "_quantize_weights": 16, "_dequantize_rows": 2}
WIDE_LOADS |= {"_add_product": 14}
WIDE_STORES = {"_quantize_rows": 2, "_quantize_weights": 16, "_dequantize_rows": 4}


def exact_arithmetic(kernel) -> list[str]:
    """A quantizer's subnormals count, its quotients are those of IEEE, and its casts are the hardware's."""
    code = kernel.asm["ptx"]
    found = [f"has {word}" for word in (".ftz", "div.full", "div.approx", "rcp.approx") if word in code]
    return found + [f"no {word}" for word in ("div.rn.f32", "cvt.rn.satfinite.e4m3x2.f32") if word not in code]


def main(framework: str):
    if framework == "paddle":
        import sonicmoe.ernie_compat  # noqa: F401  from here on `torch` inside the package is Paddle
        from sonicmoe.routing import naive

        torch = naive.torch
    else:
        import torch
    made, draw = compile_only(), random.Random(0)
    for n_tokens in TOKENS:
        call_everything(torch, n_tokens, draw)
    answer = {name: {"compiled": len(kernels), "faults": faults(kernels[0])} for name, kernels in made.items()}
    for access, counts in (("ld", WIDE_LOADS), ("st", WIDE_STORES)):
        for name, wanted in counts.items():
            code = made[name][0].asm["ptx"]
            wide = code.count(f"{access}.global.v4.b32") + code.count(f"{access}.global.v2.b64")
            if wide != wanted:
                answer[name]["faults"].append(f"{wide} times {access} of 16 bytes, not {wanted}")
    if framework == "torch":
        variants(torch)
        for name, kernels in made.items():
            answer[name]["faults"] += [fault for kernel in kernels[1:] for fault in faults(kernel)]
    for name, kernels in made.items():
        if name.startswith("_quantize"):
            answer[name]["faults"] += [fault for kernel in kernels for fault in exact_arithmetic(kernel)]
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
