"""The load-balancing loss on the tape."""

import torch

from ..config import SonicMoEConfig
from ..routing import switch_loss as kernels
from .streams import on_stream, without_autocast


class _SwitchLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, frequency, config):
        ctx.save_for_backward(logits, frequency)
        ctx.config = config
        return kernels.forward(logits, frequency, config)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        logits, frequency = ctx.saved_tensors
        return kernels.backward(dloss, logits, frequency, ctx.config), None, None


def switch_loss(logits, frequency, config: SonicMoEConfig | None = None):
    """0-d float32 from router logits [T,E] and each expert's number of slots [E]: E times the dot product of the mean
    probabilities and the shares of the slots. 1 where both are even, E where one expert gets all."""
    config = SonicMoEConfig.current() if config is None else config
    with on_stream(None, logits), without_autocast(logits):
        return _SwitchLoss.apply(logits, frequency, config)
