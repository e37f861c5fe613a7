"""The Triton version of the routing metadata in Triton's interpreter, beside the naive one, on real torch.

Prints {"cases": how many, "different": what differed, "wrong_counts": what came of each}. TRITON_INTERPRET must be set.
"""

import dataclasses
import json

import numpy as np


def compare() -> dict:
    import torch

    from sonicmoe.routing import naive, triton_metadata
    from sonicmoe.routing.arrays import bound

    rng = np.random.default_rng(0)
    different, cases = [], 0
    for number in range(36):
        n_tokens, n_topk = int(rng.choice([0, 1, 5, 40, 90])), int(rng.choice([1, 2, 8, 16]))
        n_experts, block = int(rng.choice([1, 3, 8, 33])), int(rng.choice([1, 32, 128]))
        low, high = ((-3, 2 * n_experts), (0, n_experts), (-2, 0))[number % 3]
        indices = torch.from_numpy(rng.integers(low, high, (n_tokens, n_topk)))
        if number % 2:
            indices = indices.to(torch.int32)
        elif indices.numel():
            indices[0, 0] = 2**32 + 1  # an expert once it is narrowed, but not here
        probs = torch.from_numpy(rng.standard_normal((n_tokens, n_topk)).astype(np.float32))
        scales = torch.from_numpy(rng.standard_normal((n_tokens, 2)).astype(np.float32)) if number % 4 == 0 else None
        wanted = naive.build(indices, probs, n_experts, block, scales)
        counts = wanted["counts"] if number % 5 else None
        found = triton_metadata.build(indices, probs, n_experts, block, counts, None, scales)
        cases += 1
        for name, value in wanted.items():
            if name == "counts" or value is None:
                continue
            if found[name].dtype != value.dtype or not torch.equal(found[name], value):
                different.append([name, number, n_tokens, n_topk, n_experts, block])
    for n_tokens, n_topk, n_experts, block in (
        (0, 2, 4, 128),
        (1, 1, 8, 128),
        (40, 3, 5, 32),
        (90, 8, 33, 128),
        (9, 2, 3, 1),
    ):
        indices = torch.from_numpy(rng.integers(0, n_experts, (n_tokens, n_topk)))
        probs = torch.from_numpy(rng.standard_normal((n_tokens, n_topk)).astype(np.float32))
        wanted = naive.build(indices, probs, n_experts, block)
        room = bound(n_tokens * n_topk, n_experts, block)
        found = triton_metadata.build(indices, probs, n_experts, block, room)
        cases += 1
        different += [[*case, n_tokens, block] for case in behind(wanted, found, room)]
    return {"cases": cases, "different": different}


def behind(wanted: dict, found: dict, room) -> list:
    """Where arrays for the most rows that there can be are not those of the counts with pads behind them."""
    import torch

    n_slots, n_rows = room
    rows = len(wanted["x_gather_idx"])
    more = torch.arange(rows, n_rows)
    pads = {"x_gather_idx": 0 * more, "s_scatter_idx": more, "scores": 0.0 * more}
    different = [] if rows <= n_rows else [["room"]]
    for name, value in wanted.items():
        if name in ("counts", "sorted_scales"):
            continue
        value = torch.cat([value, pads[name].to(value.dtype)]) if name in pads else value
        if not torch.equal(found[name], value):
            different.append([name])
    return different


def wrong_counts() -> list:
    """(counts, what was said, whether anything was written) for counts that the ids do not have."""
    import torch
    from triton.runtime import interpreter

    from sonicmoe.routing import triton_metadata
    from sonicmoe.routing.arrays import Arrays, Bound

    # A kernel that is compiled says for itself that its assertions stay; the interpreter has to be told.
    settings = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(settings, debug=True)
    indices, probs, made = torch.tensor([[0, 2], [2, -1], [2, 3]]), torch.ones(3, 2), []

    class Marked(Arrays):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            for view in self.views.values():
                view.fill_(77)
            made.append(self)

    triton_metadata.Arrays, found = Marked, []
    for block, counts in (
        (1, [1, 0, 2, 1]),
        (1, [1, 0, 4, 1]),
        (2, [2, 0, 3, 1]),
        (2, [1, 0, 0, 4]),
        (1, Bound(6, 6)),
        (2, Bound(5, 6)),
    ):
        try:
            triton_metadata.build(indices, probs, 4, block, counts)
            said = ""
        except Exception as error:
            said = str(error)
        found.append([counts, said, any(bool((view != 77).any()) for view in made[-1].views.values())])
    triton_metadata.build(indices, probs, 4, 1, [0, 1, 3, 1])  # of the right sum, and so of the right sizes
    triton_metadata.build(indices, probs, 4, 2, Bound(5, 10))
    return found


if __name__ == "__main__":
    print(json.dumps({**compare(), "wrong_counts": wrong_counts()}))
