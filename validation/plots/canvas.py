"""What every figure shares: size, colours, plain axes, and PNG files.

Figures are made without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which readers of every colour vision can tell apart.
COLOURS = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "input gradient": "#D55E00",
    "weight gradient": "#CC79A7",
    "optimizer": "#009E73",
    "communication": "#E69F00",
}
BOUND_COLOURS = {"compute": "#0072B2", "memory": "#009E73", "communication": "#E69F00"}
ERROR_COLOURS = ((0.15, "#009E73"), (0.40, "#E69F00"), (float("inf"), "#D55E00"))
# One colour per series, from the same palette.
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
GREY = "#666666"
DPI = 144
WIDTH = 8.0  # inches


def new_figure(height: float, rows: int = 1, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``rows`` axes above one another; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, sharex=rows > 1, squeeze=False)[:, 0])


def plain(axes: Axes) -> None:
    """Drop the frame's upper and right lines."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)


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
