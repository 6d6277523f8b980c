"""Calibration from files: what `meshwise calibrate --from` reads, sorts and fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hwmodels.catalogue import THIS_CPU
from hwmodels.curves import Curve, default_path
from meshwise import __version__
from meshwise.result import Result
from simcore.errors import InputError
from simcore.measurement import Measurement
from validation.datasets import Sample
from validation.fitting import GROUPS, fit_samples, write_curves
from validation.importers import detect, read, samples, summary

Say = Callable[[str], None]


def imported_result(
    files: Sequence[Path], out: Path | None, dry_run: bool, say: Say | None = None
) -> Result:
    """Return what files of measurements hold, by kernel family, chip, library and dtype.

    Unless ``dry_run``, a curve is fitted to each group of kernels and all are written to ``out``,
    by default `default_path`. Raises `InputError` for a file that is not as it should be,
    and where there is nothing to fit.
    """
    measurements: list[Measurement] = []
    formats = {}
    for path in files:
        if say:
            say(f"reading {path.name}")
        formats[str(path)] = detect(path)
        measurements += read(path, formats[str(path)])
    metrics: dict[str, Any] = {"files": formats, "measurements": len(measurements)}
    notes: tuple[str, ...] = ()
    if not dry_run:
        fitted = fit(samples(measurements), say)
        target = out or default_path()
        try:
            write_curves(target, fitted, {})
        except OSError as error:
            raise InputError(f"cannot write {target}: {error.strerror or error}.") from None
        metrics |= {"profile": str(target), "curves": [_row(curve) for curve in fitted]}
        notes = ("errors are medians of shapes that were held out of the fit.",)
    metrics["groups"] = summary(measurements)
    return Result("", metrics, notes, (), {"meshwise": __version__, "engine": "import"})


def fit(found: Sequence[Sample], say: Say | None = None) -> list[Curve]:
    """Return the curves of the samples that have rows enough. Raises `InputError` for none.

    Those of this CPU are left out: its costs are measured in place, by `meshwise calibrate`.
    """
    chosen = [each for each in found if each.family in GROUPS and each.chip != THIS_CPU]
    if say and chosen:
        say(f"fitting {len(chosen)} curves")
    curves = fit_samples(chosen)
    if not curves:
        raise InputError(
            "the files hold no kernel with measurements enough for a fit: "
            "--dry-run shows what they hold."
        )
    return curves


def _row(curve: Curve) -> dict[str, Any]:
    """Return a line of the table of curves."""
    origin = curve.provenance
    return {
        "family": curve.family,
        "chip": curve.chip,
        "implementation": curve.implementation,
        "dtype": curve.dtype,
        "rows": origin["rows"],
        "held_out_median_error": origin["held_out_median_error"],
    }
