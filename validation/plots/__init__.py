"""Every picture of the project: functions that return a matplotlib Figure."""

from __future__ import annotations

from validation.plots.canvas import COLOURS, png_bytes, save_png, write_bytes
from validation.plots.curves import curves_figure
from validation.plots.errors import error_bars, error_colour, ranking_figure, scatter_figure
from validation.plots.hardware import roofline_figure
from validation.plots.lanes import lanes_figure
from validation.plots.parts import parts_figure
from validation.plots.timelines import boxes, category, schedule_figure, timeline_figure

__all__ = [
    "COLOURS",
    "boxes",
    "category",
    "curves_figure",
    "error_bars",
    "error_colour",
    "lanes_figure",
    "parts_figure",
    "png_bytes",
    "ranking_figure",
    "roofline_figure",
    "save_png",
    "scatter_figure",
    "schedule_figure",
    "timeline_figure",
    "write_bytes",
]
