"""The config: where its values come from, which arguments it refuses, and who sees it. What flags may say, and who may
read them: cli/test_env.py."""

import ast
import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys
from enum import StrEnum
from fractions import Fraction
from pathlib import Path

import pytest

from sonicmoe.config import ARGUMENTS, FLAGS, PREFIX, SonicMoEConfig, read_environment

ROOT = Path(__file__).resolve().parents[1]

TRUE_WORDS = ["1", "true", "TRUE", "True", "on", "ON"]
FALSE_WORDS = ["0", "false", "FALSE", "False", "off", "Off"]

# Written out by hand, not derived from the table: a flag that disappears from the table must fail here.
BOOLEAN_FLAGS = {
    "USE_QUACK_GEMM": "use_quack_gemm",
    "SONIC_MOE_FP8_WGRAD": "fp8_wgrad",
    "SONIC_MOE_FP8_ASSUME_ALIGNED": "fp8_assume_aligned",
    "SONIC_MOE_FP8_ISO32_WEIGHT": "fp8_iso32_weight",
    "SONIC_MOE_FP8_RECOMPUTE_Z": "fp8_recompute_z",
    "SONIC_MOE_STAGEWISE_MEMORY": "stagewise_memory",
    "SONIC_MOE_VALIDATE_DISPATCH": "validate_dispatch",
}
FIELD_OF = {"SONIC_MOE_FP8_MODE": "fp8_mode", "SONIC_MOE_CACHE_DIR": "cache_dir"} | BOOLEAN_FLAGS
ALWAYS_ON = [
    "SONIC_MOE_FP8_FUSED_GATED",
    "SONIC_MOE_FP8_EPILOGUE_QUANT",
    "SONIC_MOE_FP8_FUSED_SWIGLU_QUANT",
    "SONIC_MOE_FP8_SAVE_Z_FP8",
]
RETIRED = [
    "SONIC_MOE_FP8_RECOMPUTE_OPT_B",
    "SONIC_MOE_FP8_WGRAD_BETA_ACCUM",
    "SONIC_MOE_FP8_UPPROJ_EPILOGUE_PRECISION",
    "SONIC_MOE_FP8_DOWNPROJ_MAINLOOP_PRECISION",
    "SONIC_MOE_FP8_DOWNPROJ_WEIGHT_PRECISION",
    "SONIC_MOE_FP8_FUSED_ZY1_QUANT",
    "SONIC_MOE_FP8_BLOCKSCALED_EXPERT_CAPACITY",
]

# Field: its default, and another value it may have.
FIELDS = {
    "fp8_mode": (None, "mem"),
    "use_quack_gemm": (False, True),
    "fp8_wgrad": (False, True),
    "fp8_assume_aligned": (False, True),
    "fp8_iso32_weight": (False, True),
    "fp8_recompute_z": (False, True),
    "stagewise_memory": (False, True),
    "cache_dir": (Path("/home/someone/.cache/sonicmoe"), Path("/elsewhere")),
    "validate_dispatch": (False, True),
    "fp8_recipe": ("auto", "sm100"),
    "fp8_pow2_scale": (False, True),
    "swiglu_clamp": (None, 7.0),
    "gemm_multiprocessors": (None, 100),
    "backend": ("auto", "naive"),
    "metadata_backend": ("auto", "host"),
}
DEFAULTS = {name: default for name, (default, _) in FIELDS.items()}
OTHER = {name: other for name, (_, other) in FIELDS.items()}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(PREFIX) or name == "USE_QUACK_GEMM":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/someone")


def values(config):
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


# ---- The table -------------------------------------------------------------------------------------------------------


def test_table_holds_exactly_the_documented_flags():
    by_kind = {}
    for flag in FLAGS:
        by_kind.setdefault(flag.kind, []).append(flag.env)
    assert sorted(by_kind) == ["active", "always-on", "retired"]
    assert sorted(by_kind["active"]) == sorted(FIELD_OF)
    assert sorted(by_kind["always-on"]) == sorted(ALWAYS_ON)
    assert sorted(by_kind["retired"]) == sorted(RETIRED)
    assert {flag.env: flag.field for flag in FLAGS if flag.field} == FIELD_OF


def test_dataclass_fields_are_the_tables_fields_in_its_order():
    table = [flag.field for flag in (*FLAGS, *ARGUMENTS) if flag.field]
    assert [field.name for field in dataclasses.fields(SonicMoEConfig)] == table == list(FIELDS)


@pytest.mark.parametrize("flag", [*FLAGS, *ARGUMENTS], ids=lambda flag: flag.env or flag.field)
def test_every_entry_explains_itself_in_a_table_cell(flag):
    assert flag.meaning.endswith(".")
    assert "|" not in flag.meaning + flag.domain.text
    assert "\n" not in flag.meaning + flag.domain.text
    assert (flag.field is None) == (flag.kind != "active")


