"""Dispatch and combine alone, on numbers that bf16 holds exactly, so that every result has one right value."""

import numpy as np


def problem(case) -> dict[str, np.ndarray]:
    """Of all ranks together: x, dout and weights of the rows that come [T,H]; probs and indices [T,K]."""
    rng = np.random.default_rng(case["seed"])
    tokens, hidden, topk, experts = case["n_tokens"], case["hidden"], case["topk"], case["n_experts"]
    indices = np.stack([rng.permutation(experts)[:topk] for _ in range(tokens)]) if tokens else np.zeros((0, topk))
    indices = indices.astype(np.int64)
    routing = case["routing"]
    if routing == "holes":
        indices[rng.random(indices.shape) < 0.4] = -1
        indices[rng.random(indices.shape) < 0.2] = experts + 3
    if routing == "first experts":  # those of rank 0
        indices = indices % max(1, experts // 4)
        indices[:, 1:] = -1
    if routing == "nowhere":
        indices[:] = -1

    def small(*shape):
        return rng.integers(-8, 9, shape).astype(np.float32)

    return {
        "x": small(tokens, hidden),
        "dout": small(tokens, hidden),
        "probs": small(tokens, topk),
        "indices": indices,
    }


def move(framework, case, folder) -> dict[str, np.ndarray]:
    """y = 2 x + the sum of the row's probs, each times the number of its slot from 1; out and gradients come back."""
    given = problem(case)
    bounds = np.concatenate([[0], np.cumsum(case["rows"])])
    mine = slice(int(bounds[framework.rank]), int(bounds[framework.rank + 1]))
    return framework.dispatch_combine(case, {name: values[mine] for name, values in given.items()})


def disagree(framework, case, folder) -> dict[str, np.ndarray]:
    """What each rank is told where the last one does as ``odd`` says."""
    odd = case["odd"] if framework.rank == framework.size - 1 else {}
    case = {**case, **odd}
    try:
        framework.open_call(case, problem(case))
    except ValueError as error:
        return {"error": np.array(str(error))}
    return {"error": np.array("nothing")}


def freeze_some(framework, case, folder) -> dict[str, np.ndarray]:
    """What each rank is told by a layer whose last rank has frozen its experts, before a backward that all run."""
    layer = framework.make_layer(case)
    framework.freeze([layer.router.weight] if case["frozen_router"] else [])
    framework.freeze(framework.expert_parameters(layer) if framework.rank == framework.size - 1 else [])
    try:
        out, _ = layer(framework.tensor(np.ones([4, case["hidden"]], np.float32)))
    except ValueError as error:
        return {"error": np.array(str(error))}
    out.sum().backward()
    return {"error": np.array("nothing")}


def outside(framework, case, folder) -> dict[str, np.ndarray]:
    """A group of rank 0 alone, and what the others are told who ask for its communicator."""
    try:
        comm = framework.communicator(framework.dist.new_group([0]))
    except ValueError as error:
        return {"error": np.array(str(error))}
    return {"size": np.array(comm.size)}
