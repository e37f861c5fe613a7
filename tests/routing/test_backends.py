"""Every implementation of the routing metadata gives the same arrays, bit for bit, and says which one ran.

T tokens, K slots a token, E experts, as in sonicmoe/routing/metadata.py.
"""

import errno
import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest

import sonicmoe.ernie_compat  # noqa: F401  from here on `torch` inside the package is Paddle
from sonicmoe import SonicMoEConfig, jit
from sonicmoe.cache_safety import JitUnavailable, UnsafeCache
from sonicmoe.routing import backends, metadata, native
from tests.support import children, triton_runs
from tests.support.guarded import CANARY, Guarded
from tests.workers.jit_routings import ARRAYS, KINDS, by_hand, distinct, draw, elsewhere, holes, skewed, uniform

SIZES = ("n_tokens", "n_topk", "n_experts", "n_slots", "n_rows", "block", "n_pad_rows")
BLOCKS = (1, 32, 128)
TRITON_WORKER = children.WORKERS / "jit_triton.py"


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    if jit.find_compiler(False) is None:
        pytest.skip("no C++ compiler on PATH: the host backend cannot be built")
    return tmp_path_factory.mktemp("cache") / "sonicmoe"


@pytest.fixture
def build(cache_dir):
    """metadata.build by a backend's name, on NumPy arrays or tensors."""

    def build(backend, indices, probs=None, n_experts=4, block=1, counts=None, scales=None, **settings):
        if probs is None:
            probs = np.arange(1, indices.size + 1, dtype=np.float32).reshape(indices.shape)
        given = [paddle.to_tensor(v) if isinstance(v, np.ndarray) else v for v in (indices, probs, scales)]
        config = SonicMoEConfig(metadata_backend=backend, cache_dir=cache_dir, **settings)
        return metadata.build(*given[:2], n_experts, block, config, counts, given[2])

    return build


def bits(tensor) -> np.ndarray:
    """Values as integers: a NaN equals itself, and -0 does not equal 0."""
    found = tensor.numpy()
    return found.view(f"i{found.dtype.itemsize}")


def require_same(left, right, about=""):
    for name in SIZES:
        assert getattr(left, name) == getattr(right, name), f"{name} {about}"
    names = (*ARRAYS, *(() if left.sorted_scales is None and right.sorted_scales is None else ("sorted_scales",)))
    for name in names:
        one, two = getattr(left, name), getattr(right, name)
        assert one.dtype == two.dtype, f"{name} {about}: {one.dtype}, {two.dtype}"
        assert str(one.dtype).rpartition(".")[2] == ARRAYS.get(name, str(one.dtype).rpartition(".")[2]), name
        np.testing.assert_array_equal(bits(one), bits(two), err_msg=f"{name} {about}")


# ---- Equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("backend", ["naive", "host"])
def test_definition(build, backend, kind):
    rng = np.random.default_rng(11)
    for number in range(24):
        n_experts, block = int(rng.integers(1, 7)), int(rng.choice([1, 2, 5, 32]))
        shape = int(rng.integers(1, 12)), int(rng.integers(1, 5))
        indices, probs, scales = draw(rng, *shape, n_experts, (np.int32, np.int64)[number % 2], kind)
        made = build(backend, indices, probs, n_experts, block, scales=scales)
        for name, wanted in by_hand(indices, probs, n_experts, block).items():
            np.testing.assert_array_equal(getattr(made, name).numpy(), wanted, err_msg=name)
            assert getattr(made, name).numpy().dtype == wanted.dtype
        if scales is not None:
            np.testing.assert_array_equal(made.sorted_scales.numpy(), scales[made.x_gather_idx.numpy()])


@pytest.mark.parametrize("seed", range(7))
def test_host_equals_naive(build, seed):
    """Three hundred routings for each seed, over two thousand in all."""
    rng = np.random.default_rng(seed)
    for number in range(300):
        kind = KINDS[int(rng.integers(len(KINDS)))]
        n_tokens = int(rng.choice([0, 1, 2, 3, 7, 32, 65, 129, 400]))
        n_topk = int(rng.choice([*range(1, 17), 32]))
        n_experts = int(rng.choice([1, 2, 3, 8, 31, 32, 33, 64, 127, 128, 256, 1024]))
        block, dtype = int(rng.choice(BLOCKS)), (np.int32, np.int64)[int(rng.integers(2))]
        indices, probs, scales = draw(rng, n_tokens, n_topk, n_experts, dtype, kind)
        about = f"seed {seed} number {number}: {kind.__name__} T={n_tokens} K={n_topk} E={n_experts} block={block}"
        found = [build(name, indices, probs, n_experts, block, scales=scales) for name in ("naive", "host")]
        require_same(*found, about)


