"""A torch layer on one rank: what it computes, and when. Pieces under way beside others' experts, and recompute."""

import pytest

from tests.support.torch_child import torch

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe import MoE, SonicMoEConfig
    from sonicmoe.ep import checkpoint, torch_layer
    from sonicmoe.ep.communicator import Alone, Landed
    from sonicmoe.functional.autograd import ExpertCall

SIZES = dict(num_experts=4, num_experts_per_tok=2, hidden_size=128, intermediate_size=64)


@pytest.fixture
def log(monkeypatch):
    """Exchanges by the width of their rows, waits for them, and runs of the experts, as they happen."""
    events = []
    if not torch:
        return events

    class Flight(Landed):
        def wait(self):
            events.append(("wait", tuple(self.rows.shape)))
            return super().wait()

    def begin_exchange(self, rows, sent, received):
        events.append(("send", tuple(rows.shape)))
        return Flight(rows)

    backward, forward = ExpertCall.backward, ExpertCall.forward.__func__
    monkeypatch.setattr(Alone, "begin_exchange", begin_exchange)
    monkeypatch.setattr(ExpertCall, "backward", lambda *a: events.append(("experts backward",)) or backward(*a))
    spied = classmethod(lambda cls, *a: events.append(("experts",)) or forward(cls, *a))
    monkeypatch.setattr(ExpertCall, "forward", spied)
    return events


def run(log, n_tokens=12, **options):
    """(events of forward, events of backward)."""
    layer = torch_layer.ExpertParallelMoE(**SIZES, **options).bfloat16()
    x = torch.randn(n_tokens, SIZES["hidden_size"]).bfloat16().requires_grad_()
    out, _ = layer(x)
    forward, log[:] = list(log), []
    out.float().square().sum().backward()
    assert x.grad is not None and layer.c_fc.weight.grad.abs().sum() > 0
    return forward, list(log)


def test_one_rank_is_the_moe_module():
    """The same weights, tokens and gradients: the same bits, but for x, whose gradients are added in another order."""
    torch.manual_seed(0)
    layer = torch_layer.ExpertParallelMoE(**SIZES, std=0.1).bfloat16()
    moe = MoE(4, 2, 128, 64, "swiglu", False, 0.1).bfloat16()
    for name, weight in moe.named_parameters():
        weight.data.copy_(layer.get_parameter(name))
    x, dout = (torch.randn(3, 20, 128).bfloat16() for _ in range(2))
    found = []
    for module in (layer, moe):
        given = x.clone().requires_grad_()
        out, aux = module(given)
        torch.autograd.backward([out, aux], [dout, torch.tensor(0.5)])
        found.append({"out": out, "aux": aux, **{n: p.grad for n, p in module.named_parameters()}, "x": given.grad})
    for name, value in found[1].items():
        if name in ("x", "router.weight"):
            error = (found[0][name].double() - value.double()).norm() / value.double().norm()
            assert error < 0.005, f"{name}: {error:.1e}"
        else:
            assert torch.equal(found[0][name], value), name


def test_balance_survives_a_cast_of_the_model():
    layer = torch_layer.ExpertParallelMoE(**SIZES, balance_speed=0.001)
    x = torch.randn(1, 128) + 0.3 * torch.randn(64, 128)
    for step in range(5):
        layer(x)
        if step == 2:
            layer.bfloat16()
            x = x.bfloat16()
        layer.step()
    assert layer.balance_steps.dtype == torch.int64 and layer.balance_steps.abs().max() == 5
    assert layer.state_dict()["balance_steps"].tolist() == layer.balance_steps.tolist()
    assert int(layer.load.sum()) == 0


def kinds(events, wide=64) -> list[str]:
    """Only the tokens' rows, 64 words wide in bf16, not what rides beside them."""
    return [event[0] for event in events if len(event) == 1 or event[1][1] == wide]


def test_one_piece(log):
    forward, backward = run(log)
    assert kinds(forward) == ["send", "wait", "experts", "send", "wait"]
    assert kinds(backward) == ["send", "wait", "experts backward", "send", "wait"]


def test_pieces_travel_beside_others_experts(log):
    forward, backward = run(log, overlap=3)
    each = ["wait", "experts", "send"]
    assert kinds(forward) == ["send"] * 3 + each * 3 + ["wait"] * 3
    # The tape runs them backwards: all gradients leave, then each is waited for, used, and what comes of it leaves.
    assert kinds(backward) == ["send"] * 3 + ["wait", "experts backward", "send"] * 3 + ["wait"] * 3


def test_more_pieces_than_tokens_make_the_same_calls(log):
    forward, backward = run(log, n_tokens=2, overlap=3)
    assert kinds(forward).count("experts") == 3 and kinds(backward).count("send") == 6


def test_the_shared_expert_runs_while_tokens_travel(log, monkeypatch):
    shared = torch_layer.SharedExpert.forward
    spied = lambda self, x: log.append(("shared",)) or shared(self, x)  # noqa: E731
    monkeypatch.setattr(torch_layer.SharedExpert, "forward", spied)
    forward, _ = run(log, shared_intermediate_size=64)
    assert kinds(forward) == ["send", "shared", "wait", "experts", "send", "wait"]


