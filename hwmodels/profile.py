"""A measured device profile: what `meshwise calibrate` writes and the cost model reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwmodels.collectives import CollectiveFit, read_fit
from hwmodels.kernels import KernelFit, read_kernel_fits
from simcore.errors import InputError


@dataclass(frozen=True, slots=True)
class Profile:
    """Fitted costs of one machine, with where they come from.

    ``messages``: (latency in s, seconds per byte) between two ranks of the machine.
    ``blocking``: share of a communication during which its rank cannot compute.
    ``peaks``: measured FLOP/s and bytes/s, for the baselines that predictions must beat.
    ``alone``: time of "compute" and of "memory" on one busy rank over that with every rank busy.
    """

    name: str
    kernels: Mapping[str, KernelFit]
    collectives: CollectiveFit
    issue_s: float
    blocking: float
    messages: tuple[float, float]
    peaks: Mapping[str, float]
    alone: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def default_path() -> Path:
    """Return where the profile of the machine at hand is kept."""
    return Path.home() / ".meshwise" / "this-cpu.json"


def read_profile(path: Path) -> Profile:
    """Return the profile in ``path``. Raises `InputError` for a file that is not one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return Profile(
            str(table["name"]),
            read_kernel_fits(table["kernels"], path.name),
            read_fit(table["collectives"], path.name),
            float(table["issue_s"]),
            float(table["blocking"]),
            (float(table["messages"][0]), float(table["messages"][1])),
            {str(k): float(v) for k, v in table["peaks"].items()},
            {str(k): float(v) for k, v in table.get("alone", {}).items()},
            table.get("provenance", {}),
        )
    except OSError as error:
        raise InputError(f"cannot read the profile {path.name}: {error.strerror}.") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path.name} is not a device profile ({error!r:.80}): run 'meshwise calibrate'."
        ) from None


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
