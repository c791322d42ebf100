"""Panels of curves side by side, as one PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT = "limit of matrix products"  # a row that is not measured: the prefix's operations at the machine's rate


@dataclass
class Panel:
    """One quantity against the swept size."""

    ylabel: str
    curves: dict[str, list[tuple[float, float]]]  # row -> (x, y)
    is_ratio: bool = False


def plot(path: Path, panels: Sequence[Panel], xlabel: str, title: str) -> None:
    """Draw the panels. A row has the same colour in all of them; a ratio has a line at 1 and its values beside it."""
    import matplotlib  # here: only scaling draws

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), dpi=120, squeeze=False)
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    for axis, panel in zip(axes[0], panels, strict=True):
        for name, points in panel.curves.items():
            xs, ys = zip(*points, strict=True)
            style = {"color": f"C{names.index(name)}", "marker": "o", "markersize": 3}
            axis.plot(xs, ys, label=name, **{"color": "grey", "linestyle": ":"} if name == LIMIT else style)
            for x, y in points if panel.is_ratio else ():
                axis.annotate(f"{y:.2f}", (x, y), textcoords="offset points", xytext=(0, 5), fontsize=7, ha="center")
        if panel.is_ratio:
            axis.axhline(1, color="grey", linewidth=0.8, linestyle="--")
        xs = sorted({x for points in panel.curves.values() for x, _ in points})
        if xs[0] > 0 and xs[-1] / xs[0] > 8:
            axis.set_xscale("log")
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
        axis.minorticks_off()
        axis.set(xlabel=xlabel, ylabel=panel.ylabel)
        highest = max([y for points in panel.curves.values() for _, y in points] + [float(panel.is_ratio)])
        axis.set_ylim(0, 1.4 * highest)  # room for the legend
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
