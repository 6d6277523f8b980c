"""Words that the sentences about mistakes share, and what this version cannot honour yet."""

from __future__ import annotations

import math
from collections.abc import Iterable

from simcore.errors import nearest

MAX_SENTENCE = 290

# Words of the format that this version reads but cannot honour yet.
LATER_TABLES = {
    "engine": "serving",
    "slo": "serving",
    "fleet": "serving",
    "draft_model": "speculative decoding",
}


LATER_KEYS = {
    "parallel": ("offload",),
    "goal": ("subject_to",),
    "decoding": (
        *("draft", "draft_tokens", "draft_steps", "draft_top_k", "acceptance", "accepted_length"),
    ),
}


LATER_VALUES = {
    ("workload", "kind"): ("serve",),
    ("decoding", "method"): (
        *("speculative", "tree", "multi_head", "jacobi", "lookahead", "diffusion"),
        *("block_diffusion", "masked", "wavefront", "next_scale", "fork_join"),
    ),
}


def shown_as(value: object) -> str:
    """Return a short, one-line picture of an offending value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        digits = int(value.bit_length() * math.log10(2)) + 1
        return str(value) if digits <= 20 else f"a number of {digits} digits"
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else repr(value[:37] + "...")
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return str(value)[:40] if isinstance(value, float) else f"a {type(value).__name__}"


def key_text(key: object) -> str:
    """Return a key as it may stand in a sentence."""
    text = str(key) if isinstance(key, str) else shown_as(key)
    text = text if text.isprintable() and text else repr(text)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_later(place: tuple[str, str], value: object) -> bool:
    """Return whether a value is one of the format's that this version cannot honour yet."""
    if not isinstance(value, str):
        return False
    return value in LATER_VALUES.get(place, ())


def wrong_choice(place: tuple[str, str], value: object, choices: Iterable[str]) -> str:
    """Return the end of the sentence for a value that is none of ``choices``."""
    options = sorted(choices)
    if _is_later(place, value):
        return f"= {shown_as(value)} is not available in this version: use {either_of(options)}."
    near = nearest(value, options) if isinstance(value, str) and len(value) < 100 else None
    hint = f"did you mean {near!r}?" if near else f"give {either_of(options)}."
    return f"= {shown_as(value)} is not known: {hint}"


def either_of(options: list[str]) -> str:
    """Return the options in quotes, joined by commas and "or"."""
    quoted = [repr(option) for option in options]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
