"""A weight gradient that a pipeline runs later: by then somebody may have written over what it is made from, and the
stream may be another one."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass

import torch

from .streams import Handover


class OwedGradient:
    """One weight's gradient, added to its main_grad by the one call that is owed. ``wgrad`` holds what it is made from,
    until then."""

    def __init__(self, point: str, weight, wgrad, add: Callable[[], None]):
        self.point = point
        self._work = wgrad, add  # None once it is done: whoever keeps this keeps no activations
        self._versions = self._versions_of(wgrad)
        self._handover = Handover(weight)

    def _given(self, wgrad):
        return wgrad.saved_x if self.point == "w1" else wgrad.dout

    def _made(self, wgrad):
        return wgrad.dz if self.point == "w1" else wgrad.pa

    def _versions_of(self, wgrad) -> list[int]:
        # Tensors of inference mode have none, and nobody may write them outside it.
        return [tensor._version for tensor in tensors_in(self._given(wgrad)) if not tensor.is_inference()]

    def __call__(self) -> None:
        if self._work is None:
            raise RuntimeError(f"run_wgrad: called again for {self.point}, whose gradient would count twice")
        wgrad, add = self._work
        if self._versions_of(wgrad) != self._versions:
            name = "x" if self.point == "w1" else "the gradient of the output"
            raise RuntimeError(
                f"run_wgrad: {name} changed in place after backward, but the gradient of {self.point} was still to be "
                "computed from it; clone it first"
            )
        for part in (self._given(wgrad), self._made(wgrad), wgrad.routing):
            self._handover.take(tensors_in(part))
        add()
        self._work = None


def tensors_in(value) -> list:
    """Those that a tensor, or what the engine makes of several, consists of."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else []
    return [tensor for part in parts for tensor in tensors_in(part)]
