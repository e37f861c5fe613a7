"""Routing metadata, entry by entry, against its definition in plain Python: data movement is exact or wrong."""

import numpy as np
import paddle
import pytest

from sonicmoe import SonicMoEConfig
from sonicmoe.cache_safety import JitUnavailable
from sonicmoe.ernie_compat import deepep_metadata, deepep_topk_to_sonic_metadata
from sonicmoe.routing import metadata, naive
from tests.support.problems import make_indices

NAMES = (
    "expert_frequency_offset",
    "x_gather_idx",
    "s_scatter_idx",
    "s_reverse_scatter_idx",
    "num_activated_expert_per_token_offset",
    "router_scores",
    "TK_padded",
    "total_pad_rows",
    "N_recv",
    "score_src_idx",
)
BLOCKS = (1, 32, 128)


@pytest.fixture(params=["naive", "host"])
def backend(request):
    """Every implementation that this machine can run has the same arrays."""
    with SonicMoEConfig(metadata_backend=request.param).activate():
        try:
            deepep_topk_to_sonic_metadata(paddle.zeros([1, 1], dtype="int32"), paddle.zeros([1, 1]), None, 1)
        except JitUnavailable as reason:
            pytest.skip(str(reason))
        yield request.param


def definition(indices, probs, n_experts, block):
    """Contract section 5 in loops."""
    slots = [(t, k) for t, row in enumerate(indices) for k, e in enumerate(row) if 0 <= e < n_experts]
    offset, gather, scatter = [0], [], []
    next_pad = len(slots)
    for e in range(n_experts):
        for number, (t, k) in enumerate(slots):
            if indices[t][k] == e:
                gather.append(t)
                scatter.append(number)
        while len(gather) % block:
            gather.append(0)
            scatter.append(next_pad)
            next_pad += 1
        offset.append(len(gather))
    reverse = [0] * len(slots)
    for row, number in enumerate(scatter):
        if number < len(slots):
            reverse[number] = row
    first = [sum(t < token for t, _ in slots) for token in range(len(indices))] + [len(slots)]
    n_topk = probs.shape[1]
    scores = np.zeros(len(gather), np.float32)
    scores[: len(slots)] = [probs[t, k] for t, k in slots]
    source = [t * n_topk + k for t, k in slots]
    rows, pads = len(gather), len(gather) - len(slots)
    return offset, gather, scatter, reverse, first, scores, rows, pads, len(indices), source


def build(indices, probs, counts, n_experts, block):
    return deepep_topk_to_sonic_metadata(
        paddle.to_tensor(indices), paddle.to_tensor(probs), counts, n_experts, block=block
    )


def assert_is_the_definition(indices, probs, n_experts, block, counts=None):
    found = build(indices, probs, counts, n_experts, block)
    expected = definition(indices.tolist(), probs, n_experts, block)
    for name, value, wanted in zip(NAMES, found, expected, strict=True):
        value = value.numpy() if isinstance(value, paddle.Tensor) else value
        where = f"{name}, E={n_experts}, block={block}, indices {indices.shape}"
        np.testing.assert_array_equal(value, np.array(wanted, np.asarray(value).dtype), err_msg=where)
    return found


def random_routing(rng):
    """Any shape, and every kind of row that a dispatcher may send."""
    n_experts, topk = int(rng.integers(1, 65)), int(rng.integers(1, 17))
    # Mostly few tokens: edges are where bugs are, and long inputs cost the definition most.
    n_tokens = int(rng.integers(0, rng.choice([2, 6, 30, 201], p=[0.2, 0.4, 0.3, 0.1])))
    kind = rng.choice(["uniform", "skewed", "holes", "beyond", "one_expert", "idle_experts", "idle_rank"])
    indices = make_indices(rng, kind, n_tokens, topk, n_experts).astype(rng.choice([np.int32, np.int64]))
    wild = rng.random(indices.shape) < rng.choice([0.0, 0.0, 0.3])
    strangers = rng.choice([-2, -3, -(2**31), n_experts, n_experts + 7, 2**31 - 1], indices.shape)
    indices = np.where(wild, strangers, indices).astype(indices.dtype)
    probs = rng.random(indices.shape).astype(np.float32)
    probs[rng.random(probs.shape) < 0.1] = 0.0
    return indices, probs, n_experts


