"""Frozen experts beside trained ones, for kernels that make the weight gradients of all experts in one launch."""

import torch


def deliver(run, target_E, experts, overwrite: bool) -> None:
    """``run(target)`` adds all experts' gradients to ``target``, or fills it under ``overwrite``. Only the ``experts``
    that are trained get theirs; where some are frozen, all are computed aside."""
    if not any(experts):
        return
    if all(experts):
        run(target_E)
        return
    aside = torch.empty_like(target_E) if overwrite else torch.zeros_like(target_E)
    run(aside)
    for expert, wanted in enumerate(experts):
        if wanted:
            target, found = target_E[expert], aside[expert]
            target.copy_(found) if overwrite else target.add_(found)
