"""Records of the calibration kit (`backends/kit.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hwmodels.catalogue import THIS_CPU
from simcore.measurement import Measurement
from validation.importers.reading import bad, chip_name, field, json_object, open_text, positive

FORMAT, VERSION = "meshwise-kit", 1


def read_kit(path: Path) -> list[Measurement]:
    """Return the measurements of a kit's record; what it skipped is left out.

    ``subject`` is the kernel family; ``shape`` holds its columns and ``dtype``, ``implementation``
    and ``timing``.
    """
    with open_text(path) as stream:
        record = json_object(stream.read(), path.name)
    if record.get("version") != VERSION:
        raise bad(
            path.name, f"version {record.get('version')!r} of {FORMAT}, {VERSION} is expected"
        )
    machine = field(record, "machine", path.name)
    rows = field(record, "measurements", path.name)
    if not isinstance(machine, dict) or not isinstance(rows, list):
        raise bad(path.name, "machine must be a table and measurements a list")
    cpu = machine.get("kind") == "cpu"
    chip = THIS_CPU if cpu else chip_name(str(machine.get("device", "")))
    machine = {**machine, "chip": chip}
    return [
        _measurement(row, machine, path.name, f"{path.name}, measurement {number}")
        for number, row in enumerate(rows, start=1)
    ]


def _measurement(row: Any, machine: dict[str, Any], source: str, where: str) -> Measurement:
    if not isinstance(row, dict):
        raise bad(where, "a table is expected")
    shape, samples = field(row, "shape", where), field(row, "samples_s", where)
    if not isinstance(shape, dict) or not isinstance(samples, list) or not samples:
        raise bad(where, "shape must be a table and samples_s a list that is not empty")
    names = {name: str(field(row, name, where)) for name in ("dtype", "implementation")}
    timing = {"timing": row["timing"]} if "timing" in row else {}
    return Measurement(
        str(field(row, "family", where)),
        {**shape, **names, **timing},
        tuple(positive(sample, "samples_s", where) for sample in samples),
        machine,
        source,
    )
