"""The router's Triton kernels beside their definitions, on any device: in the interpreter, or on a GPU.

Each check returns what differed, as lines; an empty list is success. Only for processes with a real torch.
"""

import itertools

import numpy as np
import torch

from sonicmoe.routing import (
    router_weight,
    switch_loss,
    triton_router_product,
    triton_router_weight,
    triton_switch_loss,
    triton_topk,
)
from tests.support.small_kernels import relative

# ---- Top-k -----------------------------------------------------------------------------------------------------------

TOPKS = [(5, 8, 2), (9, 32, 4), (7, 64, 8), (3, 100, 5), (4, 256, 8), (2, 1024, 32), (6, 3, 3), (1, 1, 1), (0, 16, 2)]


def draw_logits(rng, n_tokens, n_experts, kind, dtype, device):
    logits = rng.standard_normal((n_tokens, n_experts)) * 3
    if kind == "ties":
        logits = rng.integers(-2, 1, logits.shape).astype(np.float64)
        logits[logits == 0] = -0.0
        logits[:, ::2] += 0.0  # -0 beside 0, which are equal
    if kind == "wild":
        specials = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38]
        logits = np.where(rng.random(logits.shape) < 0.4, rng.choice(specials, logits.shape), logits)
    if kind == "-inf":
        logits[:, : max(1, n_experts - 1)] = -np.inf
    return torch.from_numpy(logits.astype(np.float32)).to(device=device, dtype=dtype)


def wanted_topk(logits, k):
    """Stable sort on the CPU; torch takes NaN for the largest."""
    values, order = torch.sort(logits.float().cpu(), dim=1, descending=True, stable=True)
    return torch.softmax(values[:, :k], dim=1), order[:, :k].to(torch.int32)


def check_topk(device, shapes=TOPKS):
    found = []
    dtypes, kinds = (torch.bfloat16, torch.float32, torch.float16, torch.float64), ("plain", "ties", "wild", "-inf")
    for number, ((n_tokens, n_experts, k), kind) in enumerate(itertools.product(shapes, kinds)):
        for dtype in (dtypes[number % 4], dtypes[(number + 1) % 2]):
            rng = np.random.default_rng(number)
            about = f"topk T={n_tokens} E={n_experts} k={k} {kind} {dtype}"
            logits = draw_logits(rng, n_tokens, n_experts, kind, dtype, device)
            scores, indices = triton_topk.topk_softmax_forward(logits, k)
            wanted_scores, wanted_indices = wanted_topk(logits, k)
            if indices.dtype != torch.int32 or not torch.equal(indices.cpu(), wanted_indices):
                found.append(f"{about}: ids")
            if scores.dtype != torch.float32 or not torch.equal(scores.isnan().cpu(), wanted_scores.isnan()):
                found.append(f"{about}: NaN")
            elif n_tokens and not relative(scores.cpu().nan_to_num(), wanted_scores.nan_to_num()) < 1e-6:
                found.append(f"{about}: scores")
            rows = indices.sort(dim=1).values
            if bool(((rows < 0) | (rows >= n_experts)).any()) or bool((rows[:, 1:] == rows[:, :-1]).any()):
                found.append(f"{about}: an id twice or out of range")
    return found


def check_topk_backward(device, shapes=TOPKS):
    found = []
    for number, (n_tokens, n_experts, k) in enumerate(shapes):
        rng = np.random.default_rng(number)
        logits = draw_logits(rng, n_tokens, n_experts, "plain", torch.float32, device)
        dscores = torch.from_numpy(rng.standard_normal((n_tokens, k)).astype(np.float32)).to(device)
        scores, indices = triton_topk.topk_softmax_forward(logits, k)
        exact = logits.double().requires_grad_()
        torch.softmax(exact.gather(1, indices.long()), dim=1).backward(dscores.double())
        elsewhere_ = torch.ones_like(exact, dtype=torch.bool).scatter(1, indices.long(), False)
        for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 5e-4)):
            made = triton_topk.topk_softmax_backward(dscores, scores, indices, n_experts, dtype)
            about = f"topk backward T={n_tokens} E={n_experts} k={k} {dtype}"
            if made.dtype != dtype or tuple(made.shape) != (n_tokens, n_experts):
                found.append(f"{about}: {made.dtype} {tuple(made.shape)}")
            elif k > 1 and n_tokens and not relative(made, exact.grad) < bound:
                found.append(f"{about}: {relative(made, exact.grad):.1e}")
            elif bool((made[elsewhere_] != 0).any()):
                found.append(f"{about}: not 0 where nothing was chosen")
    return found


