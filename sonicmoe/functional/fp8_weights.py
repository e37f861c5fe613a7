"""FP8 copies of weights for as long as the weights live.

One set for each pair of weights, found again by these, or by what they are views of. Copies are compared with the
weights at every forward (``quant.api.WeightCopies``), so neither an optimizer nor a write through ``.data`` nor another
tensor in the same place leaves stale ones.
"""

import threading
from collections.abc import Callable

import torch

from .. import checks
from ..quant.api import WeightCopies, quantize_weights
from ..quant.formats import QuantWeights
from .streams import InTurns

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
    w1, w2 = (w.detach().to(storage) for w in (w1, w2))
    if cast or not WeightCopies.can_hold(w1, w2, plan.recipe, plan.backend):
        return quantize_weights(w1, w2, plan.recipe, plan.backend), lambda: True
    # Not where they lie: memory may move under a parameter, and that is no reason for another set.
    places = tuple((w.storage_offset(), checks.shape_of(w)) for w in (w1, w2))
    key = (*places, w1.device, w1.dtype, plan.recipe)
    with _lock:
        sets = _kept.setdefault(owners[0], torch.utils.weak.WeakTensorKeyDictionary()).setdefault(owners[1], {})
        if key not in sets:
            sets[key] = WeightCopies(plan.recipe), InTurns()
        copies, turns = sets[key]
        with turns.of(w1):
            found, turn = copies.current(w1, w2), turns.count
    # What a graph will have done between two of its parts is not known while it is captured.
    return found, lambda: turns.count == turn and not torch.cuda.is_current_stream_capturing()


def clear() -> None:
    with _lock:
        _kept.clear()
