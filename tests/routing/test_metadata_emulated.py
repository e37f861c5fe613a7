"""The CUDA version of the routing metadata on the CPU, its threads as fibers, against the definition: bit for bit, on
GPUs of a few multiprocessors, and with canaries around whatever it writes.

T tokens, K slots a token, E experts, as in sonicmoe/routing/metadata.py.
"""

import numpy as np
import pytest

from tests.support.torch_child import torch
from tests.workers.jit_routings import ARRAYS, KINDS, distinct, draw, elsewhere, holes, nothing, skewed, uniform

RUNS_IN_TORCH = True
pytestmark = [pytest.mark.torch, pytest.mark.slow]

if torch:
    from sonicmoe.routing import arrays, naive
    from tests.support import metadata_emulator
    from tests.support.guarded import Guarded
    from tests.support.metadata_emulator import Call

BLOCKS = (1, 32, 128)
DTYPES = (np.int32, np.int64)
EXPERTS = (1, 2, 3, 8, 31, 32, 33, 64, 127, 128, 257, 600, 1023, 1024)
STOPPED = "deepep_topk_metadata: unspecified launch failure"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """(the extension module, the GPU that it finds)"""
    return metadata_emulator.build(tmp_path_factory.mktemp("emulator")) if torch else None


def definition(indices, probs, n_experts, block, scales=None) -> dict:
    """The bits of the naive backend's arrays."""
    given = [None if values is None else torch.as_tensor(values) for values in (indices, probs, scales)]
    made = naive.build(*given[:2], n_experts, block, given[2])
    names = ARRAYS if scales is None else (*ARRAYS, "sorted_scales")
    return {name: made[name].numpy().view(np.int32) for name in names}


def sizes(wanted) -> tuple[int, int]:
    return len(wanted["score_src_idx"]), len(wanted["x_gather_idx"])


def require_same(wanted, found, about=""):
    assert wanted.keys() == found.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=f"{name} {about}")


def compare(module, indices, probs, n_experts, block, scales=None, about=""):
    wanted = definition(indices, probs, n_experts, block, scales)
    call = Call(module, indices, probs, n_experts, block, *sizes(wanted), scales)
    call.launch()
    require_same(wanted, call.arrays(), about)


def with_room_for_the_most(indices, probs, n_experts, block, scales):
    """(the definition's bits and pads behind them, slots, rows), not knowing how slots fall on the experts"""
    wanted = definition(indices, probs, n_experts, block, scales)
    n_slots, rows = sizes(wanted)
    _, n_rows = arrays.bound(n_slots, n_experts, block)
    assert n_rows >= rows
    more = np.arange(rows, n_rows, dtype=np.int32)
    pads = {"x_gather_idx": 0 * more, "s_scatter_idx": more, "scores": 0 * more}
    pads["sorted_scales"] = np.broadcast_to(scales[0], (len(more), scales.shape[1]))
    return wanted | {name: np.concatenate([wanted[name], values]) for name, values in pads.items()}, n_slots, n_rows


