"""Pictures of what a whole is made of: bars of parts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from validation.plots.canvas import GREY, SERIES, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def parts_figure(
    rows: Mapping[str, Mapping[str, float]],
    *,
    label: str = "",
    title: str = "",
    limit: float | None = None,
) -> Figure:
    """Return a bar per row, its parts in their order; parts that are 0 in every row are left out.

    ``label`` names the quantity; ``limit`` is drawn as a line across, in the same unit.
    """
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    shown = [name for name in names if any(parts.get(name) for parts in rows.values())]
    figure, (axes,) = new_figure(1.4 + 0.35 * len(rows))
    places, starts = range(len(rows)), [0.0] * len(rows)
    for number, name in enumerate(shown):
        sizes = [parts.get(name, 0.0) for parts in rows.values()]
        colour = SERIES[number % len(SERIES)]
        axes.barh(places, sizes, height=0.7, left=starts, color=colour, label=name)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    if limit is not None:
        axes.axvline(limit, color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(list(places), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="left", fontsize=10)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=len(shown))
    plain(axes)
    return figure
