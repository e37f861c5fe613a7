"""The stages on Hopper in FP8, recipe ``sm90``: six grouped GEMMs of csrc/sm90_fp8_gemm.h that read and write e4m3 with
its scales, so that between them nothing is quantized by a pass of its own.

``naive`` is the definition. Legend in ``api.py``. dz exists twice, each copy quantized along the dimension that its
GEMM sums over; the operands of wgrad lie with the tokens contiguous, scales by block of tokens first. Without FP8 wgrad
its operands are of 16 bits, and ``sm90_bf16`` multiplies them.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from .. import checks, jit
from ..launch import address, arch, beside, current_stream, device_index, multiprocessors
from ..quant import api as quant
from ..quant import naive
from ..quant.formats import FP8_ROW_BLOCK, QuantTensor
from ..quant.joined import TokenMajor, room_for_rows, room_for_token_major
from . import sm90_bf16
from .frozen import deliver
from .plan import Plan
from .sm90_bf16 import aligned, score_gradient, sum_slots  # noqa: F401  the last two are the same stages

_NAME = "sm90_fp8_gemm"
_PARTS = ("tiles", "mainloop", "epilogues", "backward", "kernel", "maps", "tokens")
_HEADERS = (f"{_NAME}.h", "sm90_primitives.cuh", *(f"sm90_fp8_{part}.cuh" for part in _PARTS))

# A tile of z is read by the thread block that writes the same tile of dz, so dz takes z's place in memory.
OVERWRITES_Z = True
DX_FIRST = True  # dz for dx goes with it, before wgrad takes memory
# Tensors of M rows can be made some columns at a time, in a room of its own for each kind. The other operand is read
# again for each piece: so no room is smaller than this, and there are no more pieces than that.
_LEAST_ROOM, _MOST_PIECES = 100e6, 4
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, checks.FP8_DTYPE: 1}
_ROWS_UNIT, _WGRAD_UNIT = 2 * 192, 2 * 128  # columns that two neighbouring thread blocks make at once


def extension(target: str) -> jit.Extension:
    return jit.Extension(_NAME, (f"{_NAME}.cpp", f"{_NAME}.cu"), _HEADERS, target)


@cache
def _module(target: str, cache_dir):
    return jit.load(extension(target), cache_dir)


def build_ahead(plan, arch: str) -> None:
    jit.build_ahead(extension(arch), plan.cache_dir)
    if not plan.fp8_wgrad:
        sm90_bf16.build_wgrads_ahead(plan)


@dataclass(eq=False)
class Gradient:
    """dz, for dx and for dW1: the second copy is [M,F] of the storage type where wgrad is not FP8."""

    rows: QuantTensor | None  # None once dx has been made
    wgrad: Any


def _storage(rows: int, columns: int, like, plan: Plan):
    return torch.empty(rows, columns, dtype=getattr(torch, plan.storage), device=beside(like))


_settled: dict[tuple, tuple] = {}  # by plan and device: (what makes launches, the part of its arguments that stays)


def _gemms(routing, plan: Plan):
    """The launches of one plan over one routing, with all that these have in common."""
    found = routing.kept.get(id(plan))
    if found is None:
        like = routing.expert_offset
        key = plan, device_index(like)
        if key not in _settled:
            clamp = float("inf") if plan.clamp is None else plan.clamp
            stays = multiprocessors(like, plan.multiprocessors), clamp, plan.recipe.pow2, plan.storage == "float16"
            _settled[key] = _module(arch(like), plan.cache_dir).Gemms, stays
        make, stays = _settled[key]
        where = address(like), address(routing.x_gather_idx), address(routing.s_scatter_idx), address(routing.scores)
        gemms = make(*where, routing.n_rows, routing.n_slots, routing.n_experts, *stays)
        # By its id, which costs no call of its own; with the plan, so that no other one comes to have that id.
        found = routing.kept[id(plan)] = gemms, plan
    return found[0]


def prepare_rows(x, plan):
    if isinstance(x, QuantTensor):
        if x.matches(plan.recipe):
            return QuantTensor(x.data.contiguous(), x.scale.contiguous(), x.block)
        x = naive.dequantize(x)
    return quant.quantize_rows(x.contiguous(), plan.recipe)


def up_projection(x_rows, weights, routing, plan, need_a, out=None):
    width, inner, like = plan.width(weights.intermediate_size), weights.intermediate_size, routing.expert_offset
    z = room_for_rows(routing.n_rows, width, like)
    a = room_for_rows(routing.n_rows, inner, like) if need_a else None
    if routing.n_rows:
        operands = *x_rows.places(), *weights.fp8.w1.places(), width, weights.hidden_size
        found = *z.places(), *(a.places() if need_a else (0, 0))
        _gemms(routing, plan).up(*operands, *found, current_stream(like))
    return z, a


def _rows(rows: QuantTensor, weight: QuantTensor, width: int, routing, plan, out=None, first: int = 0):
    """[M,width]: ``rows`` by ``width`` of each expert's rows of ``weight`` [E,N,K], from ``first`` on."""
    like = routing.expert_offset
    y = _storage(routing.n_rows, width, like, plan) if out is None else out
    if routing.n_rows:
        _, b_rows, depth = weight.data.shape
        operands = *rows.places(), *weight.places(), width, depth, first, b_rows
        _gemms(routing, plan).rows(*operands, address(y), current_stream(like))
    return y


