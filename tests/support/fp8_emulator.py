"""Builds csrc's FP8 GEMMs for the CPU, tests/cuda_emulator in the place of the GPU, and puts them under the stages.

Imported only where a real torch is.
"""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11

from sonicmoe import jit
from sonicmoe.gemm import sm90_bf16, sm90_fp8
from sonicmoe.routing import naive as movement

EMULATOR = Path(__file__).resolve().parents[1] / "cuda_emulator"
NAME = "sm90_fp8_gemm_emulated"


def build(folder: Path):
    """The extension module, made in ``folder``."""
    for source in (*jit.source_folder().glob("sm90_fp8_*"), *EMULATOR.glob("*.cpp"), *EMULATOR.glob("*.cuh")):
        shutil.copy(source, folder)  # beside each other, so that the emulator's primitives are the ones included
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a GPU does not forgive it either
    target = folder / f"{NAME}.so"
    command = ["g++", *flags, f"-DSONICMOE_MODULE_NAME={NAME}", *includes, "sm90_fp8_gemm.cpp", "emulator.cpp"]
    done = subprocess.run([*command, "-o", str(target)], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location(NAME, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Combine:
    """The Triton combine by its definition."""

    @staticmethod
    def sum_slots(rows, routing, dtype, scores=None, out=None, first=0):
        made = movement.sum_slots(rows, routing, dtype, scores)
        if out is None:
            return made
        out[:, first : first + rows.shape[1]] = made
        return out

    @staticmethod
    def finish_ds(parts, routing):
        return movement.scatter_slot_grads(parts.sum(dim=1)[routing.s_reverse_scatter_idx.long()], routing)


def install(monkeypatch, module, clusters: int) -> None:
    """From here on the FP8 stages run on CPU tensors, as on a GPU of so many pairs of multiprocessors."""
    monkeypatch.setattr(sm90_fp8, "_module", lambda target, cache_dir: module)
    monkeypatch.setattr(sm90_fp8, "_settled", {})
    monkeypatch.setattr(sm90_fp8, "arch", lambda tensor: "sm_90a")
    monkeypatch.setattr(sm90_fp8, "current_stream", lambda tensor: 0)
    monkeypatch.setattr(sm90_fp8, "multiprocessors", lambda tensor, most=None: min(2 * clusters, most or 2 * clusters))
    monkeypatch.setattr(sm90_bf16, "combine", lambda: Combine)
