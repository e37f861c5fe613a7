"""Top-k with softmax in Triton, in its interpreter: ids exactly, scores and gradients within rounding."""

import pytest

from tests.support import children, triton_runs

pytestmark = pytest.mark.torch

CHECKS = ("check_topk", "check_topk_backward")


@pytest.fixture(scope="module")
def differences():
    return triton_runs.interpreted(children.WORKERS / "triton_small.py", "topk")


def test_each_check_is_listed_here(differences):
    assert sorted(differences) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_choice_scores_and_gradient(differences, check):
    assert differences[check] == []


def test_limits():
    """What the kernels cannot do is an error that names it."""
    script = """
        import json, torch
        from sonicmoe.routing import triton_topk

        said = []
        for shape, k in (((4, 1025), 8), ((4, 8), 9), ((4, 64), 33), ((4, 8), 0)):
            try:
                triton_topk.topk_softmax_forward(torch.zeros(shape), k)
            except ValueError as error:
                said.append(str(error))
        print(json.dumps(said))
    """
    assert triton_runs.interpreted(script) == [
        "logits: got 1025 experts, need 1 to 1024",
        "k: got 9, need 1 to 8",
        "k: got 33, need 1 to 32",
        "k: got 0, need 1 to 8",
    ]
