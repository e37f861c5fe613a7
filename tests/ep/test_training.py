"""Thirty steps of training on 2 and 4 ranks are those of one rank that holds all experts, also across a checkpoint."""

import numpy as np
import pytest

from tests.support import ep_runs, floors

STEPS, SAVED_AT = 30, 10
FP8 = dict(fp8_dispatch=True, fp8_combine_grad=True)
# Nobody is sent to the second half of the experts: steps of 0.001.
AWAY = [0] * 4 + [-10_000] * 4
ROWS = {2: [96, 0], 4: [0, 40, 56, 0]}
EXACT = "top 1, frozen router"

FRAMEWORKS = [
    pytest.param("paddle", marks=pytest.mark.dist),
    pytest.param("torch", marks=[pytest.mark.dist, pytest.mark.torch]),
]


def common(parts: int) -> dict:
    """What 2 and 4 ranks run. ``whole``: one rank takes a batch in one piece."""

    def case(**changes):
        return ep_runs.training(parts, steps=STEPS, **changes)

    return {
        "bf16": case(),
        EXACT: case(topk=1, frozen_router=True),
        "skewed": case(skewed=True),
        "ranks that get nothing": case(layer=dict(balance_speed=0.001), steer=AWAY),
        "ranks without tokens of their own": case(rows=ROWS.get(parts)),
        "fp8 payload": case(layer=FP8, intermediate=128),
    }


def more(parts: int) -> dict:
    """What 2 ranks run besides."""

    def case(**changes):
        return ep_runs.training(parts, steps=STEPS, **changes)

    return {
        "fp8 payload and experts": case(layer=FP8, intermediate=128, config=dict(use_fp8=True, fp8_wgrad=True)),
        "recompute": case(layer=dict(recompute=True)),
        "copied": case(copied=True),
        "overlap, shared expert": case(layer=dict(overlap=3, shared_intermediate_size=64)),
        "balance, two micro-batches": case(layer=dict(balance_speed=0.01), micro_batches=2),
        "fp8 payload, recompute, overlap": case(layer=dict(recompute=True, overlap=2, **FP8), intermediate=128),
    }


def saving(parts: int) -> dict:
    return {f"saved by {parts}": ep_runs.training(parts, steps=SAVED_AT, save=SAVED_AT)}


def reading(parts: int, writer: int) -> dict:
    return {f"read by {parts} from {writer}": ep_runs.training(parts, steps=2 * SAVED_AT, load=f"saved by {writer}")}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def runs(request, tmp_path_factory):
    """Results by number of ranks: one for each rank. Later runs read the checkpoints of those before."""
    folder, framework = tmp_path_factory.mktemp("training"), request.param

    def run(ranks, cases, name):
        return ep_runs.run(framework, ranks if ranks > 1 else 0, cases, folder / name)

    found = {1: run(1, common(1) | more(1) | saving(1), "one")}
    found[2] = run(2, common(2) | more(2) | saving(2) | reading(2, 1), "two")
    found[4] = run(4, common(4) | saving(4) | reading(4, 2), "four")
    for name, result in run(1, reading(1, 2) | reading(1, 4), "one again")[0].items():
        found[1][0][name] = result
    return found


def both(name: str) -> list:
    return [2, 4] if name in common(2) else [2]


CASES = [(ranks, name) for name in [*common(2), *more(2)] for ranks in both(name)]


@pytest.mark.parametrize("ranks, name", CASES)
def test_losses_are_those_of_one_rank(runs, ranks, name):
    alone = runs[1][0][name]["losses"]
    assert len(alone) == STEPS and alone[-1] < 0.7 * alone[0], "nothing was learnt"
    for rank in runs[ranks]:
        losses = rank[name]["losses"]
        assert floors.relative_error(losses[:5], alone[:5]) < 1e-3
        assert floors.relative_error(losses, alone) < floors.BF16["out"]


@pytest.mark.parametrize("ranks, name", CASES)
def test_first_gradients_are_those_of_one_rank(runs, ranks, name):
    alone, seen = runs[1][0][name], set()
    limit = floors.FP8_RELATIVE if "fp8" in name else 0.01
    for rank in runs[ranks]:
        for key in [key for key in rank[name] if key.startswith("gradient")]:
            error = floors.relative_error(rank[name][key], alone[key])
            assert error < limit, f"{key}: relative error {error:.1e}"
            seen.add(key)
    assert seen == {key for key in alone if key.startswith("gradient")}


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_expert_a_token_gives_the_same_bits(runs, ranks):
    """Nothing is added up on the way, and each expert meets the same rows in the same order."""
    alone, seen = runs[1][0][EXACT], set()
    for rank in runs[ranks]:
        for key in [key for key in rank[EXACT] if key.startswith("weight")]:
            np.testing.assert_array_equal(rank[EXACT][key], alone[key], err_msg=key)
            seen.add(key)
    assert seen == {key for key in alone if key.startswith("weight")}


@pytest.mark.parametrize("name", ["recompute", "copied"])
def test_the_same_bits(runs, name):
    """What is run again in backward, and a deep copy of a layer over the same group."""
    for rank in runs[2]:
        for key, value in rank["bf16"].items():
            np.testing.assert_array_equal(rank[name][key], value, err_msg=key)


@pytest.mark.parametrize("ranks", [2, 4])
def test_replicated_weights_stay_alike(runs, ranks):
    for name in common(ranks):
        for key in [key for key in runs[ranks][0][name] if key.startswith("weight") and "@" not in key]:
            for rank in runs[ranks][1:]:
                np.testing.assert_array_equal(rank[name][key], runs[ranks][0][name][key], err_msg=f"{name}: {key}")


@pytest.mark.parametrize("reader, writer", [(2, 1), (4, 2), (1, 2), (1, 4)])
def test_training_goes_on_from_another_number_of_ranks(runs, reader, writer):
    expected = runs[1][0]["bf16"]["losses"][SAVED_AT : 2 * SAVED_AT]
    for rank in runs[reader]:
        losses = rank[f"read by {reader} from {writer}"]["losses"]
        assert floors.relative_error(losses, expected) < floors.BF16["out"]
