"""A bar chart from the table. matplotlib is not a requirement of anything else here."""

from collections.abc import Iterable, Mapping

from .results import RIGHT, groups
from .shapes import KERNELS

COLOURS = ("#1b6ca8", "#c8c8c8", "#e07b39", "#5a9e6f")


def chart(rows: Iterable[Mapping], path: str) -> str:
    """Write the chart to ``path``; the answer says what was done."""
    measured = [row for row in rows if row["kernel"] in KERNELS and row["check"] == RIGHT and row["wall_ms"]]
    if not measured:
        return "no plot: no checked and timed row"
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed; later: --from-csv FILE --plot FILE"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    device = measured[-1]["device"]
    found = groups(row for row in measured if row["device"] == device)
    kernels = [kernel for kernel in KERNELS if any(key[0] == kernel for key in found)]
    shapes = list(dict.fromkeys(key[1:6] for key in found))
    names = list(dict.fromkeys(name for of in found.values() for name in of))
    figure, axes = pyplot.subplots(
        len(kernels), 1, figsize=(1.8 + 1.5 * len(shapes), 2.6 * len(kernels)), squeeze=False, sharex=True
    )
    width = 0.8 / len(names)
    for axis, kernel in zip(axes[:, 0], kernels, strict=True):
        for place, name in enumerate(names):
            at, heights, times = [], [], []
            for number, shape in enumerate(shapes):
                row = found.get((kernel, *shape, device), {}).get(name)
                if row:
                    at.append(number + (place - (len(names) - 1) / 2) * width)
                    heights.append(float(row["tflops"]))
                    times.append(f"{float(row['wall_ms']):.2f}")
            bars = axis.bar(at, heights, width * 0.95, label=name, color=COLOURS[place % len(COLOURS)])
            axis.bar_label(bars, times, fontsize=7)
        axis.set_title(kernel.replace("+", " + "), fontsize=9, loc="left")
        axis.set_ylabel("TFLOP/s", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    labels = [f"{t},{h},{i},\n{e},{k}" for t, h, i, e, k in shapes]
    axes[-1, 0].set_xticks(range(len(shapes)), labels)
    axes[-1, 0].set_xlabel("T, H, I, E, K; a bar's number is its time in ms", fontsize=8)
    figure.suptitle(f"MoE layer on one {device}", fontsize=10)
    # Outside of the axes: at one shape or six, no bar lies under it.
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right", fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return f"wrote {path}"
