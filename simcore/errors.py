"""The errors a user can meet.

    MeshwiseError
    ├── InputError      a scenario, file or argument is wrong: exit code 2
    └── RunError        a real run failed: a rank died, hung, or lacked memory: exit code 1

An infeasible plan is a result, not an error.
"""

from __future__ import annotations

from collections.abc import Iterable


class MeshwiseError(Exception):
    """Base of every error raised on purpose; its text is one clear sentence."""


class InputError(MeshwiseError):
    """Bad input. The text says what is wrong, where, and how to mend it."""


class RunError(MeshwiseError):
    """A real run could not be completed."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the choice closest in spelling to ``name``, or None where nothing is close."""
    import difflib

    lowered = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def unknown(what: str, name: str, choices: Iterable[str]) -> InputError:
    """Return the error for a name that is in no registry, naming the nearest valid one."""
    options = sorted(choices)
    near = nearest(name, options)
    listed = ", ".join(options) if len(options) <= 12 else f"{len(options)} known"
    hint = f"did you mean {near!r}?" if near else f"known: {listed}."
    return InputError(f"unknown {what} {str(name)[:80]!r}: {hint}")
