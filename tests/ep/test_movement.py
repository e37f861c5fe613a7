"""Dispatch and combine move numbers and add small integers: every result has one right value, found here in NumPy."""

import numpy as np
import pytest

from tests.support import ep_runs
from tests.workers import ep_movement

SIZES = dict(n_tokens=20, n_experts=8)
ROWS = {2: [10, 10], 4: [5, 5, 5, 5]}
UNEVEN = {2: [17, 3], 4: [9, 0, 10, 1]}
FP8 = dict(fp8_dispatch=True, fp8_combine_grad=True)


def cases(ranks: int) -> dict:
    def case(rows=ROWS, **changes):
        return ep_runs.movement(**{**SIZES, "rows": rows[ranks], **changes})

    return {
        "even": case(),
        "uneven": case(UNEVEN, index_dtype="int64"),
        "holes": case(UNEVEN, routing="holes"),
        "one rank gets all": case(routing="first experts"),
        "nowhere": case(routing="nowhere"),
        "no token at all": case({2: [0, 0], 4: [0] * 4}, n_tokens=0),
        "one slot": case(topk=1),
        "fp8": case(UNEVEN, wire=FP8),
        "under autocast": case(UNEVEN, autocast=True),
        "fp8, one rank gets all": case(UNEVEN, routing="first experts", wire=FP8),
    }


NO_INPUT = "any gradient of x, probs and experts wanted"
# What the last rank does otherwise, and what it and the others are told of it: 16 bits of another type, and what only
# backward would run into, are no other number of bytes.
DISAGREEMENTS = {
    "channels of x": (dict(hidden=256), 256, 128),
    "slots of a token in indices": (dict(topk=2), 2, 3),
    "dtype of x": (dict(dtype="float16"), "float16", "bfloat16"),
    "fp8_dispatch": (dict(wire=dict(fp8_dispatch=True)), True, False),
    "fp8_combine_grad": (dict(wire=dict(fp8_combine_grad=True)), True, False),
    "gradient of x wanted": (dict(frozen=["x"]), False, True),
    "gradient of probs wanted": (dict(frozen=["probs"]), False, True),
    NO_INPUT: (dict(backward=False), False, True),
}
# Those of all ranks there.
COMMON = {NO_INPUT: dict(frozen=["x", "probs"], backward=True)}
# Layers whose last rank has frozen its experts, by what wants a backward besides: whether the router does; options.
FROZEN = {
    "by a router": (True, {}),
    "by a router, recomputed": (True, dict(recompute=True)),
    "by nothing": (False, {}),
    "by nothing, recomputed": (False, dict(recompute=True)),
    "by a shared expert": (False, dict(shared_intermediate_size=64)),
}

FRAMEWORKS = [
    pytest.param("paddle", marks=pytest.mark.dist),
    pytest.param("paddle on the plugin", marks=[pytest.mark.dist, pytest.mark.torch]),
    pytest.param("torch", marks=[pytest.mark.dist, pytest.mark.torch]),
]


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture(scope="module", params=[2, 4])
def found(request, framework, tmp_path_factory):
    ranks, (name, _, on_plugin) = request.param, framework.partition(" ")
    folder = tmp_path_factory.mktemp("movement") / "run"
    plugin = request.getfixturevalue("plugin") if on_plugin else None
    # First, so that all other cases show that nothing was left of them.
    given = {n: ep_runs.disagreement(odd, **SIZES, **COMMON.get(n, {})) for n, (odd, _, _) in DISAGREEMENTS.items()}
    if not on_plugin:
        given |= {name: ep_runs.frozen(ranks, not learns, layer) for name, (learns, layer) in FROZEN.items()}
    given |= {"outside": ep_runs.movement(kind="outside")} | cases(ranks)
    return ranks, ep_runs.run(name, ranks, given, folder, limit_s=90, plugin=plugin)


DEEPEP = ["uneven", "holes", "one rank gets all", "fp8"]


@pytest.fixture(scope="module")
def through_deepep(tmp_path_factory):
    """On a stand-in that takes what DeepEP takes."""
    chosen = {name: {**cases(2)[name], "deepep": True} for name in DEEPEP}
    return ep_runs.run("torch", 2, chosen, tmp_path_factory.mktemp("deepep") / "run", limit_s=90)


@pytest.mark.dist
@pytest.mark.torch
@pytest.mark.parametrize("name", DEEPEP)
def test_deepep_is_given_what_it_takes(through_deepep, name):
    expected = Expected(cases(2)[name], 2)
    for rank in range(2):
        for key, value in expected.rank(rank).items():
            np.testing.assert_array_equal(through_deepep[rank][name][key], value, err_msg=f"rank {rank}: {key}")


def through_fp8(values) -> np.ndarray:
    """e4m3 codes with float32 scales for 128 channels, as the definition makes them."""
    import paddle

    from sonicmoe.ernie_compat import SonicMoEMlpNode  # noqa: F401  makes the definition run on Paddle
    from sonicmoe.quant.naive import dequantize, quantize

    if 0 in values.shape:
        return values
    return np.array(dequantize(quantize(paddle.to_tensor(values), (1, 128))).numpy())


