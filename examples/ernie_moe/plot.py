"""The figure: loss curves of each precision on the left, where the tokens went on the right."""

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter

# The first curve is drawn wide and pale, the second thin and dark on top: where they coincide both can be seen.
_STYLES = (
    {"color": "#f2a65a", "linewidth": 4.5, "marker": "o", "markersize": 11},
    {"color": "#1f3a5f", "linewidth": 1.4, "marker": "D", "markersize": 5},
)


def draw(trainers: dict, title: str, unigram: float, path):
    """``trainers`` maps a precision to its ``Trainer``; the PNG goes to ``path``."""
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    _draw_losses(left, trainers, unigram)
    _draw_loads(right, trainers)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_losses(figure, trainers, unigram):
    is_pair = len(trainers) == 2
    if is_pair:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.5, 1))
    else:
        top = bottom = figure.subplots()
    for (precision, trainer), style in zip(trainers.items(), _STYLES, strict=False):
        line = {key: style[key] for key in ("color", "linewidth")}
        # A step's loss is that of the weights it starts from, so it stands where as many steps are done.
        top.plot(np.arange(len(trainer.losses)), trainer.losses, label=f"{precision.upper()} training", **line)
        done, losses = zip(*trainer.held_out, strict=True)
        marks = {key: style[key] for key in ("color", "marker", "markersize")}
        label = f"{precision.upper()} held out (last: {losses[-1]:.4f})"
        top.plot(done, losses, linestyle="none", markeredgecolor="white", zorder=5, label=label, **marks)
    top.axhline(unigram, color="grey", linestyle=":", linewidth=1.2)
    top.annotate("guess from byte frequencies", (1.0, unigram), xycoords=("axes fraction", "data"), color="dimgrey",
                 xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    top.set_title("Loss")
    top.set_ylabel("cross-entropy (nats per byte)")
    top.legend(frameon=False, fontsize=9)
    top.grid(alpha=0.25)
    if is_pair:
        (name_a, a), (name_b, b) = trainers.items()
        difference = np.array(b.losses) / np.array(a.losses) - 1.0
        bottom.axhspan(-0.01, 0.01, color="grey", alpha=0.15, linewidth=0)
        bottom.plot(np.arange(len(difference)), difference, color="#1f3a5f", linewidth=1.0)
        limit = max(0.012, 1.1 * np.abs(difference).max())
        bottom.set_ylim(-limit, limit)
        bottom.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        bottom.set_ylabel(f"{name_b.upper()} over\n{name_a.upper()} (band: 1%)", fontsize=8)
        bottom.grid(alpha=0.25)
    bottom.set_xlabel("optimizer steps done")
    bottom.margins(x=0.02)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))


def _draw_loads(figure, trainers):
    """One heat map a layer and precision: experts down, steps across, colour = slots over the even share."""
    loads = {name: np.array(trainer.loads, dtype=np.float64) for name, trainer in trainers.items()}
    layers, experts = next(iter(loads.values())).shape[1:]
    axes = figure.subplots(layers, len(loads), sharex=True, sharey=True, squeeze=False)
    for column, (name, load_SLE) in enumerate(loads.items()):
        relative_SLE = experts * load_SLE / load_SLE.sum(-1, keepdims=True)
        for layer in range(layers):
            ax = axes[layer][column]
            image = ax.imshow(relative_SLE[:, layer].T, aspect="auto", interpolation="nearest", cmap="RdBu_r",
                              norm=TwoSlopeNorm(1.0, 0.0, 2.0), origin="lower",
                              extent=(0.5, len(load_SLE) + 0.5, -0.5, experts - 0.5))  # fmt: skip
            if layer == 0:
                ax.set_title(f"Expert load, {name.upper()}")
            if layer == layers - 1:
                ax.set_xlabel("optimizer step")
            if column == 0:
                ax.set_ylabel(f"layer {layer + 2}\nexpert")  # layer 1 is dense
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    bar = figure.colorbar(image, ax=axes, extend="max", shrink=0.8, pad=0.02)
    bar.set_label("token slots, relative to an even share (= 1)")
