"""A measured device profile: what `meshwise calibrate` writes and the cost model reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hwmodels.collectives import CollectiveFit, read_fit
from hwmodels.kernels import KernelFit, read_kernel_fits
from simcore.errors import InputError


@dataclass(frozen=True, slots=True)
class Links:
    """What ranks that all run at once do to one another.

    ``issue_s``: host time to start a communication. ``blocking``: share of a communication during
    which its rank cannot compute. ``messages``: (latency in s, seconds per byte) of one message.
    """

    collectives: CollectiveFit
    issue_s: float
    blocking: float
    messages: tuple[float, float]

    @property
    def values(self) -> tuple[CollectiveFit, float, float, tuple[float, float]]:
        """The four, in order."""
        return self.collectives, self.issue_s, self.blocking, self.messages


@dataclass(frozen=True, slots=True)
class Profile:
    """Fitted costs of one machine, with where they come from.

    ``collectives``, ``issue_s``, ``blocking`` and ``messages``: the `Links` between two ranks;
    ``crowds``: those of more, by how many run at once.
    ``peaks``: measured FLOP/s and bytes/s, for the baselines that predictions must beat.
    ``alone``: time of "compute" and of "memory" on one busy rank over that with every rank busy.
    ``cores``: processors that the ranks share; 0 for as many as there are ranks.
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
    cores: int = 0
    crowds: Mapping[int, Links] = field(default_factory=dict)

    def among(self, ranks: int) -> Profile:
        """Return the costs where so many ranks run at once: measured for the nearest number."""
        nearest = min((2, *self.crowds), key=lambda count: abs(count - ranks))
        if nearest not in self.crowds:
            return self
        collectives, issue_s, blocking, messages = self.crowds[nearest].values
        return replace(
            self, collectives=collectives, issue_s=issue_s, blocking=blocking, messages=messages
        )


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
            *_links(table, path.name).values,
            {str(k): float(v) for k, v in table["peaks"].items()},
            {str(k): float(v) for k, v in table.get("alone", {}).items()},
            table.get("provenance", {}),
            int(table["cores"]),
            {int(k): _links(each, path.name) for k, each in table["crowds"].items()},
        )
    except OSError as error:
        raise InputError(f"cannot read the profile {path.name}: {error.strerror}.") from None
    except KeyError as error:
        raise InputError(
            f"{path.name} was measured by another version of meshwise, or is no device profile (it "
            f"lacks {error.args[0]!r}): run 'meshwise calibrate' again."
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path.name} is not a device profile ({error!r:.80}): run 'meshwise calibrate'."
        ) from None


def _links(table: Mapping[str, Any], where: str) -> Links:
    latency_s, s_per_byte = table["messages"]
    return Links(
        read_fit(table["collectives"], where),
        float(table["issue_s"]),
        float(table["blocking"]),
        (float(latency_s), float(s_per_byte)),
    )


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
