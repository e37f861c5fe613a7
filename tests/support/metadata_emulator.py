"""csrc's routing metadata with its CUDA kernel compiled for the CPU, called with memory that shows what was written."""

import importlib.util
import sysconfig
from pathlib import Path

import numpy as np
import pybind11

from sonicmoe import jit
from tests.support.cuda_emulator import Device, compile_kernels
from tests.support.guarded import GUARD, Guarded
from tests.workers.jit_routings import ARRAYS

NAME = "deepep_topk_metadata"
EMULATED = f"{NAME}_emulated"


class Call:
    """One launch's inputs and room for its outputs: for so many slots and rows, right or wrong."""

    def __init__(self, module, indices, probs, n_experts, block, n_slots, n_rows, scales=None, bounded=False):
        # Behind the last id lies a good one: a slot too many would count.
        self.given = [np.append(values.ravel(), np.zeros(GUARD, values.dtype)) for values in (indices, probs)]
        wide = indices.dtype == np.int64
        at = [values.ctypes.data for values in self.given]
        self.inputs = module.Inputs(at[0], wide, at[1], *indices.shape, n_experts, block)
        self.words = 0 if scales is None else scales.shape[1]
        self.scales = None if scales is None else np.ascontiguousarray(scales)
        sizes = [n_experts + 1, n_rows, n_rows, n_slots, indices.shape[0] + 1, n_rows, n_slots, n_rows * self.words]
        self.outputs = Guarded(*sizes)
        self.workspace = Guarded(module.workspace_words(n_experts))
        at = [part.ctypes.data for part in self.outputs.parts[:7]]
        self.destination = module.Outputs(*at, n_slots, n_rows, bounded)
        self.module = module

    def launch(self) -> None:
        source = 0 if self.scales is None else self.scales.ctypes.data
        target, workspace = self.outputs.parts[7].ctypes.data, self.workspace.parts[0].ctypes.data
        try:
            self.module.launch(self.inputs, self.destination, source, target, self.words, workspace, 0)
        finally:
            assert self.outputs.guards_are_whole() and self.workspace.guards_are_whole(), "written beside its arrays"

    def arrays(self) -> dict[str, np.ndarray]:
        """The bits of each output; ``sorted_scales`` are [M, words]."""
        found = dict(zip(ARRAYS, self.outputs.parts, strict=False))
        return found | {"sorted_scales": self.outputs.parts[7].reshape(-1, self.words)} if self.words else found


def build(folder: Path):
    """(the extension module, its device), made in ``folder``."""
    csrc, target = jit.source_folder(), folder / f"{EMULATED}.so"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    defines = ["-DSONICMOE_WITH_CUDA", f"-DSONICMOE_MODULE_NAME={EMULATED}"]
    compile_kernels(folder, csrc / f"{NAME}.cu", target, *includes, *defines, csrc / f"{NAME}.cpp")
    spec = importlib.util.spec_from_file_location(EMULATED, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, Device(target)
