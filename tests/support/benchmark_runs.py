"""Benchmark programs as children of a test, and the tables that they write."""

import csv
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_with_torch(arguments, *folders):
    """A child process with a real torch and, before it, the given folders."""
    site = os.environ.get("SONICMOE_TEST_TORCH_SITE")
    if not site:
        pytest.skip("SONICMOE_TEST_TORCH_SITE is not set")
    path = os.pathsep.join([*map(str, folders), site])
    env = {"PYTHONPATH": path, "HOME": os.environ.get("HOME", "/"), "PATH": os.environ["PATH"]}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stored(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
