"""What ``triton_quantize.quantize_tokens`` gives, by the definition. For processes with a real torch."""

import torch

from sonicmoe.quant import naive


def wanted_tokens(values, routing, pow2, gathered=True):
    """(data [C,M], scale [M/128,C]) of float32 values of rows."""
    if gathered:
        values = values[routing.x_gather_idx.long()]
    real = (routing.s_scatter_idx < routing.n_slots).reshape(-1, 1)
    q = naive.quantize(torch.where(real, values, 0.0).t().contiguous(), (1, 128), pow2=pow2)
    return q.data, q.scale.t().contiguous()
