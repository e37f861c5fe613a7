"""The Triton quantizers beside ``sonicmoe/quant/naive.py``, on any device: in the interpreter, or on a GPU.

Each check returns what differed, as lines; an empty list is success. Bytes and the bits of scales are compared, never
values. Only for processes with a real torch.
"""

import contextlib
import functools
import itertools
import warnings
from unittest import mock

import numpy as np
import torch

from sonicmoe.quant import api, naive, triton_quantize
from sonicmoe.quant.formats import QuantTensor, make_recipe
from tests.support import fp8_model
from tests.support.drawn import KINDS, TYPES, at_any_address, differences, draw, same_bits

# ---- The interpreter -------------------------------------------------------------------------------------------------


def _as_the_gpu_converts(original, data, source, target, rounding):
    """Triton's interpreter cuts off or rounds half away, wraps around instead of saturating, and takes subnormals and
    the e4m3 NaN for other numbers. In the kernels the casts are instructions, so it is the interpreter that is mended.
    What an H100 gives in their place, tests/gpu compares with the definition."""
    names = str(source), str(target)
    if names == ("fp32", "fp8e4nv"):
        return fp8_model.encode(data)
    if names == ("fp8e4nv", "fp32"):
        return fp8_model.decode(data).astype(np.float32).view(np.uint32)
    if names == ("bf16", "fp32"):
        return data.view(np.uint16).astype(np.uint32) << 16
    if names in (("fp32", "bf16"), ("fp32", "fp16")):
        rounded = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return (
            rounded.to({"bf16": torch.bfloat16, "fp16": torch.float16}[names[1]])
            .view(torch.int16)
            .numpy()
            .view(np.uint16)
        )
    return original(data, source, target, rounding)


@contextlib.contextmanager
def arithmetic_of_a_gpu(device):
    """On the CPU: exact casts, and a ``maximum`` that prefers numbers to NaN, as Triton documents it."""
    if torch.device(device).type != "cpu":
        yield
        return
    from triton.runtime import interpreter

    def prefer_numbers(self, left, right):
        return self.binary_op(left, right, np.fmax)

    convert = functools.partial(_as_the_gpu_converts, interpreter._convert_float)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(interpreter, "_convert_float", convert))
        stack.enter_context(mock.patch.object(interpreter.InterpreterBuilder, "create_maxnumf", prefer_numbers))
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # NumPy's of blocks that are all NaN
        yield


def in_gpu_arithmetic(check):
    @functools.wraps(check)
    def run(device, *args, **kwargs):
        with arithmetic_of_a_gpu(device):
            return check(device, *args, **kwargs)

    return run


def cases(shapes, kinds):
    """(rng, shape, kind, dtype, pow2): every kind with every type; the shapes and roundings take turns."""
    for number, (kind, dtype) in enumerate(itertools.product(kinds, TYPES)):
        for turn, shape in enumerate(shapes):
            yield np.random.default_rng(number), shape, kind, dtype, (number + turn) % 2 == 1


# ---- Checks ----------------------------------------------------------------------------------------------------------

ROWS = [(19, 384), (1, 128), (33, 256), (0, 256)]
WEIGHTS = [(2, 128, 256), (1, 256, 256), (0, 128, 128)]


@in_gpu_arithmetic
def check_quantize_rows(device, shapes=ROWS, kinds=KINDS):
    found = []
    for rng, shape, kind, dtype, pow2 in cases(shapes, kinds):
        x = draw(rng, shape, kind, dtype, device)
        wanted = naive.quantize(x, (1, 128), pow2=pow2)
        about = f"rows {shape} {kind} {dtype} pow2={pow2}"
        apart = x.repeat(1, 2)[:, : shape[1]]
        for place, given in (("here", x), ("at any address", at_any_address(x)), ("apart", apart)):
            made = triton_quantize.quantize_rows(given, pow2)
            found += differences(f"{about} {place}", (made.data, made.scale), (wanted.data, wanted.scale))
    return found


