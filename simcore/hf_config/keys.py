"""Typed reading of a config's keys, with a sentence for what is missing or ill-typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simcore.errors import InputError

Config = Mapping[str, Any]


Fields = dict[str, Any]


def _find(config: Config, keys: str) -> tuple[str, Any]:
    """Return the first of the ``|``-separated keys that is there and not null, with its value."""
    names = keys.split("|")
    for name in names:
        if config.get(name) is not None:
            return name, config[name]
    return names[0], None


def _ill_typed(key: str, value: object, wanted: str) -> InputError:
    return InputError(f"key {key!r} is {str(value)[:40]!r}: it must be {wanted}.")


def whole_of(config: Config, keys: str, default: int | None = None) -> int:
    """Return a whole number of at least 0."""
    key, value = _find(config, keys)
    if value is None:
        if default is None:
            raise InputError(f"key {key!r} is missing: add it.")
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _ill_typed(key, value, "a whole number of at least 0")
    return value


def flag_of(config: Config, keys: str, default: bool) -> bool:
    key, value = _find(config, keys)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _ill_typed(key, value, "true or false")
    return value


def text_of(config: Config, keys: str, default: str) -> str:
    key, value = _find(config, keys)
    if value is None:
        return default
    if not isinstance(value, str):
        raise _ill_typed(key, value, "a text")
    return value


def table_of(config: Config, key: str) -> Config:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _ill_typed(key, value, "a table")
    return value


def list_of(config: Config, key: str) -> Sequence[Any]:
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise _ill_typed(key, value, "a list")
    return value


def ratio_of(whole: int, parts: int, what: str) -> int:
    if parts < 1 or whole % parts:
        raise InputError(f"{what}: {whole} is not a multiple of {parts}: change either.")
    return whole // parts