def count(indices, n_experts):
    here = indices[(indices >= 0) & (indices < n_experts)]
    return np.bincount(here, minlength=n_experts).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_random_routings(backend, seed):
    rng = np.random.default_rng(seed)
    for _ in range(250):
        indices, probs, n_experts = random_routing(rng)
        counts = count(indices, n_experts) if rng.random() < 0.5 else None
        assert_is_the_definition(indices, probs, n_experts, int(rng.choice(BLOCKS)), counts)


@pytest.mark.parametrize("block", [1, 2, 32, 128])
@pytest.mark.parametrize("n_tokens", [0, 1, 127, 128, 129])
def test_segments_around_a_block(backend, n_tokens, block):
    """None, one short of full, full, and one over: for the first, a middle and the last expert."""
    for expert in (0, 2, 4):
        indices = np.full((n_tokens, 2), -1, np.int32)
        indices[:, 1] = expert
        assert_is_the_definition(indices, np.ones((n_tokens, 2), np.float32), 5, block)


@pytest.mark.parametrize("block", BLOCKS)
def test_nothing_here(backend, block):
    for indices in (np.full((3, 4), -1), np.full((3, 4), 9), np.zeros((0, 4), np.int64), np.full((5, 1), -8)):
        found = assert_is_the_definition(indices, np.ones(indices.shape, np.float32), 6, block)
        assert found[6] == found[7] == 0


def test_types_of_the_tuple(backend):
    for indices in (np.array([[0, -1], [2, 1]], np.int64), np.full((2, 2), -1, np.int32), np.zeros((0, 2), np.int32)):
        found = build(indices, np.ones(indices.shape, np.float32), None, 3, 32)
        assert len(found) == 10
        for name, value in zip(NAMES, found, strict=True):
            if name in ("TK_padded", "total_pad_rows", "N_recv"):
                assert type(value) is int, name
            else:
                wanted = paddle.float32 if name == "router_scores" else paddle.int32
                assert value.dtype == wanted and value.ndim == 1 and value.stop_gradient, name


def test_a_thread_gets_the_context_of_the_indices_first(monkeypatch):
    """Paddle gives a thread its GPU where one of its own kernels runs; here none need have run before."""
    order, build_metadata = [], metadata.build
    monkeypatch.setattr(deepep_metadata, "make_current", lambda tensor: order.append(tensor.shape))
    monkeypatch.setattr(metadata, "build", lambda *given: order.append("build") or build_metadata(*given))
    build(np.zeros((3, 2), np.int32), np.ones((3, 2), np.float32), None, 4, 1)
    assert order == [[3, 2], "build"]


def test_pads(backend):
    """They gather row 0, score 0, and scatter to places of their own behind the last slot."""
    indices, rng = make_indices(np.random.default_rng(3), "holes", 90, 4, 7), np.random.default_rng(3)
    found = dict(zip(NAMES, build(indices, rng.random(indices.shape).astype(np.float32), None, 7, 128), strict=True))
    n_slots, n_rows = int((indices >= 0).sum()), found["TK_padded"]
    scatter = found["s_scatter_idx"].numpy()
    pads = scatter >= n_slots
    assert pads.sum() == found["total_pad_rows"] == n_rows - n_slots > 0 and n_rows % 128 == 0
    assert sorted(scatter.tolist()) == list(range(n_rows)), "distinct, and within room for TKp rows"
    assert not found["x_gather_idx"].numpy()[pads].any()
    assert not found["router_scores"].numpy()[scatter[pads]].any()


def test_probs_of_nobody_leave_no_trace(backend):
    indices = np.array([[-1, 2], [5, 0]], np.int32)
    probs = np.array([[np.nan, 0.5], [np.inf, 0.25]], np.float32)
    assert build(indices, probs, None, 4, 32)[5].numpy().tolist() == [0.5, 0.25, *[0.0] * 62]


COUNTS = {"list": list, "numpy": np.array, "int64 tensor": lambda c: paddle.to_tensor(np.array(c, np.int64))}