def test_recompute_runs_dispatch_and_experts_again(log):
    forward, backward = run(log, recompute=True)
    assert kinds(forward) == ["send", "wait", "experts", "send", "wait"]
    # Up to what backward needs: the experts' own activations. The outputs are not sent a second time.
    assert kinds(backward) == ["send", "wait", "send", "wait", "experts", "experts backward", "send", "wait"]


def test_recompute_runs_again_what_ran():
    """Whatever is active where backward runs: on a GPU that is another thread."""
    x, found = torch.randn(24, SIZES["hidden_size"]).bfloat16(), []
    for recompute in (False, True):
        layer = torch_layer.ExpertParallelMoE(**{**SIZES, "intermediate_size": 128}, recompute=recompute).bfloat16()
        given = x.clone().requires_grad_()
        with SonicMoEConfig(use_fp8=True, fp8_wgrad=True).activate():
            out, _ = layer(given)
        out.float().square().sum().backward()
        found.append([given.grad, layer.c_fc.weight.grad, layer.c_proj.weight.grad])
    for again, once in zip(*found, strict=True):
        assert torch.equal(again, once)


def test_recompute_keeps_x_and_little_else():
    def kept(**options):
        layer = torch_layer.ExpertParallelMoE(**SIZES, **options).bfloat16()
        x = torch.randn(256, SIZES["hidden_size"]).bfloat16().requires_grad_()
        seen = {}
        pack = lambda t: seen.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out, _ = layer(x)
        weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        return sum(size for place, size in seen.items() if place not in weights)

    rows = 256 * SIZES["hidden_size"] * 2  # x, in bf16
    assert kept(recompute=True) < 2 * rows
    assert kept() > kept(recompute=True) + 256 * 2 * 128 * 2  # z: both slots of a token, 2I columns


@pytest.mark.parametrize("frozen", ["router", "experts", "both"])
def test_frozen_parts(log, frozen):
    layer = torch_layer.ExpertParallelMoE(**SIZES).bfloat16()
    experts = [layer.c_fc.weight, layer.c_proj.weight]
    for weight in [layer.router.weight] * (frozen != "experts") + experts * (frozen != "router"):
        weight.requires_grad_(False)
    x = torch.randn(12, SIZES["hidden_size"]).bfloat16()
    out, aux = layer(x)
    assert out.requires_grad == (frozen != "both")
    if frozen != "both":
        log.clear()
        (out.float().square().sum() + aux).backward()
        # Only what somebody wants is sent: gradients of outputs, and those of scores, but none of tokens.
        assert [event[1][1] for event in log if event[0] == "send"] == ([64] if frozen == "router" else [64, 2])
    assert (layer.router.weight.grad is None) == (frozen != "experts")
    assert (layer.c_fc.weight.grad is None) == (frozen != "router")


def test_fp8_all_the_way(log):
    """What travels is what the experts take: quantized once, and as near to bf16 as FP8 is."""
    torch.manual_seed(0)
    x, dout = (torch.randn(64, 128).bfloat16() for _ in range(2))
    found = []
    for options in ({}, dict(fp8_dispatch=True, fp8_combine_grad=True)):
        config = SonicMoEConfig(use_fp8=bool(options))
        sizes = {**SIZES, "intermediate_size": 128}
        layer = torch_layer.ExpertParallelMoE(**sizes, **options, config=config, std=0.1).bfloat16()
        given = x.clone().requires_grad_()
        layer(given)[0].backward(dout)
        found.append((given.grad, layer.router.weight.grad, layer.c_fc.weight.grad, layer.c_proj.weight.grad))
    for plain, fp8 in zip(*found, strict=True):
        error = ((fp8.float() - plain.float()).norm() / plain.float().norm()).item()
        assert 0.005 < error < 0.1, error


def test_a_checkpoint_is_read_where_its_gpus_are_not(tmp_path):
    """Tensors are written as if they lay on a GPU that this machine has not."""
    files, kinds = checkpoint.torch_files(), torch.serialization._package_registry
    before = list(kinds)
    torch.serialization.register_package(0, lambda storage: "cuda:99", lambda storage, place: None)
    try:
        checkpoint.save(tmp_path, Alone(), files, {"router": torch.ones(2)}, {"w": [torch.ones(2)]}, range(1))
    finally:
        kinds[:] = before
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "shared", weights_only=True)
    shared, experts = checkpoint.load(tmp_path, files, range(1))
    assert shared["router"].tolist() == experts["w"][0].tolist() == [1.0, 1.0]


def test_transport_names(monkeypatch):
    layer = torch_layer.ExpertParallelMoE(**SIZES, transport="auto")
    assert layer.transport.name == "alltoall"
    with pytest.raises(ValueError, match="transport: got 'ring', need 'auto', 'alltoall' or 'deepep'"):
        torch_layer.ExpertParallelMoE(**SIZES, transport="ring")

    class Two(Alone):
        size = 2

    with pytest.raises(ImportError, match="transport: got 'deepep', but deep_ep cannot be imported"):
        monkeypatch.setattr(torch.distributed, "group", type("group", (), {"WORLD": None}))
        torch_layer.make_transport("deepep", Two())
