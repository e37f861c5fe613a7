"""The layer as functions, and calls that training frameworks make by this path.

Loads no framework: what needs torch is loaded when it is first asked for. ``forward.py`` and ``backward.py`` hold the
raw functions, one projection a call.
"""

import sys

from .. import lazy
from ..wgrad_deferral import set_wgrad_deferral_hook
from .utils import enable_fp8, enable_quack_gemm

_LAYER = ("count_cumsum", "moe_TC_softmax_topk_layer", "moe_general_routing_inputs", "route_topk")

__all__ = ["clear_all_fp8_weight_caches", "enable_fp8", "enable_quack_gemm", "set_wgrad_deferral_hook", *_LAYER]


def __getattr__(name):
    if name not in _LAYER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lazy.attribute(globals(), ".layer", name)


def _refresh_fp8_config():
    """PaddleFleet's FP8 settings, for it to fill in and to hand to ``run_sonic_moe``."""
    return lazy.attribute(globals(), "..ernie_compat.fleet_config", "FleetFP8Config")()


def clear_all_fp8_weight_caches() -> None:
    """Drop the FP8 copies that the torch layers keep beside their weights. The next forward makes them again; a CUDA
    graph that was captured with them must be captured again.

    A node's own copies go with ``node.release_fp8_weights()`` or ``node.step()``.
    """
    loaded = sys.modules.get(f"{__name__}.fp8_weights")
    if loaded is not None:
        loaded.clear()
