"""Which kernels the engine chooses and how it launches them, without a GPU: stubs compute what the kernels would, from
what each launch got alone, so that the whole engine's results can be held against the naive one's."""

import threading

import pytest

from tests.support import torch_oracle as oracle
from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe import SonicMoEConfig, expert_mlp
    from sonicmoe.functional.autograd import apply_experts
    from sonicmoe.gemm import api, naive, sm90_bf16, sm90_fp8
    from sonicmoe.gemm.api import ExpertWeights, GradBuffers
    from sonicmoe.gemm.plan import make_plan
    from sonicmoe.gemm.tile_table import TILES
    from sonicmoe.quant import naive as quant
    from sonicmoe.quant.formats import make_recipe
    from sonicmoe.routing import metadata
    from tests.support import gemm_stubs

H, I, E = 64, 160, 5  # I: one and a quarter tiles of down_backward, so ds comes in two parts
F = 2 * I
FORWARD = ["up", "rows", "sum_slots"]
BACKWARD = ["scores_by_row", "down_backward", "finish_ds", "rows", "sum_slots"]
NAMES = ("out", "dx", "ds", "dw1", "dw2")


# ---- make_plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "arch", "storage", "settings", "backend"),
    [
        ("cuda", "sm_90a", "bfloat16", {}, "sm90_bf16"),
        ("cuda", "sm_90a", "float16", {}, "sm90_bf16"),
        ("cuda", "sm_90a", "bfloat16", {"fp8_mode": "perf"}, "sm90_fp8"),
        ("cuda", "sm_90a", "float16", {"fp8_mode": "mem", "swiglu_clamp": 7.0}, "sm90_fp8"),
        ("cuda", "sm_90a", "bfloat16", {"backend": "naive"}, "naive"),
        ("cuda", "sm_90a", "float32", {"backend": "naive"}, "naive"),
        ("cuda", "sm_80", "bfloat16", {"backend": "naive"}, "naive"),
        ("cuda", "sm_90a", "bfloat16", {"backend": "naive", "fp8_mode": "perf"}, "naive"),
        ("cpu", None, "bfloat16", {}, "naive"),
        ("cpu", None, "float32", {}, "naive"),
        ("cpu", None, "bfloat16", {"fp8_mode": "perf"}, "naive"),
    ],
)
def test_backend_by_arch_type_and_setting(device, arch, storage, settings, backend):
    plan = make_plan(SonicMoEConfig(**settings), "swiglu", storage=storage, device=device, arch=arch)
    assert plan.backend == backend and plan.path.startswith(f"{device}/{backend}/")
    assert api.stages(plan) is {"sm90_bf16": sm90_bf16, "sm90_fp8": sm90_fp8, "naive": naive}[backend]


def test_building_ahead_begins_once_a_plan_and_leaves_errors_to_the_call(monkeypatch):
    plan = make_plan(SonicMoEConfig(swiglu_clamp=3.5), "swiglu", storage="bfloat16", device="cuda", arch="sm_90a")
    begun, unseen = [], []

    def fails(*args):
        begun.append(args)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(sm90_bf16, "build_ahead", fails)
    monkeypatch.setattr(threading, "excepthook", unseen.append)
    for _ in range(2):
        api.build_ahead(plan, "sm_90a")
    for thread in threading.enumerate():
        if thread.name == "sonicmoe-build":
            thread.join()
    assert begun == [(plan, "sm_90a")] and not unseen


@pytest.mark.parametrize(
    ("arch", "storage", "settings", "says"),
    [
        ("sm_90a", "float32", {}, r"got cuda \(sm_90a\), and this version has no kernels for float32"),
        ("sm_80", "bfloat16", {}, r"got cuda \(sm_80\), and this version has no kernels for bfloat16"),
        ("sm_90a", "bfloat16", {"fp8_mode": "perf", "fp8_recipe": "sm100"}, r"no kernels for FP8 \(sm100\)"),
        ("sm_80", "bfloat16", {"fp8_mode": "perf"}, r"no kernels for FP8 \(sm90\)"),
        (None, "bfloat16", {}, "got cuda, and this version has no kernels for bfloat16"),
    ],
)
def test_what_has_no_kernels_is_an_error_that_names_the_way_out(arch, storage, settings, says):
    with pytest.raises(ValueError, match=f"^device: .*{says}.*set backend='naive'"):
        make_plan(SonicMoEConfig(**settings), "swiglu", storage=storage, device="cuda", arch=arch)


