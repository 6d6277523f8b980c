"""The catalogue of known networks: one data file per model in ``simcore/data/models``.

A file holds the `ModelSpec` fields that differ from the defaults, and beside them:

- ``source``: where the numbers come from;
- ``aliases``: hub names and common spellings;
- ``published_parameters``: the count that the publisher states, where known;
- ``mixers``: a pattern that repeats over the layers.

Numbers are those of the published ``config.json``. Formats are bf16, whichever 16-bit or 32-bit
format the publisher stored, except where the weights were published in 8 or 4 bits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from simcore.errors import InputError, unknown
from simcore.models import ModelSpec, check_model

MODELS_DIR = Path(__file__).parent / "data" / "models"

_BESIDE = ("source", "aliases", "published_parameters")
_SPEC_FIELDS = {field.name for field in fields(ModelSpec)} - {"name"}


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the catalogue says about a model beside its numbers."""

    name: str
    source: str
    aliases: tuple[str, ...] = ()
    published_parameters: int = 0  # 0: not published exactly


def model_names() -> list[str]:
    """Return the names of all models of the catalogue, sorted."""
    return sorted(path.stem for path in MODELS_DIR.glob("*.json"))


def load_model(name: str) -> ModelSpec:
    """Return the model of that name or alias; letter case and the hub's owner do not matter.

    Raises `InputError` with the nearest name where there is none.
    """
    return _spec(_resolve(name))


def model_card(name: str) -> ModelCard:
    """Return source, aliases and published size of the model of that name or alias."""
    stem = _resolve(name)
    entry = _entry(stem)
    return ModelCard(
        stem,
        str(entry.get("source", "")),
        tuple(entry.get("aliases", ())),
        int(entry.get("published_parameters", 0)),
    )


def _key(name: str) -> str:
    """A name as it is compared: lower case, without the owner, one kind of separator."""
    plain = str(name).strip().lower().rsplit("/", maxsplit=1)[-1]
    return plain.replace(" ", "-").replace("_", "-")


def _resolve(name: str) -> str:
    """Return the stem of the file: the name's own, else from the index of aliases."""
    key = _key(name)
    if key and len(key) <= 100 and (MODELS_DIR / f"{key}.json").is_file():
        return key
    try:
        return _aliases()[key]
    except KeyError:
        raise unknown("model", name, model_names()) from None


@cache
def _aliases() -> dict[str, str]:
    """Every alias of every file, as `_key` writes it, and the stem of its file."""
    return {_key(alias): stem for stem in model_names() for alias in _entry(stem)["aliases"]}


@cache
def _entry(stem: str) -> dict[str, Any]:
    path = MODELS_DIR / f"{stem}.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path} is not JSON: repair the file.") from None
    if not isinstance(entry, dict):
        raise InputError(f"{path} holds no table of keys: repair the file.")
    for key in entry:
        if key not in _SPEC_FIELDS and key not in _BESIDE:
            raise unknown(f"key of {path}", key, [*_SPEC_FIELDS, *_BESIDE])
    return {"aliases": [], **entry}


@cache
def _spec(stem: str) -> ModelSpec:
    values = {key: value for key, value in _entry(stem).items() if key in _SPEC_FIELDS}
    if "mixers" in values:
        values["mixers"] = tuple(islice(cycle(values["mixers"]), values["layers"]))
    try:
        model = ModelSpec(name=stem, **values)
    except TypeError as error:
        raise InputError(f"{MODELS_DIR / stem}.json: {error}: repair the file.") from None
    check_model(model)
    return model
