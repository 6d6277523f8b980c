"""Pictures of curves: a quantity against a size, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from validation.plots.canvas import SERIES, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = tuple[Sequence[float], Sequence[float]]  # sizes, and the quantity there
Band = tuple[Sequence[float], Sequence[float]]  # its lower and upper bound


def curves_figure(
    sizes: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    bands: Mapping[str, Band] | None = None,
    points: Mapping[str, Points] | None = None,
    labels: tuple[str, str] = ("", ""),
    title: str = "",
    log: str = "xy",
) -> Figure:
    """Return lines over ``sizes``, with the bands and the points of the same name.

    ``labels`` name the axes; ``log`` says which of them are logarithmic.
    """
    figure, (axes,) = new_figure(4.2)
    for number, (name, line) in enumerate(lines.items()):
        colour = SERIES[number % len(SERIES)]
        axes.plot(sizes, line, color=colour, linewidth=1.4, label=name)
        if bands and name in bands:
            low, high = bands[name]
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        if points and name in points:
            axes.scatter(*points[name], s=14, color=colour, linewidth=0)
    for axis in log:
        getattr(axes, f"set_{axis}scale")("log")
    axes.set_xlabel(labels[0], fontsize=9)
    axes.set_ylabel(labels[1], fontsize=9)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    plain(axes)
    return figure