@pytest.mark.parametrize("carrier", COUNTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_counts_that_do_not_match(backend, block, carrier):
    """The expert is named, with both numbers and both sums: which side is wrong only the caller can tell."""
    indices = np.array([[0, 2], [2, -1], [2, 3]], np.int32)
    probs = np.ones(indices.shape, np.float32)
    build(indices, probs, COUNTS[carrier]([1, 0, 3, 1]), 4, block)
    for wrong, expert in (([1, 0, 2, 1], 2), ([1, 1, 2, 1], 1), ([0, 0, 3, 1], 0), ([1, 0, 3, 0], 3)):
        with pytest.raises(ValueError) as error:
            build(indices, probs, COUNTS[carrier](wrong), 4, block)
        text = str(error.value)
        assert f"got {wrong[expert]} for expert {expert} (sum {sum(wrong)})" in text, text
        assert f"but indices hold {[1, 0, 3, 1][expert]} slots for it (sum 5)" in text, text


# ---- Combine ---------------------------------------------------------------------------------------------------------


def routing_of(indices, probs, n_experts, block):
    config = SonicMoEConfig.current()
    return metadata.build(paddle.to_tensor(indices), paddle.to_tensor(probs), n_experts, block, config)


def in_slot_order(rows, indices, probs, n_experts, scatter):
    """fp32 additions one after the other, in the order of a token's slots."""
    slots = [(t, k) for t, row in enumerate(indices) for k, e in enumerate(row) if 0 <= e < n_experts]
    row_of = {number: row for row, number in enumerate(scatter)}
    total = np.zeros((len(indices), rows.shape[1]), np.float32)
    for number, (t, k) in enumerate(slots):
        part = rows[row_of[number]]
        total[t] += part if probs is None else part * probs[t, k]
    return total


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", ["uniform", "skewed", "beyond", "one_expert", "idle_rank"])
def test_combine_adds_in_slot_order(backend, kind, block, weighted):
    """Terms of very different size, so that another order of additions gives other bits."""
    rng = np.random.default_rng(block)
    indices = make_indices(rng, kind, 40, 6, 9)
    probs = rng.random(indices.shape).astype(np.float32)
    routing = routing_of(indices, probs, 9, block)
    rows = (rng.standard_normal((routing.n_rows, 24)) * 2.0 ** rng.integers(-12, 12, (routing.n_rows, 1))).astype("f4")
    # What pads hold is nobody's business.
    rows[routing.s_scatter_idx.numpy() >= routing.n_slots] = np.nan
    scores = routing.scores if weighted else None
    found = [naive.sum_slots(paddle.to_tensor(rows), routing, paddle.float32, scores).numpy() for _ in range(5)]
    expected = in_slot_order(rows, indices, probs if weighted else None, 9, routing.s_scatter_idx.numpy())
    for result in found:
        np.testing.assert_array_equal(result, expected)


def test_combine_rounds_once(backend):
    """bf16 comes from the fp32 sum, never from partial sums: 256 + 1 + 1 is 258, and 256 + 1 in bf16 is 256."""
    routing = routing_of(np.array([[0, 1, 2]], np.int32), np.ones((1, 3), np.float32), 3, 1)
    rows = paddle.to_tensor(np.array([[256.0], [1.0], [1.0]], np.float32)).astype("bfloat16")
    assert naive.sum_slots(rows, routing, paddle.bfloat16).astype("float32").item() == 258.0


@pytest.mark.parametrize("block", BLOCKS)
def test_slot_gradients_return_to_their_places(backend, block):
    indices = make_indices(np.random.default_rng(5), "beyond", 33, 5, 6)
    routing = routing_of(indices, np.ones(indices.shape, np.float32), 6, block)
    here = (indices >= 0) & (indices < 6)
    grads = np.arange(1, here.sum() + 1, dtype=np.float32)
    expected = np.zeros(indices.shape, np.float32)
    expected[here] = grads
    found = naive.scatter_slot_grads(paddle.to_tensor(grads), routing).numpy()
    np.testing.assert_array_equal(found, expected)
