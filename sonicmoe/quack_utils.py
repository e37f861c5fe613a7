"""FP8 quantizers under the module path that PaddleFleet imports them from."""

from .ernie_compat import quantize_activation_blockscaled_fast, quantize_native_fp8_weights

__all__ = ["quantize_activation_blockscaled_fast", "quantize_native_fp8_weights"]
