"""FP8 copies of weights for as long as the weights live.

One set for each pair of weights, found again by these, or by what they are views of. Copies are compared with the
weights at every forward (``quant.api.WeightCopies``), so neither an optimizer nor a write through ``.data`` nor another
tensor in the same place leaves stale ones.
"""

import threading
from collections.abc import Callable

import torch

from ..quant.api import WeightCopies, quantize_weights
from ..quant.formats import QuantWeights
from .streams import InTurns, in_dtype

_lock = threading.Lock()
# By the first weight, or what it is a view of, and by the second: {where in them, and how: (copies, who writes them)}
_kept = torch.utils.weak.WeakTensorKeyDictionary()


def fp8_weights(w1, w2, plan) -> tuple[QuantWeights, Callable[[], bool]]:
    """FP8 copies of ``w1`` [E,2I,H] and ``w2`` [E,H,I] as they are now, and the question whether these are still what
    this call gave: a later call may have found other weights, and writes in the same memory.

    Weights of another type than the plan's are cast anew at every call, and so are their copies.
    """
    storage = getattr(torch, plan.storage)
    owners, cast = [w if w._base is None else w._base for w in (w1, w2)], w1.dtype != storage or w2.dtype != storage
    w1, w2 = in_dtype(w1, storage), in_dtype(w2, storage)
    if cast or not WeightCopies.can_hold(w1, w2, plan.recipe, plan.backend):
        return quantize_weights(w1, w2, plan.recipe, plan.backend), lambda: True
    # Not where they lie: memory may move under a parameter, and that is no reason for another set.
    key = (w1.storage_offset(), w1.shape, w2.storage_offset(), w2.shape, w1.device, w1.dtype, plan.recipe)
    with _lock:
        copies, turns = _kept_for(*owners, key)
        with turns.of(w1):
            found, turn = copies.current(w1, w2), turns.count
    # What a graph will have done between two of its parts is not known while it is captured.
    return found, lambda: turns.count == turn and not torch.cuda.is_current_stream_capturing()


def _kept_for(owner1, owner2, key):
    others = _kept.get(owner1)
    if others is None:
        others = _kept[owner1] = torch.utils.weak.WeakTensorKeyDictionary()
    sets = others.get(owner2)
    if sets is None:
        sets = others[owner2] = {}
    if key not in sets:
        recipe = key[-1]
        sets[key] = WeightCopies(recipe), InTurns()
    return sets[key]


def clear() -> None:
    with _lock:
        _kept.clear()
