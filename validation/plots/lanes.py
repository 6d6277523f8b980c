"""Who runs what: the pieces of a step over sequences of unequal length, lane by time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from simcore.mixed import Assignment, Piece
from validation.plots.canvas import SERIES, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def lanes_figure(
    assignment: Assignment, seconds: Callable[[Piece], float], title: str = ""
) -> Figure:
    """Return one box per piece over the lanes that share it, coloured by their number.

    ``seconds``: of a piece. White is time in which a lane waits for its group or the step's end.
    """
    from matplotlib.patches import Patch

    degrees = sorted({piece.degree for piece in assignment.pieces})
    colours = {degree: SERIES[n % len(SERIES)] for n, degree in enumerate(degrees)}
    figure, (axes,) = new_figure(1.6 + min(6.0, 0.25 * assignment.lanes))
    ends = np.zeros(assignment.lanes)
    for piece in assignment.pieces:
        mine = slice(piece.first, piece.first + piece.degree)
        start, spent = float(ends[mine].max()), seconds(piece)
        ends[mine] = start + spent
        axes.broken_barh(
            [(start * 1e3, spent * 1e3)],
            (piece.first - 0.5, piece.degree),
            facecolor=colours[piece.degree],
            edgecolor="white",
            linewidth=0.6,
        )
    axes.set_xlim(0, float(ends.max()) * 1e3 * 1.01)
    axes.set_ylim(assignment.lanes - 0.5, -0.5)
    axes.set_ylabel("lane", fontsize=9)
    axes.set_xlabel("milliseconds since the start", fontsize=9)
    share = float(ends.mean() / ends.max())
    axes.set_title(
        title or f"lanes end on average after {share:.1%} of the step", loc="left", fontsize=10
    )
    plain(axes)
    figure.legend(
        handles=[
            Patch(color=colours[d], label=f"{d} lanes to a sequence" if d > 1 else "a lane")
            for d in degrees
        ],
        loc="outside lower center",
        ncols=len(degrees),
        frameon=False,
        fontsize=9,
    )
    return figure
