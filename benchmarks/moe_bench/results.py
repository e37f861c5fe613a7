"""What was found: statistics, verdicts, the table, and which speed-ups may be told."""

import csv
import itertools
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping

from .providers import BASELINE, PROVIDERS, Provider
from .shapes import MAIN_GRAD, OUTPUTS

KEY = ("kernel", "provider", "T", "H", "I", "E", "K", "device", "versions")
FIGURES = (
    "wall_ms",
    "wall_low",
    "wall_high",
    "event_ms",
    "rounds",
    "tflops",
    "gpu_us",
    "span_us",
    "launches",
    "peak_mib",
)
COLUMNS = (*KEY, "check", *FIGURES, "seconds", "new_files", "run", "note")
RIGHT = "ok"


class Refused(ValueError):
    """A ratio that nothing stands behind."""


def median_and_range(values: Iterable[float]) -> tuple[float, float, float]:
    values = sorted(values)
    return statistics.median(values), values[0], values[-1]


def verdict(kernel: str, provider: Provider, reply: Mapping | None) -> str:
    """`ok`, or what is wrong with a worker's answer to `check`; a tensor that was not compared is wrong too."""
    if reply is None:
        return "not run"
    found = reply.get("figures", {}).get(kernel, {})
    wrong = [f"{name} not compared" for name in OUTPUTS[kernel] if name not in found]
    for name, (relative, cosine) in found.items():
        # Written so that NaN is wrong.
        if not (relative < provider.relative and cosine >= provider.cosine):
            wrong.append(f"{name} off by {relative:.2%}, cosine {cosine:.5f}")
    if kernel == MAIN_GRAD and provider.adds_main_grad and not reply.get("adds_main_grad"):
        wrong.append("main_grad is not where the experts' gradients go")
    return f"failed: {'; '.join(wrong)}" if wrong else RIGHT


def worst(kernel: str, reply: Mapping) -> str:
    figures = reply["figures"][kernel]
    return " ".join(f"{name} {relative:.2%}" for name, (relative, _) in figures.items())


def speedup(row: Mapping, base: Mapping) -> float:
    """How many times as fast ``row`` is. Raises Refused unless both were checked, right, and timed in turns."""
    for one in (row, base):
        if one["check"] != RIGHT:
            what = "did not run" if one["check"] in ("", "not run") else "failed"
            raise Refused(f"the check of {one['provider']} {what}")
        if not one["wall_ms"]:
            raise Refused(f"{one['provider']} was not timed")
    if row["run"] != base["run"]:
        raise Refused("they were not measured in the same run")
    return float(base["wall_ms"]) / float(row["wall_ms"])


class Table:
    """Rows by KEY, in the order in which they came. Reading and writing keeps rows that this run did not touch."""

    def __init__(self, rows: Iterable[Mapping] = ()):
        self.rows: dict[tuple, dict] = {}
        for row in rows:
            self.put(row)

    @classmethod
    def read(cls, path: str | None) -> "Table":
        if path is None or not pathlib.Path(path).exists():
            return cls()
        with open(path, newline="") as file:
            return cls(csv.DictReader(file))

    def write(self, path: str | None) -> None:
        if path is None:
            return
        # Beside it and then over it: a run that is cut off here leaves the old table.
        beside = pathlib.Path(f"{path}.part")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows.values())
        beside.replace(path)

    def put(self, row: Mapping) -> dict:
        """Add a row in place of the one with the same key, as text: what was measured reads like what was stored."""
        row = {name: text(row.get(name, "")) for name in COLUMNS}
        key = tuple(row[name] for name in KEY)
        self.rows.pop(key, None)
        self.rows[key] = row
        return row


def text(value) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}" if value < 10 else f"{value:.2f}"
    return str(value)


