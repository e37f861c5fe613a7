"""The stages in framework ops: the oracle for every kernel, and the CPU backend.

Expert by expert, so that no more than one expert's rows exist in float32. Shape legend in ``api.py``.
"""

import torch

from ..activation import naive as activation
from ..launch import beside
from ..quant import naive as quant
from ..quant.formats import QuantTensor
from ..routing import naive as movement

OVERWRITES_Z = False
DX_FIRST = False


def _dtype(plan):
    return getattr(torch, plan.storage)


def _segments(routing):
    """(expert, first row, row after the last) of every non-empty expert."""
    bounds = [int(bound) for bound in routing.expert_offset.tolist()]
    return [(e, lo, hi) for e, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False)) if hi > lo]


def _pad_mask(routing, lo: int, hi: int):
    """[m,1] 1.0 for real rows, 0.0 for pads; None where the format has no pads."""
    if routing.n_pad_rows == 0:
        return None
    return (routing.s_scatter_idx[lo:hi] < routing.n_slots).reshape([-1, 1])


def _gather(x_TC, routing, lo: int, hi: int):
    """Rows (float32, as ``x_TC`` is) of the tokens behind sorted rows lo..hi.

    A pad row reads row 0 on a GPU and its products are discarded; here it is zero from the start, so that a NaN
    in row 0 stays with token 0.
    """
    rows = x_TC.index_select(0, routing.x_gather_idx[lo:hi].to(torch.int64))
    mask = _pad_mask(routing, lo, hi)
    return rows if mask is None else torch.where(mask, rows, torch.zeros_like(rows))


def _values(data):
    """e4m3 codes as the float32 numbers they stand for, without their scale."""
    return data.to(torch.float32)


class _RowSource:
    """Gathers an operand's rows for one expert at a time: plain float32, or codes with scales."""

    def __init__(self, rows, routing):
        self.routing = routing
        self.block = rows.block if isinstance(rows, QuantTensor) else None
        if self.block is None:
            # All of it once: not every framework gathers every narrow type.
            self.plain = rows.to(torch.float32)
        else:
            self.codes, self.scales = _values(rows.data), quant.scale_values(rows.scale)

    def gather(self, lo: int, hi: int):
        if self.block is None:
            return _gather(self.plain, self.routing, lo, hi)
        return _gather(self.codes, self.routing, lo, hi), _gather(self.scales, self.routing, lo, hi)

    def rows(self, lo: int, hi: int):
        """The same for operands that are in sorted order already."""
        if self.block is None:
            return self.plain[lo:hi]
        return self.codes[lo:hi], self.scales[lo:hi]


def _weight(w, expert: int):
    """One expert's [N,K] weight as an operand for ``_multiply``."""
    if isinstance(w, QuantTensor):
        scale = quant.scale_values(w.scale[expert])
        return _values(w.data[expert]), scale.repeat_interleave(w.block[0], dim=0) if w.block[0] > 1 else scale
    return w[expert].to(torch.float32)


def _multiply(a, b):
    """a [m,K] @ b [N,K]^T in float32.

    Quantized operands are (codes, scales by K-block): each block's products are summed unscaled, and that partial
    sum is promoted with scale_a * scale_b, as the tensor cores and the promotion after them do.
    """
    if not isinstance(a, tuple):
        return torch.matmul(a, b.transpose(0, 1))
    (a_mK, sa_mB), (b_NK, sb_NB) = a, b
    n_blocks = int(sa_mB.shape[1])
    step = int(a_mK.shape[1]) // n_blocks
    total = torch.zeros([int(a_mK.shape[0]), int(b_NK.shape[0])], dtype=torch.float32, device=beside(a_mK))
    for block in range(n_blocks):
        k = slice(block * step, (block + 1) * step)
        partial = torch.matmul(a_mK[:, k], b_NK[:, k].transpose(0, 1))
        total += partial * (sa_mB[:, block : block + 1] * sb_NB[:, block].reshape([1, -1]))
    return total


def _concat(parts, columns: int, dtype, like):
    """Expert segments back to one [M,C] tensor; a rank without rows gets an empty one of the same type."""
    if not parts:
        return torch.zeros([0, columns], dtype=dtype, device=beside(like))
    return torch.cat(parts, dim=0).to(dtype)


def _into(target, value):
    """``value``, or the caller's tensor with ``value`` in it."""
    return value if target is None else target.copy_(value)


def _scores(routing, lo: int, hi: int):
    """[m,1] score of each sorted row; pads point behind the last slot, where scores are 0."""
    return routing.scores.index_select(0, routing.s_scatter_idx[lo:hi].to(torch.int64)).reshape([-1, 1])


def build_ahead(plan, arch: str) -> None:
    """Nothing here is compiled."""


def prepare_rows(x, plan):
    if plan.recipe is None:
        return quant.dequantize(x).to(_dtype(plan)) if isinstance(x, QuantTensor) else x
    if isinstance(x, QuantTensor):
        return x if x.matches(plan.recipe) else quant.quantize_rows(quant.dequantize(x), plan.recipe)
    return quant.quantize_rows(x, plan.recipe)


