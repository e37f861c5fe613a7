"""The layer as functions: top-k routing, any routing, and the router by itself."""

import contextlib

import pytest

from tests.support import floors
from tests.support import torch_oracle as oracle
from tests.support.torch_child import torch
from tests.support.torch_moe import in_float64, inputs, make, run, views

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe import SonicMoEConfig, count_cumsum, moe_general_routing_inputs, moe_TC_softmax_topk_layer
    from sonicmoe.functional import enable_quack_gemm, layer, route_topk, router
    from sonicmoe.routing import topk


@pytest.mark.parametrize("kind", ["swiglu", "silu"])
def test_topk_layer(kind):
    moe, (x, dout) = make(kind), inputs(50, 64)
    out, logits, frequency = moe_TC_softmax_topk_layer(x, moe.router.weight, *views(moe), 2, None, kind)
    expected = in_float64(moe, x, dout)
    logits.retain_grad(), out.backward(dout)
    assert frequency.dtype == torch.int32 and int(frequency.sum()) == 100
    assert torch.equal(frequency.long(), torch.bincount(logits.topk(2).indices.flatten(), minlength=6))
    assert (
        oracle.error(out, expected["out"]) < 1e-5 and oracle.error(moe.c_fc.weight.grad, expected["c_fc.weight"]) < 1e-5
    )
    assert oracle.error(moe.c_proj.weight.grad, expected["c_proj.weight"]) < 1e-5 and logits.grad.any()


def test_topk_layer_with_halves_of_the_up_projection_apart():
    moe, (x, dout) = make(), inputs(50, 64)
    apart = torch.cat([moe.c_fc.weight.detach()[:, 0::2], moe.c_fc.weight.detach()[:, 1::2]], dim=1).requires_grad_()
    args = (None, moe.c_proj.weight.permute(1, 2, 0), None, 2, None)
    out, _, _ = moe_TC_softmax_topk_layer(x, moe.router.weight, apart.permute(1, 2, 0), *args, concat_layout=True)
    (grad,) = torch.autograd.grad(out, apart, dout)
    expected = in_float64(moe, x, torch.zeros_like(dout))  # for out alone
    assert oracle.error(out, expected["out"]) < 1e-5
    moe(x)[0].backward(dout)
    both = torch.cat([moe.c_fc.weight.grad[:, 0::2], moe.c_fc.weight.grad[:, 1::2]], dim=1)
    assert oracle.error(grad, both) < 1e-6
    apart.main_grad = torch.zeros(apart.shape)  # nothing would be added to it
    with pytest.raises(ValueError, match="^concat_layout: got True with a w1.main_grad"):
        moe_TC_softmax_topk_layer(x, moe.router.weight, apart.permute(1, 2, 0), *args, concat_layout=True)


def test_topk_layer_without_normalized_scores():
    moe, (x, _) = make(), inputs(50, 64)
    out, logits, _ = moe_TC_softmax_topk_layer(x, moe.router.weight, *views(moe), 2, None, is_softmax_over_topk=False)
    share = logits.softmax(1).topk(2).values.sum(1, keepdim=True)
    assert oracle.error(out / share, moe(x)[0]) < 1e-5
    args = dict(is_softmax_over_topk=False, norm_topk_probs=True)
    assert torch.equal(moe_TC_softmax_topk_layer(x, moe.router.weight, *views(moe), 2, None, **args)[0], moe(x)[0])


def test_a_view_of_a_parameter_finds_its_main_grad():
    moe, (x, dout) = make(), inputs(50, 64)
    moe.c_fc.weight.main_grad = torch.zeros(moe.c_fc.weight.shape)
    out, _, _ = moe_TC_softmax_topk_layer(x, moe.router.weight, *views(moe), 2, None)
    out.backward(dout)
    assert moe.c_fc.weight.grad is None and moe.c_proj.weight.grad is not None
    twin = make()
    twin(x)[0].backward(dout)
    assert oracle.error(moe.c_fc.weight.main_grad, twin.c_fc.weight.grad) < 1e-6


