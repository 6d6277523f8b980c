"""A table of the accuracy report."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a title; ``notes`` say how the split was made and what the columns mean.

    ``missed``: a sentence for every target that a row of the table misses.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    notes: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """Return the table as Markdown under a heading of the third level."""
        lines = [f"### {self.title}", ""]
        lines += [line for note in self.notes for line in (note, "")]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|" + "---|" * len(self.columns))
        lines += ["| " + " | ".join(_text(value) for value in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    if isinstance(value, float) and isnan(value):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    """Return a share as a percentage with one decimal place below ten."""
    return f"{100 * share:.1f} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"