def down_projection(a, weights, routing, plan, out=None):
    return _rows(a, weights.fp8.w2, weights.hidden_size, routing, plan, out)


def up_projection_backward(dz, weights, routing, plan, out=None):
    return _rows(dz.rows, weights.fp8.w1_t, weights.hidden_size, routing, plan, out)


def _summed_rows(rows: QuantTensor, weight: QuantTensor, room: int, routing, plan, scores=None):
    """[T,H]. By slot it would be the largest tensor of all, and sums over slots know no columns: so it is made some
    columns at a time, in the same memory. The numbers do not depend on how many."""
    width = weight.data.shape[1]
    step = min(width, _columns_at_once(routing.n_rows, width, 2, _ROWS_UNIT, room))
    out = _storage(routing.n_tokens, width, routing.expert_offset, plan)
    memory = _storage(routing.n_rows, step, routing.expert_offset, plan)
    for first in range(0, width, step):
        columns, y = min(step, width - first), memory
        if columns != step:  # the last ones, in fewer rows' room
            y = memory.reshape([-1])[: routing.n_rows * columns].reshape([routing.n_rows, columns])
        _rows(rows, weight, columns, routing, plan, y, first)
        sm90_bf16.combine().sum_slots(y, routing, out.dtype, scores, out, first)
    return out


