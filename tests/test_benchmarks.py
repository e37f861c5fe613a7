"""The benchmark programs start and check what they say they check; their timings need a GPU."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.torch
def test_metadata_compares_with_the_definition():
    site = os.environ.get("SONICMOE_TEST_TORCH_SITE")
    if not site:
        pytest.skip("SONICMOE_TEST_TORCH_SITE is not set")
    command = [sys.executable, "benchmarks/metadata.py", "--check", "5", "--backends", "host"]
    env = {"PYTHONPATH": site, "HOME": os.environ.get("HOME", "/"), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 random routings, host: all arrays equal the definition's")