@pytest.mark.parametrize(
    "n_tokens, n_topk, n_experts, block, kind",
    [
        (65536, 8, 32, 128, distinct),
        (65536, 8, 32, 1, skewed),
        (65536, 1, 1, 32, uniform),
        (16384, 16, 256, 128, elsewhere),
        (8192, 32, 1024, 32, holes),
    ],
)
def test_host_equals_naive_on_large_routings(build, n_tokens, n_topk, n_experts, block, kind):
    rng = np.random.default_rng(n_tokens + n_topk)
    indices, probs, _ = draw(rng, n_tokens, n_topk, n_experts, np.int64, kind)
    scales = rng.integers(-(2**31), 2**31, (n_tokens, 3)).astype(np.int32)
    found = [build(name, indices, probs, n_experts, block, scales=scales) for name in ("naive", "host", "host")]
    require_same(found[0], found[1])
    require_same(found[1], found[2])


def test_repeats_are_the_same_bits(build):
    rng = np.random.default_rng(3)
    indices, probs, _ = draw(rng, 300, 8, 32, np.int64, elsewhere)
    scales = rng.integers(-(2**31), 2**31, (300, 2)).astype(np.int32)
    first = build("host", indices, probs, 32, 128, scales=scales)
    for _ in range(50):
        require_same(first, build("host", indices, probs, 32, 128, scales=scales))


@pytest.mark.parametrize("backend", ["naive", "host"])
def test_strided_inputs(build, backend):
    """Views as a dispatcher may hand them out: their memory is not in the order of their elements."""
    rng = np.random.default_rng(5)
    indices, probs, _ = draw(rng, 50, 6, 16, np.int64, distinct)
    scales = rng.integers(-(2**31), 2**31, (50, 3)).astype(np.int32)
    strided = [paddle.to_tensor(np.ascontiguousarray(v.T)).transpose([1, 0]) for v in (indices, probs, scales)]
    assert not any(view.is_contiguous() for view in strided)
    wanted = build(backend, indices, probs, 16, 32, scales=scales)
    require_same(wanted, build(backend, *strided[:2], 16, 32, scales=strided[2]))


@pytest.mark.parametrize("backend", ["naive", "host"])
def test_float_scales_travel_as_they_are(build, backend):
    """Any bits: infinities, subnormals, and NaNs with something in them."""
    rng = np.random.default_rng(6)
    indices, probs, _ = draw(rng, 40, 4, 8, np.int32, holes)
    words = rng.integers(-(2**31), 2**31, (40, 3)).astype(np.int32)
    words[0] = [0x7F800000, 0x7FC12345, 0x00000001]
    made = build(backend, indices, probs, 8, 32, scales=words.view(np.float32))
    assert made.sorted_scales.dtype == paddle.float32
    np.testing.assert_array_equal(bits(made.sorted_scales), words[made.x_gather_idx.numpy()])


@pytest.mark.parametrize("backend", ["naive", "host"])
def test_ids_are_compared_before_they_are_narrowed(build, backend):
    indices = np.array([[1, 2**32 + 1], [2**32, 2**63 - 1], [-(2**32) + 1, -(2**63)]])
    made = build(backend, indices, n_experts=4)
    assert made.score_src_idx.tolist() == [0] and made.expert_offset.tolist() == [0, 0, 1, 1, 1]


# ---- Counts and VALIDATE_DISPATCH ------------------------------------------------------------------------------------

ROWS = np.array([[0, 1], [3, 1], [1, -1]])


