"""FP8 quantizers of recipe ``sm90`` in Triton: e4m3 with float32 scales, one read of the input and no wait.

``naive.py`` is the definition, bit for bit. What is left to the hardware: its cast to e4m3 rounds to nearest even,
saturates and turns every NaN into 0x7F, and its ``maximum`` prefers a number to a NaN. Triton's interpreter does
otherwise; tests/support/quantizers.py sets it right.

Compiled once for each type of the input and each static width: how many tokens and rows there are is read at run time
and is no part of a kernel's key.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from .. import checks
from ..launch import beside
from ..triton_launch import launch, launch_repeatable
from .formats import E4M3_MAX
from .joined import JoinedRows, room_for_rows

_GROUP = 128  # numbers that share a scale, along each dimension that a scale covers
_WEIGHT_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200: as many as there is room for
_ROWS_BYTES = 8192  # that a program of _quantize_rows reads: four times 16 for each of 128 threads

_G = tl.constexpr(_GROUP)
_FOURS = tl.constexpr(_GROUP // 4)  # of rows, in a block
_LARGEST = tl.constexpr(E4M3_MAX)
_SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def _wide(x):
    """As float32. Of bf16 said in integers: one instruction a number where the cast makes two of every second one."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _numbers(x):
    """With infinities made NaN: then ``maximum`` passes over whatever is not finite, and the cast to e4m3 keeps it. One
    instruction a number where a comparison and a choice would be two for the one purpose and two for the other."""
    return tl.fma(x, 0.0, x)


@triton.jit
def _scale_of(amax, POW2: tl.constexpr):
    """The scale of a block whose largest magnitude is ``amax``: NaN if no number in it is finite."""
    scale = tl.maximum(tl.div_rn(amax, _LARGEST), _SMALLEST_SCALE)
    if POW2:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _pair(low, high):
    """The codes of two numbers in 16 bits. Joined before the cast, which makes two codes at a time."""
    low, high = tl.split(tl.join(low, high).to(tl.float8e4nv).to(tl.uint8, bitcast=True))
    return low.to(tl.uint32) | (high.to(tl.uint32) << 8)


@triton.jit
def _words(values, inverse):
    """The codes of four consecutive rows in one word: what is transposed through shared memory are words, and one of
    them is a fourth of the work of four bytes."""
    low = _pair(values[0] * inverse, values[1] * inverse)
    return low | (_pair(values[2] * inverse, values[3] * inverse) << 16)


@triton.jit
def _magnitude(values):
    """The largest of four rows, for each column."""
    first = tl.maximum(tl.abs(values[0]), tl.abs(values[1]))
    return tl.maximum(first, tl.maximum(tl.abs(values[2]), tl.abs(values[3])))


