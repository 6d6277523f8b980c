"""The all_reduce kernels of serving engines: plain loads and stores in the peers' memory.

One-shot: every rank copies the whole buffers of its n - 1 peers, S (n-1). Two-shot: it sums its own
share of all, then the shares are gathered, 2 S (n-1)/n. Beyond the engine's registered buffer NCCL
runs. Replayed from a graph a call costs

    T = call + (n-1) peer + S f / (e B)

(call and peer in cycles, e a share of the link's payload bandwidth). Launched eagerly it also
waits for the host and copies the input into the registered buffer first (S read, S written):

    T_eager = max(host, T + copy + 2 S / (c HBM))

The host's seconds are those of the machines measured; another one takes their median.
Coefficients: ``data/curves/collectives-engines.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.collectives.algorithms import sizes
from hwmodels.collectives.nccl import library_on
from hwmodels.collectives.traffic import Array
from hwmodels.collectives.tuner import GroupLayout, choose, rate
from hwmodels.hardware import Chip
from simcore.errors import InputError, unknown

DATA = Path(__file__).parents[1] / "data" / "curves" / "collectives-engines.json"


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine's kernels, fitted."""

    one_call_cycles: float
    one_share: float
    two_call_cycles: float
    two_share: float
    peer_cycles: float
    limit_bytes: float  # the registered buffer; beyond it NCCL runs
    host_s: Mapping[str, float] = field(
        default_factory=dict
    )  # eager: what the host needs per call, by chip of its machine
    copy_s: float = 0.0  # eager: the copy's own start
    copy_share: float = 1.0  # eager: of the memory's bandwidth


@lru_cache(maxsize=1)
def engines() -> dict[str, Engine]:
    """Return the engines by name."""
    rows = json.loads(DATA.read_text(encoding="utf-8"))["engines"]
    return {name: Engine(**row["coefficients"]) for name, row in rows.items()}


def engine_all_reduce(
    name: str, size_bytes: ArrayLike, group: GroupLayout, chip: Chip, eager: bool = False
) -> tuple[Array, NDArray[np.str_]]:
    """Return the seconds of the engine's all_reduce and what ran: one-shot, two-shot or NCCL's.

    ``size_bytes``: one rank's buffer. Groups over several nodes take NCCL. Raises `InputError` for
    an engine that is not known, or eager calls of one that was measured in graphs alone.
    """
    known = engines()
    if name not in known:
        raise unknown("engine", name, known)
    if eager and not known[name].host_s:
        raise InputError(f"engine {name!r} was not measured launched eagerly: use eager=False.")
    size = np.asarray(size_bytes, dtype=np.float64)
    beyond = choose("all_reduce", size, group, "nccl")[0]
    return price(known[name], size, group, chip, beyond, eager)


def price(
    engine: Engine, size: Array, group: GroupLayout, chip: Chip, beyond: Array, eager: bool
) -> tuple[Array, NDArray[np.str_]]:
    """Return seconds and algorithm of ``engine``'s all_reduce, NCCL's being ``beyond``."""
    n, m, k = sizes(group.ranks, group.ranks_per_node)
    clock = library_on(group.scale_up.name).clock_hz
    port, start = rate(group.scale_up, m), (n - 1) * engine.peer_cycles
    one = (engine.one_call_cycles + start) / clock + size * (n - 1) / (engine.one_share * port)
    shares = 2 * (n - 1) / n
    two = (engine.two_call_cycles + start) / clock + size * shares / (engine.two_share * port)
    own = (size <= engine.limit_bytes) & (k <= 1) & (n > 1)
    seconds = np.where(own, np.minimum(one, two), beyond)
    names = np.where(own, np.where(one <= two, "one-shot", "two-shot"), "nccl")
    if eager:
        copied = 2 * size / (engine.copy_share * chip.hbm.bytes_per_s)
        host_s = engine.host_s.get(chip.name, engine.host_s["other"])
        seconds = np.where(n > 1, np.maximum(host_s, seconds + engine.copy_s + copied), 0.0)
    return seconds, names
