"""The runner of the suite's phases says at its end what failed and why."""

import subprocess
import sys

import pytest

from tests.support import children

FAILING = """
import pytest

@pytest.fixture(scope="module")
def shared():
    pytest.fail("the shared job ended with status 1\\n" + "\\n".join(f"line {n}" for n in range(30)), pytrace=False)

@pytest.mark.parametrize("n", range(3))
def test_on_the_job(shared, n):
    pass

def test_alone():
    assert 1 + 1 == 3

def test_well():
    pass
"""


@pytest.fixture
def phases(monkeypatch):
    monkeypatch.syspath_prepend(children.ROOT / "tools" / "ci")
    import phases

    return phases


def test_causes_come_last_and_once(phases, tmp_path, capsys):
    script, report = tmp_path / "test_failing.py", tmp_path / "report.xml"
    script.write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", script]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    result = phases.Result(phases.PHASES[1])
    phases.read_report(report, result)
    assert (result.passed, result.failed) == (1, 4)
    phases.print_table([result])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "1 passed, 4 failed, 0 skipped"
    first = said.index("FAILED test_failing::test_on_the_job[0] and 2 more alike")
    assert said[first + 1] == "    the shared job ended with status 1"
    assert said[first + 2 : first + 9] == [f"    line {n}" for n in range(23, 30)]
    assert "FAILED test_failing::test_alone" in said[first:]
    assert any("assert (1 + 1) == 3" in line for line in said[first:])


def test_no_cause_no_word(phases, capsys):
    phases.print_table([phases.Result(phases.PHASES[1], passed=2)])
    assert "FAILED" not in capsys.readouterr().out
