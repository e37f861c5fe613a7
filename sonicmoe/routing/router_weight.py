"""The gradient of the router's weight: dlogits^T @ x, a sum over all tokens.

Two operands of few columns and thousands of rows are where cuBLAS splits the sum, and some of its versions (13.1, which
torch 2.11 brings) leave the last token out of 16-bit products with certain odd numbers of tokens: 4097 and 7169 with 8
experts. No error is raised. So this product is a kernel of our own on a GPU, and goes in float32 elsewhere.
"""

from importlib.util import find_spec

import torch

from .. import checks

if find_spec("triton") is not None:
    from . import triton_router_weight
else:
    triton_router_weight = None


def gradient(dlogits_TE, x_TH, out_dtype, config):
    """[E,H] of ``out_dtype``, rounded once. x is taken in the type of the logits, as forward has multiplied it."""
    on_gpu = triton_router_weight is not None and config.backend != "naive" and not checks.is_cpu(dlogits_TE)
    if on_gpu and checks.dtype_name(dlogits_TE) in triton_router_weight.DTYPES:
        return triton_router_weight.gradient(dlogits_TE, x_TH, out_dtype)
    return naive_gradient(dlogits_TE, x_TH, out_dtype)


def naive_gradient(dlogits_TE, x_TH, out_dtype):
    wide = torch.float64 if dlogits_TE.dtype == torch.float64 else torch.float32
    x_TH = x_TH.to(dlogits_TE.dtype).to(wide)
    return (dlogits_TE.to(wide).t() @ x_TH).to(out_dtype)
