"""The layout's kernels in Triton's interpreter. ``test_movement.py`` holds the definition to NumPy."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch


def test_the_definitions_arrays_bit_for_bit():
    found = triton_runs.interpreted(children.WORKERS / "triton_small.py", "layout")
    assert found == {"check_layout": []}
