"""The load-balancing loss: E times the dot product of the router's mean probabilities and of each expert's share of
the slots, as in the Switch Transformer. Forward and backward in framework ops are the definition; on a GPU the Triton
kernels run, where they are.
"""

from importlib.util import find_spec

import torch

from .. import checks

if find_spec("triton") is not None:
    from . import triton_switch_loss
else:
    triton_switch_loss = None

_SMALLEST = 1e-12  # in the place of a sum over no token or no slot


def _backend(tensor, config):
    return None if checks.is_cpu(tensor) or config.backend == "naive" else triton_switch_loss


def forward(logits_TE, frequency_E, config):
    """The loss, 0-d float32; ``frequency`` [E] holds how many slots each expert got."""
    compiled = _backend(logits_TE, config)
    run = switch_loss if compiled is None else compiled.switch_loss
    return run(logits_TE, frequency_E)


def backward(dloss, logits_TE, frequency_E, config):
    """dlogits [T,E] in the logits' dtype."""
    compiled = _backend(logits_TE, config)
    run = switch_loss_backward if compiled is None else compiled.switch_loss_backward
    return run(dloss, logits_TE, frequency_E)


def switch_loss(logits, frequency):
    probs = torch.softmax(logits.to(torch.float32), dim=-1).sum(dim=0)
    return int(logits.shape[1]) * (_shares(probs) * _shares(frequency)).sum()


def switch_loss_backward(dloss, logits, frequency):
    """A token's probabilities add up to 1, so that what all of them are divided by is T."""
    n_tokens, n_experts = [int(size) for size in logits.shape]
    probs = torch.softmax(logits.to(torch.float32), dim=-1)
    dprobs = dloss.to(torch.float32) * (n_experts / max(n_tokens, 1)) * _shares(frequency)
    dlogits = probs * (dprobs - (probs * dprobs).sum(dim=-1, keepdim=True))
    return dlogits.to(logits.dtype)


def _shares(amounts):
    amounts = amounts.to(torch.float32)
    return amounts / amounts.sum().clip(min=_SMALLEST)
