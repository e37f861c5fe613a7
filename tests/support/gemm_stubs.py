"""Stand-ins for compiled GEMMs: each computes on the CPU what its kernel would, from what its launch got alone.

They take the arguments that the generator's kernels take, read a layout off strides as a kernel's key promises it, and
keep a note of each launch. Imported only where a real torch is. Legend in ``sonicmoe/gemm/api.py``.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from sonicmoe.activation import naive as activation
from sonicmoe.enums import ActivationType
from sonicmoe.gemm import kernel_store, sm90_bf16
from sonicmoe.gemm.gemm_kernel import GemmKernel
from sonicmoe.routing import naive as movement

MULTIPROCESSORS = 132


@dataclass
class Launch:
    """``name`` is the kernel's op, or the function of the Triton combine; ``given`` what it got, by name."""

    name: str
    given: dict[str, Any]
    kernel: GemmKernel | None = None

    def __getattr__(self, name):
        try:
            return self.__dict__["given"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Log:
    launches: list[Launch] = field(default_factory=list)
    loads: list[list[GemmKernel]] = field(default_factory=list)
    multiprocessors: int = MULTIPROCESSORS  # that a launch should take

    def names(self) -> list[str]:
        return [launch.name for launch in self.launches]

    def only(self, name: str) -> Launch:
        (found,) = [launch for launch in self.launches if launch.name == name]
        return found

    def clear(self) -> None:
        self.launches.clear()


def install(monkeypatch) -> Log:
    """From here on the Hopper engine runs on CPU tensors, and the log tells what it launches."""
    log = Log()

    def load(kernels, cache_dir):
        log.loads.append(list(kernels))
        return [Stub(kernel, log) for kernel in kernels]

    monkeypatch.setattr(kernel_store, "load", load)
    monkeypatch.setattr(sm90_bf16, "combine", lambda: Combine(log))
    found = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    return log


# ---- The Triton combine ----------------------------------------------------------------------------------------------


@dataclass
class Combine:
    log: Log

    def sum_slots(self, rows_MH, routing, dtype, scores=None):
        self.log.launches.append(Launch("sum_slots", {"rows": rows_MH, "scores": scores, "dtype": dtype}))
        return movement.sum_slots(rows_MH, routing, dtype, scores)

    def scores_by_row(self, routing):
        self.log.launches.append(Launch("scores_by_row", {}))
        return routing.scores.index_select(0, routing.s_scatter_idx)

    def finish_ds(self, parts_MB, routing):
        self.log.launches.append(Launch("finish_ds", {"parts": parts_MB}))
        by_slot = parts_MB.sum(dim=1).index_select(0, routing.s_reverse_scatter_idx.long())
        return movement.scatter_slot_grads(by_slot, routing)


# ---- The GEMMs -------------------------------------------------------------------------------------------------------


def require(condition: bool, what: str) -> None:
    if not condition:
        raise TypeError(f"launch: {what}")


def require_operand(name: str, tensor, dtype, inner: int) -> None:
    """As the kernels' own checks: 16-byte loads along ``inner``, the dimension whose values lie side by side."""
    require(tensor.dtype == dtype, f"{name} has dtype {tensor.dtype}, need {dtype}")
    strides = list(tensor.stride())
    require(strides.pop(inner) == 1 or tensor.shape[inner] == 1, f"{name} has strides {tensor.stride()}")
    require(all(stride * tensor.element_size() % 16 == 0 for stride in strides), f"{name}: strides {strides}")
    require(tensor.data_ptr() % 16 == 0, f"{name} begins at {tensor.data_ptr()}")


def require_indices(name: str, tensor, size: int | None = None) -> None:
    require(tensor.dtype == torch.int32 and tensor.dim() == 1, f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
    require(size is None or tensor.shape[0] == size, f"{name} has {tensor.shape[0]} entries, need {size}")


class Stub:
    def __init__(self, kernel: GemmKernel, log: Log):
        self.kernel, self.log = kernel, log
        self.dtype = getattr(torch, kernel.storage)

    def __call__(self, a, b, d, c, epilogue, schedule, segments, *scale_factors):
        require(scale_factors == (None, None), f"scale factors {scale_factors}")
        blocks = self.log.multiprocessors // self.kernel.tile.cluster
        require(schedule == (blocks, None, 8, None, None, None), f"schedule {schedule}")
        offsets_rows, offsets_sum, gather, permute = segments
        require(permute is None, "batches are in order")
        wgrad = self.kernel.op == "wgrad"
        require((offsets_rows is None) == wgrad and (offsets_sum is None) != wgrad, f"segments {segments}")
        offsets = offsets_sum if wgrad else offsets_rows
        require_indices("offsets", offsets)
        require((gather is None) == (self.kernel.op == "rows"), f"gather {gather}")
        require((c is None) == (self.kernel.op != "down_backward"), f"c is {c}")
        given = {"a": a, "b": b, "d": d, "c": c, "offsets": offsets, "gather": gather, "epilogue": epilogue}
        self.log.launches.append(Launch(self.kernel.op, given, self.kernel))
        bounds = offsets.tolist()
        segments = [(e, lo, hi) for e, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False)) if hi > lo]
        (self._wgrad if wgrad else self._rows)(a, b, d, c, epilogue, gather, segments)

    def _activate(self, z):
        return activation.forward(z, ActivationType.parse(self.kernel.activation), self.kernel.clamp)

    def _rows(self, a, b, d, c, epilogue, gather, segments):
        """Every op but wgrad: rows of a by segment, times b[e]^T, and what the epilogue makes of it."""
        require_operand("a", a, self.dtype, 1)
        require_operand("b", b, self.dtype, 1 if self.kernel.transposed or c is not None else 2)
        require_operand("d", d, self.dtype, 1)
        if gather is not None:
            require_indices("gather", gather, d.shape[0])
        rows = (a if gather is None else a.index_select(0, gather.long())).float()
        require(rows.shape[0] == d.shape[0] and rows.shape[1] == b.shape[2], f"a is {a.shape}, b {b.shape}")
        products = torch.full([d.shape[0], b.shape[1]], float("nan"))
        for e, lo, hi in segments:
            products[lo:hi] = rows[lo:hi] @ b[e].float().T
        *outputs, first, second = epilogue
        require(first is None and second is None, "split sums have no buffers")
        if self.kernel.op == "down_backward":
            self._backward(products, d, c, *outputs)
            return
        if self.kernel.op == "up":
            (a_out,) = outputs
            require_operand("activated", a_out, self.dtype, 1)
            a_out.copy_(self._activate(products))
        else:
            require(not outputs, f"{len(outputs)} outputs beside d")
        d.copy_(products)

    def _backward(self, d_a, d, c, score, pa, parts):
        require_operand("c", c, self.dtype, 1)
        require_operand("pa", pa, self.dtype, 1)
        require(score.dtype == parts.dtype == torch.float32, "scores and parts are float32")
        width, tile = d_a.shape[1], self.kernel.tile.n
        require(score.shape == d_a.shape[:1] and pa.shape == d_a.shape, f"{score.shape} {pa.shape} {d_a.shape}")
        require(tuple(parts.shape) == (d_a.shape[0], -(-width // tile)), f"parts are {parts.shape}")
        z, p = c.float(), score[:, None]  # read before d is written, which may be the same memory
        a = self._activate(z)
        for number, start in enumerate(range(0, width, tile)):
            part = slice(start, start + tile)
            parts[:, number] = (a[:, part] * d_a[:, part]).sum(dim=1)
        pa.copy_(a * p)
        kind = ActivationType.parse(self.kernel.activation)
        d.copy_(activation.backward(z, d_a * p, kind, self.kernel.clamp))

    def _wgrad(self, a, b, d, c, epilogue, gather, segments):
        require(epilogue == (None,) * 12, f"epilogue {epilogue}")
        require_operand("a", a, self.dtype, 0)
        require_operand("b", b, self.dtype, 0)
        require_operand(
            "d", d, getattr(torch, self.kernel.out or self.kernel.storage), 1 if self.kernel.transposed else 2
        )
        require_indices("gather", gather, b.shape[1])
        rows = a.T.index_select(0, gather.long()).float()
        sums = torch.zeros(d.shape)  # an expert without rows as well: the kernel stores its zeros
        for e, lo, hi in segments:
            sums[e] = rows[lo:hi].T @ b.T[lo:hi].float()
        d.copy_(d.float() + sums if self.kernel.accumulate else sums)