@in_gpu_arithmetic
def check_quantize_weights(device, shapes=WEIGHTS, kinds=KINDS):
    found = []
    for rng, shape, kind, dtype, pow2 in cases(shapes, kinds):
        w = draw(rng, shape, kind, dtype, device)
        wanted = naive.quantize(w, (128, 128), pow2=pow2)
        turned = naive.transposed(wanted)
        given = at_any_address(w) if shape[1] > 128 else w
        # Alone, and beside one of another shape, before it and behind it.
        other = draw(rng, (shape[0], 128, 384), kind, dtype, device)
        about = f"weight {shape} {kind} {dtype} pow2={pow2}"
        places = {"alone": (0, (given,)), "first": (0, (given, other)), "second": (1, (other, given))}
        for place, (number, pair) in places.items():
            made = triton_quantize.quantize_weights(pair, pow2)[number]
            found += differences(f"{about} {place}", made[:2], (wanted.data, wanted.scale))
            found += differences(f"{about} {place}, transposed", made[2:], (turned.data, turned.scale))
    return found


@in_gpu_arithmetic
def check_flags_of_weights(device):
    """Only the shares of experts whose flags are set are written, of each weight its own."""
    rng, found = np.random.default_rng(0), []
    weights = [draw(rng, (4, *size), "ordinary", torch.bfloat16, device) for size in ((256, 128), (128, 384))]
    wanted = triton_quantize.quantize_weights(weights)
    for given in (
        (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 1, 1, 0), (1, 0, 0, 0), (0, 0, 1, 0, 0, 1, 0, 0)
    ):  # fmt: skip
        flags, count = torch.tensor(given, dtype=torch.int32, device=device), min(2, len(given))
        into = [[part.view(torch.uint8).clone().fill_(77).view(part.dtype) for part in made] for made in wanted[:count]]
        triton_quantize.quantize_weights(weights[:count], False, into, flags)
        for number, made in enumerate(into):
            right, of_experts = wanted[number], flags.reshape(count, -1)[number]
            of_experts = of_experts.repeat_interleave(4 // len(of_experts)).tolist()
            for expert, flag in enumerate(of_experts):
                untouched = all(bool((part[expert].view(torch.uint8) == 77).all()) for part in made)
                same = all(same_bits(part[expert], one[expert]) for part, one in zip(made, right, strict=True))
                if not (same if flag else untouched):
                    found.append(f"flags {given}: weight {number}, expert {expert}")
    return found


@in_gpu_arithmetic
def check_dequantize_rows(device, shapes=ROWS):
    """Every code, scales of any size, and scales that are NaN or infinite; through the choice that engines make."""
    found = []
    for rng, shape, kind, dtype, _ in cases(shapes, ("ordinary", "extreme", "holes")):
        codes = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).to(device).view(torch.float8_e4m3fn)
        scale = draw(rng, shape, kind, torch.float32, device)[:, ::128].abs().contiguous()
        wanted = naive.dequantize(QuantTensor(codes, scale, (1, 128))).to(dtype)
        apart = codes.view(torch.uint8).repeat(1, 2).view(torch.float8_e4m3fn)[:, : shape[1]]
        for place, data in (("here", codes), ("apart", apart)):
            made = triton_quantize.dequantize_rows(data, scale, dtype)
            if not torch.equal(made.isnan(), wanted.isnan()) or not same_bits(
                *(v.nan_to_num(1.0) for v in (made, wanted))
            ):
                found.append(f"values {shape} {kind} {dtype} {place}")
    return found


