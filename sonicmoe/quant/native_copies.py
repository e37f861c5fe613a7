"""Copies of checkpoint weights in native layout, plain or FP8, that follow the weights' bytes on the device."""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from .. import checks, cuda_driver
from ..launch import beside, current_stream, is_cuda
from .api import _compiled, _together
from .formats import QuantWeights, Recipe

if find_spec("triton") is not None:
    from . import triton_fingerprint, triton_native, triton_quantize
else:
    triton_fingerprint = triton_native = triton_quantize = None


class Watch(NamedTuple):
    """Tells on the device whether copies have been written again since a call got them."""

    epoch: Any  # [1] int32: how often the memory's weights have changed, now
    mark: Any  # [1] int32: and when the call got them
    told: Any  # [1] int32: 1 once results had to be spoiled

    def spoil(self, *results) -> None:
        """Fill them (up to 4, or None) with NaN if the copies are others now. To be queued behind what read those."""
        triton_native.spoil_if_changed(*self, results)


class NativeCopies:
    """Of one layer's parameters: a tensor for each expert, [H,F] and [I,H], or one for all, [E,H,F] and [E,I,H].

    The device compares bytes and writes again what has changed; the host never waits, and so it cannot know whether
    memory that calls in flight read is being written. Across ``drop`` it is not: calls in flight keep theirs, and the
    next one gets new memory. Otherwise a call's ``Watch`` tells it at its end.
    """

    def __init__(self, storage: str, recipe: Recipe | None, n_experts: int, gated: bool):
        self.storage, self.recipe, self.n_experts, self.gated = getattr(torch, storage), recipe, n_experts, gated
        self._memory = self._table = self._facts = self._made = self._epoch = self._told = None
        self._hashed = None  # the type of the weights that the memory is for
        self._unfinished = False
        self._stream = self._event = None

    @staticmethod
    def can_hold(like, recipe: Recipe | None, backend: str) -> bool:
        """Whether the kernels are there for contiguous parameters like this one; else somebody has to look at them from
        the host."""
        if triton_native is None or backend == "naive" or checks.is_cpu(like) or not is_cuda(like):
            return False
        return recipe is None or _compiled(like, recipe, backend) is not None

    def current(self, params1: list, params2: list, facts):
        """(w1 [E,F,H], w2 [E,H,I], None, watch), or (None, None, FP8 copies, watch): the weights of this moment, on
        the current stream. ``facts`` is the same object as in the call before only if all parameters lie where they
        lay then, in the same form."""
        stream = current_stream(params1[0])
        if self._stream not in (None, stream):
            self._event.wait(stream)
        try:
            return self._bring_up_to_date(params1, params2, facts)
        finally:
            self._event = self._event or cuda_driver.Event()
            self._stream = stream
            self._event.record(stream)

    def _bring_up_to_date(self, params1, params2, facts):
        weights = [*params1, *params2]
        if self._epoch is None:
            self._epoch, self._told = (torch.zeros([1], dtype=torch.int32, device=beside(weights[0])) for _ in range(2))
        if self._hashed != weights[0].dtype:
            # A wider type needs room for more sums, and the same bytes mean other numbers: nothing has been seen yet.
            self._memory, self._hashed = triton_fingerprint.make_memory(weights), weights[0].dtype
        elif self._unfinished:
            # An earlier call noted the weights and then did not get as far as copying them: forget what it noted.
            self._memory.state.zero_()
        if self._made is None:
            self._epoch = self._epoch.clone()  # that of the memory before stands still: so does that memory
        mark = torch.empty([1], dtype=torch.int32, device=beside(weights[0]))
        self._unfinished = True
        in_place = self._facts is facts
        found = triton_fingerprint.fingerprint(weights, table=self._table, memory=self._memory, in_place=in_place)
        self._table, self._facts = found.table, facts
        triton_native.count_change(self._epoch, found.changed, mark, len(weights))
        changed = None if self._made is None else found.changed
        made = self._made or (None, None)
        self._made = tuple(
            self._one(params, first, gated, into, changed)
            for params, first, gated, into in (
                (params1, 0, self.gated, made[0]),
                (params2, len(params1), False, made[1]),
            )
        )
        self._unfinished = False
        watch = Watch(self._epoch, mark, self._told)
        if self.recipe is None:
            return (*self._made, None, watch)
        return None, None, self._fp8(), watch

    def _one(self, params, first: int, gated: bool, into, changed):
        plain = into if self.recipe is None else None
        if plain is None:
            plain = triton_native.room(self.n_experts, params[0], self.storage)
        triton_native.to_native(params, first, self.n_experts, self._table, changed, plain, gated)
        if self.recipe is None:
            return plain
        flags = None if changed is None else changed[first : first + len(params)]
        made = None if into is None else (into,)
        return triton_quantize.quantize_weights((plain,), self.recipe.pow2, made, flags)[0]

    def _fp8(self) -> QuantWeights:
        return _together(*self._made, self.recipe)

    def epoch(self) -> int:
        """How often the bytes have changed. Waits for the device, and raises what it could not say before."""
        if self._epoch is None:
            return 0
        # Not int(): of a tensor with a dimension, Paddle's asks NumPy for what newer ones refuse.
        if self._told.tolist()[0]:
            self._told.zero_()
            raise RuntimeError(
                "weights: they changed between a forward and its backward, and another forward came in between; the "
                "gradients of that backward are NaN. Call step() between the last backward and the change"
            )
        return self._epoch.tolist()[0]

    def drop(self) -> None:
        """Let go of the memory. Calls in flight keep what they were given, and the next one gets new memory."""
        self._made = None

    @property
    def held(self) -> bool:
        return self._made is not None
