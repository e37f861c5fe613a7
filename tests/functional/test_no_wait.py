"""Nothing on the way of a call waits for the device: seen on the CPU with stages that compute nothing."""

import pytest

from tests.support.torch_child import torch
from tests.support.torch_moe import inputs, make, views

RUNS_IN_TORCH = True
pytestmark = pytest.mark.torch

if torch:
    from sonicmoe import SonicMoEConfig, moe_general_routing_inputs
    from sonicmoe.gemm import api
    from sonicmoe.routing import backends
    from sonicmoe.routing.arrays import bound


class NoWait(torch.utils._python_dispatch.TorchDispatchMode if torch else object):
    """Ops whose result's size or value the host must see, and so would wait for on a GPU, are errors."""

    WAITING = ("_local_scalar_dense", "nonzero", "unique", "bincount", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.WAITING), func
        return func(*args, **(kwargs or {}))


class StagesWithoutArithmetic:
    """What kernels would be: they take the arrays and wait for nothing."""

    OVERWRITES_Z, DX_FIRST = True, False

    def prepare_rows(self, x, plan):
        return x

    def up_projection(self, x_rows, weights, routing, plan, need_a, out=None):
        wide, narrow = plan.width(weights.intermediate_size), weights.intermediate_size
        return x_rows.new_ones(routing.n_rows, wide), x_rows.new_ones(routing.n_rows, narrow)

    def down_projection(self, a, weights, routing, plan, out=None):
        return a.new_ones(routing.n_rows, weights.hidden_size)

    def down_projection_backward(self, dout_rows, z, weights, routing, plan, need_wgrad, out=None):
        return z, z[:, ::2], z.new_ones(routing.n_slots, dtype=torch.float32)

    def score_gradient(self, ds_parts, routing, plan):
        return ds_parts if routing.n_topk is None else ds_parts.reshape(routing.n_tokens, routing.n_topk)

    def up_projection_backward(self, dz, weights, routing, plan, out=None):
        return dz.new_ones(routing.n_rows, weights.hidden_size)

    def sum_slots(self, rows, routing, plan, scores=None):
        return rows.new_ones(routing.n_tokens, rows.shape[1])

    def summed_down_projection(self, take_a, weights, routing, plan):
        return self.sum_slots(self.down_projection(take_a(), weights, routing, plan), routing, plan)

    def summed_up_projection_backward(self, dz, weights, routing, plan):
        return self.sum_slots(self.up_projection_backward(dz, weights, routing, plan), routing, plan)

    def after_dx(self, dz):
        return dz

    def accumulate_dw1(self, dz, x, routing, plan, buffers):
        buffers.dw1_EFH.zero_()

    def accumulate_dw2(self, pa, dout, routing, plan, buffers):
        buffers.dw2.zero_()


def forget_counts(monkeypatch):
    """As on a GPU: arrays are sized by the counts that come with the call, and none are found."""
    real = backends.build

    def build(indices, probs, n_experts, block, config, counts=None, *rest):
        assert counts == bound(indices.shape[0] * indices.shape[1], n_experts, block)
        name, arrays = real(indices, probs, n_experts, block, config, None, *rest)
        return name, arrays | {"counts": None}

    monkeypatch.setattr(backends, "build", build)


@pytest.mark.parametrize("call", ["module", "general"])
def test_nothing_waits_for_the_device(call, monkeypatch):
    moe, (x, dout) = make(dtype="bfloat16"), inputs(16, 64, dtype="bfloat16")
    for weight in (moe.c_fc.weight, moe.c_proj.weight):
        weight.main_grad = torch.zeros(weight.shape)
    moe(x)[0].backward(dout)  # the metadata's build, if it takes one
    monkeypatch.setattr(api, "stages", lambda plan: StagesWithoutArithmetic())
    forget_counts(monkeypatch)
    for name in ("tolist", "item", "numpy", "cpu", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, _name=name: pytest.fail(f"Tensor.{_name}"))
    slots = (torch.ones(32), torch.arange(32) // 2, torch.arange(32) % 6)
    monkeypatch.setattr("sonicmoe.functional.layer._check_tokens", lambda *_: None)  # what a CPU alone looks at
    with NoWait(), SonicMoEConfig(metadata_backend="host").activate():
        if call == "module":
            out, aux = moe(x)
            torch.autograd.backward([out, aux], [dout, torch.ones_like(aux)])
        else:
            out, _ = moe_general_routing_inputs(x, *slots, *views(moe), 6, None, "swiglu")
            out.backward(dout)
