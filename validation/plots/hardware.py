"""Pictures of hardware: the roofline with measured points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hwmodels.hardware import Chip
from validation.plots.canvas import GREY, SERIES, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
ROOFS = ("bf16", "fp8", "nvfp4", "fp32")  # drawn where the chip has them


def roofline_figure(
    chip: Chip, points: Mapping[str, tuple[Array, Array]], title: str = ""
) -> Figure:
    """Return FLOP/s against FLOPs per byte of main memory, both logarithmic.

    ``points``: by name, the FLOPs per byte and the FLOP/s that were reached. Roofs are the dense
    peaks of the datasheet, slopes the bandwidths of main memory and of the last-level cache.
    """
    figure, (axes,) = new_figure(4.8)
    peaks = {name: chip.peak_flops_per_s[name] for name in ROOFS if name in chip.peak_flops_per_s}
    top = max([*peaks.values(), chip.vector_flops_per_s])
    slopes = {t.name: t.bytes_per_s for t in chip.tiers if t.name in ("l2", "hbm")}
    low, high = _reach(points, top / chip.hbm.bytes_per_s)
    x = np.geomspace(low, high, 200)
    for name, rate in slopes.items():
        label = f"{'memory' if name == 'hbm' else name} {rate / 1e12:.3g} TB/s"
        axes.plot(x, np.minimum(rate * x, top), color=GREY, linewidth=1.2, zorder=1,
                  linestyle="-" if name == "hbm" else ":", label=label)  # fmt: skip
    for name, rate in peaks.items():
        reach = x[x >= rate / chip.hbm.bytes_per_s]
        axes.plot(reach, np.full(len(reach), rate), color=GREY, linewidth=1.2, zorder=1)
        axes.annotate(f"{name} {rate / 1e12:.4g} TFLOP/s", (high, rate), fontsize=8, color=GREY,
                      ha="right", va="bottom")  # fmt: skip
    for (name, (intensity, reached)), colour in zip(points.items(), _colours(points), strict=True):
        axes.scatter(intensity, reached, s=9, color=colour, alpha=0.5, linewidth=0, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(top=top * 2)
    axes.set_xlabel("FLOPs per byte of main memory", fontsize=9)
    axes.set_ylabel("FLOP/s", fontsize=9)
    axes.set_title(title or chip.name, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    plain(axes)
    return figure


def _reach(points: Mapping[str, tuple[Array, Array]], ridge: float) -> tuple[float, float]:
    """Return the ends of the horizontal axis: all points, and a decade about the ridge."""
    every = [ridge / 30, ridge * 10, *(float(x) for each, _ in points.values() for x in each)]
    return min(every) / 1.5, max(every) * 1.5


def _colours(names: Mapping[str, object]) -> Sequence[str]:
    return [SERIES[i % len(SERIES)] for i in range(len(names))]
