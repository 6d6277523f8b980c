"""Curves: the fitted coefficients of a kernel family on one chip, by one library, in one dtype."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.catalogue import load_chip
from hwmodels.families import FAMILIES, VARIANTS
from hwmodels.families.family import Array, Shape, matrix_peak
from hwmodels.hardware import Chip
from simcore.errors import InputError, unknown

DATA = Path(__file__).parent / "data" / "curves" / "kernels.json"


@dataclass(frozen=True, slots=True)
class Curve:
    """Coefficients of ``family`` as fitted to ``chip``, ``implementation`` and ``dtype``.

    ``spread``: rising (predicted seconds, deviation of log(measured / predicted)) on
    shapes that were held out of the fit. ``provenance``: source, date, rows and held-out errors.
    """

    family: str
    chip: str
    implementation: str
    dtype: str
    coefficients: Mapping[str, float]
    spread: tuple[tuple[float, float], ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def seconds(self, shape: Shape, chip: Chip) -> Array:
        """Return seconds of ``shape`` on ``chip``: the coefficients, with that chip's datasheet."""
        found = FAMILIES[self.family].seconds(shape, chip, self.dtype, self.coefficients)
        return np.asarray(found, dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain data."""
        return {**asdict(self), "spread": [list(point) for point in self.spread]}

    def deviation(self, seconds: Array) -> Array:
        """Return the standard deviation of log(measured / predicted) where so much is predicted."""
        if not self.spread:
            return np.zeros_like(seconds)
        at, deviations = np.array(self.spread).T
        return np.asarray(np.interp(np.log(seconds), np.log(at), deviations))


def read_curve(row: Mapping[str, Any], where: str) -> Curve:
    """Return the curve of a file's row. Raises `InputError` for an ill-formed one."""
    try:
        name = str(row["family"])
        if name not in FAMILIES:
            raise unknown("kernel family", name, FAMILIES)
        coefficients = {str(k): float(v) for k, v in row["coefficients"].items()}
        if set(coefficients) != set(FAMILIES[name].coefficients):
            raise ValueError(f"coefficients must be {', '.join(FAMILIES[name].coefficients)}")
        spread = tuple((float(at), float(deviation)) for at, deviation in row["spread"])
        return Curve(
            name,
            str(row["chip"]),
            str(row["implementation"]),
            str(row["dtype"]),
            coefficients,
            spread,
            row.get("provenance", {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: ill-formed curve ({error}): fit it anew.") from None


@lru_cache(maxsize=1)
def shipped_curves() -> tuple[Curve, ...]:
    """Return the curves that come with the project."""
    rows = _shipped().get("curves", ())
    return tuple(read_curve(row, DATA.name) for row in rows)


def default_path() -> Path:
    """Return where the curves that a user fitted are kept."""
    return Path.home() / ".meshwise" / "curves.json"


def read_curves(path: Path) -> tuple[Curve, ...]:
    """Return the curves in a file that `meshwise calibrate --from` wrote.

    Raises `InputError` for a file that is none.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["curves"]
        return tuple(read_curve(row, path.name) for row in rows)
    except OSError as error:
        raise InputError(f"cannot read the curves {path.name}: {error.strerror}.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path.name} holds no curves ({error!r:.80}): run 'meshwise calibrate --from FILE'."
        ) from None


def with_shipped(own: tuple[Curve, ...]) -> tuple[Curve, ...]:
    """Return a user's curves and those shipped, one's own first where both know a kernel."""
    taken = {(c.family, c.chip, c.implementation, c.dtype) for c in own}
    rest = (
        c for c in shipped_curves() if (c.family, c.chip, c.implementation, c.dtype) not in taken
    )
    return (*own, *rest)


def _shipped() -> dict[str, Any]:
    return dict(json.loads(DATA.read_text(encoding="utf-8"))) if DATA.is_file() else {}


@lru_cache(maxsize=1)
def carried_deviations() -> dict[str, float]:
    """Return by family the standard deviation of log(measured / predicted) across generations.

    Taken where the curves of one generation were scored on the chips of another.
    """
    return {str(k): float(v) for k, v in _shipped().get("carried_deviation", {}).items()}


# A family without measurements: a factor of 1.5 either way in 80 % of cases.
UNMEASURED = ((1.0, 0.32),)

# -- which curve ---------------------------------------------------------------------------------

# Where an architecture has no measured chip: the one whose kernels are written most alike.
# "ampere": warp-wide products from registers (mma.sync); "hopper": asynchronous products from
# shared memory fed by a copy engine, which later and other accelerators have as well.
_RELATIVES = {
    "pascal": "ampere",
    "volta": "ampere",
    "turing": "ampere",
    "ampere-ga102": "ampere",
    "ada": "ampere",
    "blackwell-gb202": "ampere",
    "cdna2": "ampere",
    "cdna3": "ampere",
}
_DEFAULT_RELATIVE = "hopper"

# Libraries that may be named though no kernel of theirs was measured.
LIBRARIES = ("sglang", "torch", "trtllm", "vllm")

# A format without measurements takes the curve of the first of these that has some.
_ALIKE = {
    "fp16": ("bf16",),
    "tf32": ("bf16",),
    "fp32": ("bf16",),
    "fp8": ("fp8_block", "bf16"),
    "fp8_block": ("fp8", "bf16"),
    "mxfp8": ("fp8_block", "fp8", "bf16"),
    "int8": ("fp8", "bf16"),
    "nvfp4": ("fp8_block", "fp8", "bf16"),
    "mxfp4": ("fp8_block", "fp8", "bf16"),
    "int4_wo": ("bf16",),
    "int8_wo": ("int4_wo", "bf16"),
    "fp8_wo": ("int4_wo", "bf16"),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """The curves that price a family on a chip, one per library, and what they stand in for.

    ``borrowed``: the chip that they were measured on, "" for the chip itself, "nowhere" for the
    family's starting coefficients. ``dtype``: the format that is priced. ``lent``: whether the
    curves are those of the family that this one varies, which was never measured itself.
    """

    curves: tuple[Curve, ...]
    dtype: str
    borrowed: str
    lent: bool = False

    def seconds(self, shape: Shape, chip: Chip, cold: bool = False) -> Array:
        """Return the geometric mean over the libraries.

        ``cold``: other kernels have run since this one's operands were last used, as in a program;
        a benchmark repeats the same call.
        """
        return np.asarray(np.exp(np.mean(self._logs(shape, chip, cold), axis=0)))

    def _logs(self, shape: Shape, chip: Chip, cold: bool = False) -> Array:
        family = FAMILIES[self.curves[0].family]
        change = family.cold if cold else {}
        each = [
            family.seconds(shape, chip, self.dtype, {**curve.coefficients, **change})
            for curve in self.curves
        ]
        return np.asarray(np.log(np.stack(np.broadcast_arrays(*each))))

    def deviation(self, shape: Shape, chip: Chip) -> Array:
        """Return the standard deviation of log(real / predicted).

        The variances of the curves' held-out residuals, of the libraries' disagreement and, for a
        borrowed curve, of carrying it between generations add up; a curve of another family or
        another vendor's chip counts as unmeasured besides.
        """
        logs = self._logs(shape, chip)
        own = [
            curve.deviation(np.exp(row)) ** 2 for curve, row in zip(self.curves, logs, strict=True)
        ]
        variance = np.mean(own, axis=0) + np.var(logs, axis=0)
        if self.borrowed:
            family = self.curves[0].family
            lender = VARIANTS[family].borrows if self.lent else family
            variance = variance + carried_deviations().get(lender, 0.0) ** 2
        foreign = self.borrowed not in ("", "nowhere") and (
            load_chip(self.borrowed).vendor != chip.vendor
        )
        return np.asarray(np.sqrt(variance + UNMEASURED[0][1] ** 2 * (self.lent + foreign)))


def choose_curves(
    family: str,
    chip: Chip,
    dtype: str,
    implementation: str = "",
    curves: tuple[Curve, ...] | None = None,
) -> Choice:
    """Return the curves for ``family`` on ``chip``: measured there, or on its nearest relative.

    Without ``implementation``, or where that library was not measured, all libraries count alike.
    ``curves`` are those to choose from, by default the shipped ones. Raises `InputError` for an
    unknown library.
    """
    every = shipped_curves() if curves is None else curves
    known = [c for c in every if c.family == family]
    lent = not known and family in VARIANTS
    if lent:
        known = [replace(c, family=family) for c in every if c.family == VARIANTS[family].borrows]
    if implementation:
        names = {*LIBRARIES, *(c.implementation for c in every)}
        if implementation not in names:
            raise unknown("implementation", implementation, ["default", *names])
        known = [c for c in known if c.implementation == implementation] or known
    if not known:
        start = Curve(family, "", "", dtype, FAMILIES[family].start(), UNMEASURED)
        return Choice((start,), dtype, "nowhere")
    source, near = _nearest(chip, known)
    for wanted in (dtype, *_ALIKE.get(dtype, ()), near[0].dtype):
        found = tuple(c for c in near if c.dtype == wanted)
        if found:
            break
    return Choice(found, dtype, "" if source == chip.name else source, lent)


def _nearest(chip: Chip, curves: list[Curve]) -> tuple[str, list[Curve]]:
    """Return the chip whose curves serve ``chip``: itself, else its relative nearest in balance."""
    names = sorted({curve.chip for curve in curves})
    if chip.name not in names:
        kin = {name: load_chip(name) for name in names}
        wanted = chip.architecture
        if all(k.architecture != wanted for k in kin.values()):
            wanted = _RELATIVES.get(wanted, _DEFAULT_RELATIVE)
        near = {n: k for n, k in kin.items() if k.architecture == wanted} or kin
        chosen = min(near, key=lambda n: abs(np.log(_balance(near[n]) / _balance(chip))))
    else:
        chosen = chip.name
    return chosen, [curve for curve in curves if curve.chip == chosen]


def _balance(chip: Chip) -> float:
    """Return the FLOPs per byte at which the chip's limits meet."""
    return matrix_peak(chip, "bf16") / chip.hbm.bytes_per_s