# ---- The engine on stubs ---------------------------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch):
    return gemm_stubs.install(monkeypatch) if torch else None


@pytest.fixture
def hopper(log, tmp_path):
    """(kind, storage, ...) -> the plan that a Hopper would get; a cache folder of its own loads kernels anew."""

    def plan(kind="swiglu", storage="bfloat16", **settings):
        config = SonicMoEConfig(cache_dir=tmp_path, **settings)
        return make_plan(config, kind, storage=storage, device="cuda", arch="sm_90a")

    return plan


class Problem:
    """T tokens with two of E experts each; under ``skewed`` some slots are on other ranks and expert 3 gets none."""

    def __init__(self, kind="swiglu", storage="bfloat16", T=48, skewed=False, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.kind, self.storage, self.dtype = kind, storage, getattr(torch, storage)

        def normal(*size, scale=1.0):
            return (torch.randn(*size, generator=random) * scale).to(self.dtype)

        width = F if kind in oracle.GATES else I
        self.x, self.dout = normal(T, H), normal(T, H)
        self.w1, self.w2 = normal(E, width, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5)
        self.probs = torch.rand(T, 2, generator=random) + 0.05
        self.indices = torch.rand(T, E, generator=random).argsort(dim=1)[:, :2].to(torch.int32)
        if skewed:
            self.indices[self.indices == 3] = -1
            self.indices[::4, 0] = E + 2

    def route(self):
        return metadata.build(self.indices, self.probs, E, 1, SonicMoEConfig())

    def weights(self):
        return ExpertWeights(self.w1, self.w2, None, H, I)

    def buffers(self, grouped=False, trained=(True,) * E, dtype=None, fill=0.0, overwrite=False):
        dtype = dtype or torch.float32
        dw2 = torch.full([E, I, H] if grouped else [E, H, I], fill, dtype=dtype)
        return GradBuffers(torch.full(self.w1.shape, fill, dtype=dtype), dw2, grouped, trained, trained, overwrite)

    def forward(self, plan):
        return expert_mlp.forward(self.x, self.route(), self.weights(), plan)

    def run(self, plan, **options):
        out, saved = self.forward(plan)
        return self.gradients(saved, out, **options)

    def gradients(self, saved, out, **options):
        """Everything by name, dw2 in native layout."""
        buffers = self.buffers(**options)
        grads = expert_mlp.backward(saved, self.dout)
        grads.wgrad.accumulate_dw1(buffers)
        grads.wgrad.accumulate_dw2(buffers)
        dw2 = buffers.dw2.transpose(1, 2) if buffers.w2_grouped else buffers.dw2
        return dict(zip(NAMES, (out, grads.dx, grads.ds, buffers.dw1_EFH, dw2), strict=True))

    def naive(self):
        return self.run(make_plan(SonicMoEConfig(), self.kind, storage=self.storage, device="cpu"))


def same_memory(a, b) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


# Sums of float32 in another order, and a rounding that falls the other way for it now and then. One rounding more of
# every value would be 1.7e-3 in bfloat16, 2e-4 in float16.
ORDER_OF_SUMS = 1e-4


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_whole_engine_is_the_naive_one(hopper, kind, storage):
    problem = Problem(kind, storage, skewed=True)
    found = problem.run(hopper(kind, storage))
    oracle.assert_close(found, problem.naive(), ORDER_OF_SUMS, kind)


@pytest.mark.parametrize("T", [1, 2, 300])
def test_whole_engine_with_few_tokens_and_many(hopper, T):
    problem = Problem(T=T)
    oracle.assert_close(problem.run(hopper()), problem.naive(), ORDER_OF_SUMS)


def test_whole_engine_with_a_clamp_and_main_grad_in_grouped_layout(hopper):
    problem = Problem(skewed=True)
    plan = hopper(swiglu_clamp=0.5)
    reference = problem.run(make_plan(SonicMoEConfig(swiglu_clamp=0.5), "swiglu", storage="bfloat16", device="cpu"))
    oracle.assert_close(problem.run(plan, grouped=True), reference, ORDER_OF_SUMS)
    assert oracle.error(problem.naive()["out"], reference["out"]) > 0.01  # the clamp did hold something


@pytest.mark.parametrize("most, taken", [(20, 20), (2, 2), (1000, 132)])
def test_no_gemm_takes_more_multiprocessors_than_it_may(hopper, log, most, taken):
    """The stubs refuse a launch of any other number of blocks."""
    log.multiprocessors, problem = taken, Problem(skewed=True)
    oracle.assert_close(problem.run(hopper(gemm_multiprocessors=most)), problem.naive(), ORDER_OF_SUMS)
    assert set(log.names()) >= {"up", "rows", "down_backward", "wgrad"}


# ---- Which kernels, in which order, on what --------------------------------------------------------------------------


def test_one_load_for_all_that_a_plan_needs_and_none_for_new_counts_of_tokens(hopper, log):
    plan, loads = hopper("geglu", "float16"), []
    for T in (1, 16, 17, 300):
        loads.append(len(log.loads))
        for options in ({}, {"grouped": True}, {"overwrite": True, "dtype": torch.float16}):
            Problem("geglu", "float16", T=T).run(plan, **options)
    loaded, *later = log.loads
    assert loads[1:] == [len(log.loads)] * 3  # none after the first T
    assert all(set(asked) <= set(loaded) for asked in later)  # in memory by then: all that compiles does so at once
    assert len({kernel.key() for kernel in loaded}) == len(loaded) == 9
    used = {launch.kernel for launch in log.launches if launch.kernel}
    assert used <= set(loaded) and len(used) == 8  # all but up_z
    for kernel in loaded:
        assert kernel.storage == "float16" and kernel.arch == "sm_90a"
        assert kernel.activation == ("geglu" if kernel.op in ("up", "down_backward") else None)


def test_another_activation_or_clamp_is_another_set(hopper, log):
    for settings in ({}, {"kind": "relu"}, {"storage": "float16"}, {"swiglu_clamp": 7.0}):
        sm90_bf16.kernels(hopper(**settings))
    ups = [next(kernel for kernel in loaded if kernel.op == "up") for loaded in log.loads]
    assert len({kernel.key() for kernel in ups}) == 4 and ups[3].clamp == 7.0


def test_forward_launches_three_kernels(hopper, log):
    problem = Problem()
    _, saved = problem.forward(hopper())
    assert log.names() == FORWARD
    up, down, total = log.launches
    rows = saved.routing.n_rows
    assert up.kernel.tile == TILES["up"] and same_memory(up.a, problem.x) and same_memory(up.b, problem.w1)
    assert same_memory(up.d, saved.z) and tuple(up.d.shape) == (rows, F) and up.d.dtype == torch.bfloat16
    assert same_memory(up.gather, saved.routing.x_gather_idx) and same_memory(up.offsets, saved.routing.expert_offset)
    assert down.kernel.tile == TILES["down"] and same_memory(down.a, up.epilogue[0])
    assert same_memory(down.b, problem.w2) and not down.kernel.transposed and tuple(down.d.shape) == (rows, H)
    assert same_memory(total.rows, down.d) and same_memory(total.scores, saved.routing.scores)


def test_inference_keeps_nothing(hopper, log):
    problem = Problem()
    out, saved = expert_mlp.forward(problem.x, problem.route(), problem.weights(), hopper(), keep=False)
    assert saved is None and log.names() == FORWARD
    oracle.assert_close({"out": out}, problem.naive(), ORDER_OF_SUMS)


def test_backward_writes_dz_where_z_was(hopper, log):
    problem = Problem()
    _, saved = problem.forward(hopper())
    z, routing = saved.z, saved.routing
    log.clear()
    grads = expert_mlp.backward(saved, problem.dout)
    assert log.names() == BACKWARD
    _, first, ds, dx, total = log.launches
    assert same_memory(first.c, z) and same_memory(first.d, z) and same_memory(grads.wgrad.dz, z)
    assert same_memory(first.a, problem.dout) and same_memory(first.b, problem.w2.transpose(1, 2))
    score, pa, parts = first.epilogue[:3]
    assert torch.equal(score, routing.scores[routing.s_scatter_idx.long()]) and same_memory(pa, grads.wgrad.pa)
    assert tuple(parts.shape) == (routing.n_rows, 2) and same_memory(ds.parts, parts)
    assert dx.kernel.tile == TILES["dx"] and same_memory(dx.a, z) and same_memory(dx.b, problem.w1.transpose(1, 2))
    assert dx.kernel.transposed and same_memory(total.rows, dx.d) and total.scores is None


def test_stages_write_where_a_caller_says(hopper, log):
    problem, plan = Problem(skewed=True), hopper()
    routing, weights = problem.route(), problem.weights()
    shapes = ([routing.n_rows, F], [routing.n_rows, I], [routing.n_rows, H])

    def somewhere(*which):
        return tuple(torch.empty(shapes[number], dtype=problem.dtype) for number in which)

    z_a, (y,), dz_pa, (dx,) = somewhere(0, 1), somewhere(2), somewhere(0, 1), somewhere(2)
    z, a = sm90_bf16.up_projection(problem.x, weights, routing, plan, need_a=True, out=z_a)
    kept = z.clone()
    found_y = sm90_bf16.down_projection(a, weights, routing, plan, out=y)
    dz, pa, parts = sm90_bf16.down_projection_backward(problem.dout, z, weights, routing, plan, True, out=dz_pa)
    found_dx = sm90_bf16.up_projection_backward(dz, weights, routing, plan, out=dx)
    for found, given in ((z, z_a[0]), (a, z_a[1]), (found_y, y), (dz, dz_pa[0]), (pa, dz_pa[1]), (found_dx, dx)):
        assert found is given and not found.isnan().any()
    assert torch.equal(z, kept)  # dz had a place of its own
    assert same_memory(log.only("down_backward").c, z) and same_memory(log.only("down_backward").d, dz)
    dz_in_place, _, _ = sm90_bf16.down_projection_backward(problem.dout, z, weights, routing, plan, True)
    assert dz_in_place is z and torch.equal(z, dz)


@pytest.mark.parametrize(
    ("wanted", "launches"),
    [
        ({"need_dx": False}, ["scores_by_row", "down_backward", "finish_ds"]),
        ({"need_ds": False}, ["scores_by_row", "down_backward", "rows", "sum_slots"]),
        ({"need_dx": False, "need_ds": False, "need_wgrad": False}, ["scores_by_row", "down_backward"]),
    ],
)
def test_what_is_not_wanted_is_not_launched(hopper, log, wanted, launches):
    problem = Problem()
    _, saved = problem.forward(hopper())
    log.clear()
    grads = expert_mlp.backward(saved, problem.dout, **wanted)
    assert log.names() == launches
    assert (grads.dx is None, grads.ds is None) == ("need_dx" in wanted, "need_ds" in wanted)


def test_second_backward_computes_z_anew(hopper, log):
    problem = Problem()
    out, saved = problem.forward(hopper())
    first = problem.gradients(saved, out)
    log.clear()
    second = problem.gradients(saved, out)
    assert log.names() == ["up_z", *BACKWARD, "wgrad", "wgrad"]
    assert same_memory(log.only("up_z").d, log.only("down_backward").c)
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


def test_stagewise_memory_lets_go_after_backward(hopper):
    problem = Problem()
    out, saved = problem.forward(hopper(stagewise_memory=True))
    oracle.assert_close(problem.gradients(saved, out), problem.naive(), ORDER_OF_SUMS)
    assert saved.x is saved.z is saved.weights is None
    with pytest.raises(RuntimeError, match="second time"):
        expert_mlp.backward(saved, problem.dout)


# ---- Weight gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_weight_gradients_are_added_in_the_callers_own_memory(hopper, log, grouped):
    problem = Problem(skewed=True)
    once = problem.run(hopper())
    _, saved = problem.forward(hopper())
    grads, buffers = expert_mlp.backward(saved, problem.dout), problem.buffers(grouped, fill=3.0)
    log.clear()
    grads.wgrad.accumulate_dw1(buffers)
    grads.wgrad.accumulate_dw2(buffers)
    dw1, dw2 = log.launches
    assert same_memory(dw1.d, buffers.dw1_EFH.transpose(1, 2)) and dw1.kernel.transposed
    assert same_memory(dw1.a.T, problem.x) and same_memory(dw1.b.T, grads.wgrad.dz)
    assert same_memory(dw2.d, buffers.dw2.transpose(1, 2) if grouped else buffers.dw2)
    assert same_memory(dw2.a.T, problem.dout) and same_memory(dw2.b.T, grads.wgrad.pa)
    assert dw2.kernel.transposed is grouped
    for launch in (dw1, dw2):
        assert launch.kernel.accumulate and launch.kernel.out == "float32" and launch.kernel.tile == TILES["wgrad"]
        assert same_memory(launch.gather, saved.routing.x_gather_idx)
    dw2_found = buffers.dw2.transpose(1, 2) if grouped else buffers.dw2
    found = {"dw1": buffers.dw1_EFH - 3.0, "dw2": dw2_found - 3.0}
    oracle.assert_close(found, {name: once[name] for name in found}, 1e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_weight_gradients_overwrite_a_buffer_of_the_storage_type(hopper, log, grouped):
    problem = Problem(skewed=True)
    once = problem.run(hopper())
    log.clear()
    filled = problem.run(hopper(), grouped=grouped, dtype=torch.bfloat16, fill=float("nan"), overwrite=True)
    for launch in log.launches[-2:]:
        assert (launch.name, launch.kernel.accumulate, launch.kernel.out) == ("wgrad", False, None)
    for name in ("dw1", "dw2"):
        assert torch.equal(filled[name], once[name].bfloat16()), name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_buffer_that_no_kernel_fills_is_refused(hopper, log, dtype):
    problem = Problem()
    _, saved = problem.forward(hopper())
    grads = expert_mlp.backward(saved, problem.dout)
    log.clear()
    with pytest.raises(TypeError, match=f"got a {dtype} tensor to fill, need bfloat16"):
        grads.wgrad.accumulate_dw1(problem.buffers(dtype=getattr(torch, dtype), overwrite=True))
    with pytest.raises(TypeError, match="got a bfloat16 tensor to add to, need float32"):
        grads.wgrad.accumulate_dw2(problem.buffers(dtype=torch.bfloat16))
    assert log.names() == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_frozen_experts_are_not_touched(hopper, log, grouped, overwrite):
    problem, trained = Problem(skewed=True), (True, False, True, True, False)
    once = problem.run(hopper())
    dtype, fill = (torch.bfloat16, float("nan")) if overwrite else (torch.float32, 3.0)
    found = problem.run(hopper(), grouped=grouped, trained=trained, dtype=dtype, fill=fill, overwrite=overwrite)
    for name in ("dw1", "dw2"):
        for expert, wanted in enumerate(trained):
            value = found[name][expert]
            if not wanted:
                assert value.isnan().all() if overwrite else (value == 3.0).all(), (name, expert)
            elif overwrite:
                assert torch.equal(value, once[name][expert].bfloat16()), (name, expert)
            else:
                expected = once[name][expert] + 3.0
                assert oracle.error(value, expected) < 1e-6, (name, expert)


def test_experts_that_are_all_frozen_launch_nothing(hopper, log):
    problem = Problem()
    log.clear()
    found = problem.run(hopper(), trained=(False,) * E, fill=3.0)
    assert "wgrad" not in log.names() and (found["dw1"] == 3.0).all() and (found["dw2"] == 3.0).all()


# ---- Nothing routed here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("T", [0, 6])
def test_without_rows_no_gemm_is_launched(hopper, log, T, overwrite):
    problem = Problem(T=T)
    problem.indices.fill_(-1)
    options = {"overwrite": True, "dtype": torch.bfloat16, "fill": float("nan")} if overwrite else {"fill": 3.0}
    found = problem.run(hopper(), **options)
    assert set(log.names()) == {"sum_slots", "finish_ds"}
    assert found["out"].shape == found["dx"].shape == (T, H) and found["ds"].shape == (T, 2)
    assert not found["out"].any() and not found["dx"].any() and not found["ds"].any()
    for name in ("dw1", "dw2"):
        assert (found[name] == (0.0 if overwrite else 3.0)).all(), name


# ---- Rows as a kernel can read them ----------------------------------------------------------------------------------


def test_rows_that_a_kernel_can_read_are_not_copied(hopper):
    x = Problem().x
    assert sm90_bf16.prepare_rows(x, hopper()) is x
    assert sm90_bf16.prepare_rows(x[8:], hopper()).data_ptr() == x[8:].data_ptr()


def shifted(x):
    """Right values at an address that no 16-byte load takes."""
    whole = torch.empty(x.numel() + 1, dtype=x.dtype)
    return whole[1:].view_as(x).copy_(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.float(),
        lambda x: x.T.contiguous().T,
        lambda x: x[:, :1].expand(x.shape),
        lambda x: torch.cat([x, x], dim=1)[:, :H],
        shifted,
    ],
    ids=["another type", "transposed", "expanded", "columns of a wider tensor", "misaligned"],
)
def test_other_rows_are_copied_and_give_the_same(hopper, change):
    problem = Problem()
    for name in ("x", "dout"):
        given = change(getattr(problem, name))
        rows = sm90_bf16.prepare_rows(given, hopper())
        assert rows.is_contiguous() and rows.data_ptr() % 16 == 0 and rows.dtype == problem.dtype
        assert torch.equal(rows, given.to(problem.dtype))
        setattr(problem, name, given)
    found = problem.run(hopper())  # the stubs refuse what 16-byte loads cannot read
    problem.x, problem.dout = problem.x.bfloat16(), problem.dout.bfloat16()
    oracle.assert_close(found, problem.naive(), ORDER_OF_SUMS)


def test_quantized_rows_are_taken_as_the_numbers_they_stand_for(hopper):
    problem, recipe = Problem(), make_recipe("sm90")
    wide = torch.cat([problem.x, problem.x], dim=1)  # 128 columns, a block of scales
    rows = sm90_bf16.prepare_rows(quant.quantize_rows(wide, recipe), hopper())
    assert rows.dtype == torch.bfloat16 and 0 < oracle.error(rows, wide) < 0.04


@pytest.mark.parametrize("name", ["w1", "w2"])
def test_a_weight_that_no_kernel_can_read_is_refused_by_its_name(hopper, name):
    """As one in a flat buffer behind another of an odd size. A cast is a copy, and lies well."""
    problem = Problem()
    routing = metadata.build(problem.indices, problem.probs, E, 1, SonicMoEConfig())
    weights = {"w1": problem.w1, "w2": problem.w2} | {name: shifted(getattr(problem, name))}
    with pytest.raises(ValueError, match=f"^{name}: begins 2 bytes behind a multiple of 16"):
        apply_experts(problem.x, problem.probs, *weights.values(), routing, hopper())
    weights[name] = shifted(weights[name].float())
    out = apply_experts(problem.x, problem.probs, *weights.values(), routing, hopper())
    oracle.assert_close({"out": out}, {"out": problem.naive()["out"]}, ORDER_OF_SUMS)


# ---- Under autograd --------------------------------------------------------------------------------------------------


def test_autograd_hands_main_grad_itself_to_the_kernel(hopper, log):
    problem = Problem()
    leaves = [tensor.requires_grad_() for tensor in (problem.x, problem.probs, problem.w1, problem.w2)]
    problem.w1.main_grad = torch.zeros(problem.w1.shape)
    routing = metadata.build(problem.indices, problem.probs.detach(), E, 1, SonicMoEConfig())
    apply_experts(*leaves, routing, hopper()).backward(problem.dout)
    # dW2 before dx, so that p*a is gone when dx by slot takes its memory.
    names = [*FORWARD, "scores_by_row", "down_backward", "finish_ds", "wgrad", "rows", "sum_slots", "wgrad"]
    assert log.names() == names
    dw2, dw1 = (launch for launch in log.launches if launch.name == "wgrad")
    assert same_memory(dw1.d, problem.w1.main_grad.transpose(1, 2)) and dw1.kernel.accumulate
    assert problem.w1.grad is None
    assert dw2.d.dtype == torch.bfloat16 and not dw2.kernel.accumulate
    for leaf in leaves:
        leaf.requires_grad_(False)
    found = {"dx": problem.x.grad, "ds": problem.probs.grad, "dw1": problem.w1.main_grad, "dw2": problem.w2.grad}
    expected = problem.naive()
    oracle.assert_close(found, expected | {"dw2": expected["dw2"].bfloat16()}, ORDER_OF_SUMS)
