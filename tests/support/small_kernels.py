"""The small Triton kernels beside their definitions, on any device: in the interpreter, or on a GPU.

Each check returns what differed, as lines; an empty list is success. Only for processes with a real torch.
"""

import dataclasses
import itertools

import numpy as np
import torch

from sonicmoe.quant import triton_fingerprint
from sonicmoe.routing import (
    metadata,
    naive,
    pairs,
    triton_combine,
    triton_counts,
)
from tests.support.drawn import NAIVE, bits, make_routing, same_bits
from tests.workers.jit_routings import distinct, elsewhere, holes, nothing, skewed, uniform


def same_rounding(found, wanted) -> bool:
    """The same bits; but the interpreter cuts bf16 off where a GPU rounds, so there it may be one step nearer to 0."""
    if found.device.type != "cpu" or found.dtype != torch.bfloat16:
        return same_bits(found, wanted)
    steps = bits(wanted).int() - bits(found).int()
    return found.shape == wanted.shape and bool(((steps == 0) | (steps == 1)).all())


def relative(found, wanted) -> float:
    """||found - wanted|| / ||wanted||; NaN never passes a comparison with a bound."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))


def make_rows(rng, routing, width, dtype, device):
    """Values of many sizes, so that another order of additions shows; NaN in the rows that nobody may read."""
    values = rng.standard_normal((routing.n_rows, width)) * 10.0 ** rng.integers(-3, 4, (routing.n_rows, 1))
    rows = torch.full((routing.n_rows, width), float("nan"), dtype=dtype, device=device)
    used = routing.s_reverse_scatter_idx.long()
    rows[used] = torch.from_numpy(values.astype(np.float32)).to(device=device, dtype=dtype)[used]
    return rows


ROUTINGS = [
    # T, K, E, block, kind
    (7, 2, 4, 1, uniform),
    (9, 8, 16, 32, distinct),
    (5, 9, 12, 1, holes),
    (3, 32, 40, 32, elsewhere),
    (4, 10, 8, 1, skewed),
    (1, 1, 1, 32, uniform),
    (6, 3, 4, 1, nothing),
    (0, 4, 4, 1, uniform),
]


def routings(device, shapes=ROUTINGS):
    for number, (n_tokens, topk, n_experts, block, kind) in enumerate(shapes):
        rng = np.random.default_rng(number)
        about = f"T={n_tokens} K={topk} E={n_experts} block={block} {kind.__name__}"
        yield rng, make_routing(rng, n_tokens, topk, n_experts, block, kind, device), about


def check_sum_slots(device, widths=(8, 40, 1100), shapes=ROUTINGS):
    types = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
    types += [(torch.float16, torch.float16)]
    found = []
    for rng, routing, about in routings(device, shapes):
        for number, (width, weighted) in enumerate(itertools.product(widths, (False, True))):
            rows_type, out_type = types[(number + routing.n_tokens) % len(types)]
            rows = make_rows(rng, routing, width, rows_type, device)
            scores = routing.scores if weighted else None
            wanted = naive.sum_slots(rows, routing, out_type, scores)
            out = torch.full_like(wanted, float("nan"))
            given = triton_combine.sum_slots(rows, routing, out_type, scores, out)
            made = triton_combine.sum_slots(rows, routing, out_type, scores)
            wide = torch.full_like(wanted, 7.0).repeat(1, 3)
            triton_combine.sum_slots(rows, routing, out_type, scores, wide, width)
            middle, beside = wide[:, width : 2 * width], (wide[:, :width], wide[:, 2 * width :])
            if not same_bits(middle.contiguous(), made) or not all(bool((side == 7.0).all()) for side in beside):
                found.append(f"sum_slots {about} H={width} {rows_type} -> columns of {out_type} weighted={weighted}")
            if given is not out or not same_bits(out, made) or not same_rounding(made, wanted):
                found.append(f"sum_slots {about} H={width} {rows_type} -> {out_type} weighted={weighted}")
    return found


def check_order_of_addition(device):
    """Three slots whose sum depends on the order: 2^24 + 1 + 1 loses both ones, 1 + 1 + 2^24 neither."""
    probs = torch.ones((2, 3), device=device)
    indices = torch.tensor([[2, 1, 0], [0, 1, 2]], device=device)  # rows lie in the opposite order for token 0
    routing = metadata.build(indices, probs, 3, 1, NAIVE)
    values = torch.tensor([[2.0**24, 1.0, 1.0], [1.0, 1.0, 2.0**24]], device=device)
    rows = torch.empty((6, 4), device=device)
    rows[routing.s_reverse_scatter_idx.long()] = values.reshape(6, 1).expand(6, 4)
    out = triton_combine.sum_slots(rows, routing, torch.float32)
    wanted = [[2.0**24] * 4, [2.0**24 + 2] * 4]
    return [] if out.tolist() == wanted else [f"order of addition: {out.tolist()}"]


def ordered_sum(partials):
    """[M,B] -> [M], from left to right."""
    total = torch.zeros_like(partials[:, 0])
    for column in range(partials.shape[1]):
        total = total + partials[:, column]
    return total


def check_finish_ds(device, columns=(1, 3, 4, 12), shapes=ROUTINGS):
    found = []
    for rng, routing, about in routings(device, shapes):
        for n_columns in columns:
            partials = make_rows(rng, routing, n_columns, torch.float32, device)
            by_slot = ordered_sum(partials).index_select(0, routing.s_reverse_scatter_idx.long())
            wanted = naive.scatter_slot_grads(by_slot, routing)
            if not same_bits(triton_combine.finish_ds(partials, routing), wanted):
                found.append(f"finish_ds {about} columns={n_columns}")
            if n_columns == 1 and not same_bits(triton_combine.finish_ds(partials[:, 0], routing), wanted):
                found.append(f"finish_ds {about} of one part a row")
    return found


def check_scores_by_row(device, shapes=ROUTINGS):
    found = []
    for _, routing, about in routings(device, shapes):
        wanted = routing.scores.index_select(0, routing.s_scatter_idx.long())
        if not same_bits(triton_combine.scores_by_row(routing), wanted):
            found.append(f"scores_by_row {about}")
    return found


def check_gather_without_pads(device, shapes=ROUTINGS):
    found, pads = [], 0
    for _, routing, about in routings(device, shapes):
        wanted = routing.x_gather_idx.clone()
        for row, slot in enumerate(routing.s_scatter_idx.tolist()):
            if slot >= routing.n_slots:
                wanted[row] = routing.x_gather_idx[row // routing.block * routing.block]
                pads += 1
        if not same_bits(triton_combine.gather_without_pads(routing), wanted):
            found.append(f"gather_without_pads {about}")
    return found if pads else ["gather_without_pads: no routing had a pad"]


def check_list_of_slots(device, n_slots=50, n_tokens=9):
    """Any number of slots a token, and K is not known."""
    rng = np.random.default_rng(1)
    tokens = torch.from_numpy(np.sort(rng.integers(0, n_tokens - 1, n_slots))).to(device)
    experts = torch.from_numpy(rng.integers(0, 5, n_slots)).to(device)
    scores = torch.from_numpy(rng.standard_normal(n_slots).astype(np.float32)).to(device)
    routing = pairs.build(tokens, experts, scores, n_tokens, 5, 4, NAIVE)
    found = []
    rows = make_rows(rng, routing, 24, torch.bfloat16, device)
    wanted = naive.sum_slots(rows, routing, torch.bfloat16, routing.scores)
    if not same_rounding(triton_combine.sum_slots(rows, routing, torch.bfloat16, routing.scores), wanted):
        found.append("sum_slots of a list of slots")
    partials = make_rows(rng, routing, 4, torch.float32, device)
    wanted = ordered_sum(partials).index_select(0, routing.s_reverse_scatter_idx.long())
    if not same_bits(triton_combine.finish_ds(partials, routing), naive.scatter_slot_grads(wanted, routing)):
        found.append("finish_ds of a list of slots")
    return found


def check_slots_of_experts(device, shapes=ROUTINGS):
    """With segments that end in pads and such that do not, and with arrays for more rows than there are."""
    found = []
    for rng, routing, about in routings(device, shapes):
        offset, padded = routing.expert_offset, torch.diff(routing.expert_offset).long()
        row = torch.arange(routing.n_rows, device=offset.device)
        expert = torch.bucketize(row, offset.long()[1:], right=True)
        real = (routing.s_scatter_idx < routing.n_slots) & (expert < routing.n_experts)
        wanted = torch.zeros_like(padded).index_add_(0, expert[real], torch.ones_like(row)[real]).to(torch.int32)
        if not same_bits(triton_counts.slots_of_experts(routing), wanted):
            found.append(f"slots_of_experts {about}")
        more = torch.from_numpy(rng.integers(routing.n_slots, routing.n_rows + 99, 70)).to(routing.s_scatter_idx)
        roomy = dataclasses.replace(
            routing, s_scatter_idx=torch.cat([routing.s_scatter_idx, more]), n_rows=routing.n_rows + 70
        )
        if not same_bits(triton_counts.slots_of_experts(roomy), wanted):
            found.append(f"slots_of_experts {about} with more room")
    return found


# ---- Fingerprint -----------------------------------------------------------------------------------------------------

_MASK = (1 << 64) - 1


def _mix(x, first, second):
    x = x * first & _MASK
    x ^= x >> 32
    x = x * second & _MASK
    return x ^ (x >> 32)


def wanted_hash(data: bytes, address: int) -> tuple[int, int]:
    """The hash in Python's own integers."""
    step, a0, a1 = 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
    b0, b1 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
    head = min(-address % 16, len(data))
    body = (len(data) - head) // 16 * 16
    block = triton_fingerprint._BLOCK_WORDS
    padded = -(-body // (8 * block)) * block
    terms = []
    for place in range(padded):
        at = head + 8 * place
        terms.append((int.from_bytes(data[at : at + 8], "little") if 8 * place < body else 0, place))
    terms += [(data[lane], lane + (1 << 60)) for lane in range(head)]
    edge = data[head + body :]
    terms += [(byte, 16 + lane + (1 << 60)) for lane, byte in enumerate(edge)]
    total_a = total_b = 0
    for word, place in terms:
        x = (word + place * step) & _MASK
        x ^= x >> 32
        total_a, total_b = total_a + _mix(x, a0, a1), total_b + _mix(x, b0, b1)
    length = len(data) * step & _MASK
    return _mix((total_a + length) & _MASK, b0, a1) or 1, _mix((total_b & _MASK) ^ length, a0, b1)


def raw(tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def states(tensors):
    """The hash of each, as pairs of Python integers."""
    state = triton_fingerprint.fingerprint(tensors).state
    return [tuple(pair) for pair in state.tolist()]


def random_weights(rng, size, dtype, device):
    return torch.from_numpy(rng.standard_normal(size).astype(np.float32)).to(device=device, dtype=dtype)


def check_hash_is_its_formula(device):
    rng, found = np.random.default_rng(0), []
    base = random_weights(rng, 3000, torch.bfloat16, device)
    views = [base[start : start + size] for start in range(9) for size in (1, 2, 7, 8, 9, 16, 31, 200)]
    views += [base, random_weights(rng, 2049, torch.float32, device), random_weights(rng, 1, torch.float32, device)]
    for view, state in zip(views, states(views), strict=True):
        wanted = [h - (1 << 64) if h >> 63 else h for h in wanted_hash(raw(view), view.data_ptr())]
        if list(state) != wanted:
            found.append(f"hash of {view.shape[0]} x {view.dtype} at {view.data_ptr() % 16}: {state} for {wanted}")
    return found


def check_every_bit_shows(device, sizes=(1, 5, 11)):
    """Each bit of small tensors, wherever they begin; and each length."""
    rng, found = np.random.default_rng(1), []
    for size, start in itertools.product(sizes, (0, 1, 3)):
        base = random_weights(rng, size + start, torch.bfloat16, device)
        tensors, whole = [base[start:]], base.view(torch.int16)
        for place, bit in itertools.product(range(start, start + size), range(16)):
            other = whole.clone()  # allocations begin at whole 16-byte lines, so the words are the same ones
            other[place] ^= 1 << bit if bit < 15 else -(1 << 15)
            tensors.append(other.view(torch.bfloat16)[start:])
        seen = states(tensors)
        if len(set(seen)) != len(seen):
            found.append(f"{size} numbers from {start}: {len(seen) - len(set(seen))} of {len(seen)} states are not new")
    zeros = torch.zeros(64, dtype=torch.bfloat16, device=device)
    if len(set(states([zeros[:size] for size in range(1, 65)]))) != 64:
        found.append("zeros of different lengths are the same")
    return found


def check_swaps_show(device, blocks=2):
    """Words, 16-byte lines and whole blocks that change places, and flips of one bit in two words, in large tensors."""
    rng, found = np.random.default_rng(2), []
    part = triton_fingerprint._PART_WORDS * 4  # numbers of bf16
    base = random_weights(rng, blocks * part + 13, torch.bfloat16, device)
    before = triton_fingerprint.fingerprint([base])

    def expect(name, change, undo):
        change()
        after = triton_fingerprint.fingerprint([base], before.state, before.table)
        if after.changed.tolist() != [1] or bool((after.state == before.state).any()):
            found.append(name)
        undo()

    def swapped(left, right, size):
        def swap():
            kept = base[left : left + size].clone()
            base[left : left + size] = base[right : right + size]
            base[right : right + size] = kept

        return swap

    for name, left, right, size in [
        ("neighbours", 0, 1, 1),
        ("words", 0, 4, 4),
        ("lines", 8, 8 * 1000, 8),
        ("blocks of one part", 0, 4096, 4096),
        ("parts", 0, part, part),
        ("words of two parts", 40, part + 40, 4),
        ("a word and the edge", 0, blocks * part, 4),
    ]:
        expect(f"swap of {name}", swapped(left, right, size), swapped(left, right, size))
    for bit in (0, 7, 15, 16, 31, 32, 47, 48, 62, 63):
        words = base[: blocks * part].view(torch.int64)

        def flip(words=words, value=1 << bit if bit < 63 else -(1 << 63)):
            words[5] ^= value
            words[5 + part // 8] ^= value

        expect(f"bit {bit} of two words", flip, flip)
    same = triton_fingerprint.fingerprint([base], before.state, before.table)
    if same.changed.tolist() != [0] or not torch.equal(same.state, before.state):
        found.append("the same bytes count as changed")
    return found


def check_flags(device):
    """Which of several tensors changed; what a first call and a moved tensor say."""
    rng, found = np.random.default_rng(3), []
    tensors = [random_weights(rng, size, torch.float32, device) for size in (1, 3, 40000, 2, 17, 70001)]
    first = triton_fingerprint.fingerprint(tensors)
    if first.changed.tolist() != [1] * 6:
        found.append(f"first call: {first.changed.tolist()}")
    tensors[2][39999] += 1
    tensors[3][0] = -tensors[3][0]
    second = triton_fingerprint.fingerprint(tensors, first.state, first.table)
    if second.changed.tolist() != [0, 0, 1, 1, 0, 0] or second.table is not first.table:
        found.append(f"second call: {second.changed.tolist()}")
    moved = [tensor.clone() for tensor in tensors]
    third = triton_fingerprint.fingerprint(moved, second.state, second.table)
    if third.changed.tolist() != [0] * 6 or third.table is second.table:
        found.append(f"moved: {third.changed.tolist()}")
    memory, table = triton_fingerprint.make_memory(tensors), None
    for name, given, wanted in (("first", tensors, [1] * 6), ("same", tensors, [0] * 6), ("moved", moved, [0] * 6)):
        kept = triton_fingerprint.fingerprint(given, table=table, memory=memory)
        table = kept.table
        if kept.changed.tolist() != wanted or kept.state is not memory.state or not same_bits(kept.state, third.state):
            found.append(f"kept memory, {name}: {kept.changed.tolist()}")
    moved[1][2] += 1
    kept = triton_fingerprint.fingerprint(moved, table=table, memory=memory)
    if kept.changed.tolist() != [0, 1, 0, 0, 0, 0]:
        found.append(f"kept memory, one changed: {kept.changed.tolist()}")
    if memory.arrived.tolist() != [0] * 6:
        found.append(f"left of the count of parts: {memory.arrived.tolist()}")
    return found


CHECKS = {
    "combine": (
        check_sum_slots,
        check_order_of_addition,
        check_scores_by_row,
        check_gather_without_pads,
        check_finish_ds,
        check_list_of_slots,
        check_slots_of_experts,
    ),
    "fingerprint": (check_hash_is_its_formula, check_every_bit_shows, check_swaps_show, check_flags),
}
