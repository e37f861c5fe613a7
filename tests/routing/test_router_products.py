"""The router's products beside float64: the gradient of its weight, the definition and Triton's version in its
interpreter, and the two that few tokens have launches for."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

CHECKS = ("check_router_weight", "check_router_product")


@pytest.fixture(scope="module")
def differences():
    return triton_runs.interpreted(children.WORKERS / "triton_small.py", "router_products")


def test_each_check_is_listed_here(differences):
    assert sorted(differences) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_every_token_counts(differences, check):
    assert differences[check] == []
