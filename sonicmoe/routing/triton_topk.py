"""Top-k of the router's logits with a softmax over the k that were chosen, in Triton: one launch each way.

What it chooses: the k largest logits of a row in falling order, compared exactly, of equal ones the lower expert
first. -0 equals 0. A NaN counts as larger than anything, as in torch.topk, and makes all scores of its row NaN; so does
+inf as soon as it is chosen. Ids are always k different ones of 0..E-1, whatever the logits are.

Compiled once for each (E, k, type of the logits); the number of tokens is no part of a kernel's key.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..launch import beside
from ..triton_launch import launch, next_power_of_2

MAX_EXPERTS = 1024
MAX_TOPK = 32
_THREADS = 64
# Below the key of any number: what has been chosen already.
_GONE = tl.constexpr(-(2**31))


@triton.jit
def _ordered(bits, WIDTH: tl.constexpr):
    """Bits of a float as an int32 that orders like the number; all NaN become the greatest, -0 becomes 0."""
    LARGEST: tl.constexpr = 2 ** (WIDTH - 1) - 1
    order = bits ^ ((bits >> (WIDTH - 1)) & LARGEST)
    return tl.where(order == -1, 0, order)


@triton.jit
def _unordered(order, WIDTH: tl.constexpr):
    return order ^ ((order >> (WIDTH - 1)) & (2 ** (WIDTH - 1) - 1))


@triton.jit(do_not_specialize=["n_tokens"])
def _topk_softmax(
    logits, scores, indices, n_tokens,
    E: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, K: tl.constexpr, K_LANES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens. A row is TILES tensors of TILE columns, so that few lanes share a row and most of the work is done
    without a word between lanes. Keys of 16-bit logits hold the expert as well and are all different; for 32-bit
    logits the lowest expert among the equal ones is looked for in a second step."""
    WIDTH: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth
    PACKED: tl.constexpr = WIDTH == 16
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keys = ()
    for tile in tl.static_range(TILES):
        expert = tile * TILE + tl.arange(0, TILE)[None, :]
        mask = (row[:, None] < n_tokens) & (expert < E)
        # Absent columns are -inf: after all others, because of equal ones the lower id comes first.
        value = tl.load(logits + row[:, None] * E + expert, mask=mask, other=float("-inf"))
        if PACKED:
            order = _ordered(value.to(tl.int16, bitcast=True).to(tl.int32), 16)
            order = tl.where(value == value, order, 0x7FFF)
            key = (order << 16) | (0xFFFF - expert)
        else:
            order = _ordered(value.to(tl.int32, bitcast=True), 32)
            key = tl.where(value == value, order, 0x7FFFFFFF)
        keys = keys + (key,)

    place = tl.arange(0, K_LANES)[None, :]
    chosen = tl.full([ROWS, K_LANES], _GONE, dtype=tl.int32)
    expert_of = tl.zeros([ROWS, K_LANES], dtype=tl.int32)
    for number in range(K):  # a real loop: unrolled, 32 places of 1024 experts compile for a minute
        largest = keys[0]
        for tile in tl.static_range(1, TILES):
            largest = tl.maximum(largest, keys[tile])
        best = tl.max(largest, axis=1, keep_dims=True)
        chosen = tl.where(place == number, best, chosen)
        rest = ()
        if PACKED:
            for tile in tl.static_range(TILES):
                rest = rest + (tl.where(keys[tile] == best, _GONE, keys[tile]),)
        else:
            lowest = tl.full([ROWS, TILE], TILE * TILES, dtype=tl.int32)
            for tile in tl.static_range(TILES):
                expert = tile * TILE + tl.arange(0, TILE)[None, :]
                lowest = tl.minimum(lowest, tl.where(keys[tile] == best, expert, TILE * TILES))
            winner = tl.min(lowest, axis=1, keep_dims=True)
            expert_of = tl.where(place == number, winner, expert_of)
            for tile in tl.static_range(TILES):
                expert = tile * TILE + tl.arange(0, TILE)[None, :]
                rest = rest + (tl.where(expert == winner, _GONE, keys[tile]),)
        keys = rest

    if PACKED:
        expert_of = 0xFFFF - (chosen & 0xFFFF)
        bits = _unordered(chosen >> 16, 16).to(tl.int16)
        value = bits.to(logits.dtype.element_ty, bitcast=True).to(tl.float32)
    else:
        value = _unordered(chosen, 32).to(tl.float32, bitcast=True)
    value = tl.where(place < K, value, float("-inf"))
    power = tl.exp(value - tl.max(value, axis=1, keep_dims=True))
    score = power * (1.0 / tl.sum(power, axis=1, keep_dims=True))
    mask = (row[:, None] < n_tokens) & (place < K)
    tl.store(scores + row[:, None] * K + place, score, mask=mask)
    tl.store(indices + row[:, None] * K + place, expert_of, mask=mask)


