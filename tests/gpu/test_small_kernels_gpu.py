"""The small Triton kernels on a GPU: their definitions' results, and the rate at which they move memory."""

import subprocess
import sys

import pytest
import torch

from sonicmoe.gemm import sm90_fp8
from sonicmoe.quant import naive as quant
from sonicmoe.quant import triton_fingerprint, triton_quantize
from sonicmoe.routing import naive, triton_combine, triton_topk
from tests.support import children, layout_kernels, quantizers, router_kernels, small_kernels, token_major
from tests.workers.jit_routings import distinct, elsewhere, holes, skewed, uniform

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
LARGE = [(4096, 8, 64, 128, distinct), (3000, 9, 40, 1, holes), (1000, 32, 128, 32, elsewhere), (2048, 4, 8, 1, skewed)]


GROUPS = (small_kernels, router_kernels, quantizers, layout_kernels)
EVERY_CHECK = [check for group in GROUPS for checks in group.CHECKS.values() for check in checks]


@pytest.mark.parametrize("check", EVERY_CHECK, ids=lambda check: check.__name__)
def test_small_cases(check):
    assert check(GPU) == []


def test_sum_slots_at_size():
    assert small_kernels.check_sum_slots(GPU, (3072, 1000), LARGE) == []


def test_finish_ds_at_size():
    assert small_kernels.check_finish_ds(GPU, (12, 24, 7), LARGE) == []


def test_list_of_slots_at_size():
    assert small_kernels.check_list_of_slots(GPU, 30000, 2000) == []


def test_topk_at_size():
    shapes = [(8192, 64, 8), (777, 1000, 32), (4097, 96, 6)]
    assert router_kernels.check_topk(GPU, shapes) == []
    assert router_kernels.check_topk_backward(GPU, shapes) == []


def test_layout_at_size():
    sizes = [(8192, 8, 128, 4), (65536, 8, 32, 2), (8191, 8, 32, 1), (4099, 8, 1024, 64)]
    assert layout_kernels.check_layout(GPU, sizes) == []


def test_router_weight_at_size():
    """The token counts at which cuBLAS 13.1 leaves out the last one, and others."""
    counts = (1025, 4097, 7169, 8192, 8193, 32769)
    shapes = [(n_tokens, n_experts, hidden) for n_tokens in counts for n_experts, hidden in ((8, 3072), (130, 1000))]
    assert router_kernels.check_router_weight(GPU, shapes) == []


def test_router_products_at_size():
    shapes = [(n_tokens, *sizes) for n_tokens in (1024, 4095, 4096) for sizes in ((8, 3072), (128, 4096), (130, 1000))]
    assert router_kernels.check_router_product(GPU, shapes) == []


def test_quantizers_at_size():
    kinds = ("ordinary", "holes", "ties")
    assert quantizers.check_quantize_rows(GPU, [(4096, 3072), (777, 7168)], kinds) == []
    assert quantizers.check_dequantize_rows(GPU, [(4096, 3072), (777, 7168)]) == []
    assert quantizers.check_quantize_weights(GPU, [(3, 1536, 3072), (1, 4096, 128)], kinds) == []
    assert quantizers.check_weight_copies(GPU) == []


def test_rows_along_tokens_at_size(cache_dir):
    kinds = ("ordinary", "holes", "ties")
    routings = [(n_tokens, k, n_experts, kind) for n_tokens, k, n_experts, _, kind in LARGE]
    assert token_major.check_token_major(GPU, cache_dir) == []
    assert token_major.check_token_major(GPU, cache_dir, (1536, 640), routings, kinds) == []
    assert token_major.check_token_major_of_fp8(GPU, cache_dir, (1536, 640), routings, kinds) == []


def test_quantizers_past_two_billion_elements(cache_dir):
    """Offsets of 64 bits: what lies last is compared."""
    width, n_tokens = 4096, 2**19 + 128
    x = torch.empty(n_tokens, width, dtype=torch.bfloat16, device=GPU)
    x.copy_(torch.arange(n_tokens, device=GPU).remainder(251).reshape(-1, 1)).add_(torch.arange(width, device=GPU))
    rows = triton_quantize.quantize_rows(x)
    wanted = quant.quantize(x[-200:], (1, 128))
    assert quantizers.differences("rows", (rows.data[-200:], rows.scale[-200:]), (wanted.data, wanted.scale)) == []
    ((data, scale, data_t, scale_t),) = triton_quantize.quantize_weights([x[None]])
    wanted = quant.quantize(x[None, -256:], (128, 128))
    turned = quant.transposed(wanted)
    assert quantizers.differences("weight", (data[:, -256:], scale[:, -2:]), (wanted.data, wanted.scale)) == []
    found = (data_t[:, :, -256:], scale_t[:, :, -2:])
    assert quantizers.differences("transposed", found, (turned.data, turned.scale)) == []
    del data, data_t
    routing = small_kernels.make_routing(small_kernels.np.random.default_rng(0), n_tokens, 1, 1, 128, uniform, GPU)
    plan = token_major.plan_of(GPU, cache_dir)
    data, scale = token_major.both(sm90_fp8.token_major(x, routing, plan))  # sorted order is the tokens' own
    for columns in (slice(0, 128), slice(width - 128, width)):
        wanted = quant.quantize(x[-256:, columns].t().contiguous(), (1, 128))
        found = (data[columns, -256:], scale[-2:, columns])
        assert quantizers.differences(f"tokens {columns}", found, (wanted.data, wanted.scale.t())) == []