SLOTS = {  # (token, expert): any number a token, tokens 0 and 5 have none, one pair twice
    "by token": [(1, 3), (2, 0), (2, 1), (2, 2), (3, 5), (3, 5), (4, 1)],
    "any order": [(4, 1), (2, 2), (3, 5), (1, 3), (2, 0), (3, 5), (2, 1)],
    "one token": [(2, e % 6) for e in range(40)],
    "none": [],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("slots", SLOTS)
def test_general_routing(slots, index_dtype, dtype):
    problem = oracle.make(T=6, E=6, dtype=dtype)
    pairs = torch.tensor(SLOTS[slots], dtype=torch.int64).reshape(-1, 2)
    token, expert = pairs[:, 0], pairs[:, 1]
    score = torch.rand(len(pairs), generator=torch.Generator().manual_seed(2)).requires_grad_()
    given = {"x": problem.x, "s": score, "w1": problem.w1, "w2": problem.w2}
    w1, w2 = problem.w1.permute(1, 2, 0), problem.w2.permute(1, 2, 0)
    ids = [i.to(getattr(torch, index_dtype)) for i in (token, expert)]
    out, frequency = moe_general_routing_inputs(problem.x, score, *ids, w1, None, w2, None, 6, None, "swiglu")
    out.backward(problem.dout)
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    expected = oracle.experts(exact["x"], token, expert, exact["s"], exact["w1"], exact["w2"])
    expected.backward(problem.dout.double())
    assert torch.equal(frequency.long(), torch.bincount(expert, minlength=6)) and frequency.dtype == torch.int32
    found = {"out": out} | {name: value.grad for name, value in given.items()}
    wanted = {"out": expected} | {name: value.grad for name, value in exact.items()}
    oracle.assert_close(found, wanted, oracle.FLOORS[dtype])


def test_general_routing_under_fp8():
    problem = oracle.make(T=30, E=3, H=128, I=128, dtype="bfloat16")
    token, expert = torch.arange(30).flip(0), torch.arange(30) % 3
    args = (problem.w1.permute(1, 2, 0), None, problem.w2.permute(1, 2, 0), None, 3, None, "swiglu")
    with SonicMoEConfig(fp8_mode="perf", fp8_recipe="sm90").activate():
        out, frequency = moe_general_routing_inputs(problem.x, torch.ones(30), token, expert, *args)
    expected = oracle.experts(
        problem.x.double(), token, expert, torch.ones(30).double(), problem.w1.double(), problem.w2.double()
    )
    assert 0.01 < oracle.error(out, expected) < 0.076 and frequency.tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        (dict(token_indices=[0, 9]), ValueError, "token_indices: got 9, need 0 to 5"),
        (dict(token_indices=[-1, 1]), ValueError, "token_indices: got -1"),
        (dict(token_indices=[1]), ValueError, "token_indices: got shape"),
        (dict(expert_indices=[0, 6]), ValueError, "expert_indices: 1 of 2 ids are not in 0 to 5"),
        (dict(expert_indices=[0.0, 1.0]), TypeError, "expert_indices: got dtype float32"),
        (dict(E=5), ValueError, "E: got 5, but w2 holds 6"),
        (dict(b1=[0.0]), NotImplementedError, "b1: got Tensor"),
        (dict(activation_type="tanh"), ValueError, "activation_type: got 'tanh'"),
        (dict(activation_type="relu"), ValueError, r"w1: got shape \[6, 64, 64\], need \[6, 32, 64\]"),
        (dict(activation_type="relu", concat_layout=True), ValueError, "concat_layout: got True with activation relu"),
    ],
)
def test_errors_of_general_routing(changes, kind, says):
    problem = oracle.make(T=6, E=6)
    given = dict(router_scores=[0.5, 0.5], token_indices=[0, 1], expert_indices=[0, 1], b1=None, b2=None, E=6)
    given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in (given | changes).items()}
    w1, w2 = problem.w1.permute(1, 2, 0), problem.w2.permute(1, 2, 0)
    with pytest.raises(kind, match=f"^{says}"):
        moe_general_routing_inputs(x=problem.x, w1=w1, w2=w2, **{"activation_type": "swiglu", **given})


