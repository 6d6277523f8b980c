"""Importers: measurements made elsewhere, in the formats that tools write them.

Nothing in a file is executed or unpickled: all formats are text, JSON or CSV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simcore.errors import InputError, unknown
from simcore.measurement import Measurement
from validation.importers.convert import key, samples, summary
from validation.importers.kit import FORMAT, read_kit
from validation.importers.nccl import is_nccl_log, read_nccl_json, read_nccl_log
from validation.importers.reading import head
from validation.importers.serving import read_latency, read_serving, read_throughput
from validation.importers.tables import read_table, table_of
from validation.importers.trace import read_trace

__all__ = ["IMPORTERS", "Importer", "detect", "key", "read", "samples", "summary"]


@dataclass(frozen=True, slots=True)
class Importer:
    """A format: whether a file's beginning is of it, and how such a file is read."""

    fits: Callable[[str], bool]
    read: Callable[[Path], list[Measurement]]


def _holds(*keys: str) -> Callable[[str], bool]:
    """Return a test for JSON objects with these keys."""
    return lambda text: text.lstrip()[:1] == "{" and all(f'"{key}"' in text for key in keys)


IMPORTERS: dict[str, Importer] = {
    "kit": Importer(_holds("format", FORMAT), read_kit),
    "torch-trace": Importer(
        lambda text: _holds("traceEvents")(text) or text.lstrip().startswith("[{"), read_trace
    ),
    "nccl-tests-json": Importer(_holds("nccl_version", "config"), read_nccl_json),
    "serving": Importer(_holds("duration", "request_throughput"), read_serving),
    "vllm-latency": Importer(_holds("avg_latency", "latencies"), read_latency),
    "vllm-throughput": Importer(_holds("elapsed_time", "total_num_tokens"), read_throughput),
    "nccl-tests": Importer(is_nccl_log, read_nccl_log),
    "csv": Importer(lambda text: table_of(text.partition("\n")[0]) is not None, read_table),
}


def detect(path: Path) -> str:
    """Return the format of a file, told by its content. Raises `InputError` for none known."""
    text = head(path)
    for name, importer in IMPORTERS.items():
        if importer.fits(text):
            return name
    raise InputError(
        f"{path.name}: none of the known formats ({', '.join(IMPORTERS)}): "
        "is it the file that the tool wrote?"
    )


def read(path: Path | str, format: str | None = None) -> list[Measurement]:
    """Return the measurements of a file, of ``format`` or of what its content says.

    Raises `InputError`, naming line or row, for a file that is not as its format says.
    """
    name = format or detect(Path(path))
    if name not in IMPORTERS:
        raise unknown("format", name, IMPORTERS)
    found = IMPORTERS[name].read(Path(path))
    if not found:
        raise InputError(f"{Path(path).name}: no times in it, only what they are not taken from.")
    return found