def test_rows_past_two_billion_elements():
    """Offsets of 64 bits: the last rows of 4.5 GB are those that are read and written."""
    width, n_tokens = 4096, 2**19 + 64
    routing = small_kernels.make_routing(small_kernels.np.random.default_rng(0), n_tokens, 1, 1, 1, uniform, GPU)
    rows = torch.empty(n_tokens, width, dtype=torch.bfloat16, device=GPU)
    rows.copy_(torch.arange(n_tokens, device=GPU).remainder(251).reshape(-1, 1))
    out = triton_combine.sum_slots(rows, routing, torch.bfloat16)
    assert torch.equal(out, rows)  # one slot a token, one expert: sorted order is the tokens' own


def test_repeats_are_the_same_bits(cache_dir):
    rng = small_kernels.np.random.default_rng(5)
    routing = small_kernels.make_routing(rng, 4096, 8, 64, 128, distinct, GPU)
    rows = small_kernels.make_rows(rng, routing, 2048, torch.bfloat16, GPU)
    parts = small_kernels.make_rows(rng, routing, 12, torch.float32, GPU)
    logits, x = torch.randn(4096, 128, device=GPU), torch.randn(4096, 2048, device=GPU).bfloat16()
    plan = token_major.plan_of(GPU, cache_dir)
    weights = [torch.randn(999_999, device=GPU), torch.randn(7, device=GPU).bfloat16()]

    def everything():
        scores, indices = triton_topk.topk_softmax_forward(logits, 8)
        return [
            triton_combine.sum_slots(rows, routing, torch.bfloat16, routing.scores),
            triton_combine.finish_ds(parts, routing),
            scores,
            indices,
            triton_topk.topk_softmax_backward(scores, scores, indices, 128, torch.bfloat16),
            triton_fingerprint.fingerprint(weights).state,
            *token_major.both(sm90_fp8.token_major(x, routing, plan)),
        ]

    first = everything()
    for _ in range(20):
        for one, other in zip(first, everything(), strict=True):
            assert small_kernels.same_bits(one, other)


def test_new_token_counts_compile_nothing():
    kernels = (triton_combine._sum_slots, triton_combine._finish_ds, triton_topk._topk_softmax)
    kernels += (triton_quantize._quantize_rows,)

    def count():
        return [len(kernel.device_caches[GPU.index][0]) for kernel in kernels]

    def run(n_tokens):
        rng = small_kernels.np.random.default_rng(n_tokens)
        routing = small_kernels.make_routing(rng, n_tokens, 3, 16, 1, distinct, GPU)
        rows = small_kernels.make_rows(rng, routing, 1234, torch.bfloat16, GPU)
        triton_combine.sum_slots(rows, routing, torch.bfloat16)
        triton_combine.finish_ds(rows[:, :11].float(), routing)
        triton_topk.topk_softmax_forward(torch.randn(n_tokens, 48, device=GPU), 3)
        triton_quantize.quantize_rows(torch.randn(n_tokens, 384, device=GPU))

    run(17)
    before = count()
    for n_tokens in (1, 2, 16, 32, 33, 1024, 4097):
        run(n_tokens)
    assert count() == before


def test_graph_capture():
    """No wait and no allocation outside the graph's pool: a graph replays with new contents."""
    rng = small_kernels.np.random.default_rng(7)
    routing = small_kernels.make_routing(rng, 512, 4, 16, 1, distinct, GPU)
    rows = small_kernels.make_rows(rng, routing, 256, torch.bfloat16, GPU)
    weights = [torch.randn(5000, device=GPU)]
    known = triton_fingerprint.fingerprint(weights)

    def step():
        flag = triton_fingerprint.fingerprint(weights, known.state, known.table).changed
        return triton_combine.sum_slots(rows, routing, torch.bfloat16), flag

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, changed = step()
    rows.neg_()
    weights[0][3] += 1
    graph.replay()
    assert torch.equal(out, naive.sum_slots(rows, routing, torch.bfloat16)) and changed.tolist() == [1]


@pytest.mark.slow
def test_rates(tmp_path):
    """Prints what each kernel reaches beside a copy; the combine at full size is held to 85% of the copy's rate."""
    table = tmp_path / "small.csv"
    command = [sys.executable, "benchmarks/small_kernels.py", "--csv", str(table)]
    done = subprocess.run(command, cwd=children.ROOT, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if "T=8192 K=8 H=3072" in line)
    assert float(line.split()[-1]) >= 0.85, line
