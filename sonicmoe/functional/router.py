"""The router's product with the tokens, and its gradients. It multiplies in the type of its logits, whatever x and its
weight come in.
"""

from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from .. import checks
from ..config import SonicMoEConfig
from ..routing import router_weight
from .streams import in_dtype, without_autocast

if find_spec("triton") is not None:
    from ..routing import triton_router_product
else:
    triton_router_product = None


def _few(config: SonicMoEConfig, x) -> bool:
    """Whether there are so few tokens on a GPU that a launch of our own is to be preferred to asking torch."""
    kernels = triton_router_product
    if kernels is None or config.backend == "naive" or checks.is_cpu(x) or x.shape[0] > kernels.MOST_TOKENS:
        return False
    return checks.dtype_name(x) in kernels.DTYPES


def router_logits(x, router_w, config: SonicMoEConfig):
    """In autocast's type, or the router's own: one is often kept in float32 beside bf16 experts.

    The cast is made here, because autocast keeps its casts for later ops: one made within an autograd node, off the
    tape, would take from these the gradient of the router.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else router_w.dtype
    x, router_w = in_dtype(x, dtype), in_dtype(router_w, dtype)
    if _few(config, x):
        return triton_router_product.logits(x, router_w)
    with without_autocast(x):
        return F.linear(x, router_w)


def logits_on_tape(x, router_w, config: SonicMoEConfig):
    return _Logits.apply(x, router_w, config)


class _Logits(torch.autograd.Function):
    """As autograd would have it of ``router_logits``, but for the gradient of the weight: see ``router_weight.py``."""

    @staticmethod
    def forward(ctx, x, router_w, config):
        ctx.save_for_backward(x, router_w)
        ctx.config = config
        return router_logits(x, router_w, config)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogits):
        x, router_w = ctx.saved_tensors
        dx = drouter = None
        with without_autocast(x):
            if ctx.needs_input_grad[0]:
                dx = plus_product(None, dlogits, in_dtype(router_w, dlogits.dtype), x.dtype, ctx.config)
            if ctx.needs_input_grad[1]:
                drouter = router_weight.gradient(dlogits, x, router_w.dtype, ctx.config)
        return dx, drouter, None


def plus_product(dx, dlogits, router_w, dtype, config: SonicMoEConfig):
    """dx (or nothing) + dlogits @ router_w, which are of one type, in ``dtype``; dx may be written."""
    if dx is not None and dx.dtype == dlogits.dtype == dtype:
        if dx.is_contiguous() and _few(config, dx):
            return triton_router_product.add_product(dx, dlogits, router_w)
        return dx.addmm_(dlogits, router_w)
    product = in_dtype(dlogits @ router_w, dtype)
    return product if dx is None else product.add_(in_dtype(dx, dtype))


def require_router(x, router_w, w2_EHI) -> None:
    """A router of as many experts as the weights hold: kernels would read what lies behind these, or leave some out."""
    checks.require_tensor("x", x)
    checks.require_tensor("router_w", router_w)
    _require_router(checks.facts_of(x, router_w), int(w2_EHI.shape[0]))


@lru_cache(maxsize=256)
def _require_router(facts, n_experts: int) -> None:
    x, router_w = (checks.Facts(*fields) for fields in facts)
    for name, tensor, layout in (("x", x, "[T, H]"), ("router_w", router_w, "[E, H]")):
        checks.require_rank(name, tensor, 2, layout)
        checks.require_dtype(name, tensor, checks.FLOAT_DTYPES)
    checks.require_shape("router_w", router_w, (n_experts, x.shape[1]), "[E, H], E as in w2 and H as in x")
    checks.require_same_place("router_w", router_w, "x", x)
