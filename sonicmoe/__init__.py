"""sonicmoe: the Mixture-of-Experts layer for Paddle and torch.

Importing this package loads no framework, initialises no device and leaves the environment
as it is. The entry points of either framework load it when they are first asked for.
"""

# Those without a framework at once: after a renaming, `from .. import checks` would look for the old name.
from . import cache_safety, checks, jit, lazy  # noqa: F401
from .capabilities import API_VERSION, CAPABILITIES
from .config import SonicMoEConfig
from .enums import ActivationType, KernelBackendMoE

__version__ = "0.1.0"

# Public name -> submodule that holds it; loaded on first use so that `import sonicmoe` stays light.
_LAZY = {
    "SonicMoEMlpNode": ".ernie_compat",
    "run_sonic_moe": ".ernie_compat",
    "MoE": ".moe",
    "count_cumsum": ".functional",
    "enable_quack_gemm": ".functional",
    "moe_TC_softmax_topk_layer": ".functional",
    "moe_general_routing_inputs": ".functional",
}

__all__ = ["API_VERSION", "CAPABILITIES", "ActivationType", "KernelBackendMoE", "SonicMoEConfig", *_LAZY]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lazy.attribute(globals(), _LAZY[name], name)
