"""Every picture of the project: functions that return a matplotlib Figure.

Figures are made without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from simcore.ops import COMPUTE
from simcore.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from validation.compare import Compared, Comparison

# Okabe and Ito's palette, which readers of every colour vision can tell apart.
COLOURS = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "optimizer": "#009E73",
    "communication": "#E69F00",
}
BOUND_COLOURS = {"compute": "#0072B2", "memory": "#009E73", "communication": "#E69F00"}
ERROR_COLOURS = ((0.15, "#009E73"), (0.40, "#E69F00"), (float("inf"), "#D55E00"))
BAND = 0.15
KINDS = {
    "F": "forward",
    "B": "backward",
    "BR": "backward",
    "I": "backward",
    "W": "backward",
    "O": "optimizer",
    "TIE": "communication",
}
ACTION = re.compile(r"(\d+)([A-Z_]+)(\d+)$")
GREY = "#666666"
DPI = 144
WIDTH = 8.0  # inches

Boxes = list[tuple[float, float]]  # (start, width) in seconds


# ---------------------------------------------------------------- timelines


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


def _new(height: float, rows: int = 1, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0])


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)


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
    _plain(axes)


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
    figure, axes = _new(1.5 + 0.62 * ranks, 2)
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
    """Return the actions of a pipeline: one box per action, with its microbatch's number."""
    found: dict[tuple[int, str], list[float]] = {}
    for span in line.spans:
        if span.stream == COMPUTE and ACTION.match(span.action):
            edges = found.setdefault((span.rank, span.action), [span.start_s, span.end_s])
            edges[:] = min(edges[0], span.start_s), max(edges[1], span.end_s)
    ranks = sorted({rank for rank, _ in found})
    figure, (axes,) = _new(1.3 + 0.5 * len(ranks))
    for (rank, action), (start, end) in found.items():
        match = ACTION.match(action)
        assert match is not None
        what, place = KINDS.get(match[2], "forward"), ranks.index(rank)
        axes.broken_barh(
            [(start * 1e3, (end - start) * 1e3)],
            (place - 0.4, 0.8),
            facecolor=COLOURS[what],
            edgecolor="white",
            linewidth=0.8,
        )
        if what in ("forward", "backward") and end - start > line.step_s / 60:
            axes.text(
                (start + end) * 500,
                place,
                match[3],
                ha="center",
                va="center",
                fontsize=8,
                color="white" if what == "backward" else "black",
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
    _plain(axes)
    used = {KINDS.get(ACTION.match(a)[2], "forward") for _, a in found}  # type: ignore[index]
    _legend(figure, [name for name in COLOURS if name in used])
    return figure


# ---------------------------------------------------------------- errors


def scatter_figure(comparison: Comparison) -> Figure:
    """Return predicted over measured seconds, with the band of 15 % and the baseline's points."""
    figure, (axes,) = _new(5.6, width=6.4)
    cases = comparison.cases
    values = [v for c in cases for v in (c.measured_s, c.predicted_s)]
    low, high = min(values) * 0.75e3, max(values) * 1.33e3
    axes.plot((low, high), (low, high), color=GREY, linewidth=1)
    axes.fill_between(
        (low, high),
        (low * (1 - BAND), high * (1 - BAND)),
        (low * (1 + BAND), high * (1 + BAND)),
        color=GREY,
        alpha=0.15,
        linewidth=0,
        label=f"within {BAND:.0%}",
    )
    axes.plot(
        [c.measured_s * 1e3 for c in cases],
        [c.baseline_s * 1e3 for c in cases],
        "x",
        color="#999999",
        markersize=5,
        label="baseline: FLOPs over peak",
        zorder=1,
    )
    for bound, colour in BOUND_COLOURS.items():
        chosen = [c for c in cases if c.bound == bound]
        if chosen:
            axes.plot(
                [c.measured_s * 1e3 for c in chosen],
                [c.predicted_s * 1e3 for c in chosen],
                "o",
                color=colour,
                markeredgecolor="white",
                markersize=7,
                label=f"bound by {bound}",
                zorder=2,
            )
    axes.set(
        xscale="log", yscale="log", xlim=(low, high), xlabel="measured, ms", ylabel="predicted, ms"
    )
    _round_ticks(axes)
    summary = comparison.summary()
    axes.set_title(
        f"{comparison.title}: median error {summary['median_abs_error']:.1%}, worst "
        f"{summary['max_abs_error']:.0%}",
        loc="left",
        fontsize=10,
    )
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _plain(axes)
    return figure


def _round_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def error_colour(error: float) -> str:
    """Return the colour of an error: up to 15 %, up to 40 %, more."""
    return next(colour for limit, colour in ERROR_COLOURS if abs(error) <= limit)


def error_bars(comparison: Comparison) -> Figure:
    """Return every case's signed error, with the baseline's as a tick."""
    cases = comparison.cases
    figure, (axes,) = _new(1.2 + 0.22 * len(cases))
    places = range(len(cases))
    axes.axvspan(-100 * BAND, 100 * BAND, color=GREY, alpha=0.12, linewidth=0)
    axes.barh(
        places,
        [100 * c.error for c in cases],
        height=0.7,
        color=[error_colour(c.error) for c in cases],
    )
    axes.plot(
        [100 * c.baseline_error for c in cases],
        list(places),
        "|",
        color="#333333",
        markersize=9,
        label="baseline: FLOPs over peak",
    )
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(list(places), [c.name for c in cases])
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xlabel("error in % (right: predicted too slow; left: predicted too fast)", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1))
    axes.set_title(f"{comparison.title}: error of every case", loc="left", fontsize=10)
    _plain(axes)
    return figure


def ranking_figure(cases: Sequence[Compared], title: str = "") -> Figure:
    """Return predicted and measured seconds of cases that compete, the fastest measured first."""
    ordered = sorted(cases, key=lambda case: case.measured_s)
    figure, (axes,) = _new(1.2 + 0.45 * len(ordered))
    for place, case in enumerate(ordered):
        first = not place
        axes.barh(
            place - 0.2,
            case.predicted_s * 1e3,
            0.36,
            color=COLOURS["forward"],
            label="predicted" if first else None,
        )
        axes.barh(
            place + 0.2,
            case.measured_s * 1e3,
            0.36,
            color=COLOURS["backward"],
            label="measured" if first else None,
        )
    axes.set_yticks(range(len(ordered)), [case.name for case in ordered])
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xlabel("milliseconds", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0.6, 1.0), ncols=2)
    _plain(axes)
    return figure


# ---------------------------------------------------------------- files


def png_bytes(figure: Figure) -> bytes:
    """Return the figure as a PNG file's bytes, the same bytes for the same figure."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG, whole or not at all, and return its path."""
    return write_bytes(path, png_bytes(figure))


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)
    return path
