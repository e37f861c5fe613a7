"""Builds the Paddle device plugin of csrc/paddle_cuda_device against the headers of the installed Paddle.

    python tools/build_paddle_device.py OUT              OUT/libsonicmoe_gpu.so, for any Python of the same Paddle
    python tools/build_paddle_device.py OUT --stand-in   over tests/paddle_device in the place of CUDA, without a GPU

Paddle loads it where CUSTOM_DEVICE_ROOT=OUT. It is a test rig: docs/paddle_gpu.md.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "paddle_cuda_device"
STAND_IN = ROOT / "tests" / "paddle_device"
NAME = "libsonicmoe_gpu.so"
DRIVER = "libcuda.so.1"
NCCL = "libnccl.so.2"
FLAGS = ["-O2", "-std=c++17", "-w", "-DPADDLE_WITH_CUSTOM_DEVICE", "-DPADDLE_WITH_CUSTOM_KERNEL"]
ARCHES = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]


def paddle_folder() -> Path:
    spec = importlib.util.find_spec("paddle")  # found, not imported: nothing of it has to run here
    if spec is None or not Path(spec.origin).with_name("include").is_dir():
        sys.exit(f"{sys.executable} has no paddle with headers; the plugin is built where the whole wheel is installed")
    return Path(spec.origin).parent


def tool(*names: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    sys.exit(f"none of {', '.join(names)} is on PATH")


def commands(folder: Path, paddle: Path, stand_in: bool) -> tuple[list[list[str]], list[str]]:
    """(what may run at the same time, what links the result)."""
    link = [f"-L{paddle / 'libs'}", "-l:libphi_core.so", "-l:libcommon.so", "-ldl", "-o", str(folder / NAME)]
    if stand_in:
        compiler = [tool("c++", "g++"), "-fPIC", "-fvisibility=hidden", f"-I{STAND_IN}", "-x", "c++"]
        linker = [compiler[0], "-shared"]
        link += [f"-L{folder}", f"-l:{DRIVER}", "-Wl,-rpath,$ORIGIN/driver"]
    else:
        compiler = [tool("nvcc", "/usr/local/cuda/bin/nvcc"), *ARCHES, "-Xcompiler=-fPIC,-fvisibility=hidden"]
        linker = [compiler[0], "-shared", "-cudart=static"]
    headers = [f"-I{paddle / 'include'}", f"-I{paddle / 'include' / 'third_party'}"]
    compiled = []
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.cu")]):
        target = ["-c", str(path), "-o", str(folder / f"{path.name}.o")]
        compiled.append([*compiler, *FLAGS, *(headers if path.suffix == ".cpp" else []), *target])
    return compiled, [*linker, *(command[-1] for command in compiled), *link]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def stand_in_libraries(folder: Path) -> None:
    compiler = [tool("c++", "g++"), "-O2", "-std=c++17", "-fPIC", "-shared", f"-I{STAND_IN}", f"-I{SOURCES}"]
    driver = [f"-L{folder}", f"-l:{DRIVER}", "-Wl,-rpath,$ORIGIN"]
    for source, name, links in (("stand_in.cpp", DRIVER, []), ("stand_in_nccl.cpp", NCCL, driver)):
        run([*compiler, f"-Wl,-soname,{name}", str(STAND_IN / source), "-o", str(folder / name), *links])


def build(out: Path, stand_in: bool = False) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if stand_in:  # what the plugin links to and loads, and what our own questions to the driver find loaded then
            stand_in_libraries(Path(scratch))
            # In a folder below: Paddle loads every library of this one as a plugin.
            (out / "driver").mkdir(exist_ok=True)
            for name in (DRIVER, NCCL):
                shutil.copy(Path(scratch) / name, out / "driver" / name)
        compiled, link = commands(Path(scratch), paddle_folder(), stand_in)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, compiled))
        run(link)
        made = shutil.copy(Path(scratch) / NAME, out / f".{NAME}")
    return Path(made).rename(out / NAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stand-in", action="store_true")
    asked = parser.parse_args()
    print(build(asked.out, asked.stand_in))


if __name__ == "__main__":
    main()
