"""What every importer needs: text of plain or gzipped files, numbers, names of chips, errors."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from hwmodels.catalogue import load_chip
from simcore.errors import InputError

GZIP = b"\x1f\x8b"
HEAD_CHARACTERS = 2**18  # a log may begin with a long report of the network


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file, gzipped or not. Raises `InputError` for one that cannot be read."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP
        opener = gzip.open if packed else open
        with opener(path, "rt", encoding="utf-8", errors="replace", newline="") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile):
        raise InputError(f"{path.name}: a damaged gzip file: copy it anew.") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}): check the path."
        ) from None


def head(path: Path) -> str:
    """Return the beginning of a file, enough to tell its format."""
    with open_text(path) as stream:
        return stream.read(HEAD_CHARACTERS)


def bad(where: str, what: str) -> InputError:
    """Return the error for an ill-formed place of a file."""
    return InputError(f"{where}: {what}: mend or remove it.")


def positive(value: Any, name: str, where: str) -> float:
    """Return ``value`` as a number above zero. Raises `InputError` naming the place for others."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise bad(where, f"{name} = {str(value)!r:.40} is not a number") from None
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise bad(where, f"{name} = {value!r:.40} must be a number above 0")
    return number


def field(row: Mapping[str, Any], name: str, where: str) -> Any:
    """Return ``row[name]``. Raises `InputError` where there is none."""
    if row.get(name) is None:
        raise bad(where, f"{name} is missing")
    return row[name]


def json_object(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object that ``text`` holds. Raises `InputError` naming line and reason."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise bad(
            where, f"not JSON at line {line} ({getattr(error, 'msg', error)!s:.60})"
        ) from None
    if not isinstance(found, dict):
        raise bad(where, "a JSON object is expected")
    return found


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) of a file with one JSON object, or one a line, read line by line."""
    with open_text(path) as stream:
        first = stream.readline()
        try:
            json.loads(first)
        except (ValueError, RecursionError):  # one object over many lines, or a broken first line
            yield path.name, json_object(first + stream.read(), path.name)
            return
        for number, line in enumerate(chain((first,), stream), start=1):
            if line.strip():
                where = f"{path.name}, line {number}"
                yield where, json_object(line, where)


@lru_cache(maxsize=256)
def chip_name(device: str) -> str:
    """Return the catalogue's name of a device as drivers call it, or that name where it has none.

    Drivers write "NVIDIA H200", "NVIDIA A100-SXM4-80GB" or "Tesla V100-SXM2-32GB".
    """
    if device.endswith(".toml"):  # which would name a file
        return device
    for name in (device, f"nvidia {device}"):
        try:
            return load_chip(name).name
        except InputError:
            continue
    return device
