"""Compiles CUDA sources for the CPU with tests/cuda_emulator/cooperative in the place of CUDA's headers."""

import ctypes
import re
import subprocess
from pathlib import Path

EMULATOR = Path(__file__).resolve().parents[1] / "cuda_emulator" / "cooperative"

# The one thing of a kernel that C++ has no word for: memory of the block that runs.
_DYNAMIC = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
_FLAGS = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
# The first is for the emulator's hooks at accesses to memory. And a GPU does not forgive what the second finds.
_OF_KERNELS = ["-fsanitize=thread", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
_OF_THE_REST = ["-shared", "-U_FORTIFY_SOURCE"]  # which takes a jump to another stack for a mistake


def compile_kernels(folder: Path, kernels: Path, target: Path, *more) -> None:
    """A shared library of the ``.cu`` file and of ``more``: C++ sources and flags."""
    text, replaced = _DYNAMIC.subn(r"\1* const \2 = static_cast<\1*>(emulator::shared_memory());", kernels.read_text())
    assert replaced, f"{kernels}: no `extern __shared__ type name[];`"
    assert "__shared__" not in text, f"{kernels}: no other shared memory is known here"
    source, compiled = folder / kernels.name, folder / f"{kernels.stem}.o"
    source.write_text(f'#line 1 "{kernels}"\n{text}')
    includes = [f"-I{EMULATOR}", f"-I{kernels.parent}"]
    _compile(folder, *_OF_KERNELS, *includes, "-c", "-x", "c++", source, "-o", compiled)
    _compile(folder, *_OF_THE_REST, *includes, *more, *sorted(EMULATOR.glob("*.cpp")), compiled, "-o", target)


def _compile(folder: Path, *command) -> None:
    done = subprocess.run(["g++", *_FLAGS, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


class Device:
    """What a library compiled so takes for its GPU."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))

    def configure(self, multiprocessors: int, seed: int) -> None:
        """For the launches to come; ``seed`` draws the order in which their threads run."""
        self.library.emulator_configure(multiprocessors, ctypes.c_uint32(seed))

    def last_launch(self) -> tuple[int, int]:
        """(blocks, threads of each)"""
        shape = (ctypes.c_uint32 * 2)()
        self.library.emulator_last_launch(shape)
        return shape[0], shape[1]
