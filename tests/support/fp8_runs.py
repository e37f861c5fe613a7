"""FP8 runs to be measured: configurations, the rows of the precision table, error sums over several runs, payloads."""

from dataclasses import dataclass, field, replace

import numpy as np
import paddle

from sonicmoe import SonicMoEConfig

from . import fp8_model
from .oracle import GLU_GATES, Result
from .paddle_runs import oracle
from .precision_rows import HEAVY_CHANNEL, HEAVY_FACTOR
from .problems import Problem, make_problem, to_bf16

RECIPES = {
    "sm90": ({"fp8_recipe": "sm90"}, fp8_model.SM90),
    "sm90-pow2": ({"fp8_recipe": "sm90", "fp8_pow2_scale": True}, fp8_model.SM90_POW2),
    "sm100": ({"fp8_recipe": "sm100"}, fp8_model.SM100),
    "sm100-iso32": ({"fp8_recipe": "sm100", "fp8_iso32_weight": True}, fp8_model.SM100_ISO32),
}


def fp8_config(recipe: str, fp8_wgrad: bool, **fields) -> SonicMoEConfig:
    return SonicMoEConfig(use_fp8=True, fp8_wgrad=fp8_wgrad, **RECIPES[recipe][0], **fields)


def row_problem(row, seed=0, hidden=256, intermediate=None, **kwargs) -> Problem:
    n_tokens, topk, n_experts, full_intermediate = row
    return make_problem(n_tokens, hidden, intermediate or full_intermediate, n_experts, topk, seed=seed, **kwargs)


def with_heavy_channel(problem) -> Problem:
    """One channel of every token a hundred times the rest, as trained models have them."""
    x = problem.x.copy()
    x[:, HEAVY_CHANNEL] = to_bf16(x[:, HEAVY_CHANNEL] * HEAVY_FACTOR)
    return replace(problem, x=x)


@dataclass
class Errors:
    """Sums over all runs added, so that few-valued tensors are judged on enough values."""

    sums: dict = field(default_factory=dict)

    def add(self, result: Result, reference: Result) -> "Errors":
        for name in Result.NAMES:
            value, expected = (np.asarray(getattr(r, name), np.float64).ravel() for r in (result, reference))
            new = ((value - expected) @ (value - expected), expected @ expected, value @ value, value @ expected)
            self.sums[name] = self.sums.get(name, np.zeros(5)) + np.array([*new, value.size])
        return self

    def relative(self, name) -> float:
        error, expected, _, _, _ = self.sums[name]
        return float(np.sqrt(error / expected))

    def cosine(self, name) -> float:
        _, expected, value, product, _ = self.sums[name]
        return float(product / np.sqrt(expected * value))

    def count(self, name) -> int:
        return int(self.sums[name][4])


def inherent(problem, recipe: str, kind="swiglu") -> Errors:
    """What rounding x and w1 alone to e4m3 does to the function, all else being exact: no kernel that multiplies
    e4m3 operands can come closer. It matters where the slope of the gate is a step, as at large magnitudes."""
    r = RECIPES[recipe][1]
    order, back = (fp8_model.interleave, fp8_model.separate) if kind in GLU_GATES else (np.asarray, np.asarray)
    w1 = np.stack([back(fp8_model.weight(order(w).T, r).T) for w in problem.w1])
    return Errors().add(oracle(replace(problem, x=fp8_model.rows(problem.x, r), w1=w1), kind), oracle(problem, kind))


CARRIERS = ("fp32", "ue8m0_bytes", "ue8m0_words", "ue8m0_values")


def payload(x, carrier: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scales as that carrier holds them, the values both stand for) of x [T,H]."""
    block, pow2 = ((1, 128), False) if carrier == "fp32" else ((1, 32), True)
    codes, scale = fp8_model.quantize(x, block, pow2)
    values = fp8_model.decode(codes) * fp8_model.spread(scale.astype(np.float64), block)
    if carrier == "fp32":
        return codes, scale, values
    exponent = (np.frexp(scale)[1] - 1 + 127).astype(np.uint32)
    if carrier == "ue8m0_bytes":
        return codes, exponent.astype(np.uint8), values
    if carrier == "ue8m0_values":
        return codes, exponent.astype(np.int32), values
    words = exponent.reshape(len(x), -1, 4) << np.array([0, 8, 16, 24], dtype=np.uint32)
    return codes, words.sum(axis=-1, dtype=np.uint32).view(np.int32), values


def fp8_tensors(x, carrier: str):
    """The payload of x as a dispatcher hands it over: e4m3 data and scales."""
    codes, scale, _ = payload(x, carrier)
    return paddle.to_tensor(codes).view(paddle.float8_e4m3fn), paddle.to_tensor(scale)
