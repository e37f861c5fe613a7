"""Routing metadata on a GPU: its bits, its checks, where it writes, and how it gets on with streams and graphs.

T tokens, K slots a token, E experts, as in sonicmoe/routing/metadata.py.
"""

import json
import re
import statistics
import sys
import textwrap

import numpy as np
import pytest
import torch

from sonicmoe import SonicMoEConfig, jit
from sonicmoe.routing import arrays, metadata, naive, native
from tests.support import children
from tests.workers.jit_routings import ARRAYS, KINDS, distinct, draw, elsewhere, holes, skewed, uniform

pytestmark = pytest.mark.gpu

BLOCKS = (1, 32, 128)
DTYPES = (np.int32, np.int64)
GPU = torch.device("cuda", 0)


@pytest.fixture
def build(cache_dir):
    """metadata.build on the GPU, from NumPy arrays or tensors."""

    def build(indices, probs=None, n_experts=4, block=1, counts=None, scales=None, backend="cuda", **settings):
        if probs is None:
            probs = torch.ones(indices.shape)
        given = [torch.as_tensor(v).to(GPU) if v is not None else None for v in (indices, probs, scales)]
        config = SonicMoEConfig(metadata_backend=backend, cache_dir=cache_dir, **settings)
        return metadata.build(*given[:2], n_experts, block, config, counts, given[2])

    build.cache_dir = cache_dir
    return build


@pytest.fixture(scope="module")
def module(cache_dir):
    """The compiled extension itself, for tests that choose their own memory."""
    return jit.load(native.cuda_extension(target()), cache_dir)


def target() -> str:
    major, minor = torch.cuda.get_device_capability(GPU)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def definition(indices, probs, n_experts, block, scales=None) -> dict:
    """The naive backend on the CPU."""
    given = [torch.as_tensor(v) if v is not None else None for v in (indices, probs, scales)]
    return naive.build(*given[:2], n_experts, block, given[2])


def bits(tensor):
    """Values as integers: a NaN equals itself, and -0 does not equal 0."""
    return tensor.cpu().contiguous().view(torch.int32)


def require_same(wanted: dict, found, about=""):
    for name in (*ARRAYS, *(["sorted_scales"] if wanted["sorted_scales"] is not None else [])):
        value = getattr(found, name)
        assert value.dtype == wanted[name].dtype, f"{name} {about}"
        assert torch.equal(bits(wanted[name]), bits(value)), f"{name} {about}"


# ---- Equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_random_routings(build, seed):
    """A hundred for each seed, with and without counts."""
    rng = np.random.default_rng(seed)
    for number in range(100):
        kind = KINDS[int(rng.integers(len(KINDS)))]
        n_tokens = int(rng.choice([0, 1, 2, 7, 33, 129, 1025, 4100]))
        n_topk, block = int(rng.choice([*range(1, 17), 31, 32])), int(rng.choice(BLOCKS))
        n_experts = int(rng.choice([1, 2, 3, 8, 31, 32, 33, 64, 127, 128, 257, 1023, 1024]))
        indices, probs, scales = draw(rng, n_tokens, n_topk, n_experts, DTYPES[int(rng.integers(2))], kind)
        wanted = definition(indices, probs, n_experts, block, scales)
        counts = wanted["counts"] if number % 2 else None
        about = f"seed {seed} number {number}: {kind.__name__} T={n_tokens} K={n_topk} E={n_experts} block={block}"
        found = build(indices, probs, n_experts, block, counts, scales)
        assert found.backend == "cuda"
        require_same(wanted, found, about)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("block", BLOCKS)
