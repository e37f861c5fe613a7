"""Test modules that need a real torch, run by a pytest of their own: no torch may be importable beside Paddle's proxy.

A module with ``RUNS_IN_TORCH = True`` takes ``torch`` from here and carries the mark ``torch``. In the process that
collects it first, torch is None and nothing of it runs: a child with torch on its path does all of the module's
selected tests at once, and each test here reports how its namesake ended there.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support import children

_REPORT = "SONICMOE_TEST_CHILD_REPORT"

if _REPORT in os.environ:
    import torch
else:
    torch = None


@pytest.fixture(autouse=True)
def poisoned_torch():
    """In the child: ``torch.empty`` gives NaN or a large integer, and an op whose result may vary is an error."""
    if torch is not None:
        torch.use_deterministic_algorithms(True)
        assert torch.empty(1).isnan()
    yield


def pytest_runtest_logreport(report):
    """In the child: one line a phase of a test."""
    if _REPORT in os.environ:
        line = {"id": report.nodeid, "when": report.when, "outcome": report.outcome, "text": str(report.longrepr or "")}
        with open(os.environ[_REPORT], "a", encoding="utf-8") as target:
            target.write(json.dumps(line) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if torch is not None or not getattr(pyfuncitem.module, "RUNS_IN_TORCH", False):
        return None
    done, outcomes = _run_module(pyfuncitem)
    phases = outcomes.get(pyfuncitem.nodeid)
    if phases is None:
        pytest.fail(f"the child did not get to this test\n{done.report()}", pytrace=False)
    for phase in phases:
        if phase["outcome"] == "skipped":
            pytest.skip(phase["text"])
        if phase["outcome"] != "passed":
            pytest.fail(phase["text"], pytrace=False)
    # A crash writes no phase, and what was written before it is no pass.
    if phases[-1]["when"] != "teardown":
        pytest.fail(f"the child ended in this test\n{done.report()}", pytrace=False)
    if done.status not in (0, 1) and pyfuncitem.nodeid == list(outcomes)[-1]:
        pytest.fail(f"the child did not end as it should after this last test\n{done.report()}", pytrace=False)
    return True


def _run_module(item):
    """(how the child ended, {test: its phases}); one child for all tests of a module."""
    runs = item.session.__dict__.setdefault("_torch_children", {})
    if item.path not in runs:
        site = children.torch_site()
        chosen = [other.nodeid for other in item.session.items if other.path == item.path]
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.jsonl")
            command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short"]
            command += ["-p", "no:xdist", "-p", "no:cacheprovider", *chosen]
            env = children.clean_env([children.ROOT, site], **{_REPORT: report})
            done = children.run(command, env=env, cwd=item.config.rootpath, timeout=300)
            lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
        outcomes = {}
        for line in map(json.loads, lines):
            outcomes.setdefault(line["id"], []).append(line)
        runs[item.path] = (done, outcomes)
    return runs[item.path]
