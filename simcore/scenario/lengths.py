"""The key lengths of a training step: a file, a list, or a law that lengths are drawn from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from simcore.errors import InputError
from simcore.scenario.fields import MAX_FILE_BYTES, refusal
from simcore.scenario.words import shown_as

MOST_TOKENS = 10**9
LAW = {"median": "a number above 0", "sigma": "a number of 0 or more", "seed": "a whole number"}


def _is_whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= MOST_TOKENS


def _checked(value: Any) -> Any:
    """Return a file's name, a tuple of lengths, or a law with every key; refuse anything else."""
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    if isinstance(value, list | tuple) and value:
        wrong = next((each for each in value if not _is_whole(each, 1)), None)
        if wrong is not None:
            raise refusal(f"holds {shown_as(wrong)}: give whole numbers from 1 on.")
        return tuple(value)
    if isinstance(value, Mapping):
        return _checked_law(dict(value))
    raise refusal(
        f"= {shown_as(value)} is not a file, a list of whole numbers, or a table with median and "
        "sigma."
    )


def _checked_law(law: dict[Any, Any]) -> dict[str, Any]:
    for key in law:
        if key not in LAW:
            raise refusal(f"has no key {shown_as(key)}: its keys are {', '.join(LAW)}.")
    for key in ("median", "sigma"):
        given: Any = law.get(key)
        number = isinstance(given, int | float) and not isinstance(given, bool)
        if not number or not 0 <= float(given) <= MOST_TOKENS or (not given and key == "median"):
            raise refusal(f"needs {key}, {LAW[key]}, not {shown_as(given)}.")
    if not _is_whole(law.get("seed", 0), 0):
        raise refusal(f"needs seed, {LAW['seed']}, not {shown_as(law['seed'])}.")
    return {"seed": 0, **law}


_WHOLE = {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS}
Lengths = Annotated[
    Any,
    AfterValidator(_checked),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": _WHOLE}, {"type": "object"}]}
    ),
]


def lengths_of(value: Any, folder: Path, count: int, longest: int) -> tuple[int, ...]:
    """Return the lengths of the step's ``count`` sequences, at most ``longest`` tokens each."""
    if isinstance(value, Mapping):
        from simcore.lengths import lognormal_lengths

        drawn = lognormal_lengths(count, value["median"], value["sigma"], longest, value["seed"])
        return tuple(drawn.tolist())
    found = _read(folder / value) if isinstance(value, str) else tuple(value)
    if len(found) < count:
        raise InputError(
            f"[workload].lengths holds {len(found)} lengths but global_batch is {count}: lower "
            "global_batch, or give more."
        )
    found = found[:count]
    if max(found) > longest:
        raise InputError(
            f"[workload].lengths holds a sequence of {max(found)} tokens, more than seq_len = "
            f"{longest}, the longest: raise seq_len, or leave it out of the lengths."
        )
    return found


def _read(path: Path) -> tuple[int, ...]:
    """Return the whole numbers of a file, apart by commas or white space."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"[workload].lengths: {path.name} is larger than 10 MB.")
        words = re.split(r"[\s,]+", path.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"[workload].lengths: cannot read {path.name}: {reason}.") from None
    for word in words:
        if not (re.fullmatch(r"[0-9]{1,10}", word) and 1 <= int(word) <= MOST_TOKENS):
            raise InputError(
                f"[workload].lengths: {path.name} holds {shown_as(word)}: write whole numbers "
                "from 1 on, apart by commas or new lines."
            )
    return tuple(map(int, words))
