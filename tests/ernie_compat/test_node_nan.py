"""A NaN that comes in goes out where the mathematics sends it, and nowhere else.

Everything else keeps the bits of the run without it. Token 0 matters most: pad rows of FP8 read it.
"""

import numpy as np
import pytest

from sonicmoe import SonicMoEConfig
from tests.support.paddle_runs import run_node
from tests.support.problems import make_problem

pytestmark = pytest.mark.contract

PATHS = {
    "bf16": None,
    "clamped": SonicMoEConfig(swiglu_clamp=0.5),
    "sm90": SonicMoEConfig(use_fp8=True, fp8_recipe="sm90"),
    "sm90-wgrad": SonicMoEConfig(use_fp8=True, fp8_recipe="sm90", fp8_wgrad=True),
    "sm100-iso32-wgrad": SonicMoEConfig(use_fp8=True, fp8_recipe="sm100", fp8_iso32_weight=True, fp8_wgrad=True),
    "clamped-sm90": SonicMoEConfig(use_fp8=True, fp8_recipe="sm90", swiglu_clamp=0.5),
}
E = 4
CHANNEL = 131  # in the second block of a row


def problem_and_experts(token):
    """A problem, and which of its experts ``token`` visits; the others have rows, and under FP8 pads, as well."""
    problem = make_problem(n_tokens=12, hidden=256, n_experts=E, topk=2, routing="holes", seed=13)
    problem.indices[token] = [3, 1]
    assert all(problem.counts)
    return problem, np.isin(np.arange(E), problem.indices[token])


def assert_row_is_nan(dirty, clean, token, name):
    value, expected = getattr(dirty, name), getattr(clean, name)
    others = np.arange(len(value)) != token
    np.testing.assert_array_equal(value[others], expected[others], err_msg=name)
    assert np.isnan(value[token]).all(), f"{name}[{token}] must be NaN as a whole"


def assert_other_experts_are_clean(dirty, clean, visited):
    for name in ("dw1", "dw2"):
        value, expected = getattr(dirty, name), getattr(clean, name)
        np.testing.assert_array_equal(value[~visited], expected[~visited], err_msg=name)


@pytest.mark.parametrize(
    "path, token, bad",
    [*((path, token, np.nan) for path in PATHS for token in (0, 7)), *((path, 0, np.inf) for path in PATHS)],
)
def test_in_x(path, token, bad):
    problem, visited = problem_and_experts(token)
    clean = run_node(problem, config=PATHS[path])
    problem.x[token, CHANNEL] = bad
    dirty = run_node(problem, config=PATHS[path])
    if bad == np.inf and path in ("bf16", "clamped"):
        # Without FP8 an Inf is a number: silu(-Inf) is 0. What is required is that it stays with its token.
        others = np.arange(len(problem.x)) != token
        np.testing.assert_array_equal(dirty.out[others], clean.out[others])
        np.testing.assert_array_equal(dirty.dx[others], clean.dx[others])
    else:
        assert_row_is_nan(dirty, clean, token, "out")
        assert_row_is_nan(dirty, clean, token, "ds")
        if not path.startswith("clamped"):  # a clamped entry passes no gradient, whatever its value
            assert_row_is_nan(dirty, clean, token, "dx")
            assert np.isnan(dirty.dw1[visited]).all()
        assert np.isnan(dirty.dw2[visited]).all()
    assert_other_experts_are_clean(dirty, clean, visited)


@pytest.mark.parametrize("token", [0, 7])
@pytest.mark.parametrize("path", PATHS)
def test_in_dout(path, token):
    problem, visited = problem_and_experts(token)
    clean = run_node(problem, config=PATHS[path])
    problem.dout[token, CHANNEL] = np.nan
    dirty = run_node(problem, config=PATHS[path])
    np.testing.assert_array_equal(dirty.out, clean.out)
    assert_row_is_nan(dirty, clean, token, "ds")
    assert_row_is_nan(dirty, clean, token, "dx")
    assert_other_experts_are_clean(dirty, clean, visited)
    # dW2 = (p*a)^T dout: one channel of dout is one column of it, and a is in order.
    assert np.isnan(dirty.dw2[visited][:, :, CHANNEL]).all()
    columns = np.arange(problem.hidden) != CHANNEL
    np.testing.assert_array_equal(dirty.dw2[:, :, columns], clean.dw2[:, :, columns])


@pytest.mark.parametrize("path", PATHS)
def test_in_probs(path):
    """p scales the slot's share of everything but its own gradient."""
    token = 7
    problem, visited = problem_and_experts(token)
    clean = run_node(problem, config=PATHS[path])
    problem.probs[token, 0] = np.nan
    visited &= np.arange(E) == problem.indices[token, 0]
    dirty = run_node(problem, config=PATHS[path])
    np.testing.assert_array_equal(dirty.ds, clean.ds)
    assert_row_is_nan(dirty, clean, token, "out")
    assert_row_is_nan(dirty, clean, token, "dx")
    assert_other_experts_are_clean(dirty, clean, visited)
    assert np.isnan(dirty.dw1[visited]).any() and np.isnan(dirty.dw2[visited]).all()


@pytest.mark.parametrize("path", PATHS)
def test_probs_of_nobody_may_be_nan(path):
    """Dispatchers leave masked slots uninitialised."""
    problem = make_problem(n_tokens=12, hidden=256, n_experts=E, topk=3, routing="holes", seed=14)
    clean = run_node(problem, config=PATHS[path])
    problem.probs[problem.indices < 0] = np.nan
    dirty = run_node(problem, config=PATHS[path])
    for name in clean.NAMES:
        np.testing.assert_array_equal(getattr(dirty, name), getattr(clean, name), err_msg=name)


@pytest.mark.parametrize("path", PATHS)
def test_in_a_weight(path):
    """Tokens of that expert are lost, those of the others keep their bits."""
    expert = 3
    problem, _ = problem_and_experts(0)
    clean = run_node(problem, config=PATHS[path])
    problem.w1[expert, 3, 60] = np.nan
    dirty = run_node(problem, config=PATHS[path])
    visits = (problem.indices == expert).any(axis=1)
    assert np.isnan(dirty.out[visits]).all() and 0 < visits.sum() < len(visits)
    for name in ("out", "dx", "ds"):
        np.testing.assert_array_equal(getattr(dirty, name)[~visits], getattr(clean, name)[~visits], err_msg=name)
    assert_other_experts_are_clean(dirty, clean, np.arange(E) == expert)