class Expected:
    """What each rank should get and give, from the arrays of all ranks."""

    def __init__(self, case, ranks: int):
        given = ep_movement.problem(case)
        self.fp8, self.given = bool(case["wire"]), given
        held = case["n_experts"] // ranks
        indices, bounds = given["indices"], np.concatenate([[0], np.cumsum(case["rows"])])
        self.source = [slice(int(lo), int(hi)) for lo, hi in zip(bounds, bounds[1:], strict=False)]
        self.is_one = (indices >= 0) & (indices < case["n_experts"])
        self.owner = np.where(self.is_one, indices // held, -1)
        # Tokens in the order of all ranks are in the order of their ranks, then their own.
        self.tokens = [np.flatnonzero((self.owner == rank).any(axis=1)) for rank in range(ranks)]
        self.local = [np.where(self.owner == rank, indices % held, -1) for rank in range(ranks)]
        x = through_fp8(given["x"]) if self.fp8 else given["x"]
        probs = [np.where(self.owner == rank, given["probs"], 0) for rank in range(ranks)]
        self.place = np.arange(1, case["topk"] + 1)  # each slot counts otherwise
        y = [2 * x + (p * self.place).sum(axis=1, keepdims=True) for p in probs]
        goes = [(self.owner == rank).any(axis=1, keepdims=True) for rank in range(ranks)]
        self.copies = sum(goes) if ranks else 0
        self.out = sum(np.where(go, part, 0) for go, part in zip(goes, y, strict=True))
        self.x, self.probs, self.held = x, probs, held

    def rank(self, rank: int) -> dict:
        tokens, mine = self.tokens[rank], self.source[rank]
        ids = self.local[rank][tokens]
        dout = self.given["dout"]
        found = {
            "rows": self.x[tokens],
            "ids": ids,
            "probs": self.probs[rank][tokens],
            "counts": np.bincount(ids[ids >= 0], minlength=self.held),
        }
        if self.fp8:
            return found | {"dy": through_fp8(dout)[tokens]}
        ds = np.where(self.is_one, dout.sum(axis=1, keepdims=True) * self.place, 0)
        return found | {"out": self.out[mine], "dx": (2 * self.copies * dout)[mine], "ds": ds[mine]}


@pytest.mark.parametrize("name", list(cases(2)))
def test_every_row_arrives_once_and_in_order(found, name):
    ranks, results = found
    case = cases(ranks)[name]
    expected = Expected(case, ranks)
    for rank in range(ranks):
        for key, value in expected.rank(rank).items():
            np.testing.assert_array_equal(results[rank][name][key], value, err_msg=f"rank {rank}: {key}")


@pytest.mark.parametrize("name", list(DISAGREEMENTS))
def test_ranks_that_disagree_are_all_told(found, name):
    (ranks, results), (_, odd, common) = found, DISAGREEMENTS[name]
    given = [common] * (ranks - 1) + [odd]
    for rank in range(ranks):
        other, where = (odd, ranks - 1) if rank < ranks - 1 else (common, 0)
        wanted = f"{name}: got {given[rank]}, but {other} on rank {where}; need the same on all ranks"
        assert str(results[rank][name]["error"]) == wanted


@pytest.mark.parametrize("name", list(FROZEN))
def test_experts_frozen_on_some_ranks(found, framework, name):
    """All run a backward through dispatch and combine for the router's sake. For their experts' sake only some would,
    and wait there for the others."""
    if "plugin" in framework:
        pytest.skip("the device changes nothing of it")
    (ranks, results), (learns, _) = found, FROZEN[name]
    for rank in range(ranks):
        given, (other, where) = rank < ranks - 1, (False, ranks - 1) if rank < ranks - 1 else (True, 0)
        wanted = f"{NO_INPUT}: got {given}, but {other} on rank {where}; need the same on all ranks"
        assert str(results[rank][name]["error"]) == ("nothing" if learns else wanted)


def test_a_group_has_no_communicator_for_others(found):
    _, results = found
    assert results[0]["outside"]["size"] == 1
    for result in results[1:]:
        assert str(result["outside"]["error"]).startswith("group: got ")


def test_the_cases_are_what_their_names_say(found):
    ranks, results = found
    rows = {name: [len(r[name]["rows"]) for r in results] for name in cases(ranks)}
    assert rows["one rank gets all"][1:] == [0] * (ranks - 1) and rows["one rank gets all"][0] == SIZES["n_tokens"]
    assert rows["nowhere"] == rows["no token at all"] == [0] * ranks
    # Several experts on one rank share a row.
    assert sum(rows["even"]) < SIZES["n_tokens"] * 3
    assert sum(sum(r["even"]["counts"]) for r in results) == SIZES["n_tokens"] * 3
