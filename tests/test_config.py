"""The config: where values come from, what is refused, and that nothing else reads the environment."""

import ast
import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys
import threading
from enum import StrEnum
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sonicmoe.config import ARGUMENTS, FLAGS, PREFIX, SonicMoEConfig, read_environment

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sonicmoe"

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
RETIRED_BOOLEANS = [
    "SONIC_MOE_FP8_RECOMPUTE_OPT_B",
    "SONIC_MOE_FP8_WGRAD_BETA_ACCUM",
    "SONIC_MOE_FP8_FUSED_ZY1_QUANT",
]
RETIRED_PRECISIONS = [
    "SONIC_MOE_FP8_UPPROJ_EPILOGUE_PRECISION",
    "SONIC_MOE_FP8_DOWNPROJ_MAINLOOP_PRECISION",
    "SONIC_MOE_FP8_DOWNPROJ_WEIGHT_PRECISION",
]
CAPACITY = "SONIC_MOE_FP8_BLOCKSCALED_EXPERT_CAPACITY"
RETIRED = [*RETIRED_BOOLEANS, *RETIRED_PRECISIONS, CAPACITY]

DEFAULTS = {
    "fp8_mode": None,
    "use_quack_gemm": False,
    "fp8_wgrad": False,
    "fp8_assume_aligned": False,
    "fp8_iso32_weight": False,
    "fp8_recompute_z": False,
    "stagewise_memory": False,
    "cache_dir": Path("/home/someone/.cache/sonicmoe"),
    "validate_dispatch": False,
    "fp8_recipe": "auto",
    "fp8_pow2_scale": False,
    "swiglu_clamp": None,
    "backend": "auto",
}

# A value of each field that differs from its default.
OTHER = {
    "fp8_mode": "mem",
    "use_quack_gemm": True,
    "fp8_wgrad": True,
    "fp8_assume_aligned": True,
    "fp8_iso32_weight": True,
    "fp8_recompute_z": True,
    "stagewise_memory": True,
    "cache_dir": Path("/elsewhere"),
    "validate_dispatch": True,
    "fp8_recipe": "sm100",
    "fp8_pow2_scale": True,
    "swiglu_clamp": 7.0,
    "backend": "naive",
}


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
    assert [field.name for field in dataclasses.fields(SonicMoEConfig)] == table == list(DEFAULTS) == list(OTHER)


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


@pytest.mark.parametrize("mode", ["perf", "mem"])
def test_mode_flag(monkeypatch, mode):
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", mode)
    config = SonicMoEConfig()
    assert config.fp8_mode == mode
    assert config.use_fp8
    assert config.source_of("fp8_mode") == config.source_of("use_fp8") == "environment"


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


def test_argument_none_wins_over_a_mode_in_the_environment(monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "perf")
    config = SonicMoEConfig(fp8_mode=None)
    assert config.fp8_mode is None
    assert config.source_of("fp8_mode") == "argument"


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
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"SONIC_MOE_FP8_MODE": "nonsense"},
    )
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
        ("mem", {"use_fp8": True}, "mem", "environment"),
        ("mem", {"use_fp8": True, "fp8_mode": "perf"}, "perf", "argument"),
        ("mem", {"use_fp8": False}, None, "argument"),
        ("mem", {"fp8_mode": "perf"}, "perf", "argument"),
    ],
)
def test_use_fp8(monkeypatch, env, arguments, mode, source):
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


@pytest.mark.parametrize(
    ("mode", "stagewise_memory", "stagewise"),
    [
        (None, False, False),
        ("perf", False, False),
        ("mem", False, True),
        (None, True, True),
        ("perf", True, True),
        ("mem", True, True),
    ],
)
def test_stagewise(mode, stagewise_memory, stagewise):
    config = SonicMoEConfig(fp8_mode=mode, stagewise_memory=stagewise_memory)
    assert config.stagewise is stagewise
    assert config.stagewise_memory is stagewise_memory


# ---- Bad flags -------------------------------------------------------------------------------------------------------

