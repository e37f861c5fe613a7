"""The module's one node beside the functions, which put each part on the tape by itself."""

import itertools

import pytest

from tests.support import torch_oracle as oracle
from tests.support.torch_child import torch
from tests.support.torch_moe import inputs, make, views

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe import SonicMoEConfig, moe_TC_softmax_topk_layer
    from sonicmoe.functional.switch_loss import switch_loss

NAMES = ("x", "router.weight", "c_fc.weight", "c_proj.weight")


def in_parts(moe, x):
    """(output, loss) of the functions."""
    kind = moe.activation_function
    out, logits, frequency = moe_TC_softmax_topk_layer(x, moe.router.weight, *views(moe), moe.top_k, None, kind)
    return out, switch_loss(logits, frequency)


def tensors(moe, x):
    return dict(zip(NAMES, (x, *moe.parameters()), strict=True))


def gradients(call, moe, x, dout, wanted, use=("out", "loss")):
    """By name, of ``wanted``, for a total of what ``use`` names."""
    found = dict(zip(("out", "loss"), call(moe, x), strict=True))
    weights = {"out": dout.to(found["out"].dtype), "loss": torch.tensor(0.7)}
    given = tensors(moe, x)
    results, seeds = [found[name] for name in use], [weights[name] for name in use]
    grads = torch.autograd.grad(results, [given[name] for name in wanted], seeds, allow_unused=True)
    return found | dict(zip(wanted, grads, strict=True))


def require_same(found, expected, bound):
    assert set(found) == set(expected)
    for name, value in found.items():
        assert (value is None) == (expected[name] is None), name
        if value is not None:
            assert value.dtype == expected[name].dtype and value.shape == expected[name].shape, name
            assert oracle.error(value, expected[name]) <= bound, name


def whole(moe, x):
    return moe(x)


def nodes_behind(node):
    found = {node}
    for following, _ in node.next_functions:
        found |= nodes_behind(following) if following is not None else set()
    return found


SHAPES = pytest.mark.parametrize("shape", [(20, 64), (4, 5, 64), (64,)], ids=str)


@SHAPES
def test_one_node_beside_those_of_the_leaves(shape):
    moe, (x, _) = make(), inputs(*shape)
    out, loss = moe(x)
    assert out.grad_fn is loss.grad_fn and len(nodes_behind(out.grad_fn)) == 1 + len(NAMES)


WANTED = [names for count in range(1, 5) for names in itertools.combinations(NAMES, count)]


@pytest.mark.parametrize("use", [("out",), ("out", "loss")], ids="+".join)
@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
def test_gradients_of_some_inputs(wanted, use):
    moe, (x, dout) = make(), inputs(20, 64)
    for name, tensor in tensors(moe, x).items():
        tensor.requires_grad_(name in wanted)
    if not {"x", "router.weight"} & set(wanted):
        _, loss = moe(x)
        assert not loss.requires_grad and not in_parts(moe, x)[1].requires_grad
        use = ("out",)
    require_same(*(gradients(call, moe, x, dout, wanted, use) for call in (whole, in_parts)), 1e-6)


@pytest.mark.parametrize("wanted", [NAMES, ("x",), ("router.weight",), ("router.weight", "c_fc.weight")], ids="+".join)
def test_the_loss_alone_runs_no_experts(wanted, monkeypatch):
    moe, (x, dout) = make(), inputs(20, 64)
    for name, tensor in tensors(moe, x).items():
        tensor.requires_grad_(name in wanted)
    monkeypatch.setattr("sonicmoe.functional.autograd.engine_backward", None)
    require_same(*(gradients(call, moe, x, dout, wanted, ("loss",)) for call in (whole, in_parts)), 1e-6)


TYPES = {  # x, router, experts, autocast
    "all float32": ("float32", "float32", "float32", None),
    "all bfloat16": ("bfloat16", "bfloat16", "bfloat16", None),
    "router in float32": ("bfloat16", "float32", "bfloat16", None),
    "router in bfloat16": ("float32", "bfloat16", "float32", None),
    "experts in float32": ("bfloat16", "bfloat16", "float32", None),
    "autocast": ("float32", "float32", "float32", "bfloat16"),
    "autocast of bfloat16": ("bfloat16", "float32", "bfloat16", "bfloat16"),
    "autocast of float16": ("float16", "float16", "float16", "bfloat16"),
}


@pytest.mark.parametrize("types", TYPES)
def test_types(types):
    of_x, of_router, of_experts, narrow = TYPES[types]
    moe, (x, dout) = make(dtype=of_experts), inputs(20, 64, dtype=of_x)
    moe.router.to(getattr(torch, of_router))

    def both(call):
        with torch.autocast("cpu", getattr(torch, narrow or "bfloat16"), enabled=narrow is not None):
            return gradients(call, moe, x, dout, NAMES)

    found, expected = both(whole), both(in_parts)
    # dx is rounded once where the parts round its two addends first.
    require_same(found, expected, {"float32": 1e-6, "bfloat16": 3e-3, "float16": 1e-3}[of_x])
    for name in set(NAMES) - {"x"}:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("call", [whole, in_parts])