@pytest.mark.parametrize("backend", ["naive", "host", "auto"])
def test_counts_that_the_ids_do_not_have(build, backend):
    require_same(build(backend, ROWS, counts=[1, 3, 0, 1]), build("naive", ROWS))
    text = "tokens_per_expert: got 2 for expert 1 (sum 4), but dispatched_indices hold 3 slots for it (sum 5)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        build(backend, ROWS, counts=[1, 2, 0, 1])
    # The same sum, wrongly dealt out.
    with pytest.raises(ValueError, match=re.escape("got 0 for expert 0 (sum 5), but dispatched_indices hold 1")):
        build(backend, ROWS, counts=[0, 3, 1, 1])
    with pytest.raises(ValueError, match=re.escape("got 1 for expert 2 (sum 1), but dispatched_indices hold 0")):
        build(backend, np.full((3, 2), -1), counts=[0, 0, 1, 0])


@pytest.mark.parametrize("shape, counts", [((0, 2), [0, 1, 0, 0]), ((3, 2), [0, 7, 0, 0]), ((3, 0), [1, 1, 0, 0])])
def test_counts_beyond_all_slots_reach_no_backend(build, monkeypatch, shape, counts):
    """A GPU counts nothing by itself: where there is not even a slot, it would hand out memory as it found it."""
    monkeypatch.setitem(backends._BUILDERS, "host", lambda *_: pytest.fail("it was asked"))
    text = f"tokens_per_expert: got a sum of {sum(counts)}, but dispatched_indices {list(shape)} have room for "
    with pytest.raises(ValueError, match=f"^{re.escape(text)}{shape[0] * shape[1]} slots$"):
        build("host", np.zeros(shape, np.int32), counts=counts)


def test_validation_counts_where_the_backend_does_not(build, monkeypatch):
    """On a GPU wrong counts stop the device; under the flag they are an error that names the expert."""
    monkeypatch.setitem(backends._BUILDERS, "host", lambda *_: pytest.fail("it was asked"))
    text = "tokens_per_expert: got 2 for expert 1 (sum 4), but dispatched_indices hold 3 slots for it (sum 5)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        build("host", ROWS, counts=[1, 2, 0, 1], validate_dispatch=True)
    config = SonicMoEConfig(metadata_backend="host", validate_dispatch=True)
    with pytest.raises(ValueError, match="^topk: 1 of 6 ids are not in 0 to 3$"):
        metadata.build(paddle.to_tensor(ROWS), paddle.ones([3, 2]), 4, 1, config, index_name="topk", all_valid=True)


FAULTS = {
    "twice": ([0, 3, 0], "holds an expert more than once"),
    "twice in a row": ([2, 2, -1], "holds an expert more than once"),
    "under -1": ([0, -2, 1], "holds an id under -1"),
    "far under -1": ([0, 1, -(2**31)], "holds an id under -1"),
}


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("backend", ["naive", "host", "auto"])
@pytest.mark.parametrize("row, fault", FAULTS.values(), ids=FAULTS)
def test_validation_names_row_and_values(build, backend, row, fault, dtype):
    indices = np.array([[0, 1, 2], [3, -1, 1], row, [1, 1, 1]], dtype)
    text = f"dispatched_indices: row 2 is {row}, which {fault}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        build(backend, indices, validate_dispatch=True)
    assert build(backend, indices).n_slots  # only on demand: it waits for the device


@pytest.mark.parametrize("backend", ["naive", "host"])
def test_validation_passes_what_is_allowed(build, backend):
    """Many of -1, and the same id of another rank's expert twice, which is not ours to judge."""
    indices = np.array([[-1, -1, 0], [4, 4, 1], [2**32 + 1, 1, 2**32 + 1]])
    require_same(build(backend, indices, validate_dispatch=True), build("naive", indices))
    assert build(backend, np.zeros((0, 3), np.int64), validate_dispatch=True).n_slots == 0


def test_validation_by_all_backends_finds_the_same_row(build):
    rng = np.random.default_rng(9)
    seen = set()
    for number in range(200):
        dtype = (np.int32, np.int64)[number % 2]
        indices, _, _ = draw(rng, 12, int(rng.integers(1, 5)), 64, dtype, (distinct, uniform)[number % 3 == 0])
        said = []
        for backend in ("naive", "host"):
            try:
                build(backend, indices, n_experts=64, validate_dispatch=True)
                said.append("good")
            except ValueError as error:
                # A row may have both faults; then either may be named.
                said.append(str(error).partition(", which")[0])
        assert said[0] == said[1]
        seen.add(said[0][:26])
    assert len(seen) > 4, seen


