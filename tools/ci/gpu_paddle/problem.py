"""The layers and inputs that both frameworks are given, as NumPy arrays; no framework is imported here."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Problem:
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    topk: int
    seed: int = 0
    elsewhere: float = 0.0  # share of the slots whose expert is on another rank


SMALL = Problem(300, 256, 128, 8, 4, elsewhere=0.2)
TINY = Problem(40, 128, 128, 6, 2, elsewhere=0.2)
REFERENCE = Problem(8192, 3072, 1536, 8, 8)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to bf16, rounded to nearest even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def inputs(p: Problem) -> dict[str, np.ndarray]:
    """bf16 tensors as bits. Weights per expert: w1 [E,H,2I] with columns gate|up, w2 [E,I,H]."""
    draw = np.random.default_rng(p.seed)

    def normal(*shape, scale=1.0):
        return bf16_bits(draw.standard_normal(shape, np.float32) * np.float32(scale))

    ids = np.argsort(draw.random((p.tokens, p.experts), np.float32), axis=1)[:, : p.topk].astype(np.int32)
    if p.elsewhere:
        ids[draw.random(ids.shape) < p.elsewhere] = -1
    probs = draw.random((p.tokens, p.topk), np.float32)
    probs /= probs.sum(1, keepdims=True)
    return {
        "x": normal(p.tokens, p.hidden),
        "dout": normal(p.tokens, p.hidden),
        "w1": normal(p.experts, p.hidden, 2 * p.intermediate, scale=p.hidden**-0.5),
        "w2": normal(p.experts, p.intermediate, p.hidden, scale=p.intermediate**-0.5),
        "ids": ids,
        "probs": probs,
        "counts": np.bincount(ids[ids >= 0], minlength=p.experts).astype(np.int64),
    }


RECIPES = {
    "bf16": {},
    "fp8": {"use_fp8": True},
    "fp8_wgrad": {"use_fp8": True, "fp8_wgrad": True},
}
