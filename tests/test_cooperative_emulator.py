"""tests/cuda_emulator/cooperative by itself: what its operations give, and that it sees what would hurt on a GPU."""

import ctypes
import re
import shutil

import numpy as np
import pytest

from tests.support.cuda_emulator import EMULATOR, Device, compile_kernels

BLOCKS, THREADS = 3, 96
CASES = re.search(r"enum Case \{([^}]*)\}", (EMULATOR / "probe.cu").read_text())[1].replace(",", " ").split()
SEEDS = range(12)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH: nothing to build with")
    folder = tmp_path_factory.mktemp("probe")
    compile_kernels(folder, EMULATOR / "probe.cu", folder / "probe.so")
    made = Device(folder / "probe.so")
    for name in ("probe_operations", "probe_cooperation", "probe_ask"):
        getattr(made.library, name).restype = ctypes.c_char_p
    made.configure(1, 0)
    return made


def cooperate(device, case="kGood", blocks=BLOCKS, threads=THREADS, shared=None, cooperative=True):
    """(what the launch said, what its threads found)"""
    published, found = (np.zeros(blocks * threads, np.int32) for _ in range(2))
    shared = 8 * threads + 4 if shared is None else shared
    said = device.library.probe_cooperation(
        CASES.index(case), blocks, threads, shared, cooperative, published.ctypes, found.ctypes
    )
    return said.decode(), found.reshape(blocks, threads)


def wanted(blocks=BLOCKS, threads=THREADS):
    thread, block = np.arange(threads), np.arange(blocks)[:, None]
    return 1 + (thread ^ 1) + threads - thread + 1 + (block + 1) % blocks + threads


def test_operations(device):
    threads = 64
    thread = np.arange(threads)
    warp, lane = thread // 32, thread % 32
    later = thread // 32 * 32

    def of_warp(values):
        return np.repeat(values.reshape(-1, 32).sum(axis=1), 32)

    expected = [
        np.full(threads, -1),  # bytes of 0xFF
        of_warp((thread % 3 == 0) * (1 << lane)),
        warp == 1,
        warp == 0,
        of_warp(thread - 20),
        of_warp(thread),  # and 32 times half of the range
        later + 39 % 32,
        np.where(lane >= 3, thread - 3, thread),
        np.where(lane < 29, thread + 3, thread),
        thread ^ 5,
        2 * later + 5,
        later + 3,
        np.full(threads, (thread % 3 == 0).sum()),
        np.ones(threads),
        np.zeros(threads),
        np.zeros(threads),
        np.ones(threads),
        [4 * int(t).bit_count() for t in thread],
        [(int(t) & -int(t)).bit_length() for t in thread],
        [32 - int(t).bit_length() for t in thread],
        [(int(t) << 28) % 2**32 * 48 >> 32 for t in thread],
        7 * (thread + (thread + 1) % threads),
        np.full(threads, thread.sum()),
    ]
    for seed in SEEDS:
        device.configure(1, seed)
        found, least = np.full((len(expected), threads), -7, np.int32), np.array([2000], np.uint64)
        said = device.library.probe_operations(found.ctypes, least.ctypes, threads)
        assert said == b"no error" and least[0] == 1000 - 63
        for row, (one, other) in enumerate(zip(found, expected, strict=True)):
            np.testing.assert_array_equal(one, np.array(other, np.int64).astype(np.int32), err_msg=f"row {row}")


@pytest.mark.parametrize("blocks, threads", [(1, 32), (BLOCKS, THREADS), (2, 544), (2, 1024)])
def test_what_is_right_comes_out_right(device, blocks, threads):
    for seed in SEEDS:
        device.configure(1, seed)
        said, found = cooperate(device, "kGood", blocks, threads)
        assert said == "no error" and device.last_launch() == (blocks, threads)
        np.testing.assert_array_equal(found, wanted(blocks, threads))


@pytest.mark.parametrize("case", ["kNoSyncthreads", "kNoSyncwarp", "kNoAtomic", "kLatePublish"])
def test_what_is_not_ordered_comes_out_wrong(device, case):
    """No error, but other numbers: not in every order of the threads, but in many."""
    differs = 0
    for seed in range(40):
        device.configure(1, seed)
        said, found = cooperate(device, case)
        assert said == "no error"
        differs += not np.array_equal(found, wanted())
    assert differs >= 10, differs


MISTAKES = {
    "kThreadMissesBarrier": "block . thread 95 is at barrier_arrive while others are at __syncthreads"
    "|block . thread .* is at __syncthreads while others are at barrier_arrive",
    "kLanesApart": "block . thread .* is at __(syncwarp|any_sync) while others are at __(syncwarp|any_sync)",
    "kLaneMissesVote": r"deadlock: 93 threads at __any_sync \(block . thread 0\), "
    r"192 threads at barrier_arrive \(block . thread 32\), 3 threads at the end \(block . thread 3\)",
    "kSomeLanes": "block . thread .* is at __syncwarp of some lanes: only all can meet here",
    "kBarriersApart": "block . thread .* is at __syncthreads(_or)? while others are at __syncthreads(_or)?",
    "kBlockMissesGrid": r"deadlock: 192 threads at barrier_wait \(block . thread 0\), "
    r"96 threads at the end \(block 1 thread 0\)",
    "kWaitsWithoutArrival": "block . thread .* waits for the grid without its last arrival",
    "kArrivesTwice": "block . thread .* arrives twice without a wait",
    "kWritesBehind": "block . wrote outside of its 772 bytes of shared memory",
    "kWritesInFront": "block . wrote outside of its 772 bytes of shared memory",
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_reported(device, case):
    for seed in SEEDS:
        device.configure(1, seed)
        said, _ = cooperate(device, case)
        assert re.fullmatch(MISTAKES[case], said), said
    assert cooperate(device)[0] == "no error", "nothing of it is left for the next launch"


def test_a_trap_ends_the_launch(device, capfd):
    said, found = cooperate(device, "kTraps")
    assert said == "unspecified launch failure" and not found.any()
    assert capfd.readouterr().out == "thread 5 traps\n"


def test_limits_of_a_device(device):
    assert cooperate(device, cooperative=False)[0] == "the blocks meet, but the launch is not cooperative"
    assert cooperate(device, threads=1025)[0] == cooperate(device, blocks=0)[0] == "invalid configuration argument"
    too_many = "too many blocks in cooperative launch"
    for multiprocessors in (1, 2):
        device.configure(multiprocessors, 0)
        room = 2 * multiprocessors
        assert cooperate(device, blocks=room, threads=1024)[0] == "no error"
        assert cooperate(device, blocks=room + 1, threads=1024)[0] == too_many
    assert cooperate(device, shared=48 * 1024 + 1)[0] == "invalid argument"
    assert device.library.probe_ask(227 * 1024 + 1) == b"invalid argument"
    assert device.library.probe_ask(120 * 1024) == b"no error"
    assert cooperate(device, shared=120 * 1024 + 1)[0] == "invalid argument"
    assert cooperate(device, blocks=3, shared=120 * 1024)[0] == too_many
    assert cooperate(device, blocks=2, shared=120 * 1024)[0] == "no error"
