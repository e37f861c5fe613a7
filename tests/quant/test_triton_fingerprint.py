"""The fingerprint of weights in Triton's interpreter: its formula in plain integers, and that changes show."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

CHECKS = ("check_hash_is_its_formula", "check_every_bit_shows", "check_swaps_show", "check_flags")


@pytest.fixture(scope="module")
def differences():
    return triton_runs.interpreted(children.WORKERS / "triton_small.py", "fingerprint")


def test_each_check_is_listed_here(differences):
    assert sorted(differences) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_fingerprint(differences, check):
    assert differences[check] == []


def test_what_is_refused():
    script = """
        import json, torch
        from sonicmoe.quant import triton_fingerprint

        said = []
        for bad in (torch.zeros(0), torch.zeros(4, 4).t()[1:], torch.zeros(4, dtype=torch.float64)):
            try:
                triton_fingerprint.fingerprint([torch.zeros(3), bad])
            except (TypeError, ValueError) as error:
                said.append([type(error).__name__, str(error)])
        print(json.dumps(said))
    """
    assert triton_runs.interpreted(script) == [
        ["ValueError", "tensors[1]: need at least one element"],
        ["ValueError", "tensors[1]: need contiguous memory"],
        ["TypeError", "tensors[1]: got dtype torch.float64"],
    ]
