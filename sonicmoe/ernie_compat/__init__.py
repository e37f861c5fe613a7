"""All Paddle glue. Importing it makes this package run on Paddle: see ``torch_proxy``.

Everything is imported here at once. A caller may move this package under another name afterwards, and an import made
later from inside would then load a second copy.
"""

from . import torch_proxy

torch_proxy.ensure()

# First, and by this form: it makes the engine an attribute of the package under whatever name that goes by. The form
# `from .. import expert_mlp` alone would ask for it under the package's first name.
from ..expert_mlp import Plan  # noqa: E402, F401, I001

from .deepep_metadata import deepep_topk_to_sonic_metadata  # noqa: E402
from .fleet import run_sonic_moe  # noqa: E402
from .mlp_node import SonicMoEMlpNode  # noqa: E402
from .quantizers import quantize_activation_blockscaled_fast, quantize_native_fp8_weights  # noqa: E402
from .weight_layout_fusion import (  # noqa: E402
    fused_grouped_w1_to_sonic,
    fused_sonic_w1_to_grouped,
    fused_transpose_w2_layout,
)

torch_proxy.verify()

__all__ = [
    "SonicMoEMlpNode",
    "deepep_topk_to_sonic_metadata",
    "fused_grouped_w1_to_sonic",
    "fused_sonic_w1_to_grouped",
    "fused_transpose_w2_layout",
    "quantize_activation_blockscaled_fast",
    "quantize_native_fp8_weights",
    "run_sonic_moe",
]