# ---- Where a value comes from ----------------------------------------------------------------------------------------


def test_defaults():
    config = SonicMoEConfig()
    assert values(config) == DEFAULTS
    assert {config.source_of(field) for field in DEFAULTS} == {"default"}
    assert not config.use_fp8
    assert not config.stagewise


@pytest.mark.parametrize("word", TRUE_WORDS + FALSE_WORDS)
@pytest.mark.parametrize("env", BOOLEAN_FLAGS)
def test_boolean_flag(monkeypatch, env, word):
    monkeypatch.setenv(env, word)
    config = SonicMoEConfig()
    assert values(config) == DEFAULTS | {FIELD_OF[env]: word in TRUE_WORDS}
    assert config.source_of(FIELD_OF[env]) == "environment"


@pytest.mark.parametrize(
    ("text", "path"),
    [("/a/b/../c", "/a/c"), ("~", "/home/someone"), ("~/x", "/home/someone/x"), ("/a/~b", "/a/~b")],
)
def test_cache_dir_flag(monkeypatch, text, path):
    monkeypatch.setenv("SONIC_MOE_CACHE_DIR", text)
    assert SonicMoEConfig().cache_dir == Path(path)


def test_relative_cache_dir_does_not_follow_a_later_chdir(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = SonicMoEConfig(cache_dir="kernels")
    monkeypatch.chdir("/")
    assert config.cache_dir == tmp_path / "kernels"


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.env)
def test_empty_flag_counts_as_unset(monkeypatch, flag):
    monkeypatch.setenv(flag.env, "")
    assert read_environment() == {}
    config = SonicMoEConfig()
    assert values(config) == DEFAULTS
    if flag.field:
        assert config.source_of(flag.field) == "default"


@pytest.mark.parametrize("field", OTHER)
def test_argument_is_taken(field):
    config = SonicMoEConfig(**{field: OTHER[field]})
    assert values(config) == DEFAULTS | {field: OTHER[field]}
    assert {name for name in DEFAULTS if config.source_of(name) == "argument"} == {field}


@pytest.mark.parametrize("env", BOOLEAN_FLAGS)
@pytest.mark.parametrize("value", [True, False])
def test_argument_wins_over_environment(monkeypatch, env, value):
    monkeypatch.setenv(env, "0" if value else "1")
    config = SonicMoEConfig(**{FIELD_OF[env]: value})
    assert getattr(config, FIELD_OF[env]) is value
    assert config.source_of(FIELD_OF[env]) == "argument"


def test_environment_is_read_at_each_construction_and_never_after(monkeypatch):
    before = SonicMoEConfig()
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "mem")
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "1")
    assert values(before) == DEFAULTS
    during = SonicMoEConfig()
    assert (during.fp8_mode, during.fp8_wgrad) == ("mem", True)
    assert SonicMoEConfig.current() == during
    monkeypatch.delenv("SONIC_MOE_FP8_MODE")
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "0")
    assert (during.fp8_mode, during.fp8_wgrad) == ("mem", True)
    assert SonicMoEConfig() == SonicMoEConfig.current() == before


def test_a_flag_set_after_import_is_heard_and_import_reads_nothing():
    # A bad value at import time goes unnoticed, because nobody looks; once corrected it never mattered.
    code = (
        "import os; import sonicmoe.config as c; os.environ['SONIC_MOE_FP8_MODE'] = 'perf'; "
        "assert c.SonicMoEConfig().fp8_mode == 'perf'; print('ok')"
    )
    env = os.environ | {"SONIC_MOE_FP8_MODE": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.stdout.strip() == "ok", done.stderr


# ---- use_fp8 and stagewise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "arguments", "mode", "source"),
    [
        (None, {}, None, "default"),
        (None, {"use_fp8": None}, None, "default"),
        (None, {"use_fp8": True}, "perf", "argument"),
        (None, {"use_fp8": False}, None, "argument"),
        (None, {"use_fp8": True, "fp8_mode": "mem"}, "mem", "argument"),
        (None, {"use_fp8": False, "fp8_mode": None}, None, "argument"),
        ("perf", {}, "perf", "environment"),
        ("mem", {}, "mem", "environment"),
        ("mem", {"use_fp8": True}, "mem", "environment"),
        ("mem", {"use_fp8": True, "fp8_mode": "perf"}, "perf", "argument"),
        ("mem", {"use_fp8": False}, None, "argument"),
        ("mem", {"fp8_mode": "perf"}, "perf", "argument"),
        ("mem", {"fp8_mode": None}, None, "argument"),
    ],
)
def test_fp8_mode_and_use_fp8(monkeypatch, env, arguments, mode, source):
    if env:
        monkeypatch.setenv("SONIC_MOE_FP8_MODE", env)
    config = SonicMoEConfig(**arguments)
    assert config.fp8_mode == mode
    assert config.use_fp8 is (mode is not None)
    assert config.source_of("fp8_mode") == config.source_of("use_fp8") == source


