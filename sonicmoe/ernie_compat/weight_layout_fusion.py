"""Between the layouts that checkpoints hold and the one that kernels read; each call gives a new contiguous tensor.

    grouped  w1 [E,H,2I] columns gate|up     w2 [E,I,H]
    native   w1 [E,2I,H] rows g0,u0,g1,u1..  w2 [E,H,I]

They move bytes and nothing else, so there and back is exact in any dtype.
"""

import torch

from .. import checks
from .autocast import without_autocast


def _dims(weight, layout: str):
    checks.require_tensor("weight", weight)
    checks.require_rank("weight", weight, 3, layout)
    return checks.shape_of(weight)


def fused_grouped_w1_to_sonic(weight):
    """[E,H,2I] gate|up halves -> [E,2I,H] interleaved rows."""
    experts, hidden, width = _dims(weight, "[E, H, 2I]")
    if width % 2:
        raise ValueError(f"weight: got shape {[experts, hidden, width]}, need an even last dimension: gate and up")
    # stack and cat always write a fresh tensor; a permuted view of trivial dimensions would be returned as it is.
    with without_autocast():
        halves = [weight[:, :, part * (width // 2) : (part + 1) * (width // 2)].transpose(1, 2) for part in range(2)]
        return torch.stack(halves, dim=2).reshape([experts, width, hidden])


def fused_sonic_w1_to_grouped(weight):
    """[E,2I,H] interleaved rows -> [E,H,2I] gate|up halves."""
    experts, width, hidden = _dims(weight, "[E, 2I, H]")
    if width % 2:
        raise ValueError(f"weight: got shape {[experts, width, hidden]}, need an even middle dimension: gate and up")
    with without_autocast():
        return torch.cat([weight[:, part::2].transpose(1, 2) for part in range(2)], dim=2)


def fused_transpose_w2_layout(weight):
    """[E,A,B] -> [E,B,A]: w2 between grouped and native, either way."""
    _dims(weight, "[E, I, H] or [E, H, I]")
    with without_autocast():
        return torch.stack([expert.transpose(0, 1) for expert in weight.unbind(0)], dim=0)