def test_room_for_the_most_rows(build, rng, backend, block):
    """Without counts, where all ids are experts: those of the counts, and pads behind them."""
    for n_tokens, n_topk, n_experts in (
        (0, 2, 4),
        (1, 1, 8),
        (129, 3, 5),
        (4100, 8, 33),
        (8192, 8, 128),
        (700, 2, 1024),
    ):
        _, probs, scales = draw(rng, n_tokens, n_topk, n_experts, np.int32, uniform)
        # Each of them an expert, which none of the kinds promises.
        indices = rng.random((n_tokens, n_experts)).argsort(axis=1)[:, :n_topk].astype(np.int32)
        wanted = definition(indices, probs, n_experts, block, scales)
        given = [None if values is None else torch.as_tensor(values).to(GPU) for values in (indices, probs, scales)]
        config = SonicMoEConfig(metadata_backend=backend, cache_dir=build.cache_dir)
        found = metadata.build(*given[:2], n_experts, block, config, None, given[2], all_valid=True)
        rows, n_slots = len(wanted["x_gather_idx"]), n_tokens * n_topk
        more = torch.arange(rows, found.n_rows, dtype=torch.int32)
        assert (found.n_slots, found.n_rows) == arrays.bound(n_slots, n_experts, block) and found.n_rows >= rows
        pads = {"x_gather_idx": 0 * more, "s_scatter_idx": more, "scores": 0.0 * more}
        if n_tokens and scales is not None:
            pads["sorted_scales"] = torch.as_tensor(scales)[:1].expand(len(more), -1)
        require_same({name: torch.cat([wanted[name], value]) for name, value in pads.items()} | {
            name: value for name, value in wanted.items() if name not in pads
        }, found, f"{backend} {n_tokens} {n_topk} {n_experts}")  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n_tokens, n_topk, n_experts, block, kind",
    [
        (65536, 8, 32, 128, distinct),
        (65536, 8, 32, 1, skewed),
        (65536, 8, 32, 32, holes),
        (65536, 8, 33, 32, uniform),  # one expert more than a warp has lanes
        (65537, 8, 32, 1, uniform),  # one token more than a tile for each block holds
        (200001, 13, 64, 32, elsewhere),  # several tiles a block, and a last one that is nearly empty
        (16384, 16, 256, 128, elsewhere),
        (8192, 32, 1024, 32, holes),
        (300000, 2, 1024, 128, distinct),
        (1000003, 1, 1, 128, holes),
    ],
)
def test_large_routings(build, rng, n_tokens, n_topk, n_experts, block, kind, dtype):
    indices, probs, _ = draw(rng, n_tokens, n_topk, n_experts, dtype, kind)
    scales = rng.integers(-(2**31), 2**31, (n_tokens, 3)).astype(np.int32)
    wanted = definition(indices, probs, n_experts, block, scales)
    require_same(wanted, build(indices, probs, n_experts, block, wanted["counts"], scales))


@pytest.mark.parametrize("n_topk", range(1, 33))
def test_every_top_k(build, rng, n_topk):
    """A slot's token comes from a multiplication, whose constants depend on K alone."""
    indices, probs, _ = draw(rng, 9000, n_topk, 16, np.int32, uniform)
    require_same(definition(indices, probs, 16, 1), build(indices, probs, 16))


def test_ids_are_compared_before_they_are_narrowed(build):
    indices = np.array([[1, 2**32 + 1], [2**32, 2**63 - 1], [-(2**32) + 1, -(2**63)]])
    made = build(indices, n_experts=4)
    assert made.score_src_idx.tolist() == [0] and made.expert_offset.tolist() == [0, 0, 1, 1, 1]


def test_strided_inputs(build, rng):
    indices, probs, _ = draw(rng, 500, 6, 16, np.int64, distinct)
    scales = rng.integers(-(2**31), 2**31, (500, 3)).astype(np.int32)
    strided = [torch.as_tensor(np.ascontiguousarray(v.T)).to(GPU).T for v in (indices, probs, scales)]
    assert not any(view.is_contiguous() for view in strided)
    require_same(definition(indices, probs, 16, 32, scales), build(*strided[:2], 16, 32, scales=strided[2]))


