"""What a step of expert parallelism should take, from bandwidths: the tables of docs/scaling.md.

    python benchmarks/ep_model.py                             the tables
    python benchmarks/ep_model.py --points benchmarks/ep.csv  the same beside what benchmarks/ep.py measured

T tokens a rank, K slots a token, H channels, I intermediate, E experts in all, R ranks. All assumptions are fields of
``Machine``; docs/scaling.md says where they come from.
"""

import argparse
import csv
import math
import pathlib
import statistics
from dataclasses import dataclass, replace

GIGA, MICRO = 1e9, 1e-6


@dataclass(frozen=True)
class Machine:
    """Bytes and seconds. Bandwidths are of one GPU, in one direction."""

    memory: float = 4800 * GIGA * 0.8  # of HBM, as plain copies reach it
    nvlink: float = 450 * GIGA * 0.75  # to GPUs of the same node
    network: float = 50 * GIGA * 0.85  # to other nodes: a 400 Gbit/s card for each GPU
    node: int = 8  # GPUs that NVLink joins
    start: float = 20 * MICRO  # until an exchange moves its first byte
    per_peer: float = 1 * MICRO  # each further rank that an exchange talks to
    host: float = 600 * MICRO  # once a call: the host waits for the counts, and the GPU for what comes after them
    # A step of the layer on one GPU, into main_grad, from benchmarks/moe.csv: with 8 and with 32 experts.
    measured: tuple = (("bf16", (8.93e-3, 10.11e-3)), ("fp8", (7.23e-3, 8.11e-3)))
    measured_experts: tuple[int, int] = (8, 32)
    measured_work: float = 18.0 * 8192 * 8 * 3072 * 1536


@dataclass(frozen=True)
class Shape:
    tokens: int = 8192
    topk: int = 8
    hidden: int = 3072
    intermediate: int = 1536
    experts: int = 128
    ranks: int = 1
    payload: str = "bf16"  # of tokens forward and of output gradients backward
    precision: str = "bf16"  # of the experts
    once_a_node: bool = False  # a token crosses the network once for each node, and NVLink carries it on there


@dataclass(frozen=True)
class Prediction:
    """Seconds; forward and backward together."""

    dispatch: float
    experts: float
    combine: float
    host: float = 0.0  # of dispatch, and the same for all pieces together
    weights: float = 0.0  # of experts, and once for each piece: weights are read and their gradients written again

    @property
    def step(self) -> float:
        return self.dispatch + self.experts + self.combine

    def overlapped(self, pieces: int) -> float:
        """With each piece's way beside another's experts: one piece's way, or one piece's experts, stays in sight.

        Nothing is taken off for the multiprocessors that the exchange needs."""
        moved, experts = self.dispatch - self.host + self.combine, self.experts + (pieces - 1) * self.weights
        return self.host + max(experts + moved / pieces, moved + experts / pieces)


def share_of_tokens(shape: Shape, ranks: int = 1) -> float:
    """The chance that one of ``ranks`` ranks holds one of a token's experts, all choices of K being equally likely."""
    held = ranks * shape.experts // shape.ranks
    missed = math.prod(
        (shape.experts - held - number) / (shape.experts - number) for number in range(min(shape.topk, shape.experts))
    )
    return 1.0 - max(missed, 0.0)


def experts_time(shape: Shape, machine: Machine) -> tuple[float, float]:
    """What is proportional to the work, and something for each expert that a rank holds, of its weights' size."""
    few, many = dict(machine.measured)[shape.precision]
    low, high = machine.measured_experts
    for_one = (many - few) / (high - low)
    work = 18.0 * shape.tokens * shape.topk * shape.hidden * shape.intermediate
    weights = shape.hidden * shape.intermediate / (3072 * 1536)
    return (few - low * for_one) * work / machine.measured_work, for_one * weights * shape.experts / shape.ranks