# ---- Equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 5])
@pytest.mark.parametrize("n_experts", EXPERTS)
def test_random_routings(emulated, n_experts, multiprocessors):
    """Of every kind twice, with both types of ids, from one slot to some for each thread of each block."""
    module, device = emulated
    rng = np.random.default_rng(100 * n_experts + multiprocessors)
    for number in range(2 * len(KINDS)):
        kind, dtype = KINDS[number % len(KINDS)], DTYPES[number // len(KINDS)]
        n_topk, block = int(rng.choice([*range(1, 17), 31, 32])), int(rng.choice(BLOCKS))
        n_tokens = -(-int(rng.choice([1, 40, 700, 1500, 5000])) // n_topk)
        indices, probs, scales = draw(rng, n_tokens, n_topk, n_experts, dtype, kind)
        device.configure(multiprocessors, number)
        about = f"number {number}: {kind.__name__} T={n_tokens} K={n_topk} block={block}"
        compare(module, indices, probs, n_experts, block, scales, about)


@pytest.mark.parametrize(
    "multiprocessors, n_tokens, n_topk, n_experts, block, kind",
    [
        (1, 5003, 8, 64, 32, holes),
        (1, 2100, 8, 1024, 128, distinct),
        (1, 40009, 1, 3, 1, elsewhere),
        (2, 5100, 13, 257, 1, skewed),
        (3, 12000, 5, 31, 32, holes),
        (3, 2300, 31, 600, 128, uniform),
        (5, 2800, 32, 33, 1, elsewhere),
        (5, 90001, 1, 8, 128, skewed),
    ],
)
def test_blocks_with_more_slots_than_they_hold_at_once(
    emulated, multiprocessors, n_tokens, n_topk, n_experts, block, kind
):
    module, device = emulated
    rng = np.random.default_rng(n_tokens)
    indices, probs, _ = draw(rng, n_tokens, n_topk, n_experts, np.int32, kind)
    scales = rng.integers(-(2**31), 2**31, (n_tokens, 2)).astype(np.int32)
    device.configure(multiprocessors, n_topk)
    compare(module, indices, probs, n_experts, block, scales)
    blocks, threads = device.last_launch()
    assert blocks >= min(multiprocessors, 2) and n_tokens * n_topk > 16 * blocks * threads


@pytest.mark.parametrize("all_valid", [True, False])
@pytest.mark.parametrize("n_experts", [1, 31, 32, 33])
@pytest.mark.parametrize(
    "multiprocessors, n_tokens, n_topk",
    [
        (1, 1, 1),
        (7, 600, 5),  # six blocks: what they count is read four at a time
        (6, 700, 6),  # two slots a thread
        (4, 801, 10),  # four
        (3, 2300, 5),  # eight
        (2, 2700, 6),  # two tiles for each of two blocks
        (2, 3400, 5),  # three, and two
    ],
)
def test_experts_around_what_a_warp_has_lanes_for(emulated, multiprocessors, n_tokens, n_topk, n_experts, all_valid):
    """Where they are no more, and blocks have one tile, another kernel runs, in a version for holes and one without."""
    module, device = emulated
    rng = np.random.default_rng(n_tokens + n_experts)
    indices = rng.integers(0 if all_valid else -1, n_experts + (not all_valid), (n_tokens, n_topk)).astype(np.int32)
    probs = rng.standard_normal(indices.shape).astype(np.float32)
    scales = rng.integers(-(2**31), 2**31, (n_tokens, 2)).astype(np.int32)
    for number, block in enumerate(BLOCKS):
        device.configure(multiprocessors, number)
        given = indices.astype(DTYPES[number % 2]), probs, n_experts, block
        compare(module, *given, scales if number else None, f"block={block}")
        wanted, n_slots, n_rows = with_room_for_the_most(*given, scales)
        call = Call(module, *given, n_slots, n_rows, scales, bounded=True)
        call.launch()
        require_same(wanted, call.arrays(), f"block={block}, bounded")
    assert n_tokens == 1 or (n_slots == indices.size) == all_valid


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_slots_around_what_the_threads_hold(emulated, multiprocessors):
    """One short of so many for each thread of a block, as many, and one over."""
    module, device = emulated
    rng = np.random.default_rng(7)
    device.configure(multiprocessors, 7)
    compare(module, np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), 1, 1)
    _, threads = device.last_launch()
    for each in (1, 2, 3, 4, 6, 8, 12, 16):
        for more in (-1, 0, 1):
            indices, probs, _ = draw(rng, each * threads + more, 1, 5, np.int64, holes)
            compare(module, indices, probs, 5, 32, about=f"{each} for each of {threads} and {more}")


@pytest.mark.parametrize("n_topk", range(1, 33))
def test_every_top_k(emulated, n_topk):
    """A slot's token comes from a multiplication, whose constants depend on K alone."""
    module, device = emulated
    indices, probs, _ = draw(np.random.default_rng(n_topk), 200, n_topk, 16, np.int32, uniform)
    device.configure(2, n_topk)
    compare(module, indices, probs, 16, 1)


def test_ids_are_compared_before_they_are_narrowed(emulated):
    module, device = emulated
    device.configure(1, 0)
    indices = np.array([[1, 2**32 + 1], [2**32, 2**63 - 1], [-(2**32) + 1, -(2**63)]])
    call = Call(module, indices, np.ones(indices.shape, np.float32), 4, 1, 1, 1)
    call.launch()
    found = call.arrays()
    assert found["score_src_idx"].tolist() == [0] and found["expert_offset"].tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n_tokens, n_topk, n_experts", [(1, 1, 8), (129, 3, 5), (900, 8, 33), (2000, 2, 1024)])
def test_room_for_the_most_rows(emulated, n_tokens, n_topk, n_experts, block):
    module, device = emulated
    rng = np.random.default_rng(n_tokens + block)
    indices, probs, _ = draw(rng, n_tokens, n_topk, n_experts, np.int32, holes)
    scales = rng.integers(-(2**31), 2**31, (n_tokens, 3)).astype(np.int32)
    wanted, n_slots, n_rows = with_room_for_the_most(indices, probs, n_experts, block, scales)
    for multiprocessors in (1, 3):
        device.configure(multiprocessors, block)
        call = Call(module, indices, probs, n_experts, block, n_slots, n_rows, scales, bounded=True)
        call.launch()
        require_same(wanted, call.arrays(), f"{multiprocessors} multiprocessors")


@pytest.mark.parametrize("n_tokens, n_topk, n_experts", [(300, 8, 32), (5000, 1, 3), (700, 6, 257)])
def test_no_order_of_threads_shows(emulated, n_tokens, n_topk, n_experts):
    module, device = emulated
    rng = np.random.default_rng(n_experts)
    indices, probs, _ = draw(rng, n_tokens, n_topk, n_experts, np.int64, elsewhere)
    scales = rng.integers(-(2**31), 2**31, (n_tokens, 1)).astype(np.int32)
    for seed in range(25):
        device.configure(3, seed)
        compare(module, indices, probs, n_experts, 32, scales, f"seed {seed}")


# ---- What it refuses, and what it leaves alone -----------------------------------------------------------------------

WRONG = {
    "fewer": ((100, 4, 8, 1), (-1, -1), False),
    "more slots": ((100, 4, 8, 32), (1, 0), False),
    "more rows": ((100, 4, 8, 32), (0, 32), False),
    "fewer rows": ((400, 8, 1024, 128), (0, -128), False),
    "more of both": ((9000, 1, 32, 1), (7, 7), False),
    "more of both, many experts": ((9000, 1, 33, 1), (7, 7), False),
    "slots in the most room": ((600, 8, 32, 32), (-1, 64), True),
    "slots in the most room, many experts": ((600, 8, 33, 32), (-1, 64), True),
    "not room enough": ((600, 8, 32, 32), (0, -32), True),
    "not room enough, many experts": ((600, 8, 33, 32), (0, -32), True),
}
# All else has to do with rows, and may not be written before the counts are known to be right. These may, if they say
# that every slot is valid.
OF_SLOTS = {"slot_offset", "scores", "score_src_idx"}
OF_ROWS = [number for number, name in enumerate((*ARRAYS, "sorted_scales")) if name not in OF_SLOTS]


def require_stop(call, capfd, said, found):
    with pytest.raises(RuntimeError, match=f"^{STOPPED}$"):
        call.launch()  # which looks at the guards
    assert capfd.readouterr().out == (
        f"sonicmoe: tokens_per_expert sum to {said[0]} slots in {said[1]} rows, but dispatched_indices hold "
        f"{found[0]} slots in {found[1]} rows\n"
    )


@pytest.mark.parametrize("shape, off, bounded", WRONG.values(), ids=WRONG)
def test_wrong_counts_stop_the_device_with_a_message(emulated, capfd, shape, off, bounded):
    module, device = emulated
    n_tokens, n_topk, n_experts, block = shape
    rng = np.random.default_rng(n_tokens)
    indices, probs, _ = draw(rng, n_tokens, n_topk, n_experts, np.int64, holes)
    scales = rng.integers(0, 99, (n_tokens, 3)).astype(np.int32)
    found = sizes(definition(indices, probs, n_experts, block))
    said = found[0] + off[0], found[1] + off[1]
    for seed in range(6):
        device.configure(1 + seed % 3, seed)
        call = Call(module, indices, probs, n_experts, block, *said, scales, bounded)
        require_stop(call, capfd, said, found)
        assert call.outputs.is_untouched()
    compare(module, indices, probs, n_experts, block, scales)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(
    "n_tokens, n_topk, n_experts, block",
    [(100, 4, 8, 1), (700, 8, 32, 128), (700, 8, 33, 128), (9000, 1, 3, 32), (9000, 1, 33, 32)],
)
def test_counts_of_a_slot_for_every_id_stop_the_device_too(
    emulated, capfd, n_tokens, n_topk, n_experts, block, bounded
):
    """Where ids are not all here. Of such counts a kernel might make use before it has added them up."""
    module, device = emulated
    rng = np.random.default_rng(n_tokens)
    indices, probs, _ = draw(rng, n_tokens, n_topk, n_experts, np.int32, holes)
    scales = rng.integers(0, 99, (n_tokens, 3)).astype(np.int32)
    found = sizes(definition(indices, probs, n_experts, block))
    said = (
        arrays.bound(indices.size, n_experts, block) if bounded else (indices.size, -(-indices.size // block) * block)
    )
    for seed in range(6):
        device.configure(1 + seed % 3, seed)
        call = Call(module, indices, probs, n_experts, block, *said, scales, bounded)
        require_stop(call, capfd, said, found)
        assert call.outputs.is_untouched(*OF_ROWS)


@pytest.mark.parametrize("off, bounded", [(-32, False), (32, False), (-32, True)])
@pytest.mark.parametrize("n_tokens, n_topk, n_experts", [(100, 4, 8), (700, 8, 32), (700, 8, 33), (9000, 1, 32)])
def test_rows_that_slots_do_not_fill_stop_the_device_too(emulated, capfd, n_tokens, n_topk, n_experts, off, bounded):
    """Where the count of slots is right, and each of them valid."""
    module, device = emulated
    rng = np.random.default_rng(n_tokens)
    indices = rng.integers(0, n_experts, (n_tokens, n_topk)).astype(np.int64)
    probs, scales = rng.random(indices.shape, np.float32), np.zeros((n_tokens, 3), np.int32)
    found = sizes(definition(indices, probs, n_experts, 32))
    said = indices.size, found[1] + off
    assert found[0] == said[0] <= said[1]
    for seed in range(3):
        device.configure(1 + seed, seed)
        call = Call(module, indices, probs, n_experts, 32, *said, scales, bounded)
        require_stop(call, capfd, said, found)
        assert call.outputs.is_untouched(*OF_ROWS)


@pytest.mark.parametrize("n_tokens, n_topk", [(0, 4), (5, 0)])
def test_without_a_slot_nothing_is_written(emulated, n_tokens, n_topk):
    """The caller zeroes the offsets."""
    module, device = emulated
    device.configure(2, 0)
    shape = (n_tokens, n_topk)
    call = Call(module, np.zeros(shape, np.int32), np.zeros(shape, np.float32), 4, 32, 0, 0)
    call.launch()
    assert call.outputs.is_untouched() and call.workspace.is_untouched()


def test_without_a_valid_slot_the_offsets_are_zero(emulated):
    module, device = emulated
    for seed, n_tokens in enumerate((1, 700, 6000)):
        device.configure(2, seed)
        indices, probs, scales = draw(np.random.default_rng(seed), n_tokens, 2, 40, np.int32, nothing)
        compare(module, np.where(indices < 40, -1, indices).astype(np.int32), probs, 40, 32, scales)


def test_workspace_must_be_aligned(emulated):
    module, _ = emulated
    call = Call(module, np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), 1, 1, 1, 1)
    at = call.workspace.parts[0].ctypes.data + 4
    with pytest.raises(RuntimeError, match="deepep_topk_metadata: workspace: need an address that 16 divides"):
        module.launch(call.inputs, call.destination, 0, 0, 0, at, 0)


# ---- VALIDATE_DISPATCH -----------------------------------------------------------------------------------------------


def verdict(module, indices, n_experts):
    indices = np.ascontiguousarray(indices)
    wide, at = indices.dtype == np.int64, indices.ctypes.data
    room = Guarded(2)
    module.launch_check(module.Inputs(at, wide, at, *indices.shape, n_experts, 1), room.parts[0].ctypes.data, 0)
    assert room.guards_are_whole()
    found = int(room.parts[0].view(np.int64)[0])
    return None if found < 0 else (found // 4, found % 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row, fault", [([0, 3, 0], 1), ([0, -2, 1], 2), ([0, 1, -(2**31)], 2), ([2, 2, -3], 2)])
def test_the_lowest_of_many_bad_rows(emulated, row, fault, dtype):
    module, device = emulated
    for seed, place in enumerate((0, 543, 544, 1023, 1024, 4999)):
        device.configure(1 + seed, seed)
        indices = np.tile(np.array([1, -1, 2], dtype), (5000, 1))
        indices[place] = row
        indices[place + 1 :: 7] = [3, 3, 3]
        assert verdict(module, indices, 4) == (place, fault)


def test_check_agrees_with_the_definition(emulated):
    module, device = emulated
    rng, verdicts = np.random.default_rng(2), set()
    for number in range(60):
        shape = int(rng.integers(0, 40)), int(rng.integers(1, 9))
        kind = KINDS[number % len(KINDS)]
        indices, _, _ = draw(rng, *shape, 24, DTYPES[number % 2], kind)
        device.configure(2, number)
        wanted = naive.check_rows(indices, 24)
        assert verdict(module, indices, 24) == wanted, kind.__name__
        verdicts.add(wanted and wanted[1])
    assert verdicts == {None, 1, 2}


def test_more_rows_than_threads_look_at_in_one_go(emulated):
    module, device = emulated
    device.configure(1, 0)
    indices = np.zeros((1, 2), np.int32)
    assert verdict(module, indices, 4) == (0, 1)
    _, threads = device.last_launch()
    indices = np.tile(np.array([0, 1], np.int32), (1024 * threads + 3, 1))
    assert verdict(module, indices, 4) is None
    indices[-1] = 0
    assert verdict(module, indices, 4) == (len(indices) - 1, 1)
    assert device.last_launch()[0] * threads < len(indices)