# ---- The router's weight ---------------------------------------------------------------------------------------------

PRODUCTS = [(5, 8, 24), (1, 3, 16), (129, 20, 136), (1153, 100, 8), (0, 4, 8)]  # T, E, H


def check_router_weight(device, shapes=PRODUCTS):
    """Every token counts, the last one of odd numbers too: its logits are the largest, so that no bound hides it."""
    found = []
    types = [(torch.float16, torch.float16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
    if torch.device(device).type != "cpu":  # the interpreter takes a product's bf16 operands for integers
        types += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    # Tensor cores cut off what they add, by a part in 2^22 or so of a long sum.
    bounds = {torch.bfloat16: 8e-3, torch.float32: 8e-6}
    for number, ((n_tokens, n_experts, hidden), given) in enumerate(itertools.product(shapes, types)):
        rng = np.random.default_rng(number)
        sizes = (n_tokens, n_experts), (n_tokens, hidden)
        dlogits, x = (torch.from_numpy(rng.standard_normal(size).astype(np.float32)) for size in sizes)
        dlogits[-1:] *= 10
        dlogits, x = dlogits.to(device, given[0]), x.to(device, given[1])
        wanted = dlogits.double().t() @ x.to(given[0]).double()
        for out_dtype in (torch.float32, torch.bfloat16):
            for run in (triton_router_weight.gradient, router_weight.naive_gradient):
                made = run(dlogits, x, out_dtype)
                about = f"{run.__module__} T={n_tokens} E={n_experts} H={hidden} {given} -> {out_dtype}"
                if made.dtype != out_dtype or made.shape != wanted.shape:
                    found.append(f"{about}: {made.dtype} {tuple(made.shape)}")
                elif not relative(made, wanted) < bounds[out_dtype] and not (n_tokens == 0 and bool((made == 0).all())):
                    found.append(f"{about}: off by {relative(made, wanted):.1e}")
    return found


# ---- The router's products with few tokens ---------------------------------------------------------------------------

FEW = [(5, 8, 24), (1, 3, 16), (17, 20, 264), (70, 100, 520), (65, 300, 72), (0, 4, 8)]  # T, E, H


def check_router_product(device, shapes=FEW):
    """x W^T and dx + dlogits W. The last token, expert and column count for much, so that no bound hides them; a
    token's NaN is its own."""
    found = []
    bounds = {torch.float16: 6e-4}
    if torch.device(device).type != "cpu":  # the interpreter takes a product's bf16 operands for integers
        bounds[torch.bfloat16] = 4e-3
    for number, ((n_tokens, n_experts, hidden), (dtype, bound)) in enumerate(itertools.product(shapes, bounds.items())):
        rng = np.random.default_rng(number)
        sizes = (n_tokens, hidden), (n_experts, hidden), (n_tokens, n_experts), (n_tokens, hidden)
        x, weight, dlogits, dx = (torch.from_numpy(rng.standard_normal(size).astype(np.float32)) for size in sizes)
        for tensor in (x, dlogits):
            tensor[-1:] *= 10
        weight[:, -1] *= 4
        weight[-1] *= 4
        x, weight, dlogits, dx = (tensor.to(device, dtype) for tensor in (x, weight, dlogits, dx))
        given = dx.clone()
        made, added = triton_router_product.logits(x, weight), triton_router_product.add_product(dx, dlogits, weight)
        wanted = x.double() @ weight.double().t(), given.double() + dlogits.double() @ weight.double()
        about = f"router T={n_tokens} E={n_experts} H={hidden} {dtype}"
        if added is not dx:
            found.append(f"{about}: another dx than the one given")
        for name, one, other in zip(("logits", "dx"), (made, added), wanted, strict=True):
            if one.dtype != dtype or one.shape != other.shape:
                found.append(f"{about}: {name} {one.dtype} {tuple(one.shape)}")
            elif n_tokens and not relative(one, other) < bound:
                found.append(f"{about}: {name} off by {relative(one, other):.1e}")
        if n_tokens > 1:
            x[0, 0] = dlogits[0, 0] = float("nan")
            made, added = (
                triton_router_product.logits(x, weight),
                triton_router_product.add_product(dx, dlogits, weight),
            )
            for name, one in (("logits", made), ("dx", added)):
                if not bool(one[0].isnan().all()) or bool(one[1:].isnan().any()):
                    found.append(f"{about}: {name} of a NaN")
    return found


# ---- Load-balancing loss ---------------------------------------------------------------------------------------------

LOSSES = [(7, 8), (1, 1), (300, 5), (33, 100), (5, 1024), (700, 64), (0, 6)]  # T, E


def wanted_loss(logits, frequency, dloss):
    """(loss, dlogits) in float64, the gradient by autograd through every step."""
    exact = logits.double().requires_grad_()
    probs = torch.softmax(exact, dim=-1).sum(dim=0)
    shares = [values / values.sum().clamp_min(1e-12) for values in (probs, frequency.double())]
    loss = logits.shape[1] * (shares[0] * shares[1]).sum()
    return loss.detach(), torch.autograd.grad(loss * dloss, exact)[0]


def check_switch_loss(device, shapes=LOSSES):
    found = []
    for number, (n_tokens, n_experts) in enumerate(shapes):
        rng = np.random.default_rng(number)
        slots = torch.from_numpy(rng.integers(0, 50, n_experts).astype(np.int32)).to(device)
        frequency = torch.cat([slots.new_zeros(number % 4), slots])[number % 4 :]  # wherever it happens to begin
        for dtype, bound in ((torch.float32, 3e-6), (torch.bfloat16, 8e-3), (torch.float16, 6e-4)):
            logits = draw_logits(rng, n_tokens, n_experts, "plain", dtype, device)
            weight = 0.37 * (n_tokens + 1)  # so that no gradient falls below float16
            loss, dlogits = wanted_loss(logits, frequency, weight)
            dloss = torch.tensor(weight, device=device)
            for run in (switch_loss, triton_switch_loss):
                about = f"{run.__name__} T={n_tokens} E={n_experts} {dtype}"
                made, gradient = run.switch_loss(logits, frequency), run.switch_loss_backward(dloss, logits, frequency)
                if made.dtype != torch.float32 or made.shape != () or not relative(made, loss) < 2e-6:
                    found.append(f"{about}: {made} for {loss}")
                if gradient.dtype != dtype or gradient.shape != logits.shape:
                    found.append(f"{about}: {gradient.dtype} {tuple(gradient.shape)}")
                elif n_tokens and n_experts > 1 and not relative(gradient, dlogits) < bound:
                    found.append(f"{about}: gradient off by {relative(gradient, dlogits):.1e}")
                elif n_experts == 1 and bool((gradient != 0).any()):
                    found.append(f"{about}: one expert has nothing to balance")
    return found


def check_switch_loss_of_nan(device):
    """A NaN among the logits shows in the loss, as -inf of a masked expert does not."""
    frequency = torch.tensor([2, 1, 1], dtype=torch.int32, device=device)
    logits = torch.tensor([[0.5, 1.0, float("-inf")], [0.1, float("-inf"), 0.3]], device=device)
    masked = triton_switch_loss.switch_loss(logits, frequency)
    logits[1, 2] = float("nan")
    found = [] if bool(masked.isfinite()) else [f"masked experts: {masked}"]
    return found + ([] if bool(triton_switch_loss.switch_loss(logits, frequency).isnan()) else ["no NaN"])


CHECKS = {
    "topk": (check_topk, check_topk_backward),
    "router_products": (check_router_weight, check_router_product),
    "switch_loss": (check_switch_loss, check_switch_loss_of_nan),
}
