"""The Triton version of the routing metadata in Triton's interpreter, beside the naive one, on real torch.

Prints {"cases": how many, "different": what differed}. TRITON_INTERPRET must be set.
"""

import json

import numpy as np


def compare() -> dict:
    import torch

    from sonicmoe.routing import naive, triton_metadata

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
    return {"cases": cases, "different": different}


if __name__ == "__main__":
    print(json.dumps(compare()))
