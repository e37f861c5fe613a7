"""FP8 tensors that callers hand over: dispatched activations, combine gradients, weights.

Scales come in several carriers. All are told apart by dtype and shape, which never coincide:

    float32 [T, H/128]     one scale for 128 channels (DeepEP on Hopper)
    uint8   [T, H/32]      UE8M0 bytes, one for 32 channels
    int32   [T, H/128]     four UE8M0 bytes a word, the first channel block in the low byte
    int32   [T, H/32]      one UE8M0 value an int
"""

import torch

from .. import checks
from ..quant.formats import QuantTensor

LAYOUTS = ("fp32_1x128", "ue8m0_bytes", "ue8m0_words", "ue8m0_values")


def scale_layout(scale, n_rows: int, hidden: int, name: str) -> str:
    """Which carrier ``scale`` is, by dtype and shape alone."""
    columns_of = {"float32": {hidden // 128: "fp32_1x128"}, "uint8": {hidden // 32: "ue8m0_bytes"}}
    columns_of["int32"] = {hidden // 128: "ue8m0_words", hidden // 32: "ue8m0_values"}
    shape, dtype = checks.shape_of(scale), checks.dtype_name(scale)
    layout = columns_of.get(dtype, {}).get(shape[-1] if len(shape) == 2 else None)
    if layout is None or shape[0] != n_rows:
        raise ValueError(
            f"{name}: got {dtype} {list(shape)}, need float32 [{n_rows}, {hidden // 128}], uint8 [{n_rows}, "
            f"{hidden // 32}], int32 [{n_rows}, {hidden // 128}] (packed words) or int32 [{n_rows}, {hidden // 32}] "
            "(one value an int)"
        )
    return layout


def _unpack_words(words_TW):
    """[T,W] int32 -> [T,4W] bytes, low byte first. Shifts of a negative word bring in ones: cut to 8 bits each time."""
    parts = []
    for byte in range(4):
        shifted = words_TW >> (8 * byte)
        parts.append(shifted - ((shifted >> 8) << 8))
    return torch.stack(parts, dim=-1).reshape([int(words_TW.shape[0]), 4 * int(words_TW.shape[1])]).to(torch.uint8)


def packed_scale_words(scale, n_rows: int, hidden: int, name: str):
    """Any carrier as [T, H/128] of 4-byte words: float32 as it is, four UE8M0 bytes an int32, low byte first."""
    if hidden % checks.FP8_ALIGN:
        raise ValueError(f"cols: got {hidden}, need a multiple of {checks.FP8_ALIGN} for FP8 blocks")
    layout = scale_layout(scale, n_rows, hidden, name)
    if layout in ("fp32_1x128", "ue8m0_words"):
        return scale
    byte = scale.to(torch.int32).reshape([n_rows, hidden // 128, 4])
    word = byte[:, :, 0]
    for number in range(1, 4):
        word = word + (byte[:, :, number] << (8 * number))
    return word


def activation_payload(data, scale, name: str, scale_name: str, layout: str | None = None) -> QuantTensor:
    """e4m3 ``data [T,H]`` with its scales, in one form."""
    checks.require_tensor(name, data)
    checks.require_rank(name, data, 2, "[T, H]")
    checks.require_dtype(name, data, (checks.FP8_DTYPE,))
    n_rows, hidden = checks.shape_of(data)
    if hidden % checks.FP8_ALIGN:
        raise ValueError(f"{name}: got {hidden} channels, need a multiple of {checks.FP8_ALIGN} for FP8 blocks")
    if scale is None:
        raise ValueError(f"{scale_name}: got None, but {name} is FP8 and means nothing without its scales")
    checks.require_tensor(scale_name, scale)
    checks.require_same_place(scale_name, scale, name, data)
    found = scale_layout(scale, n_rows, hidden, scale_name)
    if layout not in (None, found):
        if layout not in LAYOUTS:
            raise ValueError(f"{scale_name}: got layout {layout!r}, need one of {list(LAYOUTS)}")
        raise ValueError(f"{scale_name}: got layout {layout!r}, but dtype and shape say {found!r}")
    if found == "fp32_1x128":
        return QuantTensor(data, scale, (1, 128))
    if found == "ue8m0_words":
        scale = _unpack_words(scale)
    elif found == "ue8m0_values":
        scale = scale.to(torch.uint8)
    return QuantTensor(data, scale, (1, 32))


def combine_gradient(handle, dout, n_rows: int, hidden: int):
    """dout as the engine takes it: the FP8 gradient that the combine's backward left in ``handle``, or ``dout``.

    The handle is emptied, so that a later backward can never read this one's gradient. An empty one is an error: stock
    Paddle casts an e4m3 gradient to the output's type on the way here, and codes without scales look like numbers.
    """
    if handle is not None:
        missing = [key for key in ("data", "scale") if handle.get(key) is None]
        if missing:
            raise ValueError(
                f"fp8_combine_grad_handle: got keys {sorted(handle)} at backward, need 'data' and 'scale', which the "
                "combine's backward puts there; leave the handle away for a gradient that is not FP8"
            )
        names = ("fp8_combine_grad_handle['data']", "fp8_combine_grad_handle['scale']")
        payload = activation_payload(handle["data"], handle["scale"], *names)
        checks.require_shape("fp8_combine_grad_handle['data']", payload.data, (n_rows, hidden), "[T, H]")
        handle.clear()
        return payload
    if checks.dtype_name(dout) == checks.FP8_DTYPE:
        raise ValueError(
            "gradient of the expert output: got float8_e4m3fn without scales; the combine's backward must fill "
            "fp8_combine_grad_handle with 'data' and 'scale'"
        )
    return dout


def weight_payload(weight, attribute: str, name: str, shape: tuple[int, ...], beside) -> QuantTensor:
    """``weight.fp8`` or ``weight.transposed_fp8``: e4m3 data of ``shape``; its block is read off the scales' shape."""
    pair = getattr(weight, attribute, None)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(
            f"{name}: its bf16 storage is empty and {name}.{attribute} is {type(pair).__name__}; need a pair "
            "(data, scale), as quantize_native_fp8_weights returns"
        )
    data, scale = pair
    for number, part in enumerate(pair):
        checks.require_tensor(f"{name}.{attribute}[{number}]", part)
        checks.require_same_place(f"{name}.{attribute}[{number}]", part, "hidden_states", beside)
    checks.require_dtype(f"{name}.{attribute}[0]", data, (checks.FP8_DTYPE,))
    checks.require_shape(f"{name}.{attribute}[0]", data, shape, "native layout")
    checks.require_dtype(f"{name}.{attribute}[1]", scale, ("float32", "uint8"))
    blocks = []
    for dim in (1, 2):
        count = checks.shape_of(scale)[dim] if len(scale.shape) == 3 else 0
        if count == 0 or shape[dim] % count or checks.shape_of(scale)[0] != shape[0]:
            given = list(checks.shape_of(scale))
            raise ValueError(f"{name}.{attribute}[1]: got shape {given}, which tiles no {list(shape)}")
        blocks.append(shape[dim] // count)
    return QuantTensor(data, scale, (blocks[0], blocks[1]))
