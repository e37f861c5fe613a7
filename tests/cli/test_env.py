"""The command that shows flags, packages and GPUs, and the README table made from it."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sonicmoe.cli import env as cli
from sonicmoe.config import FLAGS, PREFIX

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(PREFIX) or name == "USE_QUACK_GEMM":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/home/someone")


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


# ---- Flags -----------------------------------------------------------------------------------------------------------


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


# ---- As a command ----------------------------------------------------------------------------------------------------


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
