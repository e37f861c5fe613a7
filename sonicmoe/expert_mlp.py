"""The engine: forward and backward of one expert MLP over a Routing. It knows no autograd and no framework glue.

    out, saved = forward(x, routing, weights, plan)
    grads = backward(saved, dout)                  # dx, ds, and wgrads still to be run
    grads.wgrad.accumulate_dw1(buffers); grads.wgrad.accumulate_dw2(buffers)

``Saved`` holds what backward reads and no more: x as it was given, z (as FP8 under FP8, or nothing if z is
recomputed), the routing and the weights of this forward. Neither y nor gathered x is ever kept. The weights are
those that forward used: an optimizer that runs in between cannot mix two epochs in one gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .gemm import api
from .gemm.api import ExpertWeights, GradBuffers
from .gemm.plan import Plan
from .quant.formats import QuantTensor
from .routing.metadata import Routing


@dataclass
class Saved:
    """What one forward leaves for its backward."""

    x: Any  # [T,H] tensor, or QuantTensor if the dispatch was FP8
    z: Any  # [M,F], or None if recomputed
    routing: Routing
    weights: ExpertWeights
    plan: Plan
    released: bool = False

    def release(self) -> None:
        self.x = self.z = self.weights = None
        self.released = True


@dataclass
class PendingWgrad:
    """Weight gradients that backward has prepared and that run when their owner says so (at once, or deferred)."""

    saved_x: Any
    dout: Any
    dz: Any
    pa: Any
    routing: Routing
    plan: Plan

    def accumulate_dw1(self, buffers: GradBuffers) -> None:
        api.stages(self.plan).accumulate_dw1(self.dz, self.saved_x, self.routing, self.plan, buffers)

    def accumulate_dw2(self, buffers: GradBuffers) -> None:
        api.stages(self.plan).accumulate_dw2(self.pa, self.dout, self.routing, self.plan, buffers)


@dataclass
class Grads:
    dx: Any  # [T,H] or None
    ds: Any  # [T,K] float32 or None
    wgrad: PendingWgrad | None


def forward(x, routing: Routing, weights: ExpertWeights, plan: Plan, keep: bool = True):
    """out [T,H] in the storage type, and what backward needs (None unless ``keep``)."""
    run = api.stages(plan)
    x_rows = run.prepare_rows(x, plan)
    z, a = run.up_projection(x_rows, weights, routing, plan, need_a=True)
    saved = None
    if keep:
        saved = Saved(x=x, z=None if plan.recompute_z else z, routing=routing, weights=weights, plan=plan)
    # Where it is not kept, z goes before the next GEMM, and a after it.
    handed_over = [a]
    z = a = None
    return run.summed_down_projection(handed_over.pop, weights, routing, plan), saved


def backward(
    saved: Saved,
    dout,
    *,
    need_dx: bool = True,
    need_ds: bool = True,
    need_wgrad: bool = True,
    deliver: Callable[[PendingWgrad], None] | None = None,
) -> Grads:
    """Gradients of one forward. ``dout`` is [T,H], or a QuantTensor if the combine's backward delivered FP8.

    ``deliver`` gets the pending weight gradients where these cost the least memory: before dx, to make dW2 and drop
    ``pa``, so that p*a and dx by slot are never in memory at the same time; or, if dx has operands of its own
    (``DX_FIRST``), after it, to make both if it likes.
    """
    if saved.released:
        raise RuntimeError("backward ran a second time, but stage-wise memory released the activations after the first")
    plan, routing, weights = saved.plan, saved.routing, saved.weights
    run = api.stages(plan)
    dout_rows = run.prepare_rows(dout, plan)
    z = saved.z
    if run.OVERWRITES_Z:
        saved.z = None  # a second backward over the same forward computes it anew
    if z is None:
        z, _ = run.up_projection(run.prepare_rows(saved.x, plan), weights, routing, plan, need_a=False)
    dz, pa, ds_parts = run.down_projection_backward(dout_rows, z, weights, routing, plan, need_wgrad=need_wgrad)
    ds = run.score_gradient(ds_parts, routing, plan) if need_ds else None
    z = dout_rows = ds_parts = None
    wgrad = PendingWgrad(saved.x, dout, dz, pa, routing, plan) if need_wgrad else None
    pa = None
    if wgrad is None:
        deliver = None
    if deliver is not None and not run.DX_FIRST:
        deliver(wgrad)
    dx = run.summed_up_projection_backward(dz, weights, routing, plan) if need_dx else None
    if wgrad is not None:
        wgrad.dz = run.after_dx(dz)
    dz = None
    if deliver is not None and run.DX_FIRST:
        deliver(wgrad)
    if plan.stagewise:
        saved.release()
    return Grads(dx=dx, ds=ds, wgrad=wgrad)


__all__ = [
    "ExpertWeights",
    "GradBuffers",
    "Grads",
    "PendingWgrad",
    "Plan",
    "QuantTensor",
    "Routing",
    "Saved",
    "backward",
    "forward",
]
