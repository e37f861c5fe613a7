"""The BF16 engine on Hopper against float64, and what only a GPU can show of it: bits, streams, graphs, no waiting."""

import pytest
import torch

from sonicmoe import expert_mlp
from sonicmoe.enums import is_glu
from sonicmoe.functional import autograd
from sonicmoe.gemm import kernel_store
from sonicmoe.gemm.api import GradBuffers
from sonicmoe.routing import metadata
from tests.support import floors
from tests.support.gpu_problems import GPU, NAMES, Problem, require_floors, require_same_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("routing", ["random", "skewed", "empty"])
def test_floors(cache_dir, routing, scale):
    problem = Problem(routing=routing, scale=scale)
    require_floors(problem.run(cache_dir), problem.reference())


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 64, 64), (3, 2, 40, 128, 72), (4096, 8, 8, 1024, 512), (999, 8, 128, 512, 256)]
)
def test_sizes(cache_dir, sizes):
    problem = Problem(*sizes)
    require_floors(problem.run(cache_dir), problem.reference())


@pytest.mark.parametrize("kind", ["geglu", "reglu", "silu", "gelu", "relu", "relu_sq"])
def test_activations(cache_dir, kind):
    problem = Problem(kind=kind, routing="skewed")
    require_floors(problem.run(cache_dir), problem.reference())


def test_clamp(cache_dir):
    """Rounding z across the bound flips a gradient on or off, on any engine that stores z in 16 bits: against the same
    with z so rounded, the naive engine's, the floor holds."""
    problem = Problem(clamp=0.5)
    naive = problem.run(cache_dir, plan=problem.plan(cache_dir, backend="naive"))
    require_floors(problem.run(cache_dir), {name: value.double() for name, value in naive.items()})


def test_float16(cache_dir):
    problem = Problem(storage="float16")
    require_floors(problem.run(cache_dir), problem.reference(), floors.FP16)


def test_main_grad_in_grouped_layout_and_frozen_experts(cache_dir):
    problem = Problem(routing="skewed")
    plain = problem.run(cache_dir)
    require_floors(problem.run(cache_dir, grouped=True), problem.reference())
    plan, routing = problem.plan(cache_dir), problem.route(cache_dir)
    _, saved = expert_mlp.forward(problem.x, routing, problem.weights(), plan)
    trained = tuple(number % 2 == 0 for number in range(problem.sizes[2]))
    buffers = problem.buffers(experts=trained)
    buffers.dw1_EFH.fill_(3.0)
    grads = expert_mlp.backward(saved, problem.dout)
    grads.wgrad.accumulate_dw1(buffers)
    for number, wanted in enumerate(trained):
        expected = plain["dw1"][number] + 3.0 if wanted else torch.full_like(plain["dw1"][number], 3.0)
        assert ((buffers.dw1_EFH[number] - expected).norm() / expected.norm()).item() < 1e-6


def test_accumulation_adds_and_filling_overwrites(cache_dir):
    problem = Problem(routing="empty")
    plan, routing = problem.plan(cache_dir), problem.route(cache_dir)
    once = problem.run(cache_dir, routing, plan)
    _, saved = expert_mlp.forward(problem.x, routing, problem.weights(), plan)
    grads, buffers = expert_mlp.backward(saved, problem.dout), problem.buffers()
    for _ in range(3):
        grads.wgrad.accumulate_dw1(buffers)
        grads.wgrad.accumulate_dw2(buffers)
    for name, found in (("dw1", buffers.dw1_EFH), ("dw2", buffers.dw2)):
        assert ((found - 3 * once[name]).norm() / found.norm()).item() < 1e-6
    everyone = buffers.experts1
    dw1, dw2 = (torch.full_like(w, float("nan")) for w in (problem.w1, problem.w2))
    filled = GradBuffers(dw1, dw2, False, everyone, everyone, overwrite=True)
    grads.wgrad.accumulate_dw1(filled)
    grads.wgrad.accumulate_dw2(filled)
    for name, found in (("dw1", dw1), ("dw2", dw2)):
        assert torch.equal(found, once[name].to(found.dtype)), name


@pytest.mark.parametrize("t", [0, 5])
def test_nothing_routed_here(cache_dir, t):
    problem = Problem(t=max(t, 1))
    problem.indices.fill_(-1)
    for name in ("x", "dout", "indices", "probs"):
        setattr(problem, name, getattr(problem, name)[:t])
    problem.sizes = (t, *problem.sizes[1:])
    found = problem.run(cache_dir)
    assert all(not found[name].any() for name in NAMES)
    assert found["out"].shape == problem.x.shape


