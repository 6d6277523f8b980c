"""Pictures of timelines: rank by time, predicted above measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from simcore.ops import COMPUTE
from simcore.timeline import Span, Timeline
from validation.plots.canvas import COLOURS, GREY, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {
    "F": "forward",
    "B": "backward",
    "BR": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "WR": "weight gradient",
    "O": "optimizer",
    "TIE": "communication",
}
NUMBERED = {  # kinds whose boxes hold a number, and its colour
    "forward": "black",
    "backward": "white",
    "input gradient": "white",
    "weight gradient": "black",
}
ACTION = re.compile(r"(\d+)([A-Z_]+)(\d+)$")

Boxes = list[tuple[float, float]]  # (start, width) in seconds


def category(span: Span) -> str:
    """Return which colour a span has: communication, or the kind of its action."""
    if span.stream != COMPUTE:
        return "communication"
    found = ACTION.match(span.action)
    return KINDS.get(found[2], "forward") if found else "forward"


def boxes(spans: Iterable[Span], gap_s: float) -> dict[tuple[int, str], Boxes]:
    """Return per rank and category the boxes to draw; gaps of at most ``gap_s`` are closed."""
    found: dict[tuple[int, str], Boxes] = {}
    for span in sorted(spans, key=lambda span: span.start_s):
        drawn = found.setdefault((span.rank, category(span)), [])
        if drawn and span.start_s <= drawn[-1][0] + drawn[-1][1] + gap_s:
            start, width = drawn[-1]
            drawn[-1] = start, max(width, span.end_s - start)
        else:
            drawn.append((span.start_s, span.end_s - span.start_s))
    return found


def _lanes(axes: Axes, found: Mapping[tuple[int, str], Boxes], thin_s: float) -> None:
    """Draw a wide lane of compute and a thin one of communication for every rank.

    Boxes are at least ``thin_s`` wide, so that short messages can be seen.
    """
    ranks = sorted({rank for rank, _ in found})
    for (rank, what), drawn in found.items():
        place = ranks.index(rank)
        low, high = (0.30, 0.18) if what == "communication" else (-0.42, 0.66)
        axes.broken_barh(
            [(start * 1e3, max(width, thin_s) * 1e3) for start, width in drawn],
            (place + low, high),
            color=COLOURS[what],
            linewidth=0,
        )
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.set_ylim(len(ranks) - 0.42, -0.52)
    axes.tick_params(axis="y", length=0)
    plain(axes)


def _legend(figure: Figure, used: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=COLOURS[name], label=name) for name in used],
        loc="outside lower center",
        ncols=len(used),
        frameon=False,
        fontsize=9,
    )


def timeline_figure(predicted: Timeline, measured: Timeline, title: str = "") -> Figure:
    """Return predicted lanes above measured ones, on one time axis."""
    end = max(predicted.step_s, measured.step_s)
    ranks = len({span.rank for span in (*predicted.spans, *measured.spans)})
    figure, axes = new_figure(1.5 + 0.62 * ranks, 2)
    drawn = [boxes(line.spans, end / 2000) for line in (predicted, measured)]
    for area, lane, line, name in zip(
        axes, drawn, (predicted, measured), ("predicted", "measured"), strict=True
    ):
        _lanes(area, lane, end / 600)
        area.axvline(line.step_s * 1e3, color=GREY, linewidth=1, linestyle=":")
        area.set_title(f"{name}: {line.step_s * 1e3:.4g} ms", loc="left", fontsize=10)
        area.set_xlim(0, end * 1e3 * 1.01)
    axes[0].tick_params(axis="x", labelbottom=False)
    axes[1].set_xlabel("milliseconds since the start", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    used = {what for lane in drawn for _, what in lane}
    _legend(figure, [name for name in COLOURS if name in used])
    return figure


def schedule_figure(line: Timeline, title: str = "") -> Figure:
    """Return the actions of a pipeline: one box per action, with its microbatch's number.

    Of several stages on a rank the later ones are paler.
    """
    found: dict[tuple[int, str], list[float]] = {}
    for span in line.spans:
        if span.stream == COMPUTE and ACTION.match(span.action):
            edges = found.setdefault((span.rank, span.action), [span.start_s, span.end_s])
            edges[:] = min(edges[0], span.start_s), max(edges[1], span.end_s)
    ranks = sorted({rank for rank, _ in found})
    figure, (axes,) = new_figure(1.3 + 0.5 * len(ranks))
    stages: dict[int, list[int]] = {}
    for rank, action in found:
        match = ACTION.match(action)
        assert match is not None
        stages[rank] = sorted({*stages.get(rank, ()), int(match[1])})
    for (rank, action), (start, end) in found.items():
        match = ACTION.match(action)
        assert match is not None
        later = stages[rank].index(int(match[1])) / max(1, len(stages[rank]) - 1)
        what, place = KINDS.get(match[2], "forward"), ranks.index(rank)
        axes.broken_barh(
            [(start * 1e3, (end - start) * 1e3)],
            (place - 0.4, 0.8),
            facecolor=COLOURS[what],
            edgecolor="white",
            linewidth=0.8,
            alpha=1 - 0.45 * later,
        )
        if what in NUMBERED and end - start > line.step_s / 60:
            axes.text(
                (start + end) * 500,
                place,
                match[3],
                ha="center",
                va="center",
                fontsize=8,
                color=NUMBERED[what],
            )
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_xlim(0, line.step_s * 1e3 * 1.01)
    axes.set_xlabel("milliseconds since the start", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_title(
        title or f"step {line.step_s * 1e3:.4g} ms, idle {line.bubble_fraction:.1%}",
        loc="left",
        fontsize=10,
    )
    plain(axes)
    used = {KINDS.get(ACTION.match(a)[2], "forward") for _, a in found}  # type: ignore[index]
    _legend(figure, [name for name in COLOURS if name in used])
    return figure
