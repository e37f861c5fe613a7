"""A node's view of its experts' parameters, and the one owner of every copy made from them.

Copies (native layout, FP8) belong to a *weight epoch*. An epoch ends when the bytes of a parameter change, whoever
changed them. The epoch is told by a fingerprint of those bytes: Paddle's version counters are no witness, because
neither ``set_value`` (which also loads state dicts) nor an optimizer's kernel moves them. On a GPU the fingerprint is
taken, compared and acted upon there (``quant.native_copies``), and the host waits for none of it.
"""

import hashlib
import threading
from dataclasses import dataclass

import numpy as np
import paddle

from .. import checks
from ..enums import is_glu
from ..gemm.api import ExpertWeights
from ..gemm.plan import Plan
from ..quant.api import quantize_weights
from ..quant.native_copies import NativeCopies
from .weight_layout_fusion import fused_grouped_w1_to_sonic, fused_transpose_w2_layout


def tensor_bytes(tensor) -> memoryview:
    """A CPU tensor's values for reading. Through NumPy: Paddle's own view of a slice in another item size begins at
    the wrong byte, and a fused parameter buffer is made of slices."""
    return memoryview(np.ascontiguousarray(tensor.detach().numpy()).reshape(-1).view(np.uint8))


def is_emptied(tensor) -> bool:
    """Whether the caller released the parameter's storage, keeping its shape."""
    return not tensor._is_initialized()


@dataclass(frozen=True, eq=False)
class Look:
    """The parameters of one moment, and the facts about them that a verdict may be remembered by: shape, dtype,
    address, whether contiguous and whether a leaf of the tape, of each. An address belongs to one device, so it tells
    the place as well. While nothing changes the list of facts is the same object."""

    first: list
    second: list
    facts: list

    @property
    def contiguous(self) -> bool:
        return all([contiguous for _, _, _, contiguous, _ in self.facts])

    @property
    def leaves(self) -> bool:
        return all([leaf for *_, leaf in self.facts])


