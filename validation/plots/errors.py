"""Pictures of errors: predicted against measured, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from validation.plots.canvas import (
    BOUND_COLOURS,
    COLOURS,
    ERROR_COLOURS,
    GREY,
    new_figure,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from validation.compare import Compared, Comparison

BAND = 0.15


def scatter_figure(comparison: Comparison) -> Figure:
    """Return predicted over measured seconds, with the band of 15 % and the baseline's points."""
    figure, (axes,) = new_figure(5.6, width=6.4)
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
    plain(axes)
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
    figure, (axes,) = new_figure(1.2 + 0.22 * len(cases))
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
    plain(axes)
    return figure


def ranking_figure(cases: Sequence[Compared], title: str = "") -> Figure:
    """Return predicted and measured seconds of cases that compete, the fastest measured first."""
    ordered = sorted(cases, key=lambda case: case.measured_s)
    figure, (axes,) = new_figure(1.2 + 0.45 * len(ordered))
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
    plain(axes)
    return figure