def test_errors_of_the_topk_layer():
    moe, (x, _) = make(), inputs(9, 64)
    w1, _, w2, _ = views(moe)
    for args, says in (
        (
            (x, moe.router.weight, w1.contiguous(), None, w2, None, 2, None),
            r"w1: got shape .* stride order \(2, 0, 1\)",
        ),
        ((x, moe.router.weight, w1, None, w2, None, 7, None), "K: got 7, need at most the number of experts, 6"),
        ((x[:, :32], moe.router.weight, w1, None, w2, None, 2, None), r"router_w: got shape \[6, 64\]"),
        ((x[0], moe.router.weight, w1, None, w2, None, 2, None), "x: got shape"),
        # Fewer experts than weights too: their gradients would hold anything.
        ((x, moe.router.weight[:4], w1, None, w2, None, 2, None), r"router_w: got shape \[4, 64\], need \[6, 64\]"),
        ((x, moe.router.weight.repeat(2, 1), w1, None, w2, None, 2, None), r"router_w: got shape \[12, 64\], need \[6"),
        ((x, moe.router.weight.to("meta"), w1, None, w2, None, 2, None), "router_w: got a tensor on meta, need cpu"),
    ):
        with pytest.raises(ValueError, match=f"^{says}"):
            moe_TC_softmax_topk_layer(*args)


def test_count_cumsum():
    x = torch.tensor([3, 0, 3, 5, 3], dtype=torch.int32)
    count, total = count_cumsum(x, 7)
    assert count.tolist() == [1, 0, 0, 3, 0, 1, 0] and total.tolist() == [1, 1, 1, 4, 4, 5, 5]
    assert count.dtype == total.dtype == torch.int32
    assert torch.equal(count_cumsum(x.long(), 7, do_cumsum=False), count)


def test_enable_quack_gemm():
    with enable_quack_gemm():
        assert SonicMoEConfig.current().use_quack_gemm
        with enable_quack_gemm(False):
            assert not SonicMoEConfig.current().use_quack_gemm
    assert not SonicMoEConfig.current().use_quack_gemm


# ---- Router ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ties_go_to_the_lower_expert(dtype):
    logits = torch.tensor([[0.0] * 9, [1, 2, 2, 1, 2, 1, 2, 2, 1], [-1, -0.0, 0.0, -2, 0.0, -0.0, -3, -4, -5]])
    _, chosen = route_topk(logits.to(getattr(torch, dtype)), 4)
    assert chosen.tolist() == [[0, 1, 2, 3], [1, 2, 4, 6], [1, 2, 4, 5]] and chosen.dtype == torch.int32
    moe = make(E=9, K=4)
    torch.nn.init.zeros_(moe.router.weight)
    x, dout = inputs(5, 64)
    fused, plain = run(moe, x, dout), run(moe, x, dout, "torch")
    oracle.assert_close(fused, plain, floors.FP32["out"])
    assert fused["c_fc.weight"][:4].any() and not fused["c_fc.weight"][4:].any()