@triton.jit(do_not_specialize=["n_groups"])
def _quantize_rows(x, joined, n_groups, POW2: tl.constexpr, GROUPS: tl.constexpr):
    """GROUPS groups of 128 consecutive numbers; rows are whole groups, so no width is known here. ``joined`` takes all
    codes, and behind them all scales."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    exists = group < n_groups
    at = group[:, None] * _G + tl.arange(0, _G)[None, :]
    value = _numbers(_wide(tl.load(x + at, mask=exists[:, None], other=0.0)))
    scale_of = _scale_of(tl.max(tl.abs(value), axis=1), POW2)
    scale = (joined + n_groups.to(tl.int64) * _G).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scale + group, scale_of, mask=exists)
    codes = (value * tl.div_rn(1.0, scale_of)[:, None]).to(tl.float8e4nv)
    tl.store(joined + at, codes, mask=exists[:, None])


def quantize_rows(x_TC, pow2: bool = False) -> JoinedRows:
    """data [T,C] e4m3 and scale [T,C/128] float32 of bf16, fp16 or fp32 rows."""
    sizes = x_TC.shape
    if len(sizes) != 2 or sizes[1] % _GROUP:
        _check("x", x_TC, 2, "[T, C]")
    groups, constants = _groups_of_rows(x_TC.dtype, pow2)
    n_rows, width = sizes
    rows = room_for_rows(n_rows, width, x_TC)
    n_groups = n_rows * (width // _GROUP)
    if n_groups:
        operands = (x_TC.contiguous(), rows.memory, n_groups)
        launch(_quantize_rows, -(-n_groups // groups), operands, constants, num_warps=4)
    return rows


@cache
def _groups_of_rows(dtype, pow2: bool):
    """(groups that a program takes, the kernel's constants)."""
    checks.require_dtype("x", checks.Facts(None, dtype, None, True), checks.FLOAT_DTYPES)
    groups = _ROWS_BYTES // (_GROUP * (4 if dtype == torch.float32 else 2))
    return groups, {"POW2": pow2, "GROUPS": groups}


@triton.jit(do_not_specialize=["n_groups"])
def _dequantize_rows(data, scale, rows, n_groups, GROUPS: tl.constexpr):
    """The way back: the product of a code and its scale as float32, as in the definition, and then rounded."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    exists = group < n_groups
    at = group[:, None] * _G + tl.arange(0, _G)[None, :]
    value = tl.load(data + at, mask=exists[:, None], other=0.0).to(tl.float32)
    value *= tl.load(scale + group, mask=exists, other=0.0)[:, None]
    tl.store(rows + at, value.to(rows.dtype.element_ty), mask=exists[:, None])


def dequantize_rows(data, scale, dtype):
    """Rows [T,C] of ``dtype`` from ``quantize_rows``' pair."""
    _check("data", data, 2, "[T, C]", (checks.FP8_DTYPE,))
    n_rows, width = checks.shape_of(data)
    checks.require_dtype("scale", scale, ("float32",))
    checks.require_shape("scale", scale, (n_rows, width // _GROUP), "one for each 128 columns")
    rows = torch.empty([n_rows, width], dtype=dtype, device=beside(data))
    n_groups = n_rows * (width // _GROUP)
    if n_groups:
        groups = _ROWS_BYTES // (_GROUP * 2)
        operands = (data.contiguous(), scale.contiguous(), rows, n_groups)
        launch(_dequantize_rows, -(-n_groups // groups), operands, {"GROUPS": groups}, num_warps=4)
    return rows


@triton.jit
def _weight_block(
    w, data, scale, data_t, scale_t, changed, number,
    R: tl.constexpr, C: tl.constexpr, HELD: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """One block of 128 x 128, whose bytes go to both orientations. Nothing is done where ``changed``, a flag for each
    HELD experts, is 0."""
    columns: tl.constexpr = C // _G
    rows: tl.constexpr = R // _G
    block_column = number % columns
    block_row = number // columns % rows
    expert = (number // (columns * rows)).to(tl.int64)
    wanted = True
    if changed is not None:
        wanted = tl.load(changed + expert // HELD) != 0
    if wanted:
        column = block_column * _G + tl.arange(0, _G)
        four = tl.arange(0, _FOURS)
        corner = (expert * R + block_row * _G) * C
        values = ()
        for part in tl.static_range(4):
            at = corner + (four * 4 + part)[:, None] * C + column[None, :]
            values = values + (_numbers(_wide(tl.load(w + at))),)
        scale_of = _scale_of(tl.max(_magnitude(values)), POW2)
        tl.store(scale + number, scale_of)
        tl.store(scale_t + (expert * columns + block_column) * rows + block_row, scale_of)
        inverse = tl.div_rn(1.0, scale_of)
        for part in tl.static_range(4):
            at = corner + (four * 4 + part)[:, None] * C + column[None, :]
            tl.store(data + at, (values[part] * inverse).to(tl.float8e4nv))
        at = (expert * C + column[:, None]) * (R // 4) + block_row * _FOURS + four[None, :]
        words = data_t.to(tl.pointer_type(tl.uint32), bitcast=True)
        tl.store(words + at, tl.trans(_words(values, inverse)))


@triton.jit(do_not_specialize=["n_first", "n_blocks"], do_not_specialize_on_alignment=["changed"])
def _quantize_weights(
    w1, data1, scale1, data1_t, scale1_t, w2, data2, scale2, data2_t, scale2_t, changed, n_first, n_blocks,
    R1: tl.constexpr, C1: tl.constexpr, R2: tl.constexpr, C2: tl.constexpr, FLAGS: tl.constexpr,
    HELD: tl.constexpr, POW2: tl.constexpr,
):  # fmt: skip
    """``n_first`` blocks of the first weight, then those of the second, if there is one, whose flags begin at FLAGS. A
    few programs do all of them, so that it costs little where nothing has changed."""
    number, end = tl.program_id(0), n_blocks
    if changed is not None and FLAGS == 1:
        # Without a look at each block: 128 experts have so many that nothing but looking took 50 us.
        if w2 is None:
            end = tl.where(tl.load(changed) != 0, n_blocks, 0)
        else:
            number += tl.where(tl.load(changed) != 0, 0, n_first)
            end = tl.where(tl.load(changed + 1) != 0, n_blocks, n_first)
    while number < end:
        if w2 is None:
            _weight_block(w1, data1, scale1, data1_t, scale1_t, changed, number, R1, C1, HELD, POW2)
        elif number < n_first:
            _weight_block(w1, data1, scale1, data1_t, scale1_t, changed, number, R1, C1, HELD, POW2)
        else:
            flags = None if changed is None else changed + FLAGS
            _weight_block(w2, data2, scale2, data2_t, scale2_t, flags, number - n_first, R2, C2, HELD, POW2)
        number += tl.num_programs(0)


def _room_for_weight(w_ERC):
    n_experts, n_rows, n_columns = checks.shape_of(w_ERC)
    rows, columns = n_rows // _GROUP, n_columns // _GROUP

    def room(dtype, *size):
        return torch.empty([n_experts, *size], dtype=dtype, device=beside(w_ERC))

    plain = room(torch.float8_e4m3fn, n_rows, n_columns), room(torch.float32, rows, columns)
    return (*plain, room(torch.float8_e4m3fn, n_columns, n_rows), room(torch.float32, columns, rows))


def quantize_weights(weights, pow2: bool = False, into=None, changed=None):
    """(data [E,R,C] e4m3, scale [E,R/128,C/128] float32, data_t [E,C,R], scale_t [E,C/128,R/128]) of one or two bf16,
    fp16 or fp32 weights [E,R,C], from one read and in one launch.

    ``into`` is what an earlier call gave, to be written again; with ``changed``, int32 on the device, as many for each
    weight, one for all experts or for each share of them, only where that is not 0.
    """
    return _launch_for_weights(launch, weights, pow2, into, changed)[0]


def quantize_weights_repeatable(weights, pow2: bool, into=None, changed=None):
    """(what ``quantize_weights`` gives, what writes it again while contiguous weights lie where they lie:
    ``triton_launch.Again``, or None)."""
    return _launch_for_weights(launch_repeatable, weights, pow2, into, changed)


def _launch_for_weights(start, weights, pow2: bool, into, changed):
    """(what was written, what ``start`` gave)."""
    started = None
    if into is None:
        for weight in weights:
            _check("w", weight, 3, "[E, R, C]")
        into = tuple([_room_for_weight(weight) for weight in weights])
    n_flags = None if changed is None else int(changed.shape[0])
    n_first, n_blocks, constants = _blocks_of_weights(tuple([checks.shape_of(w) for w in weights]), n_flags, pow2)
    if n_blocks:
        operands = []
        for weight, made in zip(weights, into, strict=True):
            operands += (weight.contiguous(), *made)
        operands += [None] * (10 - len(operands)) + [changed, n_first, n_blocks]
        n_programs = min(_WEIGHT_PROGRAMS, n_blocks)
        started = start(_quantize_weights, n_programs, tuple(operands), constants, num_warps=8)
    return into, started


@cache
def _blocks_of_weights(sizes: tuple, n_flags: int | None, pow2: bool):
    """(blocks of the first weight, of all, the kernel's constants)."""
    n_experts, *first = sizes[0]
    others, *last = sizes[-1]
    if others != n_experts:
        raise ValueError(f"w: got {others} experts in the second weight, need {n_experts} as in the first")
    blocks = [n_experts * (rows // _GROUP) * (columns // _GROUP) for _, rows, columns in sizes]
    flags = 1 if n_flags is None else n_flags // len(sizes)
    constants = {"R1": first[0], "C1": first[1], "R2": last[0], "C2": last[1]}
    return blocks[0], sum(blocks), constants | {"FLAGS": flags, "HELD": n_experts // flags, "POW2": pow2}


def _check(name: str, tensor, rank: int, layout: str, dtypes=checks.FLOAT_DTYPES) -> None:
    checks.require_rank(name, tensor, rank, layout)
    checks.require_dtype(name, tensor, dtypes)
    if any(size % _GROUP for size in checks.shape_of(tensor)[1:]):
        given = list(checks.shape_of(tensor))
        raise ValueError(f"{name}: got shape {given}, need multiples of {_GROUP} after the first dimension")
