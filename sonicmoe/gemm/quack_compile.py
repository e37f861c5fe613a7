"""A child program: compiles GEMM kernels of ``gemm_kernel.py`` to shared libraries, without a GPU.

    python -P quack_compile.py FOLDER < kernels.json       writes FOLDER/<key>.so for each kernel

It runs in a process of its own, so that the process that trains imports neither the generator nor, under Paddle, a real
torch. Shapes are symbolic: one library serves every number of tokens, experts, and every width of the model.
"""

import itertools
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import quack.cache
import quack.gemm as plain_gemm
import quack.gemm_runtime.host as epilogue_gemm
import torch
from cutlass.runtime import find_runtime_libraries
from quack import activation as act
from quack.epilogue import frontend
from quack.epilogue.math import pack, unpack
from quack.epilogue.ops import ColVecLoad, ColVecReduce
from quack.gemm_config import SplitKMode
from quack.rounding import RoundingMode

GLU = {
    "swiglu": (act.swiglu, act.dswiglu),
    "geglu": (act.geglu, act.dgeglu),
    "reglu": (act.reglu, act.dreglu),
}
SINGLE = {
    "silu": (act.silu, act.dsilu),
    "gelu": (act.gelu_tanh_approx, act.dgelu_tanh_approx),
    "relu": (act.relu, act.drelu),
    "relu_sq": (act.relu_sq, act.drelu_sq),
}
# Sizes only decide which dimension is contiguous: the compiled kernel knows none of them.
T, M, E, H, I = 256, 512, 4, 512, 256


def _clamped(forward, backward, clamp):
    """min(gate, c) and clip(up, -c, c) before the activation; no gradient where a bound holds."""

    def bounded(gate, up):
        return act._minnumf(gate, clamp), act._maxnumf(act._minnumf(up, clamp), -clamp)

    def clamped_forward(gate, up):
        return forward(*bounded(gate, up))

    def clamped_backward(gate, up, dout):
        dgate, dup, out = backward(*bounded(gate, up), dout)
        return act._where_le(dgate, gate, clamp), act._where_abs_le(dup, up, clamp), out

    return clamped_forward, clamped_backward


def _curves(kernel):
    if kernel.activation in SINGLE:
        return (*SINGLE[kernel.activation], False)
    forward, backward = GLU[kernel.activation]
    if kernel.clamp is not None:
        forward, backward = _clamped(forward, backward, kernel.clamp)
    return forward, backward, True


def _store_epilogue():
    @frontend.gemm_epilogue()
    def store(acc):
        return {"D": acc}

    return store


def _up_epilogue(kernel):
    forward, _, glu = _curves(kernel)
    if glu:

        @frontend.gemm_epilogue(outputs=("a",), mode="acc_pair")
        def gated(acc):
            gate, up = unpack(acc)
            return {"D": pack(gate, up), "a": forward(gate, up)}

        return gated

    @frontend.gemm_epilogue(outputs=("a",))
    def activated(acc):
        return {"D": acc, "a": forward(acc)}

    return activated


def _down_backward_epilogue(kernel):
    """acc is dA, not weighted by p: ds = <dA, a> needs it so. dz and pa carry p."""
    _, backward, glu = _curves(kernel)
    ports = {
        "outputs": ("pa",),
        "ops": {"score": ColVecLoad("score")},
        "reduces": {"ds": ColVecReduce("ds", scaled=True)},
    }
    if glu:

        @frontend.gemm_epilogue(**ports, mode="packed_cd_b16x2")
        def gated_backward(acc, c, score):
            gate, up = unpack(c)
            dgate, dup, out = backward(gate, up, acc * score)
            return {"D": pack(dgate, dup), "pa": out * score, "ds": (out, acc)}

        return gated_backward

    @frontend.gemm_epilogue(**ports)
    def activated_backward(acc, c, score):
        dz, out = backward(c, acc * score)
        return {"D": dz, "pa": out * score, "ds": (out, acc)}

    return activated_backward


def _shape(dtype, *sizes):
    return torch.empty(sizes, dtype=dtype, device="meta")


