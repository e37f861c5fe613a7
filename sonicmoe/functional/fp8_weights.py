"""FP8 copies of weights for as long as the weights live.

One set for each pair of weights, found again by these, or by what they are views of. Copies are compared with the
weights at every forward (``quant.api.WeightCopies``), so neither an optimizer nor a write through ``.data`` nor another
tensor in the same place leaves stale ones.
"""

import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import torch

from ..quant.api import WeightCopies, quantize_weights
from ..quant.formats import QuantWeights
from .streams import InTurns, in_dtype

_lock = threading.Lock()
# By the ids of both weights, or of what they are views of; an id may come again when its tensor is gone.
_kept: dict[tuple[int, int], "_Pair"] = {}
_ORDINARY = nullcontext()


class _Pair:
    """Two tensors that may go, and what is kept until then."""

    def __init__(self, first, second, ids: tuple[int, int]):
        of_pair = weakref.ref(self)

        def forget(_):
            pair = of_pair()
            if pair is not None and _kept.get(ids) is pair:
                del _kept[ids]

        self.first, self.second = weakref.ref(first, forget), weakref.ref(second, forget)
        self.sets = {}  # where in them, and how: (copies, who writes them)


def fp8_weights(w1, w2, plan) -> tuple[QuantWeights, Callable[[], bool]]:
    """FP8 copies of ``w1`` [E,2I,H] and ``w2`` [E,H,I] as they are now, and the question whether these are still what
    this call gave: a later call may have found other weights, and writes in the same memory.

    Weights of another type than the plan's are cast anew at every call, and so are their copies.
    """
    storage, base1, base2 = getattr(torch, plan.storage), w1._base, w2._base
    owners = w1 if base1 is None else base1, w2 if base2 is None else base2
    if w1.dtype is not storage or w2.dtype is not storage:
        return quantize_weights(in_dtype(w1, storage), in_dtype(w2, storage), plan.recipe, plan.backend), lambda: True
    # Not where they lie: memory may move under a parameter, and that is no reason for another set.
    offsets = None if base1 is None and base2 is None else (w1.storage_offset(), w2.storage_offset())
    sizes = w1.shape, w1.is_contiguous(), w2.shape, w2.is_contiguous()
    key = (offsets, *sizes, w1.device, w1.dtype, plan.recipe, plan.backend)
    with _lock:
        kept = _kept_for(owners, key, w1, w2, plan)
        if kept is not None:
            copies, turns = kept
            with turns.of(w1), _ordinary_tensors():
                found, turn = copies.current(w1, w2), turns.count
    if kept is None:
        return quantize_weights(w1, w2, plan.recipe, plan.backend), lambda: True
    # What a graph will have done between two of its parts is not known while it is captured.
    return found, lambda: turns.count == turn and not torch.cuda.is_current_stream_capturing()


def _ordinary_tensors():
    """What is made under inference mode may not be written in place outside it, and copies outlive the call."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _ORDINARY


def _kept_for(owners, key, w1, w2, plan):
    """(copies, who writes them), or None where there can be none."""
    ids = id(owners[0]), id(owners[1])
    pair = _kept.get(ids)
    if pair is None or pair.first() is not owners[0] or pair.second() is not owners[1]:
        pair = None
    found = None if pair is None else pair.sets.get(key)
    if found is None and WeightCopies.can_hold(w1, w2, plan.recipe, plan.backend):
        if pair is None:
            pair = _kept[ids] = _Pair(*owners, ids)
        found = pair.sets[key] = WeightCopies(plan.recipe), InTurns()
    return found


def clear() -> None:
    with _lock:
        _kept.clear()
