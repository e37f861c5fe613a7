"""What must hold for every routing, over routings that nobody chose by hand.

Small integers make every sum of the relu kinds exact in float32, whatever the order: equalities there are of bits and
a single misplaced row shows. The smooth kinds follow with the digits that their type has.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonicmoe import SonicMoEConfig
from tests.support.floors import assert_equal_results, relative_error
from tests.support.oracle import Result
from tests.support.paddle_runs import (
    expert_list,
    forward_node,
    main_grads,
    make_node,
    oracle,
    run_fleet,
    run_node,
    tensor,
)
from tests.support.problems import Problem, to_bf16

pytestmark = pytest.mark.contract

# derandomize: the same examples on every machine and every day. database: none, or old failures would be replayed.
bounded = settings(max_examples=30, deadline=None, derandomize=True, database=None)
fewer = settings(bounded, max_examples=12)
EXACT_KINDS = ("reglu", "relu", "relu_sq")
GLU = ("swiglu", "geglu", "reglu")
FP8 = {
    "bf16": None,
    "sm90": SonicMoEConfig(use_fp8=True, fp8_recipe="sm90", fp8_wgrad=True),
    "sm100": SonicMoEConfig(use_fp8=True, fp8_recipe="sm100", fp8_wgrad=True),
}


@st.composite
def routings(draw, max_tokens=12):
    """indices [T,K] with distinct valid ids in a row, and any mix of ids that mean 'not here'; probs [T,K]."""
    n_experts, n_tokens, topk = draw(st.integers(1, 6)), draw(st.integers(0, max_tokens)), draw(st.integers(1, 5))
    nowhere = st.sampled_from([-1, -1, -2, -100, n_experts, n_experts + 3, 2**31 - 1])
    rows = []
    for _ in range(n_tokens):
        order = draw(st.permutations(range(n_experts)))
        row = [*order, *[-1] * topk][:topk]
        holes = draw(st.lists(st.booleans(), min_size=topk, max_size=topk))
        rows.append([draw(nowhere) if hole else expert for hole, expert in zip(holes, row, strict=True)])
    quarters = st.lists(st.integers(0, 8), min_size=n_tokens * topk, max_size=n_tokens * topk)
    probs = np.array(draw(quarters), dtype=np.float32).reshape(n_tokens, topk) / 4
    return np.array(rows, dtype=np.int64).reshape(n_tokens, topk), probs, n_experts


@st.composite
def problems(draw, kind="reglu", exact=True, hidden=(8, 16, 40), intermediate=(8, 24), max_tokens=12):
    indices, probs, n_experts = draw(routings(max_tokens))
    h, i = draw(st.sampled_from(hidden)), draw(st.sampled_from(intermediate))
    width = 2 * i if kind in GLU else i
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def values(shape, size, std):
        if exact:
            return rng.integers(-size, size + 1, shape).astype(np.float32)
        return to_bf16(rng.standard_normal(shape) * std)

    n_tokens = len(indices)
    return Problem(
        x=values((n_tokens, h), 3, 1.0),
        dout=values((n_tokens, h), 2, 1.0),
        w1=values((n_experts, h, width), 1, 0.1),
        w2=values((n_experts, i, h), 1, 0.1),
        indices=indices,
        probs=probs,
    )


def run_exactly(problem, kind="reglu") -> Result:
    experts = expert_list(problem, "float32")
    return run_node(problem, experts, activation_type=kind, dtype="float32", index_dtype="int64")


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_equals_the_oracle_bit_for_bit(kind):
    @bounded
    @given(problems(kind))
    def check(problem):
        result = run_exactly(problem, kind)
        assert_equal_results(result, oracle(problem, kind))
        here = (problem.indices >= 0) & (problem.indices < problem.n_experts)
        assert not result.ds[~here].any()

    check()


def test_fleet_equals_the_oracle_bit_for_bit():
    @bounded
    @given(problems("reglu"))
    def check(problem):
        result = run_fleet(problem, activation_type="reglu", dtype="float32", index_dtype="int64")
        assert_equal_results(result, oracle(problem, "reglu"))

    check()


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "silu", "gelu"])
def test_smooth_kinds_equal_the_oracle_in_fp32(kind):
    @bounded
    @given(problems(kind, exact=False))
    def check(problem):
        result, expected = run_exactly(problem, kind), oracle(problem, kind)
        for name in result.NAMES:
            # A handful of values may cancel: a thousandfold loss of fp32's digits is still no bug.
            assert relative_error(getattr(result, name), getattr(expected, name)) < 1e-4, name

    check()


@bounded
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_the_rows(problem, random):
    order = list(range(len(problem.x)))
    random.shuffle(order)
    moved = replace(
        problem,
        x=problem.x[order],
        dout=problem.dout[order],
        indices=problem.indices[order],
        probs=problem.probs[order],
    )
    plain = run_exactly(problem)
    expected = replace(plain, out=plain.out[order], dx=plain.dx[order], ds=plain.ds[order])
    assert_equal_results(run_exactly(moved), expected)


@bounded
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_slots_of_a_token_permutes_ds(problem, random):
    columns = list(range(problem.indices.shape[1]))
    random.shuffle(columns)
    moved = replace(problem, indices=problem.indices[:, columns], probs=problem.probs[:, columns])
    plain = run_exactly(problem)
    assert_equal_results(run_exactly(moved), replace(plain, ds=plain.ds[:, columns]))


@bounded
@given(problems(), st.randoms(use_true_random=False))
def test_relabelling_experts_changes_nothing_but_their_place(problem, random):
    label = list(range(problem.n_experts))  # old id -> new id
    random.shuffle(label)
    old_of = np.argsort(label)
    here = (problem.indices >= 0) & (problem.indices < problem.n_experts)
    renamed = np.where(here, np.array(label)[np.where(here, problem.indices, 0)], problem.indices)
    moved = replace(problem, indices=renamed, w1=problem.w1[old_of], w2=problem.w2[old_of])
    plain = run_exactly(problem)
    assert_equal_results(run_exactly(moved), replace(plain, dw1=plain.dw1[old_of], dw2=plain.dw2[old_of]))


@bounded
@given(problems(), st.integers(0, 2**32 - 1))
def test_linear_in_probs(problem, seed):
    """out, dx, dW1 and dW2 are linear in the probabilities; ds does not know them."""
    other = np.random.default_rng(seed).integers(-4, 5, problem.probs.shape).astype(np.float32) / 4
    first, second = run_exactly(problem), run_exactly(replace(problem, probs=other))
    both = run_exactly(replace(problem, probs=problem.probs + 3 * other))
    expected = [getattr(first, name) + 3 * getattr(second, name) for name in first.NAMES]
    assert_equal_results(both, replace(Result(*expected), ds=first.ds))
    np.testing.assert_array_equal(first.ds, second.ds)


@pytest.mark.parametrize("path", FP8)
def test_doubling_probs_doubles_the_bits(path):
    """A power of two passes through every rounding, block scales included: exact in BF16 and in FP8."""
    sizes = {"hidden": (128,), "intermediate": (128,), "max_tokens": 8}

    @fewer
    @given(problems("swiglu", exact=False, **sizes))
    def check(problem):
        single = run_node(problem, config=FP8[path], index_dtype="int64")
        double = run_node(replace(problem, probs=2 * problem.probs), config=FP8[path], index_dtype="int64")
        expected = [2 * getattr(single, name) for name in single.NAMES]
        assert_equal_results(double, replace(Result(*expected), ds=single.ds))

    check()


@pytest.mark.parametrize("path", FP8)
def test_columns_of_nothing_change_no_bit(path):
    @fewer
    @given(
        problems("swiglu", exact=False, hidden=(128,), intermediate=(128,), max_tokens=8),
        st.integers(0, 4),
        st.integers(0, 4),
        st.sampled_from([-1, -3, 6, 99]),
    )
    def check(problem, before, after, nothing):
        rows = len(problem.x)
        left, right = np.full((rows, before), nothing), np.full((rows, after), nothing)
        wide = replace(
            problem,
            indices=np.concatenate([left, problem.indices, right], axis=1),
            probs=np.concatenate([left + 0.5, problem.probs, right + 0.5], axis=1).astype(np.float32),
        )
        plain = run_node(problem, config=FP8[path], index_dtype="int64")
        result = run_node(wide, config=FP8[path], index_dtype="int64")
        assert not result.ds[:, :before].any() and not result.ds[:, before + problem.indices.shape[1] :].any()
        result.ds = result.ds[:, before : before + problem.indices.shape[1]]
        assert_equal_results(result, plain)

    check()


@pytest.mark.parametrize("path", FP8)
def test_every_id_outside_of_the_range_means_the_same(path):
    @fewer
    @given(problems("swiglu", exact=False, hidden=(128,), intermediate=(128,), max_tokens=8))
    def check(problem):
        here = (problem.indices >= 0) & (problem.indices < problem.n_experts)
        plain = replace(problem, indices=np.where(here, problem.indices, -1))
        first = run_node(problem, config=FP8[path], index_dtype="int64")
        assert_equal_results(first, run_node(plain, config=FP8[path], index_dtype="int32"))

    check()


def micro_batches(problem, cuts):
    bounds = [0, *sorted(cuts), len(problem.x)]
    for lo, hi in zip(bounds, bounds[1:], strict=False):
        rows = slice(lo, hi)
        yield replace(
            problem,
            x=problem.x[rows],
            dout=problem.dout[rows],
            indices=problem.indices[rows],
            probs=problem.probs[rows],
        )


def accumulated(problem, cuts, kind, flush_each):
    """main_grad after the batch went through in pieces, with one ``step()`` at the end or one after each piece."""
    experts = expert_list(problem, "float32")
    node = make_node(problem, experts, activation_type=kind)
    for part in micro_batches(problem, cuts):
        out, _, _ = forward_node(node, part, dtype="float32", index_dtype="int64")
        out.backward(tensor(part.dout, "float32"))
        if flush_each:
            node.step()
    node.step()
    return main_grads(experts)


@bounded
@given(problems(), st.lists(st.integers(0, 12), max_size=3), st.booleans())
def test_micro_batches_add_up_exactly(problem, cuts, flush_each):
    cuts = [min(cut, len(problem.x)) for cut in cuts]
    expected = oracle(problem, "reglu")
    dw1, dw2 = accumulated(problem, cuts, "reglu", flush_each)
    np.testing.assert_array_equal(dw1, expected.dw1)
    np.testing.assert_array_equal(dw2, expected.dw2)


@bounded
@given(problems("swiglu", exact=False), st.lists(st.integers(0, 12), min_size=1, max_size=3), st.booleans())
def test_micro_batches_add_up_to_rounding(problem, cuts, flush_each):
    cuts = [min(cut, len(problem.x)) for cut in cuts]
    whole, parts = accumulated(problem, [], "swiglu", False), accumulated(problem, cuts, "swiglu", flush_each)
    for one, other in zip(whole, parts, strict=True):
        assert relative_error(other, one) < 1e-5