@pytest.mark.parametrize(("use_fp8", "mode"), [(False, "perf"), (False, "mem"), (True, None)])
def test_use_fp8_against_fp8_mode_is_refused(use_fp8, mode):
    with pytest.raises(ValueError, match=rf"use_fp8: got {use_fp8}, .*fp8_mode={mode!r}"):
        SonicMoEConfig(use_fp8=use_fp8, fp8_mode=mode)
    with pytest.raises(ValueError, match="contradicts"):
        SonicMoEConfig().replace(use_fp8=use_fp8, fp8_mode=mode)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(("mode", "implies"), [(None, False), ("perf", False), ("mem", True)])
def test_stagewise(mode, implies, memory):
    config = SonicMoEConfig(fp8_mode=mode, stagewise_memory=memory)
    assert config.stagewise is (True if memory else implies)
    assert config.stagewise_memory is memory


# ---- Bad arguments ---------------------------------------------------------------------------------------------------

BOOLEAN_FIELDS = [*BOOLEAN_FLAGS.values(), "fp8_pow2_scale"]


class Mode(StrEnum):
    PERF = "perf"


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        *((field, value, TypeError) for field in BOOLEAN_FIELDS for value in [0, 1, "1", None, 1.0]),
        *(("fp8_mode", value, ValueError) for value in ["PERF", "", "off", "sm90"]),
        *(("fp8_mode", value, TypeError) for value in [True, False, 0, 1, b"perf", ["perf"]]),
        *(("fp8_recipe", value, ValueError) for value in ["sm80", "", "AUTO", None]),
        ("fp8_recipe", 90, TypeError),
        *(("backend", value, ValueError) for value in ["cpu", "", "cuda", None]),
        ("backend", 1, TypeError),
        *(("metadata_backend", value, ValueError) for value in ["cpu", "numpy", None]),
        *(("swiglu_clamp", value, ValueError) for value in [0, 0.0, -0.0, -1.0, math.inf, -math.inf, math.nan]),
        ("swiglu_clamp", 10**400, ValueError),
        *(("gemm_multiprocessors", value, ValueError) for value in [1, 0, -4]),
        *(("gemm_multiprocessors", value, TypeError) for value in [True, "100", 100.0]),
        *(("swiglu_clamp", value, TypeError) for value in [True, False, "7", 1j, [7.0]]),
        *(("cache_dir", value, TypeError) for value in [None, 3, b"/x", True]),
        *(("cache_dir", value, ValueError) for value in ["", "~no-such-user-here/x"]),
        *(("use_fp8", value, TypeError) for value in [0, 1, "perf", "1"]),
    ],
)
def test_bad_argument_is_refused_by_name_and_value(field, value, error):
    with pytest.raises(error) as caught:
        SonicMoEConfig(**{field: value})
    assert str(caught.value).startswith(f"{field}: got {value!r}, need ")
    with pytest.raises(error, match=f"^{field}: "):
        SonicMoEConfig().replace(**{field: value})


def test_every_field_has_a_bad_argument_above():
    marks = test_bad_argument_is_refused_by_name_and_value.pytestmark
    tried = {case[0] for mark in marks for case in mark.args[1]}
    assert tried == {*DEFAULTS, "use_fp8"}


def test_bad_choice_lists_what_is_allowed():
    with pytest.raises(ValueError, match="need 'perf', 'mem' or None$"):
        SonicMoEConfig(fp8_mode="fast")
    with pytest.raises(ValueError, match="need 'auto', 'sm90' or 'sm100'$"):
        SonicMoEConfig(fp8_recipe="sm120")
    with pytest.raises(ValueError, match="need 'auto' or 'naive'$"):
        SonicMoEConfig(backend="cuda")


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("fp8_mod", "fp8_mode"), ("use_fp_8", "use_fp8"), ("clamp", "swiglu_clamp"), ("cachedir", "cache_dir")],
)
def test_unknown_keyword_is_refused_with_the_nearest_field(typo, nearest):
    message = f"no field '{typo}'; the nearest is '{nearest}'"
    with pytest.raises(TypeError, match=message):
        SonicMoEConfig(**{typo: True})
    with pytest.raises(TypeError, match=message):
        SonicMoEConfig().replace(**{typo: True})
    with pytest.raises(TypeError, match=message):
        SonicMoEConfig().source_of(typo)