def up_projection(x_rows, weights, routing, plan, need_a, out=None):
    width = plan.width(weights.intermediate_size)
    source = _RowSource(x_rows, routing)
    w1 = weights.w1_EFH if plan.recipe is None else weights.fp8.w1
    z_parts, a_parts = [], []
    for expert, lo, hi in _segments(routing):
        z = _multiply(source.gather(lo, hi), _weight(w1, expert))
        if need_a:
            # From z as accumulated, before its rounding for storage: the epilogue holds it in registers.
            a_parts.append(activation.forward(z, plan.activation, plan.clamp))
        z_parts.append(z)
    like = routing.expert_offset
    if plan.recipe is None:
        out_z, out_a = out or (None, None)
        a = _into(out_a, _concat(a_parts, weights.intermediate_size, _dtype(plan), like)) if need_a else None
        return _into(out_z, _concat(z_parts, width, _dtype(plan), like)), a
    a = None
    if need_a:
        a = quant.quantize_rows(_concat(a_parts, weights.intermediate_size, torch.float32, like), plan.recipe)
    return quant.quantize_rows(_concat(z_parts, width, torch.float32, like), plan.recipe), a


def down_projection(a, weights, routing, plan, out=None):
    source = _RowSource(a, routing)
    w2 = weights.w2_EHI if plan.recipe is None else weights.fp8.w2
    parts = [_multiply(source.rows(lo, hi), _weight(w2, expert)) for expert, lo, hi in _segments(routing)]
    return _into(out, _concat(parts, weights.hidden_size, _dtype(plan), routing.expert_offset))


def down_projection_backward(dout_rows, z, weights, routing, plan, need_wgrad, out=None):
    source = _RowSource(dout_rows, routing)
    z = quant.dequantize(z) if isinstance(z, QuantTensor) else z
    w2_t = weights.w2_EHI.transpose(1, 2) if plan.recipe is None else weights.fp8.w2_t
    stored = _dtype(plan) if plan.recipe is None else torch.float32
    ds_parts, dz_parts, pa_parts = [], [], []
    for expert, lo, hi in _segments(routing):
        d_a = _multiply(source.gather(lo, hi), _weight(w2_t, expert))
        z_m = z[lo:hi].to(torch.float32)
        a = activation.forward(z_m, plan.activation, plan.clamp)
        p = _scores(routing, lo, hi)
        ds_parts.append((d_a * a).sum(dim=1))
        dz_parts.append(activation.backward(z_m, p * d_a, plan.activation, plan.clamp))
        if need_wgrad:
            pa_parts.append(p * a)
    like = routing.expert_offset
    out_dz, out_pa = out or (None, None)
    dz = _into(out_dz, _concat(dz_parts, plan.width(weights.intermediate_size), stored, like))
    pa = _into(out_pa, _concat(pa_parts, weights.intermediate_size, stored, like)) if need_wgrad else None
    if not ds_parts:
        return dz, pa, torch.zeros([0], dtype=torch.float32, device=beside(like))
    ds = torch.cat(ds_parts, dim=0).index_select(0, routing.s_reverse_scatter_idx.to(torch.int64))
    return dz, pa, ds


def score_gradient(ds_parts, routing, plan):
    return movement.scatter_slot_grads(ds_parts, routing)


def sum_slots(rows, routing, plan, scores=None):
    return movement.sum_slots(rows, routing, _dtype(plan), scores)


def up_projection_backward(dz, weights, routing, plan, out=None):
    w1_t = weights.w1_EFH.transpose(1, 2) if plan.recipe is None else weights.fp8.w1_t
    source = _RowSource(dz if plan.recipe is None else quant.quantize_rows(dz, plan.recipe), routing)
    parts = [_multiply(source.rows(lo, hi), _weight(w1_t, expert)) for expert, lo, hi in _segments(routing)]
    return _into(out, _concat(parts, weights.hidden_size, _dtype(plan), routing.expert_offset))


def summed_down_projection(take_a, weights, routing, plan):
    return sum_slots(down_projection(take_a(), weights, routing, plan), routing, plan, routing.scores)


def summed_up_projection_backward(dz, weights, routing, plan):
    return sum_slots(up_projection_backward(dz, weights, routing, plan), routing, plan)


def after_dx(dz):
    return dz


def _token_major(rows, plan):
    """[m,C] -> the [C,m] operand of a wgrad: quantized along tokens, or rounded to the storage type."""
    if not plan.fp8_wgrad:
        return rows.to(_dtype(plan)).to(torch.float32).transpose(0, 1)
    q = quant.quantize_rows(rows.transpose(0, 1).contiguous(), plan.recipe)
    return _values(q.data), quant.scale_values(q.scale)


def _full_rows(x):
    return quant.dequantize(x) if isinstance(x, QuantTensor) else x.to(torch.float32)


def _clear(target, experts, buffers) -> None:
    """Zeros where the buffer holds anything: for the experts that no row belongs to."""
    if buffers.overwrite:
        for expert, wanted in enumerate(experts):
            if wanted:
                target[expert].zero_()


def _deliver(target, product, buffers) -> None:
    if buffers.overwrite:
        target.copy_(product.to(target.dtype))
    else:
        target.add_(product)


def accumulate_dw1(dz, x, routing, plan, buffers):
    x_TH = _full_rows(x)
    _clear(buffers.dw1_EFH, buffers.experts1, buffers)
    for expert, lo, hi in _segments(routing):
        if buffers.experts1[expert]:
            x_m = _gather(x_TH, routing, lo, hi)
            product = _multiply(_token_major(dz[lo:hi], plan), _token_major(x_m, plan))
            _deliver(buffers.dw1_EFH[expert], product, buffers)


def accumulate_dw2(pa, dout, routing, plan, buffers):
    dout_TH = _full_rows(dout)
    _clear(buffers.dw2, buffers.experts2, buffers)
    for expert, lo, hi in _segments(routing):
        if buffers.experts2[expert]:
            left = _token_major(pa[lo:hi], plan)
            right = _token_major(_gather(dout_TH, routing, lo, hi), plan)
            if not buffers.w2_grouped:
                left, right = right, left
            _deliver(buffers.dw2[expert], _multiply(left, right), buffers)
