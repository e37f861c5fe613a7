"""The six products of a step as torch multiplies them: dense, one expert having all the rows, and nothing gathered,
activated or summed around them. No layer can be made of these alone; it is what a library of GEMMs would leave of one.
"""

import torch


def products(shape: list[int], device: str):
    """What runs them once each, in bfloat16 on random numbers: a GPU at its power limit is slower on these than on
    constants."""
    tokens, hidden, intermediate, _, topk = shape
    rows = tokens * topk

    def random(*size):
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_()

    by_hidden, by_half, by_width = random(rows, hidden), random(rows, intermediate), random(rows, 2 * intermediate)
    w1, w2 = random(2 * intermediate, hidden), random(hidden, intermediate)
    operands = (
        (by_hidden, w1.t()),  # up
        (by_half, w2.t()),  # down
        (by_hidden, w2),  # backward of down
        (by_width, w1),  # dx
        (by_width.t(), by_hidden),  # dW1
        (by_hidden.t(), by_half),  # dW2
    )
    results = [torch.empty([a.shape[0], b.shape[1]], dtype=a.dtype, device=device) for a, b in operands]

    def run() -> None:
        for (a, b), result in zip(operands, results, strict=True):
            torch.mm(a, b, out=result)

    return run