# ---- Which one runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_loaded(monkeypatch):
    """As in a process that has not asked for a backend yet."""
    monkeypatch.setattr(jit, "_loaded", {})
    monkeypatch.setattr(backends, "_said", set())
    native._module.cache_clear()
    yield
    native._module.cache_clear()


@pytest.fixture
def no_compiler(nothing_loaded, monkeypatch):
    monkeypatch.setattr(jit, "find_compiler", lambda cuda: None)


def run(cache, backend="auto", **settings):
    config = SonicMoEConfig(metadata_backend=backend, cache_dir=cache, **settings)
    return metadata.build(paddle.to_tensor(ROWS), paddle.ones([3, 2]), 4, 1, config)


def run_and_listen(cache, calls=3, **settings):
    """(routings, warnings). Filters let everything through, and are set anew for each call."""
    found, lines = [], []
    for _ in range(calls):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(run(cache, **settings))
        lines += [str(one.message) for one in caught if "sonicmoe" in str(one.message)]
    return found, lines


def test_auto_is_host_on_the_cpu(cache_dir, nothing_loaded):
    found, lines = run_and_listen(cache_dir)
    assert [one.backend for one in found] == ["host"] * 3 and lines == []


@pytest.mark.parametrize("backend", ["naive", "host"])
def test_named_backend_is_the_one_that_runs(build, backend):
    assert build(backend, ROWS).backend == backend


def test_without_a_compiler_auto_is_naive_and_says_so_once(tmp_path, no_compiler):
    found, lines = run_and_listen(tmp_path / "cache")
    assert [one.backend for one in found] == ["naive"] * 3
    (line,) = lines
    assert line.startswith("sonicmoe: routing metadata runs as 'naive', not 'host': a C++ compiler")
    assert "not on PATH" in line and line.endswith("install it") and "\n" not in line
    require_same(found[0], run(tmp_path / "cache", "naive"))


def test_without_a_compiler_host_by_name_raises(tmp_path, no_compiler):
    for _ in range(2):
        with pytest.raises(JitUnavailable, match="a C\\+\\+ compiler .* is not on PATH"):
            run(tmp_path / "cache", "host")


def test_without_a_compiler_validation_still_checks(tmp_path, no_compiler):
    config = SonicMoEConfig(cache_dir=tmp_path / "cache", validate_dispatch=True)
    with pytest.raises(ValueError, match="row 0 is \\[2, 2\\]"):
        metadata.build(paddle.to_tensor([[2, 2]]), paddle.ones([1, 2]), 4, 1, config)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_cache_that_cannot_be_written_is_a_reason_to_fall_back(tmp_path, nothing_loaded, monkeypatch, code):
    original, cache = os.mkdir, tmp_path / "cache"

    def mkdir(path, *args, **kwargs):
        if Path(path).is_relative_to(cache):
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    found, lines = run_and_listen(cache)
    assert [one.backend for one in found] == ["naive"] * 3
    (line,) = lines
    assert os.strerror(code) in line and "set SONIC_MOE_CACHE_DIR to" in line and "\n" not in line