def test_scale_rows_beyond_2_to_the_31_words(build):
    """Offsets into scales need 64 bits long before those into rows do."""
    n_tokens, words = 2**22, 516
    if torch.cuda.mem_get_info(GPU)[0] < 22 * 2**30:
        pytest.skip("needs 22 GiB of GPU memory")
    indices = torch.randint(0, 8, (n_tokens, 1), device=GPU, dtype=torch.int32)
    scales = torch.arange(n_tokens, device=GPU, dtype=torch.int32)[:, None].expand(n_tokens, words).contiguous()
    scales += torch.arange(words, device=GPU, dtype=torch.int32) << 22
    made = build(indices, torch.ones(indices.shape, device=GPU), n_experts=8, scales=scales)
    assert made.sorted_scales.numel() > 2**31
    for rows in torch.arange(n_tokens, device=GPU).split(2**18):
        assert torch.equal(made.sorted_scales[rows], scales[made.x_gather_idx[rows].long()])


# ---- Counts and VALIDATE_DISPATCH ------------------------------------------------------------------------------------

FAULTS = {
    "twice": ([0, 3, 0], "holds an expert more than once"),
    "under -1": ([0, -2, 1], "holds an id under -1"),
    "far under -1": ([0, 1, -(2**31)], "holds an id under -1"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "cuda"])
@pytest.mark.parametrize("row, fault", FAULTS.values(), ids=FAULTS)
def test_validation_names_row_and_values(build, backend, row, fault, dtype):
    """The lowest of many bad rows, in a batch that many blocks look at."""
    for place in (0, 1023, 1024, 1_500_000):
        indices = np.tile(np.array([1, -1, 2], dtype), (1_500_001, 1))
        indices[place] = row
        indices[place + 1 :: 7] = [3, 3, 3]
        text = f"dispatched_indices: row {place} is {row}, which {fault}"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            build(indices, backend=backend, validate_dispatch=True)


def test_validation_passes_what_is_allowed(build):
    """Many of -1, and the same id of another rank's expert twice, which is not ours to judge."""
    indices = np.array([[-1, -1, 0], [4, 4, 1], [2**32 + 1, 1, 2**32 + 1]])
    wanted = definition(indices, np.ones(indices.shape, np.float32), 4, 1)
    require_same(wanted, build(indices, validate_dispatch=True))
    assert build(np.zeros((0, 3), np.int64), validate_dispatch=True).n_slots == 0


WRONG_COUNTS = """
    import json, sys
    import numpy as np, torch
    from pathlib import Path
    from sonicmoe import jit
    from sonicmoe.routing import native

    cache, target, n_tokens, n_topk, n_experts, block, slots_off, rows_off = json.loads(sys.argv[1])
    module = jit.load(native.cuda_extension(target), Path(cache))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, n_experts, (n_tokens, n_topk))).cuda()
    counts = torch.bincount(ids.flatten(), minlength=n_experts).tolist()
    n_slots, n_rows = module.sizes(counts, block)
    said = n_slots + slots_off, n_rows + rows_off
    probs, workspace = torch.rand(ids.shape).cuda(), torch.empty(10**6, dtype=torch.int32).cuda()
    # Outputs in the host's memory, which the GPU can write and which outlives its stop.
    canary = 0x5CA1AB1E
    outputs = torch.full([8, n_rows + n_tokens + n_experts + 9], canary, dtype=torch.int32).pin_memory()
    addresses = [outputs[number].data_ptr() for number in range(7)]
    inputs = module.Inputs(ids.data_ptr(), True, probs.data_ptr(), n_tokens, n_topk, n_experts, block)
    torch.cuda.synchronize()
    error = ""
    try:
        module.launch(inputs, module.Outputs(*addresses, *said), 0, 0, 0, workspace.data_ptr(), 0)
        torch.cuda.synchronize()
    except RuntimeError as reason:
        error = str(reason).splitlines()[0]
    rest = outputs.numpy().copy()
    if said[0] == ids.numel():
        # A slot for every id is believed, and what follows from that alone may be there already: in its own place.
        for number, size in ((4, n_tokens + 1), (5, said[1]), (6, said[0])):
            rest[number, :size] = canary
    untouched = bool((rest == canary).all())
    print(json.dumps({"said": said, "found": [n_slots, n_rows], "error": error, "untouched": untouched}), flush=True)
    import os
    os._exit(0)  # the context is gone: freeing anything in it would fail
"""