@contextlib.contextmanager
def on_hopper(kernels, hopper: bool):
    """What chooses takes every device for an H100, or for a CPU, and finds these kernels."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(api, "triton_quantize", kernels))
        stack.enter_context(mock.patch.object(api.checks, "is_cpu", lambda tensor: not hopper))
        stack.enter_context(mock.patch.object(api, "arch", lambda tensor: "sm_90a"))
        yield


@in_gpu_arithmetic
def check_choice(device):
    """Which of the two runs, told by a call of the kernels; what they return is the same."""
    rng, found = np.random.default_rng(0), []
    w1, w2 = (draw(rng, (1, *size), "holes", torch.bfloat16, device) for size in ((256, 128), (128, 128)))
    kernels = mock.Mock(wraps=triton_quantize)
    for recipe, backend, hopper, calls in (
        (make_recipe("sm90"), "auto", True, 2),
        (make_recipe("sm90", pow2=True), "sm90_fp8", True, 2),
        (make_recipe("sm90"), "naive", True, 0),
        (make_recipe("sm100"), "auto", True, 0),
        (make_recipe("sm90"), "auto", False, 0),
    ):
        kernels.reset_mock()
        with on_hopper(kernels, hopper):
            rows = api.quantize_rows(w1[0], recipe, backend)
            weights = api.quantize_weights(w1, w2, recipe, backend)
        about = f"{recipe} backend={backend} hopper={hopper}"
        if len(kernels.method_calls) != calls:
            found.append(f"{about}: {kernels.method_calls}")
        wanted = naive.quantize_weights(w1, w2, recipe)
        pairs = [("rows", rows, naive.quantize_rows(w1[0], recipe))]
        pairs += [(name, getattr(weights, name), getattr(wanted, name)) for name in ("w1", "w2", "w1_t", "w2_t")]
        for name, one, other in pairs:
            found += differences(f"{about} {name}", (one.data, one.scale), (other.data, other.scale))
            if one.block != other.block:
                found.append(f"{about} {name}: block {one.block}")
    for recipe, hopper, calls in (
        (make_recipe("sm90"), True, 1),
        (make_recipe("sm90"), False, 0),
        (make_recipe("sm100"), True, 0),
    ):
        kernels.reset_mock()
        with on_hopper(kernels, hopper):
            rows = naive.quantize_rows(w1[0], recipe)
            right = same_bits(api.dequantize_rows(rows, torch.bfloat16), naive.dequantize(rows).bfloat16())
        if len(kernels.method_calls) != calls or not right:
            found.append(f"values of {recipe} hopper={hopper}: {kernels.method_calls}, right: {right}")
    return found


@in_gpu_arithmetic
def check_weight_copies(device):
    """Copies follow the bytes of each weight, in their own memory, and what has not changed is not written."""
    generator, recipe, found = torch.Generator().manual_seed(0), make_recipe("sm90"), []
    w1, w2 = (
        torch.randn(*shape, generator=generator).bfloat16().to(device) for shape in ((2, 256, 128), (2, 128, 128))
    )
    first, copies = w1.clone(), api.WeightCopies(recipe)

    def require(about, spoilt=()):
        made, wanted = copies.current(w1, w2), naive.quantize_weights(w1, w2, recipe)
        for name in ("w1", "w2", "w1_t", "w2_t"):
            one, other = getattr(made, name), getattr(wanted, name)
            right = differences(name, (one.data, one.scale), (other.data, other.scale)) == []
            if right == (name[:2] in spoilt):
                found.append(f"{about}: {name} {'was written' if right else 'is wrong'}")
        return made

    made = require("first")
    made.w1.data.view(torch.uint8).fill_(1)
    made.w1_t.scale.fill_(3.0)
    if require("nothing changed", spoilt=("w1",)).w1.data is not made.w1.data:
        found.append("new memory")
    w2.data[1, 5, 7] += 1.0
    require("w2 changed", spoilt=("w1",))
    w1.mul_(2.0)
    require("w1 changed")
    w1.copy_(first)
    require("w1 as it was at first")
    # A call that is cut off between looking and copying, the very first one and a later one.
    for cut in (copies, api.WeightCopies(recipe)):
        copies = cut
        w2.add_(1.0)
        cut_off = mock.patch.object(triton_quantize, "quantize_weights_repeatable", side_effect=MemoryError)
        with cut_off, contextlib.suppress(MemoryError):
            copies.current(w1, w2)
        require("after a call that failed")
    return found


CHECKS = {
    "quantize": (
        check_weight_copies,
        check_quantize_rows,
        check_quantize_weights,
        check_flags_of_weights,
        check_dequantize_rows,
        check_choice,
    ),
}
