"""``router_weight.py`` in Triton: two launches, no atomics: every sum has its order.

The tokens are shared out among programs, each of which leaves its sum of products in float32; a second kernel adds
these up in the order of the tokens. Compiled once for each (E, H, types); the number of tokens is no part of a
kernel's key, and the way they are shared out depends on nothing but sizes.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..launch import beside
from ..triton_launch import launch, next_power_of_2

DTYPES = ("bfloat16", "float16", "float32")
_TOKENS = 64  # of one step; half as many in float32, for want of registers
_COLUMNS = 128  # of x that one program holds
_EXPERTS = 64  # at most, likewise; a product of tensor cores has 16 or more
_PROGRAMS = 256  # about so many keep a GPU's memory busy
_STEPS = 4  # at least, for one program: what it leaves behind is read again
_PARTS_AT_ONCE = 1024


@triton.jit(do_not_specialize=["n_tokens", "share"])
def _products(
    dlogits, x, parts, n_tokens, share,
    E: tl.constexpr, H: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """``share`` tokens' products, EXPERTS rows and COLUMNS columns of the result. Neighbours read the same tokens."""
    across: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    down: tl.constexpr = (E + EXPERTS - 1) // EXPERTS
    part = tl.program_id(0) // (across * down)
    expert = tl.program_id(0) // across % down * EXPERTS + tl.arange(0, EXPERTS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum(part * share + share, n_tokens)
    total = tl.zeros([EXPERTS, COLUMNS], dtype=tl.float32)
    for begin in tl.range(part * share, end, TOKENS, num_stages=3):
        token = (begin + tl.arange(0, TOKENS)).to(tl.int64)
        exists = token < end
        at = dlogits + token[None, :] * E + expert[:, None]
        left = tl.load(at, mask=exists[None, :] & (expert[:, None] < E), other=0.0)
        at = x + token[:, None] * H + column[None, :]
        right = tl.load(at, mask=exists[:, None] & (column[None, :] < H), other=0.0)
        # float32 as three products of its parts on tensor cores, which is as exact and several times as fast.
        total = tl.dot(left, right.to(left.dtype), total, input_precision="tf32x3")
    at = parts + (part.to(tl.int64) * E + expert[:, None]) * H + column[None, :]
    tl.store(at, total, mask=(expert[:, None] < E) & (column[None, :] < H))


@triton.jit(do_not_specialize=["n_parts"])
def _sum_parts(parts, out, n_parts, SIZE: tl.constexpr, LANES: tl.constexpr):
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    total = tl.zeros([LANES], dtype=tl.float32)
    place = parts + at
    for _ in tl.range(0, n_parts):
        total += tl.load(place, mask=at < SIZE, other=0.0)
        place += SIZE
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < SIZE)


@cache
def _sizes(n_experts: int, hidden: int, wide: bool) -> tuple[dict, int]:
    """(constants of ``_products``, how many programs it takes to cover the result)."""
    experts = min(max(next_power_of_2(n_experts), 16), _EXPERTS)
    columns = min(max(next_power_of_2(hidden), 16), _COLUMNS)
    tokens = _TOKENS // 2 if wide else _TOKENS
    constants = {"E": n_experts, "H": hidden, "EXPERTS": experts, "COLUMNS": columns, "TOKENS": tokens}
    return constants, -(-n_experts // experts) * -(-hidden // columns)


def gradient(dlogits_TE, x_TH, out_dtype):
    """[E,H] of ``out_dtype``."""
    n_tokens, n_experts, hidden = int(dlogits_TE.shape[0]), int(dlogits_TE.shape[1]), int(x_TH.shape[1])
    out = torch.empty([n_experts, hidden], dtype=out_dtype, device=beside(x_TH))
    constants, cover = _sizes(n_experts, hidden, dlogits_TE.dtype == torch.float32)
    steps = -(-n_tokens // constants["TOKENS"])
    n_parts = max(1, min(_PROGRAMS // cover, steps // _STEPS))
    share = -(-steps // n_parts) * constants["TOKENS"]
    n_parts = -(-n_tokens // share) if share else 0
    parts = torch.empty([n_parts, n_experts, hidden], dtype=torch.float32, device=beside(x_TH))
    if n_parts:
        operands = (dlogits_TE.contiguous(), x_TH.contiguous(), parts, n_tokens, share)
        launch(_products, cover * n_parts, operands, constants, num_warps=4)
    size = n_experts * hidden
    lanes = {"SIZE": size, "LANES": _PARTS_AT_ONCE}
    launch(_sum_parts, -(-size // _PARTS_AT_ONCE), (parts, out, n_parts), lanes, num_warps=4)
    return out