BAD_TEXT = [
    *((env, text) for env in BOOLEAN_FLAGS for text in ["2", "yes", "no", "-1", " 1", "true ", "None", "perf"]),
    *(("SONIC_MOE_FP8_MODE", text) for text in ["PERF", "1", "0", "bf16", "off", "none", " perf", "perf,mem"]),
    *(("SONIC_MOE_CACHE_DIR", text) for text in ["~no-such-user-here/x", "~no-such-user-here"]),
    *((env, text) for env in ALWAYS_ON for text in ["0", "false", "off", "2", "yes"]),
    *((env, text) for env in RETIRED_BOOLEANS for text in ["1", "true", "on", "2", "no"]),
    *((env, text) for env in RETIRED_PRECISIONS for text in ["bf16", "fp8", "1", "0", "FP8-blockscaled"]),
    *((CAPACITY, text) for text in ["0", "1", "128", "none"]),
]


def test_every_flag_has_a_bad_value_to_try():
    assert {env for env, _ in BAD_TEXT} == {flag.env for flag in FLAGS}


@pytest.mark.parametrize(("env", "text"), BAD_TEXT)
def test_bad_flag_is_refused_by_name_value_and_need(monkeypatch, env, text):
    monkeypatch.setenv(env, text)
    allowed = next(flag.domain.text for flag in FLAGS if flag.env == env)
    with pytest.raises(ValueError) as caught:
        SonicMoEConfig()
    assert str(caught.value).startswith(f"{env}: got {text!r}, need {allowed}")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    with pytest.raises(ValueError, match=env):
        SonicMoEConfig.current()


def test_bad_flag_is_refused_even_if_an_argument_overrides_it(monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "pref")
    with pytest.raises(ValueError, match="SONIC_MOE_FP8_MODE: got 'pref'"):
        SonicMoEConfig(fp8_mode="perf")


@pytest.mark.parametrize("env", ALWAYS_ON)
@pytest.mark.parametrize("word", TRUE_WORDS)
def test_always_on_flag_may_be_set_and_changes_nothing(monkeypatch, env, word):
    monkeypatch.setenv(env, word)
    assert values(SonicMoEConfig()) == DEFAULTS
    assert read_environment() == {env: True}


@pytest.mark.parametrize("env", ALWAYS_ON)
def test_always_on_flag_says_so(monkeypatch, env):
    monkeypatch.setenv(env, "0")
    with pytest.raises(ValueError, match="It is always on"):
        SonicMoEConfig()


@pytest.mark.parametrize(
    ("env", "text"),
    [
        *((env, word) for env in RETIRED_BOOLEANS for word in FALSE_WORDS),
        *((env, "fp8-blockscaled") for env in RETIRED_PRECISIONS),
    ],
)
def test_retired_flag_may_say_what_happens_anyway(monkeypatch, env, text):
    monkeypatch.setenv(env, text)
    assert values(SonicMoEConfig()) == DEFAULTS
    assert set(read_environment()) == {env}


@pytest.mark.parametrize("env", RETIRED)
def test_retired_flag_says_what_to_do(monkeypatch, env):
    monkeypatch.setenv(env, "7")
    with pytest.raises(ValueError, match="It is retired: unset it; "):
        SonicMoEConfig()


def test_down_projection_weights_in_bf16_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_DOWNPROJ_WEIGHT_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"down-projection weights are FP8 too.*unset `SONIC_MOE_FP8_MODE`"):
        SonicMoEConfig()


@pytest.mark.parametrize(
    ("env", "nearest"),
    [
        ("SONIC_MOE_FP8_WGARD", "SONIC_MOE_FP8_WGRAD"),
        ("SONIC_MOE_FP8_MODES", "SONIC_MOE_FP8_MODE"),
        ("SONIC_MOE_CACHEDIR", "SONIC_MOE_CACHE_DIR"),
        ("SONIC_MOE_USE_QUACK_GEMM", "USE_QUACK_GEMM"),
        ("SONIC_MOE_fp8_wgrad", "SONIC_MOE_"),
        ("SONIC_MOE_", "SONIC_MOE_"),
    ],
)
@pytest.mark.parametrize("text", ["1", ""])
def test_unknown_flag_is_refused_with_the_nearest_known(monkeypatch, env, nearest, text):
    monkeypatch.setenv(env, text)
    with pytest.raises(ValueError, match=rf"^{env}: there is no such flag; the nearest is {nearest}"):
        SonicMoEConfig()


