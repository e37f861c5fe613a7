"""Random routings of every kind, and the definition of the metadata, slot by slot."""

import numpy as np

ARRAYS = {
    "expert_offset": "int32",
    "x_gather_idx": "int32",
    "s_scatter_idx": "int32",
    "s_reverse_scatter_idx": "int32",
    "slot_offset": "int32",
    "scores": "float32",
    "score_src_idx": "int32",
}

WILD = {
    np.int32: [-(2**31), -7, -2, 2**31 - 1],
    # Some of these are a good expert once their upper half is dropped.
    np.int64: [-(2**63), -(2**32) + 1, -(2**31), -2, 2**31, 2**32, 2**32 + 1, 2**63 - 1],
}


def uniform(rng, shape, n_experts):
    return rng.integers(0, n_experts, shape)


def distinct(rng, shape, n_experts):
    """As a dispatcher sends it: no expert twice in a row, -1 where it ran out of them."""
    row = np.full((shape[0], max(n_experts, shape[1])), -1)
    row[:, :n_experts] = np.arange(n_experts)
    return rng.permuted(row, axis=1)[:, : shape[1]]


def skewed(rng, shape, n_experts):
    """Nearly all to one expert, and some experts without any."""
    favourite = rng.integers(0, n_experts)
    return np.where(rng.random(shape) < 0.9, favourite, rng.integers(0, n_experts, shape))


def holes(rng, shape, n_experts):
    return np.where(rng.random(shape) < rng.random(), -1, rng.integers(0, n_experts, shape))


def elsewhere(rng, shape, n_experts):
    """Ids of other ranks' experts on both sides."""
    return rng.integers(-3, 3 * n_experts + 2, shape)


def nothing(rng, shape, n_experts):
    return np.where(rng.random(shape) < 0.5, -1, n_experts + rng.integers(0, 5, shape))


def nearly_nothing(rng, shape, n_experts):
    made = np.full(shape, -1)
    if made.size:
        made.flat[rng.integers(0, made.size)] = rng.integers(0, n_experts)
    return made


KINDS = (uniform, distinct, skewed, holes, elsewhere, nothing, nearly_nothing)


def draw(rng, n_tokens, n_topk, n_experts, dtype, kind):
    """(indices, probs, scales or None)"""
    shape = (n_tokens, n_topk)
    indices = kind(rng, shape, n_experts).astype(dtype)
    if rng.random() < 0.5:
        indices = np.where(rng.random(shape) < 0.1, rng.choice(np.array(WILD[dtype], dtype), shape), indices)
    probs = rng.standard_normal(shape).astype(np.float32)
    scales = None
    if rng.random() < 0.3:
        scales = rng.integers(-(2**31), 2**31, (n_tokens, int(rng.integers(1, 5)))).astype(np.int32)
    return indices.astype(dtype), probs, scales


def by_hand(indices, probs, n_experts, block):
    """The definition, slot by slot."""
    valid = [s for s, expert in enumerate(indices.flat) if 0 <= expert < n_experts]
    topk = indices.shape[1]
    out = {name: [] for name in ARRAYS}
    out["score_src_idx"] = valid
    out["slot_offset"] = [sum(s < topk * t for s in valid) for t in range(len(indices) + 1)]
    out["s_reverse_scatter_idx"] = [None] * len(valid)
    pads = 0
    for expert in range(n_experts):
        out["expert_offset"].append(len(out["x_gather_idx"]))
        mine = [compact for compact, s in enumerate(valid) if indices.flat[s] == expert]
        for compact in mine:
            out["s_reverse_scatter_idx"][compact] = len(out["x_gather_idx"])
            out["x_gather_idx"].append(valid[compact] // topk)
            out["s_scatter_idx"].append(compact)
        for _ in range(-len(mine) % block):
            out["x_gather_idx"].append(0)
            out["s_scatter_idx"].append(len(valid) + pads)
            pads += 1
    out["expert_offset"].append(len(out["x_gather_idx"]))
    out["scores"] = [probs.flat[s] for s in valid] + [0.0] * pads
    return {name: np.array(values, ARRAYS[name]) for name, values in out.items()}
