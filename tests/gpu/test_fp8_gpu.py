"""The FP8 stages on Hopper: each beside its definition on the same operands, then the engine against float64."""

import dataclasses
import pathlib
import subprocess

import pytest
import torch

from sonicmoe import expert_mlp
from sonicmoe.gemm.api import GradBuffers
from tests.support import floors
from tests.support.fp8_stages import FILLS, ROUTINGS, Fp8Problem, Stages, distance, require_same_in_pieces
from tests.support.gpu_problems import NAMES, require_floors, require_same_bits

pytestmark = pytest.mark.gpu

# Both sum the same products of e4m3 numbers; the tensor cores keep fewer bits of a step's 32 products than float32.
SUMS = 1e-3
# One value in some dozens lies so near the middle of two codes that such a difference decides.
CODES = 3e-2


def test_scales_are_divided_exactly(tmp_path):
    """Scales are found and inverted by less than the compiler's divisions: the same bits for every float there is."""
    source, program = pathlib.Path(__file__).with_name("divisions.cu"), tmp_path / "divisions"
    subprocess.run(["nvcc", "-arch=sm_90a", "-std=c++17", "-O3", source, "-o", program], check=True)
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout == "0 0\n"


@pytest.fixture(params=ROUTINGS)
def stages(request, cache_dir):
    return Stages(Fp8Problem(t=500, k=4, e=6, h=512, i=384, routing=request.param), cache_dir, SUMS, CODES)


def test_up(stages):
    stages.compare_up()


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_rows(stages, storage):
    stages.compare_rows(storage)


@pytest.mark.parametrize("fp8_wgrad", [True, False])
def test_down_backward(stages, fp8_wgrad):
    stages.compare_down_backward(fp8_wgrad)


@pytest.mark.parametrize("fill", FILLS)
def test_wgrad(stages, fill):
    stages.compare_wgrad(fill)


@pytest.mark.parametrize("scale", [1e-4, 1.0])
@pytest.mark.parametrize("routing", ["random", "skewed", "empty"])
def test_floors(cache_dir, routing, scale):
    problem = Fp8Problem(routing=routing, scale=scale)
    # ds sits on its floor (docs/precision.md), and a measurement on so many values has an error of its own.
    bound = floors.sampled(floors.FP8_RELATIVE, problem.indices.numel())
    require_floors(problem.run(cache_dir), problem.reference(), floors.fp8_floors("sm90") | {"ds": bound})


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 128, 128), (3, 2, 40, 128, 384), (4096, 8, 8, 1024, 512), (999, 8, 128, 640, 256)]
)
def test_sizes(cache_dir, sizes):
    """Odd numbers of tiles along H, I and the segments: the spare block of a cluster stores nothing."""
    problem = Fp8Problem(*sizes)
    plan, routing = problem.plan(cache_dir), problem.route(cache_dir)
    wanted = problem.run(cache_dir, routing, dataclasses.replace(plan, backend="naive"))
    require_floors(
        problem.run(cache_dir, routing, plan), {n: v.double() for n, v in wanted.items()}, dict.fromkeys(NAMES, 0.02)
    )


SWITCHES = {"pow2": {"fp8_pow2_scale": True}, "recompute_z": {"fp8_recompute_z": True}, "wide": {"fp8_wgrad": False}}


@pytest.mark.parametrize("settings", SWITCHES.values(), ids=SWITCHES)
def test_switches(cache_dir, settings):
    problem = Fp8Problem(routing="skewed")
    found = problem.run(cache_dir, plan=problem.plan(cache_dir, **settings))
    require_floors(found, problem.reference(), floors.FP8_POW2)


def test_clamp(cache_dir):
    problem = Fp8Problem(clamp=0.5)
    plan, routing = problem.plan(cache_dir), problem.route(cache_dir)
    wanted = problem.run(cache_dir, routing, dataclasses.replace(plan, backend="naive"))
    require_floors(
        problem.run(cache_dir, routing, plan), {n: v.double() for n, v in wanted.items()}, dict.fromkeys(NAMES, 0.03)
    )


def test_grouped_layout_is_the_same_numbers(cache_dir):
    problem = Fp8Problem()
    plain, grouped = problem.run(cache_dir), problem.run(cache_dir, grouped=True)
    for name in NAMES:
        assert distance(grouped[name], plain[name]) < SUMS, name


@pytest.mark.parametrize("fp8_wgrad", [True, False])
def test_nan_of_a_token_stays_with_it(cache_dir, fp8_wgrad):
    """Pad rows read token 0; what it holds must not reach experts that it was not sent to."""
    problem = Fp8Problem(t=300, k=2, e=6)
    problem.indices[0] = torch.tensor([1, 3], device=problem.device)
    problem.x[0] = float("nan")
    problem.dout[0] = float("nan")
    found = problem.run(cache_dir, plan=problem.plan(cache_dir, fp8_wgrad=fp8_wgrad))
    for name in ("out", "dx", "ds"):
        bad = found[name].isnan().any(dim=1)
        assert bad[0] and not bad[1:].any(), name
    for name in ("dw1", "dw2"):
        assert found[name].isnan().flatten(1).any(dim=1).tolist() == [e in (1, 3) for e in range(6)], name


def test_same_bits_again(cache_dir):
    problem = Fp8Problem(t=2048, e=8, h=1024, i=512)
    routing = problem.route(cache_dir)
    first = problem.run(cache_dir, routing)
    for _ in range(20):
        require_same_bits(problem.run(cache_dir, routing), first)


def test_some_columns_at_a_time_are_the_same_bits(monkeypatch, cache_dir):
    require_same_in_pieces(monkeypatch, Fp8Problem(t=500, k=4, e=6, h=640, i=384, routing="empty"), cache_dir)


def test_nothing_routed_here(cache_dir):
    problem = Fp8Problem(t=5)
    problem.indices.fill_(-1)
    found = problem.run(cache_dir)
    assert all(not found[name].any() for name in NAMES)


def test_filling_takes_any_memory(cache_dir):
    """``overwrite``: NaN in the caller's memory is gone, and an expert without tokens gets zeros."""
    problem = Fp8Problem(routing="empty")
    plan, routing = problem.plan(cache_dir), problem.route(cache_dir)
    once = problem.run(cache_dir, routing, plan)
    _, saved = expert_mlp.forward(problem.x, routing, problem.weights(plan), plan)
    grads = expert_mlp.backward(saved, problem.dout)
    everyone = (True,) * problem.sizes[2]
    dw1, dw2 = (torch.full_like(w, float("nan")) for w in (problem.w1, problem.w2))
    filled = GradBuffers(dw1, dw2, False, everyone, everyone, overwrite=True)
    grads.wgrad.accumulate_dw1(filled)
    grads.wgrad.accumulate_dw2(filled)
    for name, found in (("dw1", dw1), ("dw2", dw2)):
        assert torch.equal(found, once[name].to(found.dtype)), name
