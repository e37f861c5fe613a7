"""Sums over slots and gradients of scores in Triton: the bits of the naive ones, in Triton's interpreter."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

CHECKS = ("check_sum_slots", "check_order_of_addition", "check_scores_by_row", "check_finish_ds")
CHECKS += ("check_list_of_slots", "check_slots_of_experts", "check_gather_without_pads")


@pytest.fixture(scope="module")
def differences():
    return triton_runs.interpreted(children.WORKERS / "triton_small.py", "combine")


def test_each_check_is_listed_here(differences):
    assert sorted(differences) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_same_bits(differences, check):
    assert differences[check] == []