@pytest.mark.parametrize("backend", ["auto", "host"])
@pytest.mark.parametrize("validate", [False, True])
def test_unsafe_cache_stops_the_run(tmp_path, nothing_loaded, backend, validate):
    """Not a reason to fall back in silence: somebody may have put code there."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    for _ in range(2):
        with pytest.raises(UnsafeCache, match=re.escape(f"{cache} can be written by others (mode 777)")):
            run(cache, backend, validate_dispatch=validate)


def test_backend_of_the_other_device_is_refused(cache_dir):
    with pytest.raises(ValueError, match="metadata_backend: got 'cuda' for indices on cpu"):
        run(cache_dir, "cuda")


@pytest.mark.skipif(backends.triton_metadata is not None, reason="triton is installed")
def test_triton_by_name_without_triton(cache_dir):
    with pytest.raises(JitUnavailable, match="pip install triton"):
        run(cache_dir, "triton")


@pytest.mark.parametrize(
    "n_experts, n_topk, block, need",
    [
        (1025, 2, 1, "n_experts: got 1025, need 1 to 1024"),
        (0, 2, 1, "n_experts: got 0, need 1 to 1024"),
        (4, 33, 1, "need at most 32 columns"),
        (4, 2, 0, "block: got 0, need at least 1"),
    ],
)
@pytest.mark.parametrize("backend", ["naive", "host", "auto"])
def test_limits_are_the_same_on_every_backend(build, backend, n_experts, n_topk, block, need):
    with pytest.raises(ValueError, match=need):
        build(backend, np.zeros((3, n_topk), np.int64), n_experts=n_experts, block=block)


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(cache_dir):
    return jit.load(native.HOST, cache_dir)


def problem(seed):
    rng = np.random.default_rng(seed)
    n_tokens, n_topk = int(rng.integers(0, 200)), int(rng.integers(1, 33))
    n_experts, block = int(rng.choice([1, 7, 64, 1024])), int(rng.choice(BLOCKS))
    indices, probs, _ = draw(rng, n_tokens, n_topk, n_experts, np.int64, KINDS[seed % len(KINDS)])
    return np.ascontiguousarray(indices), probs, n_experts, block, rng.integers(0, 99, (n_tokens, 3)).astype(np.int32)


def call(host, indices, probs, n_experts, block, scales, change=0):
    """Guarded outputs sized by the counts, or by counts that are ``change`` off."""
    inputs = host.Inputs(indices.ctypes.data, True, probs.ctypes.data, *indices.shape, n_experts, block)
    n_slots, n_rows = host.sizes(host.count(inputs), block)
    n_slots, n_rows = n_slots + change, n_rows + change * block
    sizes = [n_experts + 1, n_rows, n_rows, n_slots, indices.shape[0] + 1, n_rows, n_slots, n_rows * 3]
    room = Guarded(*sizes)
    outputs = host.Outputs(*[part.ctypes.data for part in room.parts[:7]], n_slots, n_rows)
    host.build(inputs, outputs, scales.ctypes.data, room.parts[7].ctypes.data, 3)
    return room


@pytest.mark.parametrize("seed", range(42))
def test_host_writes_all_of_its_outputs_and_nothing_else(host, seed):
    room = call(host, *problem(seed))
    assert room.guards_are_whole()
    for name, part in zip((*ARRAYS, "scales"), room.parts, strict=True):
        assert not (part == CANARY).any(), name


def test_host_writes_nothing_where_the_sizes_are_wrong(host):
    for seed in range(14):
        assert call(host, *problem(seed), change=1).is_untouched()


def test_extensions_name_all_that_they_include():
    """A change of a file that they do not name would leave users with what was built before."""
    for extension in (native.HOST, native.cuda_extension("sm_90a")):
        files = [jit.source_folder() / name for name in (*extension.sources, *extension.headers)]
        included = {name for file in files for name in re.findall(r'#include "(.*)"', file.read_text())}
        assert included == set(extension.headers)


@pytest.mark.slow
def test_cuda_version_compiles_and_knows_its_workspace(cache_dir):
    """Without a GPU: that it is right on one is shown elsewhere."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: the CUDA version cannot be compiled")
    cuda = jit.load(native.cuda_extension("sm_90a"), cache_dir)
    assert jit.load(native.HOST, cache_dir).Inputs is not cuda.Inputs  # both versions live in one process
    # Counts of each expert by block, read four at a time; nothing grows with the slots.
    assert [cuda.workspace_words(n_experts) for n_experts in (1, 32, 1024)] == [128, 32 * 128, 1024 * 128]
    for refused in (lambda: cuda.Inputs(0, True, 0, 1, 1, 1025, 1), lambda: cuda.Inputs(0, True, 0, 2**26, 32, 8, 1)):
        with pytest.raises(ValueError):
            refused()


@pytest.mark.torch
@pytest.mark.slow
def test_triton_version_in_its_interpreter():
    found = triton_runs.interpreted(TRITON_WORKER, timeout=170)
    assert found["cases"] >= 30 and found["different"] == []
    assert len(found["wrong_counts"]) == 6
    for counts, said, wrote in found["wrong_counts"]:
        assert "dispatched_indices do not hold the slots that tokens_per_expert count" in said and not wrote, counts
