"""Balance without a loss: an offset for each expert that only the choice of experts sees.

The K experts with the largest sum of probability and offset are chosen; scores come from the logits alone, so the
offset has no gradient and changes no output but by the choice. After a step it grows by ``speed`` for experts with less
than the mean load of all ranks and falls for those with more. Layers keep how many steps up it is, as an integer:
casting a whole model to bf16 would round a float.
"""

import math

import torch


def checked_speed(speed: float | None) -> float | None:
    """Against what would choose the same experts for every token, or drive the loads apart, without an error."""
    if speed is None:
        return None
    if isinstance(speed, bool) or not isinstance(speed, (int, float)):
        raise TypeError(f"balance_speed: got {speed!r}, need a number or None")
    if not 0 <= speed < math.inf:
        raise ValueError(f"balance_speed: got {speed}, need a finite number from 0 on")
    return float(speed)


def choose(logits_TE, offset_E, k: int):
    """[T,K] int64; of equals the lower expert first. Without an offset (None) the largest probabilities."""
    ranked = torch.softmax(logits_TE.to(torch.float32), dim=-1)
    if offset_E is not None:
        ranked = ranked + offset_E.reshape([1, -1])
    return torch.argsort(-ranked, dim=-1, stable=True)[:, :k]


def change(load_E):
    """int64 [E]: a step up, down or none, from the slots that each expert got on all ranks."""
    load = load_E.to(torch.float32)
    return torch.sign(load.mean() - load).to(torch.int64)
