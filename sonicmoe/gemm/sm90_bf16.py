"""The stages on Hopper in 16-bit types: six grouped GEMMs with gather, activation and gradients in their epilogues.

``naive`` is the definition. Legend in ``api.py``. Nothing here waits for the device, and no size that depends on the
number of tokens decides what is compiled.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from .. import checks
from ..cache_safety import JitUnavailable
from ..launch import address, beside
from ..quant import api as quant
from ..quant.formats import QuantTensor
from . import grouped, kernel_store
from .frozen import deliver
from .gemm_kernel import GemmKernel
from .grouped import Loaded
from .plan import Plan
from .tile_table import TILES

if find_spec("triton") is not None:
    from ..routing import triton_combine
else:
    triton_combine = None

# A tile of z is read by the thread block that writes the same tile of dz, so dz takes z's place in memory.
OVERWRITES_Z = True
DX_FIRST = False


def _kernel(op: str, storage: str, tile: str | None = None, **facts) -> GemmKernel:
    return GemmKernel(op=op, tile=TILES[tile or op], storage=storage, **facts)


@dataclass(frozen=True)
class _Set:
    """What one plan launches beside its wgrads; loaded with them, so that all that is missing compiles at once."""

    up: Loaded
    up_z: Loaded
    down: Loaded
    dx: Loaded
    down_backward: Loaded


_WGRADS = [
    (transposed, out, accumulate)
    for transposed in (False, True)
    for out, accumulate in ((None, False), ("float32", True))
]


def _chosen(plan: Plan) -> dict:
    storage, curve = plan.storage, {"activation": plan.activation.value, "clamp": plan.clamp}
    return {
        "up": _kernel("up", storage, **curve),
        "up_z": _kernel("up_z", storage),
        "down": _kernel("rows", storage, "down"),
        "dx": _kernel("rows", storage, "dx", transposed=True),
        "down_backward": _kernel("down_backward", storage, **curve),
    }


def _wanted(plan: Plan) -> list[GemmKernel]:
    return [*_chosen(plan).values(), *_wgrad_kernels(plan.storage).values()]


@cache
def kernels(plan: Plan) -> _Set:
    chosen, wanted = _chosen(plan), _wanted(plan)
    run = dict(zip(wanted, kernel_store.load(wanted, plan.cache_dir), strict=True))
    return _Set(**{name: Loaded(kernel, run[kernel], plan.multiprocessors) for name, kernel in chosen.items()})


def _wgrad_kernels(storage: str) -> dict:
    """By (whether D lies transposed, its dtype if not the storage type, whether it is added to)."""
    return {key: _kernel("wgrad", storage, transposed=key[0], out=key[1], accumulate=key[2]) for key in _WGRADS}


@cache
def wgrads(storage: str, cache_dir, most: int | None = None) -> dict:
    """``most``: how many multiprocessors they take at most."""
    wanted = _wgrad_kernels(storage)
    found = kernel_store.load(list(wanted.values()), cache_dir)
    return {key: Loaded(kernel, run, most) for (key, kernel), run in zip(wanted.items(), found, strict=True)}


def build_ahead(plan: Plan, arch: str) -> None:
    kernel_store.build_ahead(_wanted(plan), plan.cache_dir)


def build_wgrads_ahead(plan: Plan) -> None:
    kernel_store.build_ahead(list(_wgrad_kernels(plan.storage).values()), plan.cache_dir)


def combine():
    if triton_combine is None:
        raise JitUnavailable("triton is not installed; pip install triton")
    return triton_combine


def _empty(out, sizes, dtype, like):
    return torch.empty(sizes, dtype=dtype, device=beside(like)) if out is None else out


def prepare_rows(x, plan):
    """Rows as 16-byte loads can read them. A gradient may come as an expanded view or in another type."""
    dtype = getattr(torch, plan.storage)
    if isinstance(x, QuantTensor):
        return quant.dequantize_rows(x, dtype)
    if x.dtype != dtype:
        x = x.to(dtype)
    if not x.is_contiguous():
        x = x.contiguous()
    return aligned(x)


def aligned(rows):
    """As loads of 16 bytes can read them."""
    return rows if address(rows) % checks.ALIGN_BYTES == 0 else rows.clone()


def up_projection(x_rows, weights, routing, plan, need_a, out=None):
    chosen, dtype = kernels(plan), getattr(torch, plan.storage)
    out_z, out_a = out or (None, None)
    z = _empty(out_z, [routing.n_rows, plan.width(weights.intermediate_size)], dtype, x_rows)
    a = _empty(out_a, [routing.n_rows, weights.intermediate_size], dtype, x_rows) if need_a else None
    if routing.n_rows:
        where = (routing.expert_offset, routing.x_gather_idx)
        if need_a:
            grouped.up(chosen.up, x_rows, weights.w1_EFH, z, a, *where)
        else:
            grouped.up_z(chosen.up_z, x_rows, weights.w1_EFH, z, *where)
    return z, a


def _rows(gemm: Loaded, a, b, columns, routing, out):
    y = _empty(out, [routing.n_rows, columns], a.dtype, a)
    if routing.n_rows:
        grouped.rows(gemm, a, b, y, routing.expert_offset)
    return y


def down_projection(a, weights, routing, plan, out=None):
    return _rows(kernels(plan).down, a, weights.w2_EHI, weights.hidden_size, routing, out)


def down_projection_backward(dout_rows, z, weights, routing, plan, need_wgrad, out=None):
    """dz takes z's place unless the caller gives a tensor for it. p*a is a by-product, needed or not."""
    gemm = kernels(plan).down_backward
    columns = -(-weights.intermediate_size // gemm.kernel.tile.n)
    out_dz, out_pa = out or (None, None)
    dz = z if out_dz is None else out_dz
    pa = _empty(out_pa, [routing.n_rows, weights.intermediate_size], z.dtype, z)
    parts = torch.empty([routing.n_rows, columns], dtype=torch.float32, device=beside(z))
    if routing.n_rows:
        tensors = (dout_rows, weights.w2_EHI, z, dz, combine().scores_by_row(routing), pa, parts)
        grouped.down_backward(gemm, *tensors, routing.expert_offset, routing.x_gather_idx)
    return dz, pa if need_wgrad else None, parts


def score_gradient(ds_parts, routing, plan):
    return combine().finish_ds(ds_parts, routing)


def sum_slots(rows, routing, plan, scores=None):
    return combine().sum_slots(rows, routing, getattr(torch, plan.storage), scores)


def up_projection_backward(dz, weights, routing, plan, out=None):
    w1_t = weights.w1_EFH.transpose(1, 2)
    return _rows(kernels(plan).dx, dz, w1_t, weights.hidden_size, routing, out)


def summed_down_projection(take_a, weights, routing, plan):
    return sum_slots(down_projection(take_a(), weights, routing, plan), routing, plan, routing.scores)


def summed_up_projection_backward(dz, weights, routing, plan):
    return sum_slots(up_projection_backward(dz, weights, routing, plan), routing, plan)


def after_dx(dz):
    return dz


def _wgrad(left_TC, right_MN, target_ECN, transposed, routing, plan, overwrite: bool):
    """``target`` is a view with the columns of ``left`` first; ``transposed`` tells how it lies."""
    if not routing.n_rows:
        if overwrite:
            target_ECN.zero_()
        return
    dtype = checks.dtype_name(target_ECN)
    out = None if dtype == plan.storage else dtype
    gemm = wgrads(plan.storage, plan.cache_dir, plan.multiprocessors).get((transposed, out, not overwrite))
    if gemm is None:
        raise TypeError(
            f"weight gradient: got a {dtype} tensor to {'fill' if overwrite else 'add to'}, need "
            f"{plan.storage if overwrite else 'float32'}"
        )
    left_TC = prepare_rows(left_TC, plan)
    grouped.wgrad(gemm, left_TC, right_MN, target_ECN, routing.expert_offset, routing.x_gather_idx)


def accumulate_dw1(dz, x, routing, plan, buffers):
    deliver(
        lambda target: _wgrad(x, dz, target, True, routing, plan, buffers.overwrite),
        buffers.dw1_EFH.transpose(1, 2), buffers.experts1, buffers.overwrite,
    )  # fmt: skip


def accumulate_dw2(pa, dout, routing, plan, buffers):
    transposed = buffers.w2_grouped
    deliver(
        lambda target: _wgrad(dout, pa, target, transposed, routing, plan, buffers.overwrite),
        buffers.dw2.transpose(1, 2) if transposed else buffers.dw2, buffers.experts2, buffers.overwrite,
    )  # fmt: skip
