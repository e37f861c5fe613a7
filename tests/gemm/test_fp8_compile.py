"""The FP8 GEMMs through nvcc for a GPU that is not there."""

import re
import shutil
import subprocess

import pytest

from sonicmoe import jit

# As the compiler writes them, those with a clamp apart from those without.
CLAMPED = ("6UpKind", "16DownBackwardKind", "20WideDownBackwardKind")
ROWS = ("8RowsKindILi192E", "8RowsKindILi128E")
KERNELS = (*ROWS, "9WgradKind", *(f"{name}ILb{clamp}E" for name in CLAMPED for clamp in (0, 1)))


@pytest.fixture(scope="module")
def assembler_report(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: CUDA code cannot be compiled")
    flags = [flag for flag in jit._flags(jit.Extension("sm90_fp8_gemm", (), (), "sm_90a")) if flag != "-shared"]
    source = jit.source_folder() / "sm90_fp8_gemm.cu"
    target = tmp_path_factory.mktemp("fp8") / "sm90_fp8_gemm.o"
    command = ["nvcc", *flags, "-Xptxas", "-v", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_stay_in_registers(assembler_report, kernel):
    """Two accumulators of 64 to 128 registers, and nothing in local memory. The clamped backward of down for a 16-bit
    wgrad leaves a word of a tile's place there, outside its loops."""
    about = re.search(rf"Function properties for \S*{kernel}\S*\n(.*)\n(.*)", assembler_report)
    assert about, assembler_report
    frame, stores, loads = (int(number) for number in re.findall(r"\d+", about[1]))
    assert max(frame, stores, loads) <= (8 if "WideDownBackwardKindILb1E" in kernel else 0), about[1]
    # Of 65536, dealt out anew by each warpgroup: 384 threads begin with 168.
    assert "Used 168 registers" in about[2]


@pytest.mark.parametrize("item", range(4))
def test_tokens_stay_in_registers(assembler_report, item):
    """Two words of float16's do not."""
    about = re.search(rf"Function properties for \S*token_major\S*ItemE{item}E\S*\n(.*)\n", assembler_report)
    assert about, assembler_report
    assert max(map(int, re.findall(r"\d+", about[1]))) <= (8 if item == 1 else 0), about[1]


def test_products_run_beside_each_other(assembler_report):
    """The assembler waits for each product by itself where registers of one in flight might be touched, and says so."""
    assert "serializ" not in assembler_report
