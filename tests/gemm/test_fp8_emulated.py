"""The FP8 GEMMs' own CUDA code, its threads as fibers on the CPU: barriers, swizzles, epilogues, edges of clusters.
Sums are nearly exact here, so codes are those of the definition but for a handful."""

import dataclasses

import pytest

from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = [pytest.mark.torch, pytest.mark.slow]

if torch:
    from sonicmoe.gemm import naive, sm90_fp8
    from sonicmoe.quant import naive as quant
    from tests.support import fp8_emulator, token_major
    from tests.support.fp8_stages import Fp8Problem, Stages, distance, require_same_in_pieces, values
    from tests.support.gpu_problems import NAMES, errors

    CPU = torch.device("cpu")

SUMS, CODES = 2e-6, 2e-4
ROUTINGS = ("random", "skewed", "empty")
FILLS = ("add", "float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """For routing metadata, which is compiled too."""
    return tmp_path_factory.mktemp("cache") / "sonicmoe"


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return fp8_emulator.build(tmp_path_factory.mktemp("emulator")) if torch else None


@pytest.fixture(autouse=True)
def one_thread():
    """The definition's matrices are small, and threads that wait for work take the emulator's core."""
    if torch:
        torch.set_num_threads(1)


@pytest.fixture(params=ROUTINGS)
def stages(request, module, monkeypatch, cache_dir):
    """Odd numbers of tiles along rows and columns, so that some clusters have a spare block."""
    if not torch:
        return None
    fp8_emulator.install(monkeypatch, module, clusters=2)
    problem = Fp8Problem(t=150, k=3, e=4, h=384, i=128, routing=request.param, device=CPU)
    return Stages(problem, cache_dir, SUMS, CODES)


def test_up(stages):
    stages.compare_up()


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_rows(stages, storage):
    stages.compare_rows(storage)


@pytest.mark.parametrize("h", [128, 256, 512, 640, 896])
def test_rows_of_any_width(module, monkeypatch, cache_dir, h):
    """Tiles of 192 columns have the scales of two blocks of the weights, and those of 128 behind them begin where they
    end."""
    fp8_emulator.install(monkeypatch, module, clusters=2)
    Stages(Fp8Problem(t=70, k=2, e=3, h=h, i=256, device=CPU), cache_dir, SUMS, CODES).compare_rows("bfloat16")


@pytest.mark.parametrize("i", [256, 384])
def test_a_tile_of_tokens_without_a_neighbour(module, monkeypatch, cache_dir, i):
    """Both blocks of a cluster have it, with columns of their own; of an odd number one is left over."""
    fp8_emulator.install(monkeypatch, module, clusters=2)
    problem = Fp8Problem(t=400, k=3, e=5, h=256, i=i, routing="skewed", device=CPU)
    stages = Stages(problem, cache_dir, SUMS, CODES)
    tiles = {rows // 128 for rows in stages.routing.expert_offset.diff().tolist()}
    assert 1 in tiles and any(count > 1 and count % 2 for count in tiles), tiles
    stages.compare_up()
    stages.compare_down_backward(fp8_wgrad=True)


@pytest.mark.parametrize("fp8_wgrad", [True, False])
def test_down_backward(stages, fp8_wgrad):
    stages.compare_down_backward(fp8_wgrad)


@pytest.mark.parametrize("fill", FILLS)
def test_wgrad(stages, fill):
    stages.compare_wgrad(fill)


def test_rows_along_tokens(module, monkeypatch, cache_dir):
    fp8_emulator.install(monkeypatch, module, clusters=1)
    assert token_major.check_token_major("cpu", cache_dir) == []
    assert token_major.check_token_major_of_fp8("cpu", cache_dir) == []


def test_rows_along_tokens_that_do_not_fit(module, monkeypatch, cache_dir):
    """They would be read from behind their end, or cut off."""
    fp8_emulator.install(monkeypatch, module, clusters=1)
    problem = Fp8Problem(t=20, k=1, e=2, h=256, i=128, device=CPU)
    plan, routing = problem.plan(cache_dir), problem.route(cache_dir)
    with pytest.raises(ValueError, match="^rows: got 19 of them, need 20, as many as the routing has"):
        sm90_fp8.token_major(problem.x[1:], routing, plan)
    with pytest.raises(ValueError, match="^rows: got 256 in sorted order and columns 64 to 256, need multiples of 128"):
        sm90_fp8.token_major(problem.x, routing, plan, (64, 256))
    with pytest.raises(ValueError, match="^rows: got 20 in sorted order .* need multiples of 128"):
        sm90_fp8.token_major(problem.x, problem.route(cache_dir, 1), plan)


def test_a_gradient_at_an_odd_place_is_refused(module, monkeypatch, cache_dir):
    """Bulk stores want multiples of 16 bytes, and main_grad may be cut from a buffer with anything before it."""
    fp8_emulator.install(monkeypatch, module, clusters=1)
    problem = Fp8Problem(t=20, k=1, e=2, h=128, i=128, device=CPU)
    plan, routing = problem.plan(cache_dir), problem.route(cache_dir)
    side = sm90_fp8.token_major(problem.x, routing, plan)
    target = torch.zeros(2 * 128 * 128 + 2)[2:].reshape(2, 128, 128)
    with pytest.raises(ValueError, match="weight gradient: begins .* behind a multiple of 16"):
        sm90_fp8._wgrad(side, side, target, routing, plan, overwrite=False)
    assert not target.any()


@pytest.mark.parametrize("clusters", [1, 5])
def test_the_number_of_blocks_changes_nothing(module, monkeypatch, cache_dir, clusters):
    """Tiles go to other blocks and through the stages in another rhythm."""
    fp8_emulator.install(monkeypatch, module, clusters)
    stages = Stages(Fp8Problem(t=150, k=3, e=4, h=384, i=256, device=CPU), cache_dir, SUMS, CODES)
    stages.compare_up()
    stages.compare_down_backward(True)
    stages.compare_wgrad("add")


def test_no_gemm_takes_more_multiprocessors_than_it_may(module, monkeypatch, cache_dir):
    fp8_emulator.install(monkeypatch, module, clusters=3)
    blocks, make = [], module.Gemms
    monkeypatch.setattr(module, "Gemms", lambda *fields: blocks.append(fields[7]) or make(*fields))
    problem = Fp8Problem(t=20, k=2, e=2, h=128, i=128, device=CPU)
    for most, taken in ((2, 2), (4, 4), (100, 6)):
        blocks.clear()
        problem.run(cache_dir, problem.route(cache_dir), problem.plan(cache_dir, gemm_multiprocessors=most))
        assert blocks == [taken], blocks


SETTINGS = {"plain": {}, "pow2": {"fp8_pow2_scale": True}, "clamp": {"swiglu_clamp": 0.5}}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_engine_beside_the_naive_one(module, monkeypatch, cache_dir, settings):
    fp8_emulator.install(monkeypatch, module, clusters=2)
    clamp, pow2 = settings.get("swiglu_clamp"), settings.get("fp8_pow2_scale", False)
    problem = Fp8Problem(t=100, k=2, e=3, h=256, i=256, routing="skewed", device=CPU, clamp=clamp)
    plan, routing = problem.plan(cache_dir, fp8_pow2_scale=pow2), problem.route(cache_dir)
    found = problem.run(cache_dir, routing, plan)
    naive_plan, exact = dataclasses.replace(plan, backend="naive"), problem.reference()
    theirs = errors(problem.run(cache_dir, routing, naive_plan), exact)
    # The kernels keep dz and p*a in bfloat16 until they know their scales. That apart, they are the naive ones, and it
    # makes nothing worse.
    backward = naive.down_projection_backward

    def narrow(*args, **options):
        dz, pa, ds = backward(*args, **options)
        return dz.bfloat16().float(), pa.bfloat16().float(), ds

    monkeypatch.setattr(naive, "down_projection_backward", narrow)
    wanted = problem.run(cache_dir, routing, naive_plan)
    assert {name: distance(found[name], wanted[name]) < 1e-3 for name in NAMES} == dict.fromkeys(NAMES, True)
    assert {name: error < 1.02 * theirs[name] for name, error in errors(found, exact).items()} == dict.fromkeys(
        NAMES, True
    )
    grouped = problem.run(cache_dir, routing, plan, grouped=True)
    assert distance(grouped["dw2"], found["dw2"]) < SUMS


def test_some_columns_at_a_time_are_the_same_bits(module, monkeypatch, cache_dir):
    fp8_emulator.install(monkeypatch, module, clusters=2)
    require_same_in_pieces(monkeypatch, Fp8Problem(t=70, k=2, e=3, h=640, i=128, device=CPU), cache_dir)


def test_nan_and_inf_stay_where_they_are(module, monkeypatch, cache_dir):
    """Of a token, and of nobody who shares a pad's row 0, a block or a tile with it."""
    fp8_emulator.install(monkeypatch, module, clusters=1)
    problem = Fp8Problem(t=60, k=1, e=2, h=128, i=128, device=CPU)
    problem.indices[:, 0] = torch.arange(60) % 2
    problem.x[0, 5], problem.x[3, 7] = float("nan"), float("inf")
    found = problem.run(cache_dir)
    bad = found["out"].isnan().any(dim=1)
    assert bad.nonzero().flatten().tolist() == [0, 3]
    assert found["ds"].isnan().flatten().nonzero().flatten().tolist() == [0, 3]
    z, _ = fp8_emulator.sm90_fp8.up_projection(
        quant.quantize_rows(problem.x, problem.plan(cache_dir).recipe), problem.weights(problem.plan(cache_dir)),
        problem.route(cache_dir), problem.plan(cache_dir), need_a=False,
    )  # fmt: skip
    assert z.scale.isfinite().all(), "a NaN touches its block's scale"


def same_in_codes(found, wanted, rows, scales=0.0) -> None:
    """NaN in the same places, and in so many rows; other numbers of a row a code apart at most."""
    beyond, same = (tensor.data.float().isnan() for tensor in (found, wanted))
    assert torch.equal(beyond, same)
    assert beyond.any(dim=1).sum() == rows
    torch.testing.assert_close(found.scale, wanted.scale, rtol=scales, atol=0)
    ours, theirs = (values(tensor).masked_fill(same, 0) for tensor in (found, wanted))
    apart = (ours - theirs).norm(dim=1)
    assert (apart <= theirs.norm(dim=1) / 8).all()  # a step from one code to the next


def test_what_is_beyond_float32_is_nan(module, monkeypatch, cache_dir):
    """An Inf that comes up in z, or only in a or in a gradient, counts for no scale; the rest of its block keeps its
    precision."""
    fp8_emulator.install(monkeypatch, module, clusters=1)
    problem = Fp8Problem(t=60, k=1, e=2, h=128, i=128, device=CPU)
    problem.indices[:, 0] = torch.arange(60) % 2
    problem.probs.fill_(1.0)
    # Rows of the weights without a change of sign, so that no order of sums matters.
    size = torch.tensor([8.0, 1.0, -1.0, 0.0])
    draw = torch.Generator().manual_seed(0)
    problem.w1.copy_(size[torch.randint(4, (2, 256, 1), generator=draw)].expand_as(problem.w1) / 128)
    problem.w2.copy_(size[torch.randint(4, (2, 1, 128), generator=draw)].expand_as(problem.w2) / 128)
    problem.x[0], problem.x[3] = 1e38, 1e19
    plan = problem.plan(cache_dir)
    weights, routing = problem.weights(plan), problem.route(cache_dir)
    x = quant.quantize_rows(problem.x, plan.recipe)
    (z, a), wanted = (stages.up_projection(x, weights, routing, plan, need_a=True) for stages in (sm90_fp8, naive))
    same_in_codes(z, wanted[0], rows=1)
    same_in_codes(a, wanted[1], rows=2)
    problem.x[0], problem.dout[3] = 1.0, 1e18
    x, dout = (quant.quantize_rows(rows, plan.recipe) for rows in (problem.x, problem.dout))
    z, _ = naive.up_projection(x, weights, routing, plan, need_a=False)
    wanted = naive.down_projection_backward(dout, z, weights, routing, plan, need_wgrad=True)
    dz, pa, _ = sm90_fp8.down_projection_backward(dout, z, weights, routing, plan, need_wgrad=True)
    same_in_codes(dz.rows, quant.quantize_rows(wanted[0], plan.recipe), rows=1, scales=2**-8)
    for found, rows in ((dz.wgrad, wanted[0]), (pa, wanted[1])):
        along = quant.quantize_rows(rows.transpose(0, 1).contiguous(), plan.recipe)
        along = sm90_fp8.TokenMajor(along.data, along.scale.transpose(0, 1))
        same_in_codes(found, along, rows=along.data.float().isnan().any(dim=1).sum(), scales=2**-8)
        assert found.data.float().isnan().sum() > 9