def test_scores_and_their_gradient():
    logits = torch.randn(30, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for options in (dict(), dict(is_softmax_over_topk=False), dict(is_softmax_over_topk=False, norm_topk_probs=True)):
        ours, exact = logits.float().requires_grad_(), logits.float().double().requires_grad_()
        scores, chosen = route_topk(ours, 3, **options)
        values, expected = exact.topk(3)
        assert scores.dtype == torch.float32 and torch.equal(chosen.long(), expected)
        wanted = values.softmax(1)
        if options == dict(is_softmax_over_topk=False):
            wanted = exact.softmax(1).gather(1, expected)
        weight = torch.arange(90.0).reshape(30, 3)
        (scores * weight).sum().backward(), (wanted * weight).sum().backward()
        assert oracle.error(scores, wanted) < 1e-6 and oracle.error(ours.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("options", [{}, {"is_softmax_over_topk": False}], ids=["of the chosen", "of all"])
def test_errors_of_the_router(options):
    """Bits of integers would be taken for those of floats, where a kernel chooses."""
    for logits, kind, says in (
        (torch.zeros(3, 4, 5), ValueError, r"got shape \[3, 4, 5\], need 2 dimensions \[T, E\]"),
        (torch.zeros(4), ValueError, r"got shape \[4\], need 2"),
        (torch.zeros(3, 4, dtype=torch.int32), TypeError, "got dtype int32, need bfloat16"),
        (torch.zeros(3, 4).to(torch.float8_e4m3fn), TypeError, "got dtype float8_e4m3fn, need bfloat16"),
        (None, TypeError, "got NoneType, need a tensor"),
    ):
        with pytest.raises(kind, match=f"^logits: {says}"):
            route_topk(logits, 2, **options)


def test_the_router_runs_where_its_logits_are(monkeypatch):
    """On their GPU, whichever one is current."""
    there = []

    @contextlib.contextmanager
    def on_stream(stream_id, tensor):
        there.append(tensor)
        yield
        there.pop()

    seen, run = [], layer.router_forward
    monkeypatch.setattr(layer, "on_stream", on_stream)
    monkeypatch.setattr(layer, "router_forward", lambda *args: seen.append(list(there)) or run(*args))
    logits = torch.randn(3, 4)
    route_topk(logits, 2), route_topk(logits, 2, is_softmax_over_topk=False)
    assert len(seen) == 2 and all(len(found) == 1 and found[0] is logits for found in seen)


def test_a_kernel_for_the_router_is_taken_where_there_is_one(monkeypatch):
    class Kernels:
        topk_softmax_forward = staticmethod(lambda logits, k: ("forward", k))
        topk_softmax_backward = staticmethod(lambda *args: ("backward", *args[3:]))

    monkeypatch.setattr(topk, "triton_topk", Kernels)
    logits, config = torch.zeros(2, 4), SonicMoEConfig()
    assert topk.forward(logits, 2, config)[0].shape == (2, 2)  # on the CPU it is not
    monkeypatch.setattr(topk.checks, "is_cpu", lambda _: False)
    assert topk.forward(logits, 2, config) == ("forward", 2)
    assert topk.backward(logits, None, None, 4, torch.float32, config) == ("backward", 4, torch.float32)
    assert topk.forward(logits, 2, SonicMoEConfig(backend="naive"))[0].shape == (2, 2)


def test_few_tokens_take_a_launch_of_our_own(monkeypatch):
    """Of 16-bit types on a GPU; with more tokens, in float32 and under the naive engine torch multiplies."""

    class Kernels:
        DTYPES, MOST_TOKENS = ("bfloat16", "float16"), 5
        logits = staticmethod(lambda x, weight: "ours")
        add_product = staticmethod(lambda dx, dlogits, weight: "ours")

    monkeypatch.setattr(router, "triton_router_product", Kernels)
    config = SonicMoEConfig()

    def taken(n_tokens, dtype=torch.bfloat16, config=config, dlogits=torch.bfloat16, apart=False):
        x, weight, dx = torch.ones(n_tokens, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.ones(n_tokens, 3)
        dx = torch.ones(3, n_tokens, dtype=dtype).t() if apart else dx.to(dtype)
        made = router.router_logits(x, weight, config)
        added = router.plus_product(dx, torch.ones(n_tokens, 2, dtype=dlogits), weight.to(dlogits), dtype, config)
        for found, wanted in ((made, torch.full((n_tokens, 2), 3.0)), (added, torch.full((n_tokens, 3), 3.0))):
            assert isinstance(found, str) or torch.equal(found.float(), wanted)
        return isinstance(made, str), isinstance(added, str)

    assert taken(5) == (False, False)  # on the CPU
    monkeypatch.setattr(router.checks, "is_cpu", lambda _: False)
    assert taken(5) == taken(5, dtype=torch.float16, dlogits=torch.float16) == (True, True)
    assert taken(6) == taken(5, dtype=torch.float32, dlogits=torch.float32) == (False, False)
    assert taken(5, config=SonicMoEConfig(backend="naive")) == (False, False)
    assert taken(5, dlogits=torch.float32) == (True, False)
    assert taken(5, apart=True) == (True, False)
    monkeypatch.setattr(router, "triton_router_product", None)  # not installed
    assert taken(5) == (False, False)
