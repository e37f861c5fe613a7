"""torch autograd over the engine.

x, the scores and both weights are inputs of one autograd node, or the inputs of a larger one (``whole_layer.py``) take
their place. The gradient of a weight takes one of two ways:

- ordinary: backward returns it in the weight's dtype. Where that is the type of the computation the stages write it
  there directly, so no fp32 copy of the weights' size exists.
- ``weight.main_grad`` is a tensor (fp32, the weight's shape): backward adds to it in place, in fp32, and autograd gets
  None, so that ``.grad`` stays as it was. A weight that has the attribute ``grad_added_to_main_grad`` belongs to
  Megatron, which waits for its hook and throws the gradient away: it gets that flag set and an uninitialised gradient
  (zeros under ``zero_out_wgrad``).
  What is added is queued on the stream of the backward, which is that of its forward: who runs forwards on several
  streams has to order them, and the optimizer behind them. A deferred addition is queued where it is run, behind what
  it needs of that backward.

A backward of some inputs alone (``torch.autograd.grad``, ``backward(inputs=...)``) leaves the others' ``main_grad`` as
it was; and ``torch.autograd.grad`` of a weight gives that gradient back, and adds it to nothing.
"""

import threading

import torch

from .. import checks
from ..expert_mlp import ExpertWeights, GradBuffers, QuantTensor, Saved
from ..expert_mlp import backward as engine_backward
from ..expert_mlp import forward as engine_forward
from ..gemm.api import stages
from ..gemm.plan import Plan
from ..routing.metadata import Routing
from ..wgrad_deferral import OwedGradient, may_be_deferred
from .fp8_weights import fp8_weights
from .streams import Handover, in_dtype, tensors_in, without_autocast

# Two threads may run backwards through the same weights.
_main_grad_lock = threading.Lock()


def apply_experts(x, scores, w1_EFH, w2_EHI, routing: Routing, plan: Plan, inference: bool = False):
    """out [T,H] on the tape. ``scores`` [T,K], or [S] for a list of slots, are those that ``routing`` was made from.

    Where nothing wants a gradient, or under ``inference``, nothing is kept for a backward.
    """
    inputs = (x, scores, w1_EFH, w2_EHI)
    if torch.is_grad_enabled() and not inference and any(tensor.requires_grad for tensor in inputs):
        return _Experts.apply(*inputs, routing, plan)
    return inference_experts(x, w1_EFH, w2_EHI, routing, plan)


def inference_experts(x, w1_EFH, w2_EHI, routing: Routing, plan: Plan):
    """out [T,H] of x, a tensor or an FP8 payload, and nothing for a backward."""
    with torch.no_grad(), without_autocast(w1_EFH):
        return engine_forward(x, routing, _engine_weights(w1_EFH, w2_EHI, plan)[0], plan, keep=False)[0]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scores, w1, w2, routing, plan):
        with without_autocast(x):
            out, ctx.call, z_parts = ExpertCall.forward(x, w1, w2, routing, plan)
        ctx.save_for_backward(x, w1, w2, *z_parts)
        ctx.scores_dtype = scores.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, w1, w2, *z_parts = ctx.saved_tensors
        with without_autocast(x):
            dx, ds, dw1, dw2 = ctx.call.backward(
                x, w1, w2, z_parts, dout, *ctx.needs_input_grad[:2], *weight_needs(ctx)
            )
        return dx, None if ds is None else ds.to(ctx.scores_dtype), dw1, dw2, None, None


# What ``weight_needs`` says of a gradient that is asked for as a result, and so belongs in no main_grad.
_AS_RESULT = "as result"


def weight_needs(ctx) -> tuple:
    """Of w1 and w2, inputs 2 and 3 of the node whose backward runs: whether this backward wants their gradients.

    ``needs_input_grad`` does not know which inputs a backward was asked for. It need not where a gradient that nobody
    wanted is dropped; but one that was added to a main_grad stays there.
    """
    functions = [function for function, _ in ctx.next_functions[2:4]]
    return tuple([need and _wanted(by) for need, by in zip(ctx.needs_input_grad[2:4], functions, strict=True)])


