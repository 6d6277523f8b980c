"""`Result`: the one answer of every command, as JSON, rows, a data frame or a notebook cell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simcore.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Result:
    """What a scenario gave: metrics in SI units, and all that they rest on."""

    scenario_hash: str
    metrics: Mapping[str, Any]
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    timeline: Timeline | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, the timeline left out."""
        return {
            "scenario_hash": self.scenario_hash,
            "metrics": dict(self.metrics),
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "provenance": dict(self.provenance),
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return the result as JSON text. Raises ValueError for numbers that JSON lacks."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, default=_plain)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one flat row of metrics, or one per ranked candidate of a plan."""
        rows = self.metrics.get("candidates")
        return [flat(row) for row in rows] if isinstance(rows, list) else [flat(self.metrics)]

    def to_pandas(self) -> Any:
        """Return the records as a pandas DataFrame; needs pandas."""
        import pandas

        return pandas.DataFrame(self.to_records())

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        from meshwise.render import result_html

        return result_html(self)


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, their keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _plain(value: Any) -> Any:
    """Return numpy's numbers and arrays as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)
