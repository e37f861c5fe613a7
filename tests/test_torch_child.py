"""Tests that run in a child with torch end as the child does, a crash included."""

import sys
import textwrap

import pytest

from tests.support import children

pytestmark = pytest.mark.torch

CONFTEST = """
    from tests.support.torch_child import poisoned_torch, pytest_pyfunc_call, pytest_runtest_logreport
"""
HEAD = """
    import atexit, os
    from tests.support.torch_child import torch
    RUNS_IN_TORCH = True

    def test_right():
        assert torch is not None
"""
CRASH = """
    def test_wrong():
        assert torch is None

    def test_crash():
        os._exit(0)

    def test_behind_it():
        pass
"""
CRASH_AT_THE_END = """
    def test_last():
        atexit.register(os._exit, 7)
"""


def ends_of(folder, tail: str) -> dict[str, str]:
    """{test: the first line of what it failed with, or ""}."""
    (folder / "conftest.py").write_text(textwrap.dedent(CONFTEST))
    (folder / "test_given.py").write_text(textwrap.dedent(HEAD + tail))
    more = {children.TORCH_SITE_VARIABLE: children.torch_site(), "COLUMNS": 200}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        folder,
        folder,
    ]
    said = children.run(command, env=children.clean_env(**more), cwd=folder).stdout
    lines = [line.split(" ", 2) for line in said.splitlines() if line.startswith(("PASSED ", "FAILED "))]
    return {line[1].split("::")[1]: line[2].removeprefix("- Failed: ") if len(line) > 2 else "" for line in lines}


def test_a_crash_is_no_pass(tmp_path):
    found = ends_of(tmp_path, CRASH)
    assert found.pop("test_wrong")
    assert found == {
        "test_right": "",
        "test_crash": "the child ended in this test",
        "test_behind_it": "the child did not get to this test",
    }


def test_an_end_that_is_none(tmp_path):
    found = ends_of(tmp_path, CRASH_AT_THE_END)
    assert found == {"test_right": "", "test_last": "the child did not end as it should after this last test"}
