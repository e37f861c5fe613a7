"""The router's two products with few tokens, Triton's in its interpreter, beside float64."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

CHECKS = ("check_router_product",)


@pytest.fixture(scope="module")
def differences():
    return triton_runs.interpreted(children.WORKERS / "triton_small.py", "router_product")


def test_each_check_is_listed_here(differences):
    assert sorted(differences) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_as_in_float64(differences, check):
    assert differences[check] == []