@pytest.mark.parametrize(
    "shape, off",
    [
        ((100, 4, 8, 1), (-1, -1)),
        ((100, 4, 8, 32), (1, 0)),
        ((100, 4, 8, 32), (0, 32)),
        ((20000, 8, 1024, 128), (0, -128)),
        ((200000, 8, 32, 1), (7, 7)),
    ],
)
def test_wrong_counts_stop_the_device_with_a_message(build, cache_dir, module, shape, off):
    request = json.dumps([str(cache_dir), target(), *shape, *off])
    done = children.check(children.run([sys.executable, "-c", textwrap.dedent(WRONG_COUNTS), request]))
    found = json.loads(done.stdout.strip().splitlines()[-1])
    (said_slots, said_rows), (slots, rows) = found["said"], found["found"]
    assert (
        f"sonicmoe: tokens_per_expert sum to {said_slots} slots in {said_rows} rows, but dispatched_indices hold "
        f"{slots} slots in {rows} rows\n"
    ) in done.stdout + done.stderr
    assert "CUDA error" in found["error"] and found["untouched"]
    # Only that process's context is lost.
    assert build(np.array([[0, 1]]), counts=[1, 1, 0, 0]).n_slots == 2


TRITON_WRONG_COUNTS = """
    import json, os, sys
    import torch
    from sonicmoe.routing import triton_metadata

    ids, error = torch.tensor([[0, 2], [2, 1], [2, 3]]).cuda(), ""
    try:
        triton_metadata.build(ids, torch.ones(ids.shape).cuda(), 4, 1, json.loads(sys.argv[1]))
        torch.cuda.synchronize()
    except RuntimeError as reason:
        error = str(reason).splitlines()[0]
    print(json.dumps(error), flush=True)
    os._exit(0)  # as above
"""


@pytest.mark.parametrize("counts, stops", [([1, 1, 3, 1], False), ([1, 1, 2, 1], True), ([0, 0, 0, 0], True)])
def test_wrong_counts_stop_the_device_under_triton(counts, stops):
    command = [sys.executable, "-c", textwrap.dedent(TRITON_WRONG_COUNTS), json.dumps(counts)]
    done = children.check(children.run(command))
    error = json.loads(done.stdout.strip().splitlines()[-1])
    assert ("device-side assert" in error) == stops, error
    # Where a launch is the first to find the device stopped, what the device has said is lost.
    if "Triton Error" not in error:
        said = "sonicmoe: dispatched_indices do not hold the slots that tokens_per_expert count"
        assert (said in done.stdout + done.stderr) == stops


# ---- Where it writes -------------------------------------------------------------------------------------------------

GUARD, CANARY = 64, 0x5CA1AB1E


