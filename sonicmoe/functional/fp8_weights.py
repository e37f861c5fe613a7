"""FP8 copies of weights for as long as the weights live.

One set for each pair of weights, found again by the first one, or by what it is a view of. Copies are compared with the
weights at every forward (``quant.api.WeightCopies``), so neither an optimizer nor a write through ``.data`` nor another
tensor in the same place leaves stale ones.
"""

import threading

import torch

from .. import checks
from ..quant.api import WeightCopies, quantize_weights
from ..quant.formats import QuantWeights
from .streams import InTurns

_lock = threading.Lock()
# A weight, or what it is a view of -> {where in it, and how: (copies, who writes them)}
_kept = torch.utils.weak.WeakTensorKeyDictionary()


def fp8_weights(w1, w2, plan) -> QuantWeights:
    """FP8 copies of ``w1`` [E,2I,H] and ``w2`` [E,H,I] as they are now.

    Weights of another type than the plan's are cast anew at every call, and so are their copies.
    """
    storage = getattr(torch, plan.storage)
    owner, cast = w1 if w1._base is None else w1._base, w1.dtype != storage or w2.dtype != storage
    w1, w2 = (w.detach().to(storage) for w in (w1, w2))
    if cast or not WeightCopies.can_hold(w1, w2, plan.recipe, plan.backend):
        return quantize_weights(w1, w2, plan.recipe, plan.backend)
    # Not where they lie: memory may move under a parameter, and that is no reason for another set.
    key = (w1.device, w1.storage_offset(), checks.shape_of(w1), checks.shape_of(w2), w1.dtype, plan.recipe)
    with _lock:
        sets = _kept.setdefault(owner, {})
        if key not in sets:
            sets[key] = WeightCopies(plan.recipe), InTurns()
        copies, turns = sets[key]
        with turns.of(w1):
            return copies.current(w1, w2)


def clear() -> None:
    with _lock:
        _kept.clear()
