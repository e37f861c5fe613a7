"""Calls that training frameworks make by this path, beside the layer itself."""

from ..wgrad_deferral import set_wgrad_deferral_hook
from .utils import enable_fp8

__all__ = ["clear_all_fp8_weight_caches", "enable_fp8", "set_wgrad_deferral_hook"]


def clear_all_fp8_weight_caches() -> None:
    """Kept for callers that reset between runs: there is no cache outside the nodes, so nothing can be left over.

    A node's own copies go with ``node.release_fp8_weights()`` or ``node.step()``.
    """
