"""The load-balancing loss and its gradient, the definition and Triton's version in its interpreter, beside float64."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

CHECKS = ("check_switch_loss", "check_switch_loss_of_nan")


@pytest.fixture(scope="module")
def differences():
    return triton_runs.interpreted(children.WORKERS / "triton_small.py", "switch_loss")


def test_each_check_is_listed_here(differences):
    assert sorted(differences) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_loss_and_gradient(differences, check):
    assert differences[check] == []