def exchange_time(shape: Shape, machine: Machine, row_bytes: float) -> float:
    """One exchange of the tokens' rows: links inside and outside of the node work at the same time."""
    if shape.ranks == 1:
        return 0.0
    rows = shape.tokens * share_of_tokens(shape)
    inside = (min(shape.ranks, machine.node) - 1) * rows
    outside = shape.ranks * rows - rows - inside
    if shape.once_a_node and shape.ranks > machine.node:
        inside += outside
        outside = shape.tokens * share_of_tokens(shape, machine.node) * (shape.ranks // machine.node - 1)
    moved = max(inside * row_bytes / machine.nvlink, outside * row_bytes / machine.network)
    return machine.start + (shape.ranks - 1) * machine.per_peer + moved


def predict(shape: Shape, machine: Machine | None = None) -> Prediction:
    machine = Machine() if machine is None else machine
    copies = shape.tokens * share_of_tokens(shape) * shape.ranks
    wide, slots = 2 * shape.hidden, 8 * shape.topk
    narrow = shape.hidden * (1 + 4 / 128) if shape.payload == "fp8" else wide
    quantized = shape.tokens * (wide + narrow) / machine.memory if shape.payload == "fp8" else 0.0
    gathered = quantized + (shape.tokens + copies) * narrow / machine.memory  # rows are read once, written as copies
    added = (copies + shape.tokens) * wide / machine.memory
    counted = machine.host + (machine.start if shape.ranks > 1 else 0.0)
    forward = counted + gathered + exchange_time(shape, machine, narrow + slots)
    dispatch_backward = exchange_time(shape, machine, wide + slots / 2) + added
    combine = exchange_time(shape, machine, wide) + added + gathered + exchange_time(shape, machine, narrow)
    products, weights = experts_time(shape, machine)
    return Prediction(forward + dispatch_backward, products + weights, combine, machine.host, weights)


def near_table(machine: Machine | None = None) -> list[str]:
    lines = [
        "| experts | ranks | payload, experts | dispatch, ms | experts, ms | combine, ms | step, ms | two pieces, ms "
        "| tokens/s | efficiency |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for experts in (32, 128):
        for payload, precision in (("bf16", "bf16"), ("fp8", "fp8")):
            base = None
            for ranks in (1, 2, 4):
                shape = Shape(experts=experts, ranks=ranks, payload=payload, precision=precision)
                found = predict(shape, machine)
                base = found.step if base is None else base
                lines.append(
                    f"| {experts} | {ranks} | {payload}, {precision} | {_row(found)} | "
                    f"{ranks * shape.tokens / found.step / 1e6:.2f} M | {base / found.step:.0%} |"
                )
    return lines


def _row(found: Prediction) -> str:
    return " | ".join(
        f"{1e3 * seconds:.2f}"
        for seconds in (found.dispatch, found.experts, found.combine, found.step, found.overlapped(2))
    )


def far_table(machine: Machine | None = None) -> list[str]:
    """8 to 2048 ranks: 128 experts, and from 128 ranks on one a rank."""
    lines = [
        "| ranks | experts | copies of a token | payload, experts | dispatch, ms | experts, ms | combine, ms "
        "| step, ms | two pieces, ms | experts' share | one copy a node: step, ms | two pieces, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for ranks in (8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        for payload, precision in (("bf16", "bf16"), ("fp8", "fp8")):
            shape = Shape(experts=max(128, ranks), ranks=ranks, payload=payload, precision=precision)
            found, once = predict(shape, machine), predict(replace(shape, once_a_node=True), machine)
            lines.append(
                f"| {ranks} | {shape.experts} | {ranks * share_of_tokens(shape):.2f} | {payload}, {precision} | "
                f"{_row(found)} | {found.experts / found.step:.0%} | {1e3 * once.step:.2f} | "
                f"{1e3 * once.overlapped(2):.2f} |"
            )
    return lines


def compare(path: pathlib.Path) -> list[str]:
    """Measured / predicted milliseconds of each point, where all halves of a part are there, and its efficiency."""
    points: dict[tuple, dict[str, list[float]]] = {}
    for row in csv.DictReader(path.open()):
        if row["pieces"] in ("1", "2"):
            part = "two pieces" if row["pieces"] == "2" else row["part"]
            names = ("tokens", "topk", "hidden", "intermediate", "experts", "ranks", "payload", "precision")
            shape = Shape(*(int(row[name]) for name in names[:6]), row["payload"], row["precision"])
            points.setdefault(shape, {}).setdefault(part, []).append(float(row["milliseconds"]))
    columns = ("dispatch", "experts", "combine", "step", "two pieces")
    lines = [
        f"| experts | ranks | payload, experts | {' | '.join(columns)} | tokens/s | efficiency |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape in sorted(points, key=lambda s: (s.experts, s.payload, s.precision, s.ranks)):
        parts, found = points[shape], predict(shape)
        cells = []
        for name in columns:
            halves = (name,) if name in ("step", "two pieces") else (name, f"{name} backward")
            measured = sum(statistics.median(parts[half]) for half in halves) if set(halves) <= set(parts) else None
            predicted = 1e3 * (found.overlapped(2) if name == "two pieces" else getattr(found, name))
            cells.append("" if measured is None else f"{measured:.2f} / {predicted:.2f}")
        step = statistics.median(parts["step"])
        alone = points.get(replace(shape, ranks=1), {}).get("step")
        efficiency = f"{statistics.median(alone) / step:.0%}" if alone else ""
        speed = f"{shape.ranks * shape.tokens / step / 1e3:.2f} M"
        lines.append(
            f"| {shape.experts} | {shape.ranks} | {shape.payload}, {shape.precision} | {' | '.join(cells)} | {speed} "
            f"| {efficiency} |"
        )
    return lines


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=pathlib.Path, help="rows of benchmarks/ep.py")
    args = parser.parse_args(argv)
    tables = [near_table(), far_table()] + ([compare(args.points)] if args.points else [])
    print("\n\n".join("\n".join(table) for table in tables))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
