"""Seeded problems: inputs already rounded to bf16, so that engine and oracle are fed the same numbers."""

from dataclasses import dataclass

import numpy as np

ROUTINGS = ("uniform", "skewed", "holes", "beyond", "one_expert", "idle_experts", "idle_rank")


def to_bf16(values) -> np.ndarray:
    """float32 values rounded to nearest-even bf16, as float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


@dataclass
class Problem:
    """x, dout [T,H]; w1 [E,H,F]; w2 [E,I,H]; indices, probs [T,K]; counts [E]."""

    x: np.ndarray
    dout: np.ndarray
    w1: np.ndarray
    w2: np.ndarray
    indices: np.ndarray
    probs: np.ndarray

    @property
    def n_experts(self) -> int:
        return self.w1.shape[0]

    @property
    def hidden(self) -> int:
        return self.w1.shape[1]

    @property
    def intermediate(self) -> int:
        return self.w2.shape[1]

    @property
    def counts(self) -> list[int]:
        here = self.indices[(self.indices >= 0) & (self.indices < self.n_experts)]
        return np.bincount(here, minlength=self.n_experts).tolist()


def make_indices(rng, kind: str, n_tokens: int, topk: int, n_experts: int) -> np.ndarray:
    """[T,K] ids, distinct within a row but for the ids that mean 'not here'. K may exceed E: the rest is -1."""
    rows = np.full((n_tokens, topk), -1, dtype=np.int32)
    here = min(topk, n_experts)
    weight = np.ones(n_experts)
    if kind == "skewed":
        weight = 1.0 / (1 + np.arange(n_experts)) ** 2
    if kind == "idle_experts":
        weight[::2] = 1e-12 if n_experts > 1 and (n_experts + 1) // 2 < n_experts and here <= n_experts // 2 else 1.0
    for t in range(n_tokens):
        # Largest of log-weight plus Gumbel noise: k distinct draws with these odds.
        noise = np.log(weight) + rng.gumbel(size=n_experts)
        rows[t, :here] = np.argsort(-noise)[:here]
        rng.shuffle(rows[t])
    if kind in ("holes", "beyond"):
        mask = rng.random(rows.shape) < 0.4
        far = n_experts + rng.integers(0, 3, rows.shape)
        rows = np.where(mask, -1 if kind == "holes" else far, rows)
    if kind == "one_expert":
        rows[:] = -1
        rows[:, 0] = n_experts - 1
    if kind == "idle_rank":
        rows[:] = -1
    return rows.astype(np.int32)


def make_problem(
    n_tokens=48,
    hidden=128,
    intermediate=128,
    n_experts=4,
    topk=2,
    routing="uniform",
    magnitude=1.0,
    weight_std=0.02,
    glu=True,
    seed=0,
) -> Problem:
    rng = np.random.default_rng(seed)
    width = intermediate * (2 if glu else 1)

    def normal(*shape, scale=1.0):
        return to_bf16(rng.standard_normal(shape) * scale)

    return Problem(
        x=normal(n_tokens, hidden, scale=magnitude),
        dout=normal(n_tokens, hidden, scale=magnitude),
        w1=normal(n_experts, hidden, width, scale=weight_std),
        w2=normal(n_experts, intermediate, hidden, scale=weight_std),
        indices=make_indices(rng, routing, n_tokens, topk, n_experts),
        probs=(rng.random((n_tokens, topk)) + 0.05).astype(np.float32),
    )