def test_autocast_keeps_no_cast_of_the_router_that_is_off_the_tape(call):
    """Another loss in the same region, on the router's weight: autocast would take its cast of an earlier op."""
    moe, (x, _) = make(), inputs(20, 64)
    weight = moe.router.weight
    with torch.autocast("cpu", torch.bfloat16):
        call(moe, x)
        with torch.no_grad():
            call(moe, x)
        of_router = torch.nn.functional.linear(x.detach(), weight).float().square().sum()
    (grad,) = torch.autograd.grad(of_router, weight)
    assert grad.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_tokens(dtype):
    moe, (x, dout) = make(dtype=dtype), inputs(0, 64, dtype=dtype)
    require_same(*(gradients(call, moe, x, dout, NAMES) for call in (whole, in_parts)), 0.0)


def test_second_backward_over_a_retained_graph():
    moe, (x, dout) = make(dtype="bfloat16"), inputs(20, 64, dtype="bfloat16")
    results, given = moe(x), list(tensors(moe, x).values())
    seeds = [dout, torch.tensor(0.7)]
    first = torch.autograd.grad(results, given, seeds, retain_graph=True)
    (alone,) = torch.autograd.grad(results[1], given[1:2], seeds[1:], retain_graph=True)
    again = torch.autograd.grad(results, given, seeds, retain_graph=True)
    assert alone.any() and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("use", [0, 1], ids=["out", "loss"])
def test_a_second_derivative_is_an_error(use):
    moe, (x, _) = make(), inputs(20, 64)
    (dx,) = torch.autograd.grad(moe(x)[use].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@SHAPES
def test_results_may_be_written_in_place(shape):
    """As residuals and loss weights are."""
    moe, (x, dout) = make(), inputs(*shape)
    expected = gradients(whole, moe, x, dout, NAMES)
    out, loss = moe(x)
    out += 1.0
    loss *= 0.7
    found = torch.autograd.grad([out, loss], tensors(moe, x).values(), [dout, torch.tensor(1.0)])
    assert all(torch.equal(grad, expected[name]) for name, grad in zip(NAMES, found, strict=True))


def test_a_hook_on_the_input_sees_its_whole_gradient_once():
    moe, (leaf, dout) = make(), inputs(20, 64)
    x, seen = leaf * 1.0, []
    x.register_hook(seen.append)
    out, loss = moe(x)
    torch.autograd.backward([out, loss], [dout, torch.tensor(0.7)])
    assert len(seen) == 1 and torch.equal(seen[0], leaf.grad)


def test_an_input_that_changed_before_backward_is_an_error():
    moe, (leaf, dout) = make(), inputs(20, 64)
    x = leaf * 1.0
    out, _ = moe(x)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


def test_nothing_is_saved_twice():
    moe, (x, _), saved = make(), inputs(20, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        moe(x)
    known = [tensor.data_ptr() for tensor in tensors(moe, x).values()]
    assert len(saved) == len(set(saved)) == 9 and set(known) < set(saved)  # and z, logits, scores, experts, counts


# ---- Verdicts that are remembered ------------------------------------------------------------------------------------


BREAKS = {
    "x in another width": lambda moe, x: (moe, x[:, :32], "hidden_states: got shape"),
    "x in a type without kernels": lambda moe, x: (moe, x.double(), "x: got dtype float64"),
    "weight of another shape": lambda moe, x: (swap(moe, "c_fc", lambda w: w[:, :62]), x, "w1: got shape"),
    "weight in pieces": lambda moe, x: (swap(moe, "c_proj", lambda w: w.mT.contiguous().mT), x, "w2: got a non-con"),
    "weight elsewhere": lambda moe, x: (swap(moe, "c_fc", lambda w: w.to("meta")), x, "w1: got a tensor on meta"),
    "router of another width": lambda moe, x: (swap(moe, "router", lambda w: w[:, :32]), x, "router_w: got shape"),
    "router of fewer experts": lambda moe, x: (swap(moe, "router", lambda w: w[:4]), x, "router_w: got shape"),
    "router of more experts": lambda moe, x: (swap(moe, "router", lambda w: w.repeat(2, 1)), x, "router_w: got shape"),
    "router elsewhere": lambda moe, x: (swap(moe, "router", lambda w: w.to("meta")), x, "router_w: got a tensor on"),
    "more slots than experts": lambda moe, x: (moe.__dict__.update(top_k=7) or moe, x, "K: got 7"),
}


def swap(moe, part, change):
    holder = getattr(moe, part)
    holder.weight = torch.nn.Parameter(change(holder.weight.detach()))
    return moe


@pytest.mark.parametrize("what", BREAKS)
def test_a_good_call_before_hides_no_mistake(what):
    moe, (x, _) = make(), inputs(9, 64)
    moe(x)
    moe, x, says = BREAKS[what](moe, x.detach())
    with pytest.raises((ValueError, TypeError), match=f"^{says}"):
        moe(x)


def test_a_good_call_before_hides_no_setting():
    moe, (x, _) = make(H=128, I=128, dtype="bfloat16"), inputs(9, 128, dtype="bfloat16")
    plain, _ = moe(x)
    with SonicMoEConfig(fp8_mode="perf", fp8_recipe="sm90").activate():
        narrow, _ = moe(x)
    assert not torch.equal(plain, narrow) and torch.equal(plain, moe(x)[0])
    with SonicMoEConfig(swiglu_clamp=1e-3).activate():
        assert not torch.equal(plain, moe(x)[0])
