"""Argument checks that name the argument, what was given and what is needed.

They look at shapes, dtypes and host values only, so none of them waits for a device.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

FLOAT_DTYPES = ("bfloat16", "float16", "float32")
INT_DTYPES = ("int32", "int64")
FP8_DTYPE = "float8_e4m3fn"

# Kernels move 16 bytes at a time, and FP8 blocks are 128 wide: the same limits hold on every backend,
# so that what runs on a CPU today runs on a GPU tomorrow.
ALIGN_BYTES = 16
FP8_ALIGN = 128
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


class Facts(NamedTuple):
    """All that the checks below may look at in a tensor. A verdict on facts can be remembered by them: it cannot depend
    on anything else."""

    shape: Any
    dtype: Any
    device: Any
    contiguous: bool

    def is_contiguous(self) -> bool:
        return self.contiguous


def facts_of(*tensors) -> tuple[tuple, ...]:
    """The fields of each one's ``Facts``: plain tuples, because a key is made at every call and read almost never."""
    return tuple([(tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous()) for tensor in tensors])


def dtype_name(tensor) -> str:
    """``"bfloat16"`` for both ``torch.bfloat16`` and ``paddle.bfloat16``."""
    return _last_word(tensor.dtype)


@cache
def _last_word(dtype) -> str:
    return str(dtype).rsplit(".", 1)[-1]


def shape_of(tensor) -> tuple[int, ...]:
    return tuple(map(int, tensor.shape))


def require_tensor(name: str, value) -> None:
    if not hasattr(value, "dtype") or not hasattr(value, "shape") or not hasattr(value, "data_ptr"):
        raise TypeError(f"{name}: got {type(value).__name__}, need a tensor")


def require_rank(name: str, tensor, rank: int, layout: str) -> None:
    if len(tensor.shape) != rank:
        raise ValueError(f"{name}: got shape {list(shape_of(tensor))}, need {rank} dimensions {layout}")


def require_shape(name: str, tensor, shape: Sequence[int], layout: str) -> None:
    if shape_of(tensor) != tuple(shape):
        raise ValueError(f"{name}: got shape {list(shape_of(tensor))}, need {list(shape)} ({layout})")


def require_dtype(name: str, tensor, allowed: Sequence[str]) -> None:
    if dtype_name(tensor) not in allowed:
        raise TypeError(f"{name}: got dtype {dtype_name(tensor)}, need {' or '.join(allowed)}")


def require_contiguous(name: str, tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got a non-contiguous tensor, need a contiguous one (call .contiguous())")


def require_aligned(name: str, tensor) -> None:
    """For what kernels read or add to where it lies, because a copy would cost too much or cannot take its place."""
    off = tensor.data_ptr() % ALIGN_BYTES
    if off:
        raise ValueError(
            f"{name}: begins {off} bytes behind a multiple of {ALIGN_BYTES}, need one, as kernels move {ALIGN_BYTES} "
            "bytes at a time (leave room before it in the buffer that it is cut from)"
        )


def require_same_place(name: str, tensor, reference_name: str, reference) -> None:
    if place_of(tensor) != place_of(reference):
        given, needed = place_name(tensor), place_name(reference)
        raise ValueError(f"{name}: got a tensor on {given}, need {needed}, where {reference_name} is")


def place_of(tensor):
    """Paddle's place, torch's device: to be compared. Paddle's custom places have no torch-style device."""
    place = getattr(tensor, "place", None)
    return tensor.device if place is None else place


def place_name(tensor) -> str:
    """``cpu``, ``cuda:0``, ``gpu:0``: one spelling per framework, good for comparing and for messages."""
    place = getattr(tensor, "place", None)
    if place is not None:
        return str(place).removeprefix("Place(").removesuffix(")")
    return _device_name(tensor.device)


_device_name = cache(str)


def is_cpu(tensor) -> bool:
    place = getattr(tensor, "place", None)
    return tensor.is_cpu if place is None else place.is_cpu_place()


def require_int(name: str, value, minimum: int = 1) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != value or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, need an integer")
    if number < minimum:
        raise ValueError(f"{name}: got {number}, need at least {minimum}")
    return number


def require_layer_sizes(hidden_size: int, intermediate_size: int, storage: str, fp8: bool) -> None:
    """H and I must suit the widest load and, under FP8, whole 128-blocks."""
    step = FP8_ALIGN if fp8 else ALIGN_BYTES // ITEMSIZE[storage]
    why = "FP8 blocks" if fp8 else f"{ALIGN_BYTES}-byte rows of {storage}"
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size % step:
            raise ValueError(f"{name}: got {size}, need a multiple of {step} for {why}")


def host_counts(tokens_per_expert, n_experts: int) -> list[int]:
    """Counts as a list of E ints. A list or NumPy array costs nothing; a device tensor is copied to the host."""
    given = tokens_per_expert.tolist() if hasattr(tokens_per_expert, "tolist") else tokens_per_expert
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"tokens_per_expert: got {type(tokens_per_expert).__name__}, need a list, NumPy array or int tensor"
        )
    if len(given) != n_experts:
        raise ValueError(f"tokens_per_expert: got {len(given)} counts, need one for each of {n_experts} experts")
    return [require_int(f"tokens_per_expert[{expert}]", count, 0) for expert, count in enumerate(given)]
