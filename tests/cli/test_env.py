"""Environment flags: what they may say, who may read them, and the command and README table that show them."""

import ast
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sonicmoe.cli import env as cli
from sonicmoe.config import FLAGS, PREFIX, SonicMoEConfig, read_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(PREFIX) or name == "USE_QUACK_GEMM":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/someone")


# ---- What a flag may say ---------------------------------------------------------------------------------------------

TRUE_WORDS = ["1", "true", "TRUE", "True", "on", "ON"]
FALSE_WORDS = ["0", "false", "FALSE", "False", "off", "Off"]


def flags_of(kind, default):
    return [flag.env for flag in FLAGS if flag.kind == kind and flag.default is default]


# That the table itself is right is checked against a list by hand in test_config.py.
BOOLEANS = flags_of("active", False)
ALWAYS_ON = flags_of("always-on", True)
RETIRED_BOOLEANS = flags_of("retired", False)
(CAPACITY,) = flags_of("retired", None)
RETIRED = [flag.env for flag in FLAGS if flag.kind == "retired"]
RETIRED_PRECISIONS = [name for name in RETIRED if name.endswith("_PRECISION")]

BAD_TEXT = [
    *((env, text) for env in BOOLEANS for text in ["2", "yes", "no", "-1", " 1", "true ", "None", "perf"]),
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
    plain = SonicMoEConfig()
    monkeypatch.setenv(env, word)
    assert SonicMoEConfig() == plain
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
    plain = SonicMoEConfig()
    monkeypatch.setenv(env, text)
    assert SonicMoEConfig() == plain
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
    plain = SonicMoEConfig()
    monkeypatch.setenv(env, "whatever")
    assert SonicMoEConfig() == plain


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


# ---- Who may read the environment ------------------------------------------------------------------------------------

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
    files = sorted((ROOT / "sonicmoe").rglob("*.py"))
    assert Path(cli.__file__).resolve() in files
    reads = {
        str(file.relative_to(ROOT)): lines for file in files if (lines := environment_reads(file.read_text("utf-8")))
    }
    assert set(reads) == {"sonicmoe/config.py"}, f"read sonicmoe.config instead, at {reads}"


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.shutil, "which", lambda name: None)
    monkeypatch.setattr(cli, "DEVICE_NODE", tmp_path / "nvidia0")


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Puts a stand-in for nvidia-smi on PATH, and no device node."""
    monkeypatch.setattr(cli, "DEVICE_NODE", tmp_path / "nvidia0")

    def install(script):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return install


def run_json(capsys):
    assert cli.main(["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def flag(report, name):
    return next(row for row in report["flags"] if row["name"] == name)


def test_json_lists_every_flag_with_its_default(capsys, no_gpu):
    report = run_json(capsys)
    assert [row["name"] for row in report["flags"]] == [flag.env for flag in FLAGS]
    assert {row["source"] for row in report["flags"]} == {"default"}
    assert flag(report, "SONIC_MOE_FP8_MODE")["value"] is None
    assert flag(report, "SONIC_MOE_FP8_WGRAD")["value"] == "0"
    assert flag(report, "SONIC_MOE_FP8_SAVE_Z_FP8")["value"] == "1"
    cache = flag(report, "SONIC_MOE_CACHE_DIR")
    assert (cache["value"], cache["default"]) == ("/home/someone/.cache/sonicmoe", "~/.cache/sonicmoe")


def test_json_follows_the_environment(capsys, no_gpu, monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "mem")
    monkeypatch.setenv("USE_QUACK_GEMM", "on")
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "")
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD_BETA_ACCUM", "off")
    report = run_json(capsys)
    set_here = {row["name"]: row["value"] for row in report["flags"] if row["source"] == "environment"}
    assert set_here == {"SONIC_MOE_FP8_MODE": "mem", "USE_QUACK_GEMM": "1", "SONIC_MOE_FP8_WGRAD_BETA_ACCUM": "0"}


def test_text_shows_each_flag_on_one_line_with_value_source_and_meaning(capsys, no_gpu, monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "perf")
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for entry in FLAGS:
        (line,) = [line for line in lines if line.split()[:1] == [entry.env]]
        _, kind, value, source, *_ = line.split()
        assert kind == entry.kind
        assert source == ("environment" if entry.env == "SONIC_MOE_FP8_MODE" else "default")
        assert line.lower().endswith(entry.meaning.lower())
        if entry.env == "SONIC_MOE_FP8_MODE":
            assert value == "perf"
    for module in cli.PACKAGES:
        assert sum(line.split()[:1] == [module] for line in lines) == 1
    assert "GPU: none found" in lines


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("SONIC_MOE_FP8_MODE", "fast", "SONIC_MOE_FP8_MODE: got 'fast', need perf or mem"),
        ("SONIC_MOE_FP8_MOED", "perf", "SONIC_MOE_FP8_MOED: there is no such flag; the nearest is SONIC_MOE_FP8_MODE"),
        ("SONIC_MOE_CACHE_DIR", "~no-such-user-here", "SONIC_MOE_CACHE_DIR: got '~no-such-user-here', need a path"),
    ],
)
def test_bad_flag_is_reported_and_exits_2(capsys, no_gpu, monkeypatch, form, name, text, message):
    monkeypatch.setenv(name, text)
    assert cli.main(form) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1


# ---- The command, in a process of its own ----------------------------------------------------------------------------


def command(*arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "sonicmoe.cli.env", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | env,
        timeout=120,
    )


def test_command_exit_statuses():
    good, bad = command("--json"), command(SONIC_MOE_FP8_WGRAD="maybe")
    assert (good.returncode, good.stderr) == (0, "")
    assert set(json.loads(good.stdout)) == {"flags", "packages", "gpu"}
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "SONIC_MOE_FP8_WGRAD: got 'maybe'" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_a_reader_that_stops_early_causes_no_traceback():
    line = f"'{sys.executable}' -m sonicmoe.cli.env --markdown | true"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_tells_every_option_and_the_exit_status():
    done = command("--help")
    assert done.returncode == 0
    for word in ("--json", "--markdown", "Exit status", "python -m sonicmoe.cli.env"):
        assert word in done.stdout
    assert command("--json", "--markdown").returncode == 2


def test_command_imports_no_framework():
    code = (
        "import sys; from sonicmoe.cli.env import main; status = main(['--json']); "
        "loaded = {'paddle', 'torch', 'triton', 'numpy', 'cutlass', 'quack', 'tvm_ffi'} & set(sys.modules); "
        "sys.exit(f'loaded {loaded}' if loaded else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ---- Packages --------------------------------------------------------------------------------------------------------


def test_packages_are_found_with_the_version_of_whichever_distribution_brought_them(monkeypatch):
    versions = {"paddlepaddle": "3.3.1", "pytorch-triton": "9.9", "apache-tvm-ffi": "0.1"}

    def version(name):
        if name not in versions:
            raise cli.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(cli.importlib.metadata, "version", version)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "tvm_ffi" else object())
    rows = {row["module"]: (row["found"], row["version"]) for row in cli.package_rows()}
    assert rows["paddle"] == (True, "3.3.1")
    assert rows["triton"] == (True, "9.9")
    assert rows["quack"] == (True, None)
    # Metadata left behind by a removed package: it is the module that counts.
    assert rows["tvm_ffi"][0] is False
    assert list(rows) == ["paddle", "torch", "triton", "cutlass", "quack", "tvm_ffi"]

    text = cli.report(cli.flag_rows(), cli.package_rows(), {"found": False, "detail": []}).splitlines()
    assert [line.split() for line in text if line.startswith("quack")] == [["quack", "yes", "unknown"]]
    assert [line.split() for line in text if line.startswith("tvm_ffi")] == [["tvm_ffi", "no"]]


# ---- GPU -------------------------------------------------------------------------------------------------------------


def test_gpus_come_from_nvidia_smi(smi):
    smi("echo 'Some GPU, 81559 MiB, 550.1'; echo 'Some GPU, 81559 MiB, 550.1'")
    assert cli.gpu_report() == {"found": True, "detail": ["Some GPU, 81559 MiB, 550.1"] * 2}


@pytest.mark.parametrize(
    ("script", "trouble"),
    [
        ("echo 'No devices were found'; exit 6", "exit status 6"),
        ("exit 0", "lists no GPU"),
        ("exec sleep 30", "timed out"),
    ],
)
@pytest.mark.parametrize("node", [False, True])
def test_the_device_node_decides_where_nvidia_smi_cannot(smi, monkeypatch, script, trouble, node):
    # Short enough for the sleeper, long enough for a shell to start on a busy machine.
    monkeypatch.setattr(cli, "SMI_TIMEOUT_S", 2)
    smi(script)
    if node:
        cli.DEVICE_NODE.touch()
    report = cli.gpu_report()
    assert report["found"] is node
    assert trouble in report["detail"][0]


def test_nvidia_smi_that_cannot_be_started(smi, tmp_path):
    smi("")
    (tmp_path / "nvidia-smi").write_text("#!/no/such/interpreter\n")
    report = cli.gpu_report()
    assert report["found"] is False
    assert "did not answer" in report["detail"][0]


@pytest.mark.parametrize("node", [False, True])
def test_without_nvidia_smi(no_gpu, node):
    if node:
        cli.DEVICE_NODE.touch()
    report = cli.gpu_report()
    assert report["found"] is node
    assert "not on PATH" in report["detail"][0]


# ---- The README ------------------------------------------------------------------------------------------------------


def test_markdown_is_the_same_whatever_is_set(capsys, monkeypatch):
    assert cli.main(["--markdown"]) == 0
    plain = capsys.readouterr().out
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "nonsense")
    monkeypatch.setenv("HOME", "/home/other")
    assert cli.main(["--markdown"]) == 0
    assert capsys.readouterr().out == plain


def test_markdown_is_one_well_formed_table():
    header, rule, *rows = cli.markdown_table().splitlines()
    assert {line.count("|") for line in (header, rule, *rows)} == {6}
    assert set(rule) == set("|- ")
    assert [row.split("|")[1].strip() for row in rows] == [f"`{flag.env}`" for flag in FLAGS]


def test_readme_holds_the_generated_table():
    text = (ROOT / "README.md").read_text("utf-8")
    assert "\n## Flags\n" in text
    assert text.count("<!-- flags -->") == text.count("<!-- /flags -->") == 1
    table = text.partition("<!-- flags -->")[2].partition("<!-- /flags -->")[0].strip()
    assert table == cli.markdown_table(), "paste the output of `python -m sonicmoe.cli.env --markdown` into README.md"
