"""What can be switched, and the only place that looks at environment flags.

``FLAGS`` is the single table: ``SonicMoEConfig``, ``python -m sonicmoe.cli.env`` and the README are made from it.
The environment is read when a config is built, never at import: a launcher, a notebook or a test may set a flag
after importing the package and still be heard.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

PREFIX = "SONIC_MOE_"


# ---- Domains: what a setting may hold --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """``check`` returns the value to keep or raises; ``parse`` first turns a flag's text into such a value."""

    value: str  # what an argument may be, for error messages
    text: str  # what the environment may say, for error messages and the README
    check: Callable[[Any], Any]
    parse: Callable[[str], Any] = str


def _parse_bool(text: str) -> bool:
    word = text.lower()
    if word in ("1", "true", "on"):
        return True
    if word in ("0", "false", "off"):
        return False
    raise ValueError


def _check_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _check_directory(value: Any) -> Path:
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError
    if not path:
        raise ValueError
    path = os.path.expanduser(path)
    # An unknown home leaves the tilde, and a directory of that very name would appear wherever the job started.
    if path.startswith("~"):
        raise ValueError
    # Absolute now, so that a later chdir does not move the cache of a config that is already frozen.
    return Path(os.path.abspath(path))


def _check_clamp(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    try:
        clamp = float(value)
    except OverflowError:  # an int too large for a float
        raise ValueError from None
    if not (math.isfinite(clamp) and clamp > 0):
        raise ValueError
    return clamp


def _check_multiprocessors(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError
    if value < 2:  # a cluster is two of them
        raise ValueError
    return int(value)


def _listing(words: list[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _one_of(*choices: str | None) -> Domain:
    def check(value: Any) -> str | None:
        if value is not None and not isinstance(value, str):
            raise TypeError
        # index() raises ValueError for a stranger; returning our own string drops a caller's str subclass.
        return choices[choices.index(value)]

    return Domain(
        value=_listing([repr(choice) for choice in choices]),
        text=_listing([choice for choice in choices if choice is not None]),
        check=check,
    )


def _always(constant: bool) -> Domain:
    """A boolean that must not be turned: it may only be told what the package does anyway."""

    def check(value: Any) -> bool:
        if value is not constant:
            raise ValueError
        return value

    return Domain(
        value=repr(constant), text="1, true or on" if constant else "0, false or off", check=check, parse=_parse_bool
    )


def _refuse(value: Any) -> None:
    raise ValueError


_BOOL = Domain(value="True or False", text="0, 1, true, false, on or off", check=_check_bool, parse=_parse_bool)
_PATH = "a path (~ only for a home that exists)"
_DIRECTORY = Domain(value=_PATH, text=_PATH, check=_check_directory)
_CLAMP = Domain(value="None or a finite number above 0", text="", check=_check_clamp)
_MULTIPROCESSORS = Domain(value="None or an integer of at least 2", text="", check=_check_multiprocessors)
_BLOCKSCALED = _one_of("fp8-blockscaled")
_NOTHING = Domain(value="nothing", text="no value", check=_refuse)


# ---- The table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """One setting. ``env`` is None for a field that only the constructor sets; ``field`` is None where nothing can
    be set, that is for every flag that is not ``active``."""

    env: str | None
    field: str | None
    domain: Domain
    default: Any
    meaning: str
    kind: str = "active"  # or "always-on", "retired"

    def from_text(self, text: str) -> Any:
        rest = {
            "active": " (or nothing, for the default)",
            "always-on": f". It is always on: {self.meaning}",
            "retired": f". It is retired: {self.meaning}",
        }[self.kind]
        return _fit(self.env, text, lambda: self.domain.check(self.domain.parse(text)), self.domain.text + rest)

    def from_argument(self, value: Any) -> Any:
        return _fit(self.field, value, lambda: self.domain.check(value), self.domain.value)

    def default_value(self) -> Any:
        """The default as a config holds it; only a directory changes on the way (its home is expanded)."""
        return self.from_argument(self.default) if self.field else self.default

    def is_default(self, value: Any) -> bool:
        if isinstance(value, Path):
            # Not through default_value(), which raises where there is no home: repr() must work there too.
            return str(value) == os.path.abspath(os.path.expanduser(self.default))
        return value == self.default


def _fit(name: str | None, given: Any, convert: Callable[[], Any], need: str) -> Any:
    try:
        return convert()
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: got {given!r}, need {need}") from None


def _fp8(name: str) -> str:
    return f"{PREFIX}FP8_{name}"


FLAGS: tuple[Flag, ...] = (
    Flag(_fp8("MODE"), "fp8_mode", _one_of("perf", "mem", None), None,
         "Master switch. Unset computes in BF16; `perf` computes in FP8; `mem` is `perf` plus stage-wise memory."),
    Flag("USE_QUACK_GEMM", "use_quack_gemm", _BOOL, False,
         "Run the grouped GEMMs through QuACK's CuTeDSL kernels; Blackwell needs it."),
    Flag(_fp8("WGRAD"), "fp8_wgrad", _BOOL, False,
         "In an FP8 mode, compute weight gradients in FP8 as well; they are BF16 otherwise."),
    Flag(_fp8("ASSUME_ALIGNED"), "fp8_assume_aligned", _BOOL, False,
         "Trust that token counts are aligned and skip the check, which costs a host sync."),
    Flag(_fp8("ISO32_WEIGHT"), "fp8_iso32_weight", _BOOL, False,
         "Scale FP8 weights in 32x32 blocks, so that one copy serves both directions: half the FP8 weight memory."),
    Flag(_fp8("RECOMPUTE_Z"), "fp8_recompute_z", _BOOL, False,
         "Do not keep z for backward; run the up-projection again there. Less memory, more time."),
    Flag("SONIC_MOE_STAGEWISE_MEMORY", "stagewise_memory", _BOOL, False,
         "Free each activation as soon as its stage is over. A lower memory peak, slightly more time."),
    Flag("SONIC_MOE_CACHE_DIR", "cache_dir", _DIRECTORY, "~/.cache/sonicmoe",
         "Where compiled kernels are kept; processes and machines may share it."),
    Flag("SONIC_MOE_VALIDATE_DISPATCH", "validate_dispatch", _BOOL, False,
         "Check that no row of `dispatched_indices` names an expert twice and that the counts are right, and say which "
         "row or expert is wrong. Costs a host sync."),
    Flag(_fp8("FUSED_GATED"), None, _always(True), True,
         "the up-projection applies SwiGLU and quantizes in its epilogue.", "always-on"),
    Flag(_fp8("EPILOGUE_QUANT"), None, _always(True), True,
         "GEMM outputs that stay in FP8 are quantized inside the GEMM.", "always-on"),
    Flag(_fp8("FUSED_SWIGLU_QUANT"), None, _always(True), True,
         "SwiGLU and the row quantization of its result are one kernel.", "always-on"),
    Flag(_fp8("SAVE_Z_FP8"), None, _always(True), True,
         "what backward needs of z is kept in FP8, never in BF16.", "always-on"),
    Flag(_fp8("RECOMPUTE_OPT_B"), None, _always(False), False,
         "unset it; to save the memory of z, set `SONIC_MOE_FP8_RECOMPUTE_Z=1`.", "retired"),
    Flag(_fp8("WGRAD_BETA_ACCUM"), None, _always(False), False,
         "unset it; there is one way of accumulating weight gradients, in fp32.", "retired"),
    Flag(_fp8("UPPROJ_EPILOGUE_PRECISION"), None, _BLOCKSCALED, "fp8-blockscaled",
         "unset it; in an FP8 mode the up-projection always ends in block-scaled FP8.", "retired"),
    Flag(_fp8("DOWNPROJ_MAINLOOP_PRECISION"), None, _BLOCKSCALED, "fp8-blockscaled",
         "unset it; in an FP8 mode the down-projection always multiplies in block-scaled FP8.", "retired"),
    Flag(_fp8("DOWNPROJ_WEIGHT_PRECISION"), None, _BLOCKSCALED, "fp8-blockscaled",
         "unset it; in an FP8 mode the down-projection weights are FP8 too, and `bf16` is not available. For BF16 "
         "weights unset `SONIC_MOE_FP8_MODE`.", "retired"),
    Flag(_fp8("FUSED_ZY1_QUANT"), None, _always(False), False,
         "unset it; z and the activation are quantized by separate steps.", "retired"),
    Flag(_fp8("BLOCKSCALED_EXPERT_CAPACITY"), None, _NOTHING, None,
         "unset it; room for each expert follows the tokens routed to it and cannot be overridden.", "retired"),
)  # fmt: skip

ARGUMENTS: tuple[Flag, ...] = (
    Flag(None, "fp8_recipe", _one_of("auto", "sm90", "sm100"), "auto",
         "Scale format of FP8; `auto` takes the one the device multiplies natively."),
    Flag(None, "fp8_pow2_scale", _BOOL, False,
         "Round fp32 block scales up to a power of two."),
    Flag(None, "swiglu_clamp", _CLAMP, None,
         "Bound on the inputs of SwiGLU; None is no bound."),
    Flag(None, "gemm_multiprocessors", _MULTIPROCESSORS, None,
         "At most so many multiprocessors for the experts' GEMMs, so that communication keeps some; None is all."),
    Flag(None, "backend", _one_of("auto", "naive"), "auto",
         "`naive` computes with ordinary framework operators, on any device."),
    Flag(None, "metadata_backend", _one_of("auto", "naive", "host", "triton", "cuda"), "auto",
         "Which implementation makes routing metadata; all give the same arrays."),
)  # fmt: skip

_BY_ENV = {flag.env: flag for flag in FLAGS}
_BY_FIELD = {flag.field: flag for flag in (*FLAGS, *ARGUMENTS) if flag.field}


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def read_environment() -> dict[str, Any]:
    """The flags that are set, by environment name, as Python values. An empty one counts as unset.

    Every flag is checked, also one that an argument overrides or that does nothing in this mode: a flag somebody
    bothered to set and that is silently ignored is the mistake this function exists to catch.
    """
    found = {}
    # Names first, then values: another thread may remove a variable between the two.
    for name in list(os.environ):
        flag = _BY_ENV.get(name)
        if flag is not None:
            text = os.environ.get(name)
            if text:
                found[name] = flag.from_text(text)
        elif name.startswith(PREFIX):
            raise ValueError(f"{name}: there is no such flag; the nearest is {_nearest(name, _BY_ENV)}")
    return found


# ---- The config ------------------------------------------------------------------------------------------------------


class HashedOnce:
    """For frozen dataclasses that every call looks something up by. They write ``__hash__ = HashedOnce.__hash__``,
    because a dataclass makes its own otherwise."""

    def __hash__(self) -> int:
        known = self.__dict__.get("_hash")
        if known is None:
            known = hash(tuple(getattr(self, field.name) for field in fields(self)))
            object.__setattr__(self, "_hash", known)
        return known

    def __getstate__(self):
        # Hashes of text differ from process to process, so a copy in another one counts anew.
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}


_active: ContextVar[SonicMoEConfig | None] = ContextVar("sonicmoe_config", default=None)
# One entry: (the whole environment as it was, the config made from it).
_standing: list[tuple[dict, SonicMoEConfig | None]] = [({}, None)]


@dataclass(frozen=True, init=False, repr=False)
class SonicMoEConfig(HashedOnce):
    """Settings of a call, frozen: an argument wins, then the environment at construction, then the default.

    ``use_fp8=True`` stands for ``fp8_mode="perf"`` unless an argument or the environment names a mode, and
    ``use_fp8=False`` for BF16 whatever the environment says. Values are compared, not where they came from.
    """

    fp8_mode: str | None
    use_quack_gemm: bool
    fp8_wgrad: bool
    fp8_assume_aligned: bool
    fp8_iso32_weight: bool
    fp8_recompute_z: bool
    stagewise_memory: bool
    cache_dir: Path
    validate_dispatch: bool
    fp8_recipe: str
    fp8_pow2_scale: bool
    swiglu_clamp: float | None
    gemm_multiprocessors: int | None
    backend: str
    metadata_backend: str

    __hash__ = HashedOnce.__hash__

    def __init__(self, *, use_fp8: bool | None = None, **fields: Any):
        found = {_BY_ENV[env].field: value for env, value in read_environment().items()}
        given = _check_arguments(use_fp8, fields, standing_mode=found.get("fp8_mode"))
        values, sources = {}, {}
        for name, flag in _BY_FIELD.items():
            if name in given:
                values[name], sources[name] = given[name], "argument"
            elif name in found:
                values[name], sources[name] = found[name], "environment"
            else:
                values[name], sources[name] = flag.default_value(), "default"
        self._fill(values, sources)

    def _fill(self, values: dict[str, Any], sources: dict[str, str]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)
        # No dataclass field: two configs with the same values are equal wherever the values came from.
        object.__setattr__(self, "_sources", sources)

    @property
    def use_fp8(self) -> bool:
        return self.fp8_mode is not None

    @property
    def stagewise(self) -> bool:
        return self.stagewise_memory or self.fp8_mode == "mem"

    def replace(self, *, use_fp8: bool | None = None, **changes: Any) -> SonicMoEConfig:
        """A copy with some values changed. The environment is not read again."""
        given = _check_arguments(use_fp8, changes, standing_mode=self.fp8_mode)
        copy = object.__new__(type(self))
        copy._fill(
            {name: getattr(self, name) for name in _BY_FIELD} | given,
            self._sources | dict.fromkeys(given, "argument"),
        )
        return copy

    def source_of(self, field: str) -> str:
        """Where the value came from: ``"argument"``, ``"environment"`` or ``"default"``."""
        if field == "use_fp8":  # another view of the mode, and a constructor argument like any field
            field = "fp8_mode"
        _check_field(field)
        return self._sources[field]

    @contextmanager
    def activate(self) -> Iterator[SonicMoEConfig]:
        """Make this the config that ``current()`` returns inside the ``with`` block, in this thread only.

        Autograd may run backward in a thread of its own, after the block has ended: take ``current()`` once in
        forward and keep it for backward. A forward that recompute runs again is run by backward as well, so there the
        node itself must have its config.
        """
        token = _active.set(self)
        try:
            yield self
        finally:
            _active.reset(token)

    @classmethod
    def current(cls) -> SonicMoEConfig:
        """The innermost active config, else that of the environment as it is now."""
        active = _active.get()
        if active is not None:
            return active
        # Reading all flags takes longer than launching a kernel. CPython's own mapping compares in a microsecond.
        variables = getattr(os.environ, "_data", None)
        if variables is None:
            return cls()
        seen, config = _standing[0]
        if config is None or seen != variables:
            seen, fresh = dict(variables), cls()
            # The same object for the same settings: what is remembered by it is then found without comparing them.
            if config != fresh or config._sources != fresh._sources:
                config = fresh
            _standing[0] = (seen, config)
        return config

    def __repr__(self) -> str:
        shown = []
        for name, flag in _BY_FIELD.items():
            value = getattr(self, name)
            if not flag.is_default(value):
                shown.append(f"{name}={str(value)!r}" if isinstance(value, Path) else f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _check_field(name: str) -> None:
    if name not in _BY_FIELD:
        nearest = _nearest(name, (*_BY_FIELD, "use_fp8"))
        raise TypeError(f"SonicMoEConfig has no field {name!r}; the nearest is {nearest!r}")


def _check_arguments(use_fp8: bool | None, fields: dict[str, Any], standing_mode: str | None) -> dict[str, Any]:
    """The given fields, checked, with ``use_fp8`` turned into the mode it stands for.

    ``standing_mode`` is the mode that holds where no argument says otherwise.
    """
    for name in fields:
        _check_field(name)
    given = {name: _BY_FIELD[name].from_argument(value) for name, value in fields.items()}
    if use_fp8 is None:
        return given
    _fit("use_fp8", use_fp8, lambda: _check_bool(use_fp8), "True, False or None")
    if "fp8_mode" in given:
        if use_fp8 != (given["fp8_mode"] is not None):
            raise ValueError(f"use_fp8: got {use_fp8}, which contradicts fp8_mode={given['fp8_mode']!r}; give only one")
    elif not use_fp8:
        given["fp8_mode"] = None
    elif standing_mode is None:
        given["fp8_mode"] = "perf"
    return given