@pytest.mark.parametrize("env", ["SONICMOE_FP8_MODE", "SONIC_MO_X", "MY_SONIC_MOE_FP8_MODE", "USE_QUACK"])
def test_variables_of_others_are_left_alone(monkeypatch, env):
    monkeypatch.setenv(env, "whatever")
    assert values(SonicMoEConfig()) == DEFAULTS


# NUL and lone surrogates cannot be put into an environment.
ENV_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=12)


@given(text=ENV_TEXT)
def test_a_boolean_flag_is_one_of_its_words_or_an_error(text):
    words = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SONIC_MOE_FP8_WGRAD", text)
        if text.lower() in words:
            assert SonicMoEConfig().fp8_wgrad is words[text.lower()]
        else:
            with pytest.raises(ValueError, match="SONIC_MOE_FP8_WGRAD"):
                SonicMoEConfig()


@given(name=st.from_regex(r"[A-Z0-9_]{1,20}", fullmatch=True))
def test_any_unlisted_name_under_the_prefix_is_an_error(name):
    assume(PREFIX + name not in {flag.env for flag in FLAGS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PREFIX + name, "1")
        with pytest.raises(ValueError, match=f"{PREFIX}{name}: there is no such flag"):
            SonicMoEConfig()


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
        *(("swiglu_clamp", value, ValueError) for value in [0, 0.0, -0.0, -1.0, math.inf, -math.inf, math.nan]),
        ("swiglu_clamp", 10**400, ValueError),
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
    twin = again(config)
    assert twin == config
    assert {name: twin.source_of(name) for name in DEFAULTS} == {name: config.source_of(name) for name in DEFAULTS}


# ---- replace ---------------------------------------------------------------------------------------------------------


def test_replace_keeps_the_rest_and_does_not_read_the_environment(monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "1")
    config = SonicMoEConfig(fp8_mode="mem")
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "nonsense")
    monkeypatch.setenv("SONIC_MOE_NO_SUCH_FLAG", "1")
    monkeypatch.setenv("HOME", "/somewhere/new")
    changed = config.replace(swiglu_clamp=7)
    assert values(changed) == values(config) | {"swiglu_clamp": 7.0}
    assert values(config) == DEFAULTS | {"fp8_mode": "mem", "fp8_wgrad": True}
    sources = [changed.source_of(name) for name in ("swiglu_clamp", "fp8_mode", "fp8_wgrad", "backend")]
    assert sources == ["argument", "argument", "environment", "default"]
    assert config.source_of("swiglu_clamp") == "default"


def test_replace_with_nothing_is_an_equal_copy():
    config = SonicMoEConfig(**OTHER)
    assert config.replace() == config


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


# ---- activate and current --------------------------------------------------------------------------------------------


def test_activate_nests_and_unwinds(monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "1")
    outer, inner = SonicMoEConfig(fp8_mode="perf"), SonicMoEConfig(fp8_mode="mem")
    with outer.activate() as active:
        assert active is outer
        assert SonicMoEConfig.current() is outer
        with inner.activate():
            assert SonicMoEConfig.current() is inner
            with outer.activate():
                assert SonicMoEConfig.current() is outer
            assert SonicMoEConfig.current() is inner
        assert SonicMoEConfig.current() is outer
        monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "nonsense")
        assert SonicMoEConfig.current() is outer
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "0")
    assert values(SonicMoEConfig.current()) == DEFAULTS


def test_activate_unwinds_after_an_error():
    outer = SonicMoEConfig(fp8_mode="perf")
    with outer.activate():
        with pytest.raises(ZeroDivisionError), SonicMoEConfig(fp8_mode="mem").activate():
            raise ZeroDivisionError
        assert SonicMoEConfig.current() is outer
    assert SonicMoEConfig.current().fp8_mode is None