def guarded(sizes):
    """One buffer with guards around its parts: (buffer, the parts, what must stay as it is)."""
    steps = [-(-size // 4) * 4 + GUARD for size in sizes]  # each part begins at a multiple of 16 bytes
    buffer = torch.full([sum(steps) + GUARD], CANARY, dtype=torch.int32, device=GPU)
    untouched, parts, start = torch.ones(buffer.numel(), dtype=torch.bool), [], GUARD
    for size, step in zip(sizes, steps, strict=True):
        untouched[start : start + size] = False
        parts.append(buffer[start : start + size])
        start += step
    return buffer, parts, untouched


def problem(seed):
    rng = np.random.default_rng(seed)
    n_tokens, n_topk = int(rng.choice([1, 5, 200, 3000, 40000, 300000])), int(rng.choice([1, 2, 8, 13, 32]))
    n_tokens = min(n_tokens, 2_000_000 // n_topk)
    n_experts, block = int(rng.choice([1, 7, 64, 130, 1024])), int(rng.choice(BLOCKS))
    indices, probs, _ = draw(rng, n_tokens, n_topk, n_experts, np.int64, KINDS[seed % len(KINDS)])
    return indices, probs, n_experts, block, rng.integers(0, 99, (n_tokens, 3)).astype(np.int32)


@pytest.mark.parametrize("seed", range(28))
def test_writes_all_of_its_outputs_and_nothing_else(module, seed):
    indices, probs, n_experts, block, scales = problem(seed)
    wanted = definition(indices, probs, n_experts, block, scales)
    n_slots, n_rows = module.sizes(wanted["counts"], block)
    words = module.workspace_words(n_experts)
    sizes = [n_experts + 1, n_rows, n_rows, n_slots, indices.shape[0] + 1, n_rows, n_slots, 3 * n_rows, words]
    buffer, parts, untouched = guarded(sizes)
    given = [torch.as_tensor(np.ascontiguousarray(v)).to(GPU) for v in (indices, probs, scales)]
    at = [part.data_ptr() for part in parts]
    inputs = module.Inputs(given[0].data_ptr(), True, given[1].data_ptr(), *indices.shape, n_experts, block)
    outputs = module.Outputs(*at[:7], n_slots, n_rows)
    torch.cuda.synchronize()
    module.launch(inputs, outputs, given[2].data_ptr(), at[7], 3, at[8], torch.cuda.current_stream(GPU).cuda_stream)
    torch.cuda.synchronize()
    assert bool((buffer.cpu()[untouched] == CANARY).all())
    for name, part in zip((*ARRAYS, "sorted_scales"), parts, strict=False):
        assert torch.equal(bits(wanted[name]).flatten(), bits(part)), name
    for given_value, original in zip(given, (indices, probs, scales), strict=True):
        assert torch.equal(given_value.cpu(), torch.as_tensor(original))


def test_workspace_must_be_aligned(module):
    ids = torch.zeros([1, 1], dtype=torch.int32, device=GPU)
    room = torch.zeros([4096], dtype=torch.int32, device=GPU)
    inputs = module.Inputs(ids.data_ptr(), False, ids.data_ptr(), 1, 1, 1, 1)
    outputs = module.Outputs(*[room.data_ptr()] * 7, 1, 1)
    with pytest.raises(RuntimeError, match="deepep_topk_metadata: workspace: need an address that 16 divides"):
        module.launch(inputs, outputs, 0, 0, 0, room.data_ptr() + 4, 0)


# ---- Streams and graphs ----------------------------------------------------------------------------------------------

LONG = 400_000_000  # cycles: some 0.2 s


def test_work_follows_the_current_stream(build, rng):
    """Ids that exist only once a slow kernel on the same stream is done; the default stream has no part in it."""
    indices, probs, _ = draw(rng, 8192, 8, 32, np.int64, holes)
    wanted = definition(indices, probs, 32, 128)
    late, late_probs = (torch.as_tensor(v).pin_memory() for v in (indices, probs))
    ids, given_probs = (torch.zeros(v.shape, dtype=v.dtype, device=GPU) for v in (late, late_probs))
    build(ids, given_probs, 32, 128)  # compiled and loaded
    side = torch.cuda.Stream(GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG // 4)
        ids.copy_(late, non_blocking=True)
        given_probs.copy_(late_probs, non_blocking=True)
        found = build(ids, given_probs, 32, 128, wanted["counts"])
        assert not side.query()  # the call has waited for nothing
    torch.cuda._sleep(LONG)
    side.synchronize()
    assert not torch.cuda.default_stream(GPU).query()  # a kernel there would have waited for the sleep
    copied = {name: torch.empty_like(getattr(found, name), device="cpu").pin_memory() for name in ARRAYS}
    with torch.cuda.stream(side):
        for name, to in copied.items():
            to.copy_(getattr(found, name), non_blocking=True)
    side.synchronize()
    assert not torch.cuda.default_stream(GPU).query()
    for name, value in copied.items():
        assert torch.equal(bits(wanted[name]), bits(value)), name
    torch.cuda.synchronize()


@pytest.mark.parametrize("n_tokens", [8192, 200000])
def test_graph_replay_with_other_inputs(build, rng, n_tokens):
    """Captured once; then other ids of the same counts, and other probs and scales, in the same memory."""
    indices, probs, _ = draw(rng, n_tokens, 8, 32, np.int32, distinct)
    indices[rng.random(indices.shape) < 0.2] = -1
    scales = rng.integers(-(2**31), 2**31, (n_tokens, 3)).astype(np.int32)
    given = [torch.as_tensor(v).to(GPU) for v in (indices, probs, scales)]
    wanted = definition(indices, probs, 32, 128, scales)
    build(*given[:2], 32, 128, wanted["counts"], given[2])  # compiled and loaded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = build(*given[:2], 32, 128, wanted["counts"], given[2])
    for _ in range(5):
        indices = rng.permutation(indices)
        probs, scales = rng.random(probs.shape, dtype=np.float32), rng.permutation(scales)
        for value, to in zip((indices, probs, scales), given, strict=True):
            to.copy_(torch.as_tensor(value))
        graph.replay()
        torch.cuda.synchronize()
        require_same(definition(indices, probs, 32, 128, scales), found)


@pytest.mark.parametrize("n_tokens, n_experts", [(8192, 128), (65536, 32), (150000, 64)])
def test_same_bits_while_other_work_runs(build, rng, n_tokens, n_experts):
    """On two streams at once, beside a third that keeps the multiprocessors busy."""
    indices, probs, _ = draw(rng, n_tokens, 8, n_experts, np.int32, elsewhere)
    wanted = definition(indices, probs, n_experts, 32)
    ids, given_probs = torch.as_tensor(indices).to(GPU), torch.as_tensor(probs).to(GPU)
    streams = [torch.cuda.Stream(GPU) for _ in range(3)]
    matrix, found = torch.randn(2048, 2048, device=GPU, dtype=torch.bfloat16), []
    torch.cuda.synchronize()
    for _ in range(40):
        with torch.cuda.stream(streams[2]):
            for _ in range(3):
                torch.mm(matrix, matrix)
        for stream in streams[:2]:
            with torch.cuda.stream(stream):
                found.append(build(ids, given_probs, n_experts, 32, wanted["counts"]))
    torch.cuda.synchronize()
    for made in found:
        for name in ARRAYS:
            assert torch.equal(getattr(made, name), getattr(found[0], name)), name
    require_same(wanted, found[0])


# ---- Loading ---------------------------------------------------------------------------------------------------------

LOAD = """
    import json, sys, time
    from pathlib import Path
    import torch
    from sonicmoe import jit
    from sonicmoe.routing import native

    began = time.perf_counter()
    module = jit.load(native.cuda_extension(sys.argv[2]), Path(sys.argv[1]))
    print(json.dumps({"seconds": time.perf_counter() - began, "words": module.workspace_words(1)}))
"""


def test_import_of_the_prebuilt_artifact_takes_less_than_50_ms(cache_dir, module):
    found = [children.answer(LOAD, cache_dir, target()) for _ in range(5)]
    assert all(one["words"] > 0 for one in found)
    seconds = [one["seconds"] for one in found]
    assert statistics.median(seconds) < 0.050, seconds