class WeightStore:
    """Parameters of one node: a list of experts, or one object with fused ``weight1`` and ``weight2``."""

    def __init__(self, experts, n_experts: int, hidden_size: int, intermediate_size: int, activation):
        self.n_experts, self.hidden_size, self.intermediate_size = n_experts, hidden_size, intermediate_size
        self.glu = is_glu(activation)
        self.width = intermediate_size * (2 if self.glu else 1)
        self.fused = hasattr(experts, "weight1") and hasattr(experts, "weight2")
        self._experts = experts if self.fused else self._as_list(experts)
        self._begin()
        self.check()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._copies: dict = {}  # (storage, recipe) -> ExpertWeights, all of the present epoch
        self._on_device: dict[tuple, NativeCopies] = {}  # the same by place too, where a GPU keeps them up to date
        self._fingerprint: bytes | None = None
        self._epoch = 0
        self._facts: list | None = None  # that ``check`` has found to be right

    def __getstate__(self) -> dict:
        """A copied store reads the copied experts, and makes its own copies of their weights."""
        names = ("n_experts", "hidden_size", "intermediate_size", "glu", "width", "fused", "_experts")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._begin()  # the first look checks: experts that hold the node have no weights yet while it is copied

    def _as_list(self, experts):
        if not isinstance(experts, (list, tuple)) and not isinstance(experts, paddle.nn.LayerList):
            raise TypeError(
                f"experts: got {type(experts).__name__}, need a list of experts with .up_gate_proj.weight and "
                ".down_proj.weight, or one object with .weight1 and .weight2"
            )
        experts = list(experts)
        if len(experts) != self.n_experts:
            raise ValueError(f"experts: got {len(experts)}, need n_experts={self.n_experts}")
        for number, expert in enumerate(experts):
            for projection in ("up_gate_proj", "down_proj"):
                if not hasattr(getattr(expert, projection, None), "weight"):
                    raise TypeError(f"experts[{number}]: got {type(expert).__name__} without .{projection}.weight")
        return experts

    # The parameters are looked up anew each time: frameworks replace parameter objects when they convert or shard.
    def params1(self) -> list:
        return [self._experts.weight1] if self.fused else [e.up_gate_proj.weight for e in self._experts]

    def params2(self) -> list:
        return [self._experts.weight2] if self.fused else [e.down_proj.weight for e in self._experts]

    def named(self):
        """(name, parameter, shape, layout) of every parameter."""
        e, h, i, f = self.n_experts, self.hidden_size, self.intermediate_size, self.width
        f_name = "2I" if self.glu else "I"
        if self.fused:
            yield "experts.weight1", self._experts.weight1, (e, h, f), f"[E, H, {f_name}]"
            yield "experts.weight2", self._experts.weight2, (e, i, h), "[E, I, H]"
            return
        for number, expert in enumerate(self._experts):
            yield f"experts[{number}].up_gate_proj.weight", expert.up_gate_proj.weight, (h, f), f"[H, {f_name}]"
            yield f"experts[{number}].down_proj.weight", expert.down_proj.weight, (i, h), "[I, H]"

    def check(self) -> None:
        first = None
        for name, param, shape, layout in self.named():
            checks.require_tensor(name, param)
            checks.require_shape(name, param, shape, layout)
            checks.require_dtype(name, param, checks.FLOAT_DTYPES)
            if is_emptied(param):
                raise ValueError(f"{name}: its storage is empty; SonicMoEMlpNode reads its weights at every forward")
            first = first or (name, param)
            if param.dtype != first[1].dtype:
                raise TypeError(
                    f"{name}: got dtype {checks.dtype_name(param)}, need {checks.dtype_name(first[1])}, "
                    f"which {first[0]} has"
                )
            checks.require_same_place(name, param, *first)

    def look(self) -> Look:
        """The parameters now, checked. Every forward looks, once: with many experts that is most of its host time."""
        first, second = self.params1(), self.params2()
        try:
            facts = [(p.shape, p.dtype, p.data_ptr(), p.is_contiguous(), p.is_leaf) for p in (*first, *second)]
        except AttributeError:
            self.check()  # says what is no tensor
            raise
        known = self._facts
        if facts != known:
            self.check()
            self._facts = known = facts
        return Look(first, second, known)

    def place_of(self):
        return self._experts.weight1 if self.fused else self._experts[0].up_gate_proj.weight

    def trainable(self, seen: Look) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """For each expert, whether its two weights take a gradient."""
        repeat = self.n_experts if self.fused else 1
        return tuple(tuple([not p.stop_gradient for p in params] * repeat) for params in (seen.first, seen.second))

    def _read_fingerprint(self, seen: Look) -> bytes:
        digest = hashlib.sha256()
        for param in (*seen.first, *seen.second):
            digest.update(f"{checks.dtype_name(param)} {checks.shape_of(param)}".encode())
            digest.update(tensor_bytes(param))
        return digest.digest()

    def current(self, plan: Plan, seen: Look | None = None) -> ExpertWeights:
        """This moment's weights as the engine reads them; copies are shared by all calls of one epoch."""
        seen = self.look() if seen is None else seen
        with self._lock:
            if seen.contiguous and NativeCopies.can_hold(seen.first[0], plan.recipe, plan.backend):
                return self._current_on_device(plan, seen)
            fingerprint = self._read_fingerprint(seen)
            if fingerprint != self._fingerprint:
                self._fingerprint, self._copies = fingerprint, {}
                self._epoch += 1
            key = (plan.storage, plan.recipe)
            if key not in self._copies:
                self._copies[key] = self._make(plan, seen)
            return self._copies[key]

    def _current_on_device(self, plan: Plan, seen: Look) -> ExpertWeights:
        key = (plan.storage, plan.recipe, checks.place_name(seen.first[0]))
        copies = self._on_device.get(key)
        if copies is None:
            copies = self._on_device[key] = NativeCopies(plan.storage, plan.recipe, self.n_experts, self.glu)
        with paddle.no_grad():
            plain1, plain2, fp8, watch = copies.current(seen.first, seen.second, seen.facts)
        return ExpertWeights(plain1, plain2, fp8, self.hidden_size, self.intermediate_size, watch)

    @property
    def epoch(self) -> int:
        """Where a GPU counts, this waits for it."""
        with self._lock:
            return max([self._epoch, *(copies.epoch() for copies in self._on_device.values())])

    def _make(self, plan: Plan, seen: Look) -> ExpertWeights:
        with paddle.no_grad():
            w1_EHF = self._stacked(seen.first, plan.storage)
            w1 = fused_grouped_w1_to_sonic(w1_EHF) if self.glu else fused_transpose_w2_layout(w1_EHF)
            w2 = fused_transpose_w2_layout(self._stacked(seen.second, plan.storage))
            if plan.recipe is None:
                return ExpertWeights(w1, w2, None, self.hidden_size, self.intermediate_size)
            fp8 = quantize_weights(w1, w2, plan.recipe, plan.backend)
            return ExpertWeights(None, None, fp8, self.hidden_size, self.intermediate_size)

    def _stacked(self, params, storage):
        whole = params[0].detach() if self.fused else paddle.stack([p.detach() for p in params], axis=0)
        return whole.astype(storage)

    def invalidate(self) -> None:
        """Drop every copy. Calls in flight keep the ones they forwarded with."""
        with self._lock:
            self._copies = {}
            for copies in self._on_device.values():
                copies.drop()

    def release_fp8(self) -> None:
        """Drop the FP8 copies only."""
        with self._lock:
            self._copies = {key: copy for key, copy in self._copies.items() if key[1] is None}
            for (_, recipe, _), copies in self._on_device.items():
                if recipe is not None:
                    copies.drop()

    def fp8_copies(self) -> int:
        with self._lock:
            held = [key for key, copies in self._on_device.items() if copies.held]
            return sum(key[1] is not None for key in [*self._copies, *held])