def _wanted(function):
    try:
        return torch._C._will_engine_execute_node(function)
    except RuntimeError as error:  # where torch.autograd.grad was asked for a leaf, the engine stops short of it
        return _AS_RESULT if "autograd.grad()" in str(error) else True


class ExpertCall:
    """One forward of the experts within an autograd node, and its backwards. It holds what they need beside the tensors
    that the node saves: x and the weights as given, because copies of them in another type are made again by backward
    and not kept in between, and the parts of z."""

    def __init__(self, w1, w2, routing: Routing, plan: Plan):
        self.routing, self.plan = routing, plan
        self.owner1 = w1 if main_grad_of("w1", w1) is not None else None
        self.owner2 = w2 if main_grad_of("w2", w2) is not None else None
        self.fp8_weights, self.z_together = (None, lambda: False), None
        self.z_turns = iter((True,))

    @classmethod
    def forward(cls, x, w1, w2, routing: Routing, plan: Plan):
        """(out [T,H], the call, the parts of z to be saved)."""
        call = cls(w1, w2, routing, plan)
        weights, still_good = _engine_weights(w1, w2, plan)
        if weights.fp8 is not None:
            call.fp8_weights = weights, still_good
        out, saved = engine_forward(x, routing, weights, plan)
        z_parts, call.z_together = _apart(saved.z)
        return out, call, z_parts

    def backward(self, x, w1, w2, z_parts, dout, need_dx: bool, need_ds: bool, need1, need2):
        """(dx, ds float32, dw1, dw2), each None where it is not needed or has gone into its ``main_grad``. What
        ``weight_needs`` says comes as ``need1`` and ``need2``."""
        plan, z, uses_up_z = self.plan, None, False
        dx_first = stages(plan).DX_FIRST
        owner1 = self.owner1 if need1 is True else None
        owner2 = self.owner2 if need2 is True else None
        # Both before anything is added to one of them.
        for name, owner in (("w1", owner1), ("w2", owner2)):
            if owner is not None:
                _standing_main_grad(name, owner)
        # The first backward may use up z in place. Whoever comes later over a retained graph computes it anew.
        if next(self.z_turns, False):
            z, uses_up_z = _together(z_parts, self.z_together), dx_first
        weights, still_good = self.fp8_weights
        if not still_good():
            weights, _ = _engine_weights(w1, w2, plan)
        saved = Saved(x=x, z=z, routing=self.routing, weights=weights, plan=plan)
        z = None  # the engine's alone now
        dw1 = dw2 = None

        def deliver(wgrad):
            nonlocal dw1, dw2
            if uses_up_z:
                _free(z_parts)
            # With nothing left to come but these, the one with the larger operand goes first.
            if dx_first and need1:
                dw1 = _weight_grad("w1", w1, owner1, _into_dw1, wgrad)
            if need2:
                dw2 = _weight_grad("w2", w2, owner2, _into_dw2, wgrad)

        if not isinstance(dout, QuantTensor):
            dout = dout.contiguous()
        grads = engine_backward(
            saved, dout, need_dx=need_dx, need_ds=need_ds, need_wgrad=bool(need1 or need2), deliver=deliver
        )
        if need1 and not dx_first:
            dw1 = _weight_grad("w1", w1, owner1, _into_dw1, grads.wgrad)
        return grads.dx, grads.ds, dw1, dw2