def _grouped_rows(kernel):
    """Every op but wgrad: an epilogue function over a GEMM whose rows come in segments."""
    dtype, tile = getattr(torch, kernel.storage), kernel.tile
    offsets, gather = _shape(torch.int32, E + 1), _shape(torch.int32, M)
    common = {
        "tile_M": tile.m, "tile_N": tile.n, "cluster_M": tile.cluster_m, "cluster_N": tile.cluster_n,
        "tile_K": tile.k, "pingpong": tile.pingpong, "cu_seqlens_m": offsets, "_launch": False,
    }  # fmt: skip
    if kernel.op == "rows":
        b = _shape(dtype, E, H, I).transpose(1, 2) if kernel.transposed else _shape(dtype, E, I, H)
        return _store_epilogue().gemm(_shape(dtype, M, H), b, _shape(dtype, M, I), epi_args={}, **common)
    common["A_idx"] = gather
    x = _shape(dtype, T, H)
    if kernel.op == "up_z":
        return _store_epilogue().gemm(x, _shape(dtype, E, I, H), _shape(dtype, M, I), epi_args={}, **common)
    width = 2 * I if kernel.activation in GLU else I
    z, a = _shape(dtype, M, width), _shape(dtype, M, I)
    if kernel.op == "up":
        return _up_epilogue(kernel).gemm(x, _shape(dtype, E, width, H), z, epi_args={"a": a}, **common)
    w2_t = _shape(dtype, E, H, I).transpose(1, 2)
    extra = {
        "score": _shape(torch.float32, M),
        "pa": a,
        "ds": _shape(torch.float32, M, -(-I // tile.n)),
    }
    return _down_backward_epilogue(kernel).gemm(x, w2_t, z, z, epi_args=extra, **common)


def _wgrad(kernel):
    """Segments of rows are the summed dimension, so both operands are read transposed."""
    dtype, tile = getattr(torch, kernel.storage), kernel.tile
    out = getattr(torch, kernel.out or kernel.storage)
    d = _shape(out, E, I, H).transpose(1, 2) if kernel.transposed else _shape(out, E, H, I)
    absent = dict.fromkeys(("tile_count_semaphore", "rowvec_bias", "colvec_bias", "cu_seqlens_m"))
    return plain_gemm._build_gemm_plan(
        _shape(dtype, T, H).T, _shape(dtype, M, I).T, d, None,
        **absent, batch_idx_permute=None, num_warps=None, SFA=None, SFB=None,
        tile_M=tile.m, tile_N=tile.n, cluster_M=tile.cluster_m, cluster_N=tile.cluster_n, cluster_K=1, tile_K=tile.k,
        pingpong=tile.pingpong, persistent=True, is_dynamic_persistent=False, max_swizzle_size=8,
        cu_seqlens_k=_shape(torch.int32, E + 1), A_idx=_shape(torch.int32, M), add_to_output=kernel.accumulate,
        rounding_mode=RoundingMode.RN, sr_seed_mode=0, alpha_mode=0, beta_mode=0,
        use_tma_gather=False, concat_layout=(), split_k=1, split_k_mode=SplitKMode.SERIAL,
    )  # fmt: skip


def _prepare_generator():
    """It asks the device how many clusters fit, for a number that is an argument of each launch; and it identifies an
    epilogue by all that its function refers to, which fails for packages that are not below a site-packages folder.
    Nothing is cached by that identity here, it only has to differ from one kernel to the next."""
    quack.cache.CACHE_ENABLED = False  # ours is the only cache, and the only one that checks what it loads
    number = itertools.count()
    frontend._function_semantic_key = lambda function: (function.__qualname__, next(number))
    for module in (plain_gemm, epilogue_gemm):
        module.get_max_active_clusters = lambda *_, **__: 1


def _link(made: Path, library: Path) -> None:
    """So that a process which runs the kernel needs no linker of the generator's, whose import takes a second. Triton
    wants a C compiler too."""
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        sys.exit("error: no C compiler to link with; install gcc")
    command = [found, "-shared", "-Wl,-z,now", "-Wl,--no-undefined", "-o", library, made, *find_runtime_libraries()]
    linked = subprocess.run(command, capture_output=True, text=True)
    if linked.returncode:
        sys.exit(f"error: {found} links no library: {(linked.stderr.strip().splitlines() or ['no word of why'])[-1]}")


def main():
    folder = Path(sys.argv[1])
    _prepare_generator()
    for record in json.load(sys.stdin):
        kernel = types.SimpleNamespace(**record["kernel"])
        kernel.tile = types.SimpleNamespace(**kernel.tile)
        plan = _wgrad(kernel) if kernel.op == "wgrad" else _grouped_rows(kernel)
        made, half = folder / f"{record['key']}.o", folder / f"{record['key']}.half"
        plan.compiled_fn.export_to_c(object_file_path=str(made), function_name="gemm")
        _link(made, half)
        half.rename(half.with_suffix(".so"))  # under its name only when it is whole


if __name__ == "__main__":
    main()