def groups(rows: Iterable[Mapping]) -> dict[tuple, dict[str, Mapping]]:
    """{(kernel, T, H, I, E, K, device): {provider: its latest row}} of what has a check."""
    found: dict[tuple, dict[str, Mapping]] = {}
    for row in rows:
        if row["kernel"] in OUTPUTS:
            key = (row["kernel"], *(row[name] for name in "THIEK"), row["device"])
            found.setdefault(key, {})[row["provider"]] = row
    return found


def describe(row: Mapping) -> str:
    if row["check"] != RIGHT:
        return row["check"] or "not run"
    parts = []
    if row["wall_ms"]:
        parts.append(f"{row['wall_ms']} ms ({row['wall_low']} to {row['wall_high']}), {row['tflops']} TFLOP/s")
    if row["gpu_us"]:
        within = f" of {row['span_us']}" if row["span_us"] else ""  # older tables do not tell
        parts.append(f"GPU {row['gpu_us']}{within} us in {row['launches']} launches")
    if row["peak_mib"]:
        parts.append(f"peak {row['peak_mib']} MiB")
    return ", ".join(parts) or "not timed"


def summary(rows: Iterable[Mapping]) -> tuple[list[str], int]:
    """Lines to print, and how many configurations are not right or may not be compared."""
    lines, refused = [], 0
    for (kernel, *shape, device), of in groups(rows).items():
        lines.append(f"{kernel}, T,H,I,E,K {','.join(shape)}, {device}")
        for name, row in of.items():
            lines.append(f"    {name:<16}{describe(row)}")
            if name == BASELINE or BASELINE not in of:
                # Nothing to compare it with; it must still be right.
                refused += not (row["check"] == RIGHT and row["wall_ms"])
                continue
            try:
                lines.append(f"    {'':<16}{speedup(row, of[BASELINE]):.3f} times as fast as {BASELINE}")
            except Refused as reason:
                refused += 1
                lines.append(f"    {'':<16}no speed-up: {reason}")
    return lines, refused


def gemm_rows(shape, provider: str, sequence: list) -> list[tuple[str, float, float, str]]:
    """(GEMM, microseconds, TFLOP/s, kernel) for the grouped GEMMs of one forward and backward; ``dW1+dW2`` where nobody
    can tell which launches are whose.

    The provider's table says in which order they come. Where it names no kernels, they are the longest launches.
    """
    told = PROVIDERS[provider]
    if told.kernels:
        ours = [launch for launch in sequence if any(kernel in launch[0] for kernel in told.kernels)]
        parts = _by_kernel(told.gemms, told.kernels, ours)
    else:
        longest = sorted(range(len(sequence)), key=lambda i: -sequence[i][1])[: len(told.gemms)]
        parts = [((gemm,), [sequence[place]]) for gemm, place in zip(told.gemms, sorted(longest), strict=False)]
    if sum(len(gemms) for gemms, _ in parts) < len(told.gemms):
        return []
    found = []
    for gemms, launches in parts:
        us, flops = sum(us for _, us in launches), sum(shape.gemm_flops(gemm) for gemm in gemms)
        found.append(("+".join(gemms), us, flops / us / 1e6, launches[0][0]))
    return found


def _by_kernel(gemms: tuple[str, ...], kernels: tuple[str, ...], launches: list) -> list[tuple[tuple[str, ...], list]]:
    """(GEMMs, their launches). Neighbours with the same kernel are apart if each is one launch, and else together: of
    which they are more is not to be seen."""
    parts = []
    for kernel, group in itertools.groupby(zip(gemms, kernels, strict=True), key=lambda pair: pair[1]):
        names = tuple(name for name, _ in group)
        mine = list(itertools.takewhile(lambda launch, kernel=kernel: kernel in launch[0], launches))
        launches = launches[len(mine) :]
        if len(mine) < len(names):
            return []
        if len(mine) == len(names):
            parts += [((name,), [launch]) for name, launch in zip(names, mine, strict=True)]
        else:
            parts.append((names, mine))
    return parts if not launches else []