def test_arguments_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        SonicMoEConfig(True)


def test_no_home_is_an_error_only_for_a_default_that_needs_one(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match=r"cache_dir: got '~/\.cache/sonicmoe', need a path"):
        SonicMoEConfig()
    assert repr(SonicMoEConfig(cache_dir="/x")) == "SonicMoEConfig(cache_dir='/x')"


@pytest.mark.parametrize("value", [7, 7.0, Fraction(7), 1e-30])
def test_clamp_is_kept_as_a_float(value):
    clamp = SonicMoEConfig(swiglu_clamp=value).swiglu_clamp
    assert type(clamp) is float
    assert clamp == value


def test_a_str_subclass_is_kept_as_plain_text():
    config = SonicMoEConfig(fp8_mode=Mode.PERF)
    assert type(config.fp8_mode) is str
    assert repr(config) == "SonicMoEConfig(fp8_mode='perf')"


# ---- Frozen, comparable, printable, copyable -------------------------------------------------------------------------


@pytest.mark.parametrize("field", [*DEFAULTS, "use_fp8", "stagewise", "anything"])
def test_frozen(field):
    config = SonicMoEConfig()
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        setattr(config, field, True)
    assert values(config) == DEFAULTS


def test_equal_and_hashed_by_value_whatever_the_source(monkeypatch):
    argument = SonicMoEConfig(fp8_mode="perf", fp8_wgrad=True)
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "perf")
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "on")
    environment = SonicMoEConfig()
    assert argument == environment
    assert hash(argument) == hash(environment)
    assert {argument: 1}[environment] == 1


@pytest.mark.parametrize("field", OTHER)
def test_each_field_matters_to_equality_and_repr(field):
    plain, other = SonicMoEConfig(), SonicMoEConfig(**{field: OTHER[field]})
    assert plain != other
    assert repr(plain) == "SonicMoEConfig()"
    shown = str(OTHER[field]) if field == "cache_dir" else OTHER[field]
    assert repr(other) == f"SonicMoEConfig({field}={shown!r})"


def test_repr_builds_the_config_again():
    config = SonicMoEConfig(**OTHER)
    assert eval(repr(config)) == config
    assert repr(SonicMoEConfig(**DEFAULTS)) == "SonicMoEConfig()"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_keep_values_and_sources_without_reading_the_environment(monkeypatch, again):
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "mem")
    config = SonicMoEConfig(fp8_wgrad=True)
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "nonsense")
    hash(config)
    twin = again(config)
    assert twin == config and "_hash" not in vars(twin)  # text hashes differently in another process
    assert {name: twin.source_of(name) for name in DEFAULTS} == {name: config.source_of(name) for name in DEFAULTS}


# ---- replace ---------------------------------------------------------------------------------------------------------


def test_replace_keeps_the_rest_and_does_not_read_the_environment(monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "1")
    config = SonicMoEConfig(fp8_mode="mem")
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "nonsense")
    monkeypatch.setenv("SONIC_MOE_NO_SUCH_FLAG", "1")
    monkeypatch.setenv("HOME", "/somewhere/new")
    assert config.replace() == config
    changed = config.replace(swiglu_clamp=7)
    assert values(changed) == values(config) | {"swiglu_clamp": 7.0}
    assert values(config) == DEFAULTS | {"fp8_mode": "mem", "fp8_wgrad": True}
    sources = [changed.source_of(name) for name in ("swiglu_clamp", "fp8_mode", "fp8_wgrad", "backend")]
    assert sources == ["argument", "argument", "environment", "default"]
    assert config.source_of("swiglu_clamp") == "default"


@pytest.mark.parametrize(
    ("mode", "changes", "result"),
    [
        (None, {"use_fp8": True}, "perf"),
        ("mem", {"use_fp8": True}, "mem"),
        ("mem", {"use_fp8": False}, None),
        ("perf", {"use_fp8": True, "fp8_mode": "mem"}, "mem"),
        ("perf", {"fp8_mode": None}, None),
        ("mem", {"use_fp8": None}, "mem"),
    ],
)
def test_replace_takes_use_fp8(mode, changes, result):
    assert SonicMoEConfig(fp8_mode=mode).replace(**changes).fp8_mode == result


# ---- At the bottom of the package ------------------------------------------------------------------------------------


def test_config_imports_only_the_standard_library():
    tree = ast.parse((ROOT / "sonicmoe" / "config.py").read_text("utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "config stands below every other module"
            names.add(node.module.partition(".")[0])
    assert names
    assert names <= sys.stdlib_module_names
