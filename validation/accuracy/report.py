"""The accuracy report: every section's tables, and the targets that were missed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from simcore.errors import InputError
from validation.accuracy.collectives import collective_tables
from validation.accuracy.kernels import kernel_tables
from validation.accuracy.table import Table
from validation.accuracy.training import training_tables
from validation.accuracy.training_memory import memory_tables

SECTIONS: dict[str, Callable[[Path], list[Table]]] = {
    "kernels": kernel_tables,
    "collectives": collective_tables,
    "training": training_tables,
    "memory": memory_tables,
}

INTRODUCTION = """# Accuracy

How far predictions are from measurements that the fit has not seen. This file is written by

    meshwise accuracy --data DIR --out docs/accuracy.md

where DIR holds the calibration data in the layout of [calibration.md](calibration.md); it takes
minutes, `--section` names a part. Errors are
|predicted / measured - 1|: their median and 90th percentile. Beside them stand what needs no model
(the datasheet's roofline; the nearest measured shape, scaled by its arithmetic) and how far two
libraries are apart on the same shape, the floor of any figure that does not name its library.

What is held out, is held out of the fit of the coefficients. The formulas themselves were found
while looking at residuals on these same measurements, and no chip but A100, H100 and H200 is among
them: expect more error on others. Kernels were timed by repeating one call, with small operands
warm in the cache.
"""


def tables(data: Path, sections: Iterable[str] = ()) -> dict[str, list[Table]]:
    """Return the tables of the sections, by default of all that ``data`` has measurements for.

    Raises `InputError` where a section that was asked for, or every one, has none.
    """
    if sections:
        return {name: SECTIONS[name](data) for name in sections}
    found: dict[str, list[Table]] = {}
    lacking: list[InputError] = []
    for name, section in SECTIONS.items():
        try:
            found[name] = section(data)
        except InputError as error:
            lacking.append(error)
    if not found:
        raise lacking[0]
    return found


def to_markdown(found: dict[str, list[Table]]) -> str:
    """Return the report as Markdown."""
    parts = [INTRODUCTION]
    missed = [line for each in found.values() for table in each for line in table.missed]
    parts.append("## Missed targets\n")
    parts.append("\n".join(f"- {line}" for line in missed) + "\n" if missed else "None.\n")
    parts += [section_text(name, each) for name, each in found.items()]
    return "\n".join(parts)


def section_text(name: str, found: list[Table]) -> str:
    """Return one section as Markdown."""
    return "\n".join([f"## {name.capitalize()}\n", *(table.to_markdown() for table in found)])
