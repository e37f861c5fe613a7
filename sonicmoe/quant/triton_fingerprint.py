"""Have these weights changed? Asked and answered on the device: no copy of them, no wait, at the speed of memory.

``fingerprint`` hashes each tensor to 128 bits and compares with the hashes of an earlier call. What it returns stays on
the device, where a quantizer can read it: FP8 copies of a tensor whose flag is 0 are still good.

The hash is a sum over the tensor's 8-byte words of a mixed value of each word and its place in the tensor, once by
each of two mixers. Sums of integers have no order, so nothing depends on how the work is dealt out; what has an order
is the place. A mixer maps the words of one place one to one, so a change within one word always shows. Any other
change, two words or two blocks that swap places included, would go unnoticed once in 2^128 if the mixers were random
functions. They are made to notice what happens to weights, not to withstand somebody who constructs a collision.

The words are those of the aligned addresses. A tensor that has moved to another alignment counts as changed, although
its bytes may be the same.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import address, beside
from ..triton_launch import launch, launch_repeatable

_ITEM_SIZE = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4, torch.float8_e4m3fn: 1, torch.uint8: 1}
_LANES_WORDS = 256  # 16 bytes for each of 128 threads
_LOADS = 8  # of these, that are in flight together
_BLOCK_WORDS = _LOADS * _LANES_WORDS
_PART_WORDS = 4 * _BLOCK_WORDS  # 64 KiB: what one program reads
_LANES = tl.constexpr(_LANES_WORDS)
_TIMES = tl.constexpr(_LOADS)
_PART = tl.constexpr(_PART_WORDS)
_PARTS_A_STEP = tl.constexpr(512)

# Odd, with bits all over: splitmix64's and murmur3's.
_STEP = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_A0 = tl.constexpr(0xFF51AFD7ED558CCD)
_MIX_A1 = tl.constexpr(0xC4CEB9FE1A85EC53)
_MIX_B0 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_B1 = tl.constexpr(0x94D049BB133111EB)
# Places of the bytes before the first and after the last aligned word: beyond any word's.
_EDGE = tl.constexpr(1 << 60)


@triton.jit
def _mix(x, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """One to one on 64 bits. A shift by 32 costs one instruction, any other three."""
    x *= FIRST
    x ^= x >> 32
    x *= SECOND
    return x ^ (x >> 32)


@triton.jit
def _mix_both(word, key):
    """(A, B) of words at places: a key is the place times STEP, so that no two places have the same."""
    x = word + key
    x ^= x >> 32  # the upper bits come down, from where multiplications spread them
    return _mix(x, _MIX_A0, _MIX_A1), _mix(x, _MIX_B0, _MIX_B1)


@triton.jit
def _judge(row, parts, previous, state, changed):
    """One tensor: its parts added from first to last, its edge bytes and length, and the comparison."""
    body = tl.load(row)
    n_words = tl.load(row + 1) * 2
    head = tl.load(row + 3) & 15
    tail = tl.load(row + 3) >> 4
    first = tl.load(row + 2)
    end = tl.load(row + 6)  # where the next tensor's parts begin
    total_a = tl.zeros([_PARTS_A_STEP], dtype=tl.uint64)
    total_b = tl.zeros([_PARTS_A_STEP], dtype=tl.uint64)
    for begin in tl.range(first, end, _PARTS_A_STEP, num_stages=1):
        part = begin + tl.arange(0, _PARTS_A_STEP)
        total_a += tl.load(parts + part * 2, mask=part < end, other=0)
        total_b += tl.load(parts + part * 2 + 1, mask=part < end, other=0)
    # Lanes 0 to 15 are the bytes before the body, 16 to 31 those after it.
    lane = tl.arange(0, 32)
    here = tl.where(lane < 16, lane < head, lane - 16 < tail)
    at = tl.where(lane < 16, body - head + lane, body + n_words * 8 + lane - 16)
    byte = tl.load(at.to(tl.pointer_type(tl.uint8)), mask=here, other=0).to(tl.uint64)
    a, b = _mix_both(byte, (lane.to(tl.uint64) + _EDGE) * _STEP)
    length = (n_words * 8 + head + tail).to(tl.uint64) * _STEP
    hash_a = _mix(tl.sum(total_a) + tl.sum(tl.where(here, a, 0)) + length, _MIX_B0, _MIX_A1)
    hash_b = _mix((tl.sum(total_b) + tl.sum(tl.where(here, b, 0))) ^ length, _MIX_A0, _MIX_B1)
    hash_a = tl.where(hash_a == 0, 1, hash_a).to(tl.int64, bitcast=True)  # a state of zeros means: never seen
    hash_b = hash_b.to(tl.int64, bitcast=True)
    same = (tl.load(previous) == hash_a) & (tl.load(previous + 1) == hash_b)
    tl.store(state, hash_a)
    tl.store(state + 1, hash_b)
    tl.store(changed, tl.where(same, 0, 1))


_ARRAYS = ["table", "parts", "arrived", "previous", "state", "changed"]


@triton.jit(do_not_specialize=["n_tensors"], do_not_specialize_on_alignment=_ARRAYS)
def _hash_parts(table, parts, arrived, previous, state, changed, n_tensors):
    """The sums over one part of one tensor: PART words, or what is left of them. Whoever comes last to a tensor has
    all its sums before it, and judges."""
    part = tl.program_id(0)
    # The tensor is the last one that begins at or before this part.
    low, high = part * 0, n_tensors
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table + middle * 4 + 2) <= part:
            low = middle
        else:
            high = middle
    row = table + low * 4
    words = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.uint64)), 16)
    n_words = tl.load(row + 1) * 2
    first_part = tl.load(row + 2)
    first = (part - first_part) * _PART
    end = tl.minimum(first + _PART, n_words)
    lane = tl.arange(0, _LANES)
    key = lane.to(tl.uint64) * _STEP
    sum_a = tl.zeros([_LANES], dtype=tl.uint64)
    sum_b = tl.zeros([_LANES], dtype=tl.uint64)
    for begin in tl.range(first, end, _TIMES * _LANES, num_stages=1):
        got = ()
        for number in tl.static_range(_TIMES):
            # Words that are not there are 0 and are hashed as well; the length, hashed too, tells them from real ones.
            at = begin + number * _LANES + lane
            got = got + (tl.load(words + at, mask=at < end, other=0),)
        for number in tl.static_range(_TIMES):
            behind = (tl.zeros([1], dtype=tl.int64) + begin + number * _LANES).to(tl.uint64) * _STEP
            a, b = _mix_both(got[number], key + behind)
            sum_a += a
            sum_b += b
    tl.store(parts + part * 2, tl.sum(sum_a))
    tl.store(parts + part * 2 + 1, tl.sum(sum_b))
    # The sums are there for whoever sees the count. What is added up is integers: who comes last shows in no result.
    tl.debug_barrier()
    n_parts = (tl.load(row + 6) - first_part).to(tl.int32)
    before = tl.atomic_add(arrived + low, 1, sem="acq_rel")
    # The count goes back by as many as came, so that it fits again even after calls that nobody had ordered.
    if before % n_parts == n_parts - 1:
        tl.atomic_add(arrived + low, -n_parts, sem="relaxed")
        _judge(row, parts, previous + low * 2, state + low * 2, changed + low)


class Table(NamedTuple):
    """Where a list of tensors lies, for the kernels. It holds addresses and keeps nothing alive."""

    places: tuple  # (address, bytes) of each, by which a table is known to be current
    rows: Any  # [n+1, 4] int64: first aligned address, pairs of words, first part, bytes before (4 bits) and after
    n_parts: int


def _places(tensors) -> tuple:
    places = []
    for number, tensor in enumerate(tensors):
        if tensor.dtype not in _ITEM_SIZE:
            raise TypeError(f"tensors[{number}]: got dtype {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"tensors[{number}]: need contiguous memory")
        size = _ITEM_SIZE[tensor.dtype]
        for extent in tensor.shape:
            size *= int(extent)
        if size == 0:
            raise ValueError(f"tensors[{number}]: need at least one element")
        places.append((address(tensor), size))
    return tuple(places)


def _make_table(places: tuple, device) -> Table:
    rows, n_parts = [], 0
    for start, size in places:
        head = min(-start % 16, size)
        pairs, tail = divmod(size - head, 16)
        rows.append([start + head, pairs, n_parts, head | tail << 4])
        n_parts += max(1, -(-2 * pairs // _PART_WORDS))
    rows.append([0, 0, n_parts, 0])
    return Table(places, torch.tensor(rows, dtype=torch.int64, device=device), n_parts)


class Fingerprint(NamedTuple):
    changed: Any  # [n] int32, on the device: 1 where the bytes differ from those of ``previous``
    state: Any  # [n, 2] int64, on the device: to be handed to the next call
    table: Table  # likewise; made anew whenever a tensor has moved
    again: Any = None  # triton_launch.Again, for a call with memory about tensors that lie where they lay


class Memory(NamedTuple):
    """What calls that follow one another about the same tensors write each time. A captured CUDA graph needs it, to
    compare with the replay before it and not with the moment of its capture."""

    state: Any  # as in Fingerprint; zeros: nothing has been seen yet
    changed: Any
    parts: Any  # [.., 2] int64: sums over parts, room for as many as the tensors can have wherever they lie
    arrived: Any  # [n] int32: how many parts of each are there, 0 between calls


def make_memory(tensors) -> Memory:
    places, device = _places(tensors), beside(tensors[0])
    most = sum([max(1, -(-(size // 8) // _PART_WORDS)) for _, size in places])
    return Memory(
        torch.zeros([len(places), 2], dtype=torch.int64, device=device),
        torch.empty([len(places)], dtype=torch.int32, device=device),
        torch.empty([most, 2], dtype=torch.int64, device=device),
        torch.zeros([len(places)], dtype=torch.int32, device=device),
    )


def fingerprint(
    tensors, previous=None, table: Table | None = None, memory: Memory | None = None, in_place: bool = False,
    repeatable: bool = False,
) -> Fingerprint:  # fmt: skip
    """Hash each of the contiguous ``tensors`` (all on one device) and compare with ``previous``, an earlier call's
    ``state``; without one, or with zeros, all have changed. ``table`` of the earlier call saves the one copy to the
    device, as long as the tensors lie where they lay; ``in_place``: the caller knows that they do. With ``memory`` its
    state is the previous one and takes the new one, and the next call writes what this one gave. ``repeatable``: for
    who wants ``again``."""
    if not in_place:
        places = _places(tensors)
        if table is None or table.places != places:
            table = _make_table(places, beside(tensors[0]))
    if memory is None:
        memory = make_memory(tensors)
        previous = torch.zeros_like(memory.state) if previous is None else previous
    state, changed, parts, arrived = memory
    previous = state if previous is None else previous
    operands = (table.rows, parts, arrived, previous, state, changed, len(table.places))
    if repeatable:
        again = launch_repeatable(_hash_parts, table.n_parts, operands, {}, num_warps=4)
        return Fingerprint(changed, state, table, again)
    launch(_hash_parts, table.n_parts, operands, {}, num_warps=4)
    return Fingerprint(changed, state, table)