def _engine_weights(w1, w2, plan: Plan):
    """The weights as the engine takes them, and under FP8 the question whether its copies are still these."""
    hidden, intermediate = int(w2.shape[1]), int(w2.shape[2])
    if plan.recipe is not None:
        fp8, still_good = fp8_weights(w1, w2, plan)
        return ExpertWeights(None, None, fp8, hidden, intermediate), still_good
    storage = getattr(torch, plan.storage)
    w1, w2 = in_dtype(w1, storage), in_dtype(w2, storage)
    if plan.backend != "naive":
        checks.require_aligned("w1", w1)
        checks.require_aligned("w2", w2)
    return ExpertWeights(w1, w2, None, hidden, intermediate), None


def _apart(z):
    """(tensors of what the engine kept of z, what makes it of them again): a tensor, an FP8 tensor, or nothing."""
    if z is None:
        return (), None
    return z.taken_apart() if isinstance(z, QuantTensor) else ((z,), _itself)


def _itself(z):
    return z


def _together(parts, make):
    # .data: an alias with a version counter of its own, so that writing to it is nobody's in-place change.
    return None if make is None else make(*[part.data for part in parts])


def _free(z_parts) -> None:
    """The memory of a z that nobody will read again: the tape itself lets go of it only after the whole backward.
    Hooks on saved tensors may have put it into memory that it shares with others; that stays."""
    for part in z_parts:
        memory = part.untyped_storage()
        if memory.nbytes() == part.nbytes:
            memory.resize_(0)


def main_grad_of(name: str, weight):
    """The fp32 tensor that this weight's gradient is added to, or None. One of another kind is an error: adding to it
    would lose digits, or go to the wrong place."""
    grad = getattr(weight, "main_grad", None)
    if grad is not None:
        name = f"{name}.main_grad"
        checks.require_tensor(name, grad)
        checks.require_shape(name, grad, checks.shape_of(weight), "the weight's shape")
        checks.require_dtype(name, grad, ("float32",))
        checks.require_contiguous(name, grad)
        checks.require_same_place(name, grad, "the weight", weight)
        checks.require_aligned(name, grad)
    return grad


def _standing_main_grad(point: str, owner):
    main_grad = main_grad_of(point, owner)
    if main_grad is None:
        raise RuntimeError(f"{point}.main_grad: was there in forward and is gone in backward")
    return main_grad


def _into_dw1(wgrad, buffer, everyone, overwrite: bool) -> None:
    wgrad.accumulate_dw1(GradBuffers(buffer, None, False, everyone, everyone, overwrite))
    wgrad.dz = None  # before dW2, if that is still to come


def _into_dw2(wgrad, buffer, everyone, overwrite: bool) -> None:
    wgrad.accumulate_dw2(GradBuffers(None, buffer, False, everyone, everyone, overwrite))
    wgrad.pa = None  # before dx by slot takes its own memory


def _weight_grad(point: str, weight, owner, into, wgrad):
    """What autograd gets for one weight; see the two ways above. ``owner`` is the weight if it has a main_grad."""
    everyone = (True,) * int(weight.shape[0])
    if owner is None:
        direct = checks.dtype_name(weight) == wgrad.plan.storage
        grad = torch.empty_like(weight) if direct else torch.zeros_like(weight, dtype=torch.float32)
        into(wgrad, grad, everyone, direct)
        return in_dtype(grad, weight.dtype)

    def add(wgrad):
        main_grad = _standing_main_grad(point, owner)
        with _main_grad_lock, torch.no_grad(), without_autocast(main_grad):
            into(wgrad, main_grad, everyone, False)

    if may_be_deferred():
        handover = Handover(owner)

        def add_anywhere(wgrad):
            handover.take(wgrad)
            add(wgrad)

        if not OwedGradient(point, owner, wgrad, _versions, add_anywhere).settle():
            return None
    else:
        add(wgrad)
    if not hasattr(owner, "grad_added_to_main_grad"):
        return None
    owner.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(owner, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)


def _versions(*values) -> list[int]:
    """torch's counts of in-place changes. Tensors of inference mode have none, and nobody may write them outside it."""
    return [tensor._version for tensor in tensors_in(values) if not tensor.is_inference()]