def _columns_at_once(n_rows: int, width: int, item: int, unit: int, room: int) -> int:
    """An even share of the columns, ``item`` bytes a number, in whole units of the GEMM, for about ``room`` bytes."""
    pieces = min(_MOST_PIECES, math.ceil(item * n_rows * width / max(room, _LEAST_ROOM)))
    return -(-width // (max(pieces, 1) * unit)) * unit


def summed_down_projection(take_a, weights, routing, plan):
    # What the weights take in FP8, in both orientations: with many experts the rows are little beside these. More than
    # in backward, which holds dz by token as well.
    room = 6 * routing.n_experts * weights.hidden_size * weights.intermediate_size
    return _summed_rows(take_a(), weights.fp8.w2, room, routing, plan, routing.scores)


def summed_up_projection_backward(dz, weights, routing, plan):
    # What the weights take in one orientation, less a sixth: at 8192 tokens and 32 experts of 3072 x 1536 there are two
    # pieces, and a step takes less memory than in 16 bits.
    room = 5 * routing.n_experts * weights.hidden_size * weights.intermediate_size // 2
    return _summed_rows(dz.rows, weights.fp8.w1_t, room, routing, plan)


def after_dx(dz):
    return Gradient(None, dz.wgrad)


def down_projection_backward(dout_rows, z, weights, routing, plan, need_wgrad, out=None):
    """dz by row takes z's place, if no other is given. What wgrad reads is a by-product, needed or not."""
    rows = z if out is None else out[0]
    width, like, n_rows = weights.intermediate_size, routing.expert_offset, routing.n_rows
    parts = torch.empty(n_rows, width // 64, dtype=torch.float32, device=beside(like))
    if plan.fp8_wgrad:
        dz, pa = room_for_token_major(2 * width, n_rows, like), room_for_token_major(width, n_rows, like)
        by_products = *dz.places(), *pa.places()
    else:
        dz, pa = (_storage(n_rows, columns, like, plan) for columns in (2 * width, width))
        by_products = address(dz), 0, address(pa), 0
    if n_rows:
        operands = *dout_rows.places(), *weights.fp8.w2_t.places(), width, weights.hidden_size
        found = *z.places(), *rows.places(), *by_products, address(parts)
        _gemms(routing, plan).down_backward(*operands, *found, current_stream(like))
    return Gradient(rows, dz), pa if need_wgrad else None, parts


def _wgrad(left: TokenMajor, right: TokenMajor, target, routing, plan, overwrite: bool, at=(0, 0)) -> None:
    """target[e] [P,Q] = (+=) left @ right^T over segment e, in that part of ``target``'s that begins ``at`` a row and
    column."""
    if not routing.n_rows:
        if overwrite:
            target.zero_()
        return
    kind = checks.dtype_name(target)
    if kind != "float32" and not overwrite:
        raise TypeError(f"weight gradient: got a {kind} tensor to add to, need float32")
    checks.require_aligned("weight gradient", target)
    operands = *left.places(), *right.places(), left.shape[0], right.shape[0]
    _, rows, columns = target.shape
    place = address(target) + (at[0] * columns + at[1]) * _ITEM_BYTES[kind], rows, columns, kind
    _gemms(routing, plan).wgrad(*operands, *place, not overwrite, current_stream(target))


def accumulate_dw1(dz, x, routing, plan, buffers):
    if not plan.fp8_wgrad:
        if any(buffers.experts1):
            sm90_bf16.accumulate_dw1(dz.wgrad, x, _pads_among_their_own(routing), plan, buffers)
        return

    def run(target):
        # At once where z has just made room for it and nothing new is to be made. No name for a piece of x, which would
        # keep it until the next one is there.
        _, width, hidden = checks.shape_of(target)
        room = routing.n_experts * hidden * width * 3 // 2 if buffers.overwrite else None
        for columns in _spans(routing.n_rows, hidden, room):
            at = 0, columns[0]
            _wgrad(dz.wgrad, token_major(x, routing, plan, columns), target, routing, plan, buffers.overwrite, at)

    deliver(run, buffers.dw1_EFH, buffers.experts1, buffers.overwrite)


def _spans(n_rows: int, width: int, room: int | None) -> list[tuple[int, int]]:
    """(first, end) of the columns of which an operand by token is made at a time, in about ``room`` bytes."""
    step = width if room is None else _columns_at_once(n_rows, width, 1, _WGRAD_UNIT, room)
    return [(first, min(width, first + step)) for first in range(0, width, step)]


def accumulate_dw2(pa, dout, routing, plan, buffers):
    if not plan.fp8_wgrad:
        if any(buffers.experts2):
            sm90_bf16.accumulate_dw2(pa, dout, _pads_among_their_own(routing), plan, buffers)
        return

    def run(target):
        # In the room that dW1's operands had, if that comes first, less what a new gradient takes.
        grouped, to = buffers.w2_grouped, (target, routing, plan, buffers.overwrite)
        n_experts, *sizes = checks.shape_of(target)
        hidden, intermediate = reversed(sizes) if grouped else sizes
        room = None
        if buffers.overwrite:
            taken = n_experts * hidden * intermediate * _ITEM_BYTES[checks.dtype_name(target)]
            room = routing.n_rows * (hidden + 2 * intermediate) - taken
        for columns in _spans(routing.n_rows, hidden, room):
            if grouped:
                _wgrad(pa, token_major(dout, routing, plan, columns), *to, (0, columns[0]))
            else:
                _wgrad(token_major(dout, routing, plan, columns), pa, *to, (columns[0], 0))

    deliver(run, buffers.dw2, buffers.experts2, buffers.overwrite)


def token_major(rows, routing, plan, columns=None) -> TokenMajor:
    """Tokens gathered into sorted order and quantized along it, from the values that forward was given: rows [T,C],
    plain or quantized, or the ``columns`` (first, end), multiples of 128, of these."""
    rows, row_scale = _token_rows(rows, plan)
    n_tokens, apart = rows.shape
    first, end = columns or (0, apart)
    n_rows = routing.n_rows
    if n_tokens != routing.n_tokens:
        raise ValueError(f"rows: got {n_tokens} of them, need {routing.n_tokens}, as many as the routing has tokens")
    if (n_rows | first | end) % FP8_ROW_BLOCK:
        given = f"{n_rows} in sorted order and columns {first} to {end}"
        raise ValueError(f"rows: got {given}, need multiples of {FP8_ROW_BLOCK}")
    made = room_for_token_major(end - first, n_rows, rows)
    if n_rows and end > first:
        scale = 0 if row_scale is None else address(row_scale) + first // FP8_ROW_BLOCK * 4
        kind = checks.dtype_name(rows)
        where = address(rows) + first * _ITEM_BYTES[kind], scale, kind, apart
        _gemms(routing, plan).tokens(*where, *made.places(), end - first, current_stream(rows))
    return made


def _token_rows(rows, plan):
    """(numbers or codes, the scales of codes or None), as ``token_major`` can read them."""
    if not isinstance(rows, QuantTensor):
        return aligned(rows.contiguous()), None
    if rows.matches(plan.recipe):
        return aligned(rows.data.contiguous()), rows.scale.contiguous()
    return naive.dequantize(rows), None


def _pads_among_their_own(routing):
    """Pad rows read token 0, whose NaN would reach experts that it was not sent to: the products of pads are not left
    out, they are multiplied by 0. The first row of every block of 128 is a real one, so let its pads read that."""
    if routing.n_pad_rows == 0:
        return routing
    return replace(routing, x_gather_idx=sm90_bf16.combine().gather_without_pads(routing))
