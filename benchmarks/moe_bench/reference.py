"""The layer in float64, one expert at a time, and how far a provider's tensors are from it.

Legend: T tokens, N rows of one expert, H hidden, I intermediate, E experts, K slots a token. W1 [E,2I,H] holds rows
gate0, up0, gate1, up1, ...; W2 is [E,H,I]. The router's logits are taken as a bfloat16 linear layer gives them, since
which experts a token goes to is decided there; everything after them is float64.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Two bfloat16 steps at the size of the largest logits: far enough for two ways of summing to agree on the top K.
MARGIN = 2.0**-5
# main_grad's content before the step: overwriting it instead of adding to it is then an error that shows.
MAIN_GRAD_START = 1.0


@dataclass
class Problem:
    router_EH: torch.Tensor
    w1_EFH: torch.Tensor
    w2_EHI: torch.Tensor
    x_TH: torch.Tensor
    dout_TH: torch.Tensor
    topk: int

    def fingerprint(self) -> list[float]:
        """Equal for equal inputs, so that two processes can tell that they had the same."""
        tensors = (self.router_EH, self.w1_EFH, self.w2_EHI, self.x_TH, self.dout_TH)
        return [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors]


def draw(shape: list[int], seed: int, device: str) -> Problem:
    """Random inputs whose top K do not hang on a rounding: tokens with a near tie at the boundary are drawn again."""
    tokens, hidden, intermediate, experts, topk = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size, std=1.0):
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0.0, std, generator=generator)

    router = normal(experts, hidden, std=hidden**-0.5)
    w1 = normal(experts, 2 * intermediate, hidden, std=0.02)
    w2 = normal(experts, hidden, intermediate, std=0.02)
    dout = normal(tokens, hidden)
    x = normal(tokens, hidden)
    for _ in range(100 if topk < experts else 0):
        best = F.linear(x, router).float().topk(topk + 1).values
        close = (best[:, topk - 1] - best[:, topk] < MARGIN).nonzero()[:, 0]
        if not len(close):
            break
        x[close] = normal(len(close), hidden)
    return Problem(router, w1, w2, x, dout, topk)


class Gap:
    """Sums over a tensor that may come in pieces."""

    def __init__(self):
        self.sums = 0

    def add(self, found, expected) -> None:
        found = found.double()
        pairs = ((found - expected, found - expected), (expected, expected), (found, found), (found, expected))
        # A new tensor, not += : the start is a plain 0.
        self.sums = self.sums + torch.stack([(a * b).sum() for a, b in pairs])

    def figures(self) -> list[float]:
        """[norm of the difference over norm, cosine]. Anything that is not finite makes both NaN."""
        difference, expected, found, product = self.sums.tolist()
        if not (expected > 0 and found > 0):
            return [float("nan")] * 2 if difference != 0 else [0.0, 1.0]
        return [(difference / expected) ** 0.5, product / (expected * found) ** 0.5]


def compare(problem: Problem, runs: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, list[float]]]:
    """{run: {tensor: [relative, cosine]}} for runs of {out, dx, drouter, dw1, dw2} on the same problem."""
    with torch.no_grad():
        return _compare(problem, runs)


def _compare(problem, runs):
    gaps = {name: {tensor: Gap() for tensor in found} for name, found in runs.items()}

    def see(tensor, expected, expert=None):
        for name, found in runs.items():
            gaps[name][tensor].add(found[tensor] if expert is None else found[tensor][expert], expected)

    x, dout = problem.x_TH.double(), problem.dout_TH.double()
    logits_TE = F.linear(problem.x_TH, problem.router_EH).double()
    best_TK, ids_TK = logits_TE.topk(problem.topk)
    probs_TK = best_TK.softmax(-1)
    out, dx, ds_TK = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(probs_TK)
    for expert in range(problem.router_EH.shape[0]):
        token_N, slot_N = (ids_TK == expert).nonzero(as_tuple=True)
        w1, w2 = problem.w1_EFH[expert].double(), problem.w2_EHI[expert].double()
        p_N1 = probs_TK[token_N, slot_N, None]
        x_NH, dout_NH = x[token_N], dout[token_N]
        z = x_NH @ w1.T
        gate, up = z[:, 0::2], z[:, 1::2]
        sigmoid = gate.sigmoid()
        a_NI = gate * sigmoid * up
        out.index_add_(0, token_N, p_N1 * (a_NI @ w2.T))
        da_NI = dout_NH @ w2
        ds_TK[token_N, slot_N] = (da_NI * a_NI).sum(-1)
        see("dw2", dout_NH.T @ (p_N1 * a_NI), expert)
        da_NI *= p_N1
        dz = torch.empty_like(z)
        dz[:, 0::2] = da_NI * up * sigmoid * (1 + gate * (1 - sigmoid))
        dz[:, 1::2] = da_NI * gate * sigmoid
        see("dw1", dz.T @ x_NH, expert)
        dx.index_add_(0, token_N, dz @ w1)
    dbest_TK = probs_TK * (ds_TK - (probs_TK * ds_TK).sum(-1, keepdim=True))
    dlogits_TE = torch.zeros_like(logits_TE).scatter_(1, ids_TK, dbest_TK)
    dx += dlogits_TE @ problem.router_EH.double()
    see("out", out)
    see("dx", dx)
    see("drouter", dlogits_TE.T @ x)
    return {name: {tensor: gap.figures() for tensor, gap in tensors.items()} for name, tensors in gaps.items()}