@triton.jit(do_not_specialize=["n_tokens"], do_not_specialize_on_alignment=["dscores", "scores", "indices"])
def _topk_softmax_backward(
    dscores, scores, indices, dlogits, n_tokens,
    E: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each element of dlogits is written once: the gradient of the place that chose it, or 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < n_tokens
    chosen, score_of, gradient_of = (), (), ()
    dot = tl.zeros([ROWS, 1], dtype=tl.float32)
    for number in tl.static_range(K):
        at = row * K + number
        score = tl.load(scores + at, mask=exists, other=0.0)
        dscore = tl.load(dscores + at, mask=exists, other=0.0)
        dot += score * dscore
        chosen = chosen + (tl.load(indices + at, mask=exists, other=-1),)
        score_of = score_of + (score,)
        gradient_of = gradient_of + (dscore,)
    for tile in tl.static_range(TILES):
        expert = tile * TILE + tl.arange(0, TILE)[None, :]
        dlogit = tl.zeros([ROWS, TILE], dtype=tl.float32)
        for number in tl.static_range(K):
            dlogit = tl.where(expert == chosen[number], score_of[number] * (gradient_of[number] - dot), dlogit)
        tl.store(dlogits + row * E + expert, dlogit.to(dlogits.dtype.element_ty), mask=exists & (expert < E))


@cache
def _shape(n_experts: int, wide: bool) -> tuple[int, int, int]:
    """(TILE, TILES, ROWS): at most eight tiles, and rows for all threads at 16 bytes each."""
    whole = next_power_of_2(n_experts)
    tile = min(whole, max(32, whole // 8))
    lanes = max(1, tile // (4 if wide else 8))
    return tile, -(-n_experts // tile), max(1, _THREADS // lanes)


def topk_softmax_forward(logits_TE, k: int):
    """(scores [T,k] float32, indices [T,k] int32) of logits of any float type; float64 is rounded to float32 first."""
    n_tokens, n_experts = int(logits_TE.shape[0]), int(logits_TE.shape[1])
    if not 1 <= n_experts <= MAX_EXPERTS:
        raise ValueError(f"logits: got {n_experts} experts, need 1 to {MAX_EXPERTS}")
    if not 1 <= k <= min(MAX_TOPK, n_experts):
        raise ValueError(f"k: got {k}, need 1 to {min(MAX_TOPK, n_experts)}")
    if logits_TE.dtype == torch.float64:
        logits_TE = logits_TE.to(torch.float32)
    scores = torch.empty([n_tokens, k], dtype=torch.float32, device=beside(logits_TE))
    indices = torch.empty([n_tokens, k], dtype=torch.int32, device=beside(logits_TE))
    if n_tokens:
        tile, tiles, rows = _shape(n_experts, logits_TE.dtype == torch.float32)
        k_lanes = next_power_of_2(k)
        launch(
            _topk_softmax,
            -(-n_tokens // rows),
            (logits_TE.contiguous(), scores, indices, n_tokens),
            {"E": n_experts, "TILE": tile, "TILES": tiles, "K": k, "K_LANES": k_lanes, "ROWS": rows},
            num_warps=_THREADS // 32,
        )
    return scores, indices


def topk_softmax_backward(dscores_TK, scores_TK, indices_TK, n_experts: int, out_dtype):
    """dlogits [T,E] of ``out_dtype``, 0 where nothing was chosen. ``scores`` and ``indices`` are the forward's."""
    n_tokens, k = int(scores_TK.shape[0]), int(scores_TK.shape[1])
    dlogits = torch.empty([n_tokens, n_experts], dtype=out_dtype, device=beside(scores_TK))
    if n_tokens:
        tile, tiles, rows = _shape(n_experts, out_dtype == torch.float32)
        launch(
            _topk_softmax_backward,
            -(-n_tokens // rows),
            (dscores_TK.contiguous(), scores_TK.contiguous(), indices_TK.contiguous(), dlogits, n_tokens),
            {"E": n_experts, "TILE": tile, "TILES": tiles, "K": k, "ROWS": rows},
            num_warps=_THREADS // 32,
        )
    return dlogits
