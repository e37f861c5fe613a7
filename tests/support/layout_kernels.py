"""Expert parallelism's layout in Triton against its definition, on any device."""

import numpy as np
import torch

from sonicmoe.ep import naive_layout, triton_layout

NAMES = ("token", "side", "copy_row", "copy_offset", "slot_source")
# tokens, slots a token, experts, ranks
SIZES = [
    (24, 2, 4, 1),
    (300, 3, 12, 2),
    (129, 8, 32, 4),
    (1, 1, 8, 8),
    (0, 2, 8, 2),
    (70, 6, 60, 20),
    (40, 4, 256, 256),
]
KINDS = ("distinct", "holes", "elsewhere", "one rank", "nowhere")


def routing(rng, n_tokens: int, n_topk: int, n_experts: int, size: int, kind: str):
    """int64 [T,K], each row's experts distinct."""
    among = max(n_experts // size, n_topk) if kind == "one rank" else n_experts
    ids = np.argsort(rng.random((n_tokens, among)), axis=1)[:, :n_topk].reshape(n_tokens, n_topk)
    if kind == "holes":
        ids = np.where(rng.random(ids.shape) < 0.4, -1, ids)
    elif kind == "elsewhere":
        ids = np.where(rng.random(ids.shape) < 0.3, n_experts + ids, ids)
    elif kind == "nowhere":
        ids = np.full_like(ids, -1)
    return ids


def same(found, wanted) -> bool:
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found, wanted)


def check_layout(device, sizes=SIZES):
    """Every array, and scores on their way back, bit for bit."""
    faults = []
    for number, (n_tokens, n_topk, n_experts, size) in enumerate(sizes):
        for kind in KINDS:
            rng = np.random.default_rng([number, len(kind)])
            ids = torch.from_numpy(routing(rng, n_tokens, n_topk, n_experts, size, kind))
            indices = ids.to(torch.int32 if number % 2 else torch.int64).to(device)
            probs = torch.from_numpy(rng.random((n_tokens, n_topk), np.float32)).to(device)
            about = f"T={n_tokens} K={n_topk} E={n_experts} R={size} {kind}"
            wanted, finish = naive_layout.begin(indices, probs, n_experts, size)
            found, finish_found = triton_layout.begin(indices, probs, n_experts, size)
            if not same(found, wanted):
                faults.append(f"counts {about}")
                continue
            n_sent = int(wanted[:, 0].sum())
            arrays = dict(zip(NAMES, finish(n_sent), strict=True))
            others = dict(zip(NAMES, finish_found(n_sent), strict=True))
            faults += [f"{name} {about}" for name in NAMES if not same(others[name], arrays[name])]
            values = torch.from_numpy(rng.random((n_sent, n_topk), np.float32)).to(device)
            wanted = naive_layout.to_slots(values, arrays["slot_source"])
            if not same(triton_layout.to_slots(values, arrays["slot_source"]), wanted):
                faults.append(f"to_slots {about}")
    return faults


CHECKS = {"layout": (check_layout,)}
