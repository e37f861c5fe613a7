"""DeepGEMM's grouped FP8 GEMMs beside this package's, on the same quantized operands; see fp8_gemms.py.

It gets what this package's GEMMs do without: rows that were gathered before and experts' token-major operands that were
copied apart. What these do beyond a product, activations and quantization, it does not do.
"""

import ctypes
import pathlib
import subprocess

import torch

ROW_TILES, WGRAD_TILES = (128, 160, 192), (120, 128, 152)  # columns


def _library(folder: str, hidden: int, intermediate: int, experts: int) -> pathlib.Path:
    return pathlib.Path(folder, f"deepgemm-{hidden}-{intermediate}-{experts}.so")


def build(deepgemm: str, cutlass: str, sizes: set[tuple[int, int, int]], blocks: int, folder: str) -> None:
    """A library for each (hidden, intermediate, experts), of which its kernels are made, side by side: nvcc takes its
    time. ``deepgemm``, ``cutlass``: checkouts with headers; ``blocks``: the device's multiprocessors."""
    source = pathlib.Path(__file__).with_suffix(".cu")
    command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-O3", "-w", "--expt-relaxed-constexpr"]
    command += [f"-I{deepgemm}/deep_gemm/include", f"-I{cutlass}/include", "-shared", "-Xcompiler", "-fPIC"]
    compilers = []
    for hidden, intermediate, experts in sizes:
        facts = {"HIDDEN": hidden, "INTERMEDIATE": intermediate, "EXPERTS": experts, "MULTIPROCESSORS": blocks}
        target = [*(f"-D{name}={value}" for name, value in facts.items())]
        target += ["-o", str(_library(folder, hidden, intermediate, experts)), str(source)]
        compilers.append(subprocess.Popen([*command, *target]))
    if any([compiler.wait() for compiler in compilers]):
        raise RuntimeError("nvcc failed at DeepGEMM's kernels")


class DeepGemm:
    """Its kernels for one shape, every expert of which has rows, from a folder in which they were built."""

    def __init__(self, problem, folder: str):
        p = problem
        self.library = ctypes.CDLL(str(_library(folder, p.h, p.i, p.e)))
        blocks = torch.cuda.get_device_properties(p.x.device).multi_processor_count
        self.offsets = p.routing.expert_offset.tolist()
        lengths = [end - begin for begin, end in zip(self.offsets, self.offsets[1:], strict=False)]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=p.x.device)
        experts = torch.arange(p.e, device=p.x.device, dtype=torch.int32)
        self.group = experts.repeat_interleave(self.lengths.long())
        self.maps = torch.empty(2 * 128 * blocks, dtype=torch.uint8, device=p.x.device)

    def wgrad(self, name: str, left, right):
        """(columns of a tile, call, its result for the first expert)"""
        rows, first = self.offsets[-1], int(self.lengths[0])
        apart = [self._apart(operand.data) for operand in (left, right)]
        for tile in WGRAD_TILES:
            out = torch.zeros(len(self.lengths), len(left.data), len(right.data), device=self.lengths.device)
            tensors = (apart[0], left.scale, apart[1], right.scale, out, self.lengths)
            yield tile, self._call(f"{name}_{tile}", tensors, (first, rows), (self.maps,)), out[0]

    def rows(self, name: str, a, weight):
        rows, first = self.offsets[-1], self.offsets[1]
        for tile in ROW_TILES:
            out = torch.empty(rows, weight.data.shape[1], dtype=torch.bfloat16, device=self.lengths.device)
            tensors = (a.data, a.scale.T.contiguous(), weight.data, weight.scale, out, self.group)
            yield tile, self._call(f"{name}_{tile}", tensors, (rows,), ()), out[:first]

    def _apart(self, operand):
        data = operand.view(torch.uint8)
        spans = zip(self.offsets, self.offsets[1:], strict=False)
        return torch.cat([data[:, begin:end].flatten() for begin, end in spans])

    def _call(self, entry: str, tensors, numbers, room):
        launch = getattr(self.library, entry)
        args = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        args += [*numbers, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in room)]

        def call(keep=(tensors, room)):
            status = launch(*args, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
            if status:
                raise RuntimeError(f"{entry}: CUDA error {status}")

        return call
