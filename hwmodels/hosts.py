"""What the host spends to keep an accelerator busy: per kernel, per replayed graph, per step.

A rank's host issues kernels ahead of the device. Where it takes longer to issue a kernel than the
device takes to run it, the step is host-bound: K kernels take K x issue. A captured graph is one
launch, whatever it holds. An engine adds bookkeeping per step and per running sequence, which the
device waits for unless the engine schedules one step ahead.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from simcore.errors import unknown
from simcore.ops import Size

DATA = Path(__file__).parent / "data" / "hosts.toml"


@dataclass(frozen=True, slots=True)
class Host:
    """Software costs in seconds.

    ``issue_s``: host time per kernel; ``launch_s``: per graph or pass; ``step_s`` and
    ``sequence_s``: an engine's work per step, and per running sequence in it.
    """

    name: str
    issue_s: float = 0.0
    launch_s: float = 0.0
    step_s: float = 0.0
    sequence_s: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def pass_seconds(self, sequences: Size) -> Size:
        """Return the seconds that a pass over ``sequences`` adds where nothing hides them."""
        return self.launch_s + self.step_s + self.sequence_s * np.asarray(sequences, np.float64)


NO_HOST = Host("none")  # measured kernels that contain their launch


@lru_cache(maxsize=1)
def hosts() -> dict[str, Host]:
    """Return every known way to launch, by name."""
    table = tomllib.loads(DATA.read_text(encoding="utf-8"))
    return {name: Host(name, **row) for name, row in table.items()}


def load_host(name: str) -> Host:
    """Return the host called ``name``. Raises `InputError` for an unknown one."""
    if name not in hosts():
        raise unknown("launch mode", name, hosts())
    return hosts()[name]