def test_same_bits_again_and_beside_other_work(cache_dir):
    problem = Problem(t=2048, e=8, h=1024, i=512)
    routing = problem.route(cache_dir)
    first = problem.run(cache_dir, routing)
    other, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device=GPU)
    for _ in range(20):
        with torch.cuda.stream(other):
            for _ in range(3):
                busy = torch.nn.functional.normalize(busy @ busy)
        require_same_bits(problem.run(cache_dir, routing), first)
    torch.cuda.synchronize()


def test_runs_on_the_current_stream(cache_dir):
    """The inputs become right only late on a side stream: whatever ran elsewhere would have read garbage."""
    problem = Problem(t=2048)
    routing = problem.route(cache_dir)
    wanted = problem.run(cache_dir, routing)
    good = {name: getattr(problem, name).clone() for name in ("x", "dout", "w1", "w2")}
    for name in good:
        getattr(problem, name).fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for name, value in good.items():
            getattr(problem, name).copy_(value)
        found = problem.run(cache_dir, routing)
    side.synchronize()
    require_same_bits(found, wanted)


def test_graph_capture_of_forward_and_backward(cache_dir):
    problem = Problem(t=1024)
    routing, plan = problem.route(cache_dir), problem.plan(cache_dir)
    problem.run(cache_dir, routing, plan)  # compiles and loads, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run(cache_dir, routing, plan)
    other = Problem(t=1024, seed=1)
    for name in ("x", "dout", "w1", "w2"):
        getattr(problem, name).copy_(getattr(other, name))
    graph.replay()
    replayed = {name: value.clone() for name, value in captured.items()}
    require_same_bits(replayed, problem.run(cache_dir, routing, plan))


def test_no_wait_for_the_device(cache_dir):
    problem = Problem(routing="skewed")
    e, counts = problem.sizes[2], problem.counts()
    problem.run(cache_dir)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing = metadata.build(problem.indices, problem.probs, e, 1, problem.config(cache_dir), counts)
        problem.run(cache_dir, routing)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_new_token_count_compiles_nothing(cache_dir):
    Problem(t=64).run(cache_dir)
    before = sorted(path.name for path in (cache_dir / "gemm").rglob("*"))
    loaded = len(kernel_store._loaded)
    for t in (1, 16, 63, 640):
        Problem(t=t, e=5).run(cache_dir)
    assert sorted(path.name for path in (cache_dir / "gemm").rglob("*")) == before
    assert len(kernel_store._loaded) == loaded


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_one_process(cache_dir):
    found = {}
    for index in (1, 0):
        with torch.cuda.device(index):
            problem = Problem(device=torch.device("cuda", index))
            found[index] = {name: value.cpu() for name, value in problem.run(cache_dir).items()}
    require_same_bits(found[1], found[0])


def test_a_second_backward_of_a_retained_graph(cache_dir):
    """The first one writes dz over z; the second computes z anew and comes to the same bits."""
    problem = Problem()
    routing, plan = problem.route(cache_dir), problem.plan(cache_dir)
    leaves = [v.clone().requires_grad_() for v in (problem.x, problem.probs, problem.w1, problem.w2)]
    out = autograd.apply_experts(*leaves, routing, plan)
    first = torch.autograd.grad(out, leaves, problem.dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, problem.dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_expanded_gradients_and_offset_rows(cache_dir):
    """``out.sum().backward()`` hands over an expanded view, and a slice of a buffer need not begin at 16 bytes."""
    problem = Problem()
    routing, plan = problem.route(cache_dir), problem.plan(cache_dir)
    problem.dout = torch.ones(1, 1, device=GPU, dtype=problem.dtype).expand(problem.dout.shape)
    shifted = torch.empty(problem.x.numel() + 1, device=GPU, dtype=problem.dtype)[1:].view_as(problem.x)
    problem.x = shifted.copy_(problem.x)
    require_floors(problem.run(cache_dir, routing, plan), problem.reference())


def test_glu_kinds_are_what_the_problem_takes_them_for():
    from sonicmoe import ActivationType

    assert {kind.value for kind in ActivationType if is_glu(kind)} == {"swiglu", "geglu", "reglu"}