def test_threads_do_not_see_each_others_config():
    configs = [SonicMoEConfig(swiglu_clamp=float(n + 1)) for n in range(8)]
    together = threading.Barrier(len(configs), timeout=30)
    seen = [None] * len(configs)

    def work(n):
        with configs[n].activate():
            together.wait()  # every thread is inside its own block now
            first = SonicMoEConfig.current()
            with configs[n - 1].activate():
                together.wait()
                second = SonicMoEConfig.current()
            together.wait()
            third = SonicMoEConfig.current()
        seen[n] = (first, second, third)

    with SonicMoEConfig(backend="naive").activate() as mine:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(configs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert SonicMoEConfig.current() is mine
    for n, config in enumerate(configs):
        assert seen[n] is not None, f"thread {n} died"
        assert [id(one) for one in seen[n]] == [id(config), id(configs[n - 1]), id(config)]


@pytest.mark.skipif(
    getattr(sys.flags, "thread_inherit_context", False), reason="this Python hands a thread its starter's context"
)
def test_a_new_thread_starts_from_the_environment(monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "1")
    seen = []
    with SonicMoEConfig(fp8_mode="perf", fp8_wgrad=False).activate():
        thread = threading.Thread(target=lambda: seen.append(SonicMoEConfig.current()))
        thread.start()
        thread.join()
    assert [(config.fp8_mode, config.fp8_wgrad) for config in seen] == [(None, True)]


# ---- Nobody else reads the environment -------------------------------------------------------------------------------

READERS = {"environ", "environb", "getenv", "getenvb", "expandvars"}


def environment_reads(source):
    """Lines that look at environment variables. Assigning or deleting one (``os.environ[name] = ...``) is not a
    read: some libraries take their settings no other way."""
    tree = ast.parse(source)
    written = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del))
    }
    # `environ[x] += y` is a Store in the tree, but reads too.
    written -= {
        id(node.target.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Subscript)
    }
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            hit = node.attr in READERS and id(node) not in written
        elif isinstance(node, ast.ImportFrom):
            hit = node.module in ("os", "posix", "os.path") and any(name.name in READERS | {"*"} for name in node.names)
        elif isinstance(node, ast.Call):  # getattr(os, "environ")
            hit = any(isinstance(arg, ast.Constant) and arg.value in READERS for arg in node.args)
        else:
            hit = False
        if hit:
            lines.append(node.lineno)
    return sorted(set(lines))


@pytest.mark.parametrize(
    "source",
    [
        "import os\nx = os.environ['A']",
        "import os\nx = os.environ.get('A')",
        "import os\nx = os.getenv('A')",
        "import os as o\nx = 'A' in o.environ",
        "import os\nx = dict(os.environ)",
        "import os\nos.environ['A'] += ':b'",
        "import os\nx = os.environ.setdefault('A', '1')",
        "import os\nx = os.path.expandvars('$A')",
        "import os\nx = getattr(os, 'environ')",
        "from os import environ",
        "from os import getenv as g",
        "from os import *",
    ],
)
def test_the_scan_finds_a_read(source):
    assert environment_reads(source)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['A'] = '1'",
        "import os\ndel os.environ['A']",
        "import os\nx = os.path.join('a', 'environ.py')",
        "from ..config import read_environment\nx = read_environment()",
        "'''os.environ is read elsewhere'''",
        "from os import path",
    ],
)
def test_the_scan_lets_other_code_be(source):
    assert environment_reads(source) == []


def test_config_is_the_only_reader_of_the_environment():
    files = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "cli" / "env.py" in files
    reads = {
        str(file.relative_to(ROOT)): lines for file in files if (lines := environment_reads(file.read_text("utf-8")))
    }
    assert set(reads) == {"sonicmoe/config.py"}, f"read sonicmoe.config instead, at {reads}"


def test_config_imports_only_the_standard_library():
    tree = ast.parse((PACKAGE / "config.py").read_text("utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "config stands below every other module"
            names.add(node.module.partition(".")[0])
    assert names
    assert names <= sys.stdlib_module_names
