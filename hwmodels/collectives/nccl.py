"""NCCL: its protocols on each generation of link, and the seconds of a call under each of them.

A call of S bytes under a protocol takes, on links of payload bandwidth B up (in a node) and out,

    T = call + hops_up h_up + hops_out h_out + max(S f_up / (e B_up), S f_out / (e_out B_out))
        + p min(S c, piece) / (e B) + min(S c, grain) / channel + S l / copy

f, c, p, l: the algorithm's shares and pieces (`Traffic`). *LL* sends 4 bytes of data with 4 of
flag, *LL128* 120 of 128, *Simple* whole chunks with a fence after each (NCCL, src/device); call and
hop are the cycles that a kernel needs to start and to see a peer's flag, hence seconds fall with
the clock. A channel is one block of threads: a message below ``grain`` has only one, and a chunk
leaves in pieces whose last one nothing hides. ``copy``: steps without sending go at the block's own
speed. NVLS is one read and one write through the switch.

The coefficients are fitted (``meshwise accuracy`` scores them) and lie in
``data/curves/collectives-nccl.json``: cycles, bytes per cycle, shares of the link. A link without
measurements borrows those of its nearest generation, or of all, as the file says link by link.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.collectives.algorithms import ALGORITHMS
from hwmodels.collectives.traffic import Array, Number, Traffic

DATA = Path(__file__).parents[1] / "data" / "curves" / "collectives-nccl.json"
# NVLink's hop in NCCL's own model (src/graph/tuning.cc, ring, LL); a link's latency is over it.
NVLINK_HOP_S = 6e-7
# What NVLS adds up: the switch has no integer-8 or fp8 sum (NCCL, src/include/nccl_common.h).
SWITCH_DTYPES = frozenset({"fp16", "bf16", "fp32", "fp64"})


@dataclass(frozen=True, slots=True)
class Protocol:
    """One protocol's coefficients on a generation of links; 0 leaves a term out."""

    call_cycles: float
    hop_cycles: float
    share: float  # of the link's payload bandwidth
    channel_bytes_per_cycle: float = 0.0
    grain_bytes: float = 0.0
    piece_bytes: float = 0.0
    copy_bytes_per_cycle: float = 0.0


@dataclass(frozen=True, slots=True)
class Wire:
    """A protocol between nodes: hops in units of the adapter's latency, share of its bandwidth."""

    hop: float
    tree_hop: float
    share: float


@dataclass(frozen=True, slots=True)
class Nccl:
    """The library on one link: its protocols, the clock of the chips there, what the switch can."""

    protocols: Mapping[str, Protocol]
    clock_hz: float
    in_switch: bool
    fitted: bool  # measured on this very generation
    scope: str  # the coefficients' name in the data file


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the things that the library can do: an algorithm under a protocol."""

    algorithm: str
    protocol: str
    wire: str
    spans_only: bool = False  # offered between nodes alone


# name -> candidate. Inside a node NCCL's tree is a chain of the same depth as the ring.
CANDIDATES: dict[str, Candidate] = {
    **{f"ring-{p}": Candidate("ring", p, p) for p in ("ll", "ll128", "simple")},
    **{f"tree-{p}": Candidate("tree", p, p, spans_only=True) for p in ("ll", "ll128", "simple")},
    "nvls": Candidate("in-switch", "nvls", "simple"),
    "sends-ll": Candidate("grouped-sends", "send-ll", "ll"),
    "sends-simple": Candidate("grouped-sends", "send-simple", "simple"),
    "send-ll": Candidate("point-to-point", "send-ll", "ll"),
    "send-simple": Candidate("point-to-point", "send-simple", "simple"),
}


def candidates(op: str) -> tuple[str, ...]:
    """Return what NCCL chooses from for ``op``."""
    return tuple(name for name, c in CANDIDATES.items() if op in ALGORITHMS[c.algorithm].ops)


@lru_cache(maxsize=1)
def _file() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return table


@lru_cache(maxsize=1)
def wires() -> dict[str, Wire]:
    """Return the protocols between nodes, from NCCL's own constants."""
    return {name: Wire(**row) for name, row in _file()["wires"].items()}


@lru_cache(maxsize=64)
def on_link(name: str) -> Nccl | None:
    """Return the library on the link called ``name``; None where the data file names no kin.

    The file's longest key that ``name`` starts with is its kin.
    """
    kin = [key for key in _file()["links"] if name.startswith(key)]
    return _library(max(kin, key=len)) if kin else None


@lru_cache(maxsize=64)
def library_on(name: str) -> Nccl:
    """Return the library on the link called ``name``, whatever it is."""
    return on_link(name) or _library("other")


def _library(key: str) -> Nccl:
    row = _file()["links"].get(key) or _file()["other"]
    scope = row["coefficients"]
    found = _file()["coefficients"][scope]["protocols"]
    protocols = {n: Protocol(**p) for n, p in found.items() if n not in row.get("without", ())}
    for name, factors in row.get("times", {}).items():
        scaled = {key: getattr(protocols[name], key) * by for key, by in factors.items()}
        protocols[name] = replace(protocols[name], **scaled)
    return Nccl(protocols, row["clock_hz"], row["in_switch"], scope == key, scope)


def read_again() -> None:
    """Forget what was read of the data file, after it was written anew."""
    for cached in (_file, wires, on_link, library_on):
        cached.cache_clear()


@dataclass(frozen=True, slots=True)
class Ports:
    """A rank's links as a protocol sees them: payload bytes per second, seconds of a hop."""

    up_bytes_per_s: Array
    out_bytes_per_s: Array
    up_latency_s: float
    out_latency_s: float


def offered(candidate: Candidate, library: Nccl, dtype: str) -> bool:
    """Return whether ``library`` has the candidate for elements of ``dtype``."""
    if candidate.protocol not in library.protocols:
        return False
    in_switch = ALGORITHMS[candidate.algorithm].in_switch
    return not in_switch or (library.in_switch and dtype in SWITCH_DTYPES)


def call_seconds(
    candidate: Candidate, library: Nccl, size: Array, moved: Traffic, m: Array, ports: Ports
) -> Array:
    """Return T of the module's formula for calls of ``size`` bytes with ``m`` ranks in a node."""
    protocol, wire = library.protocols[candidate.protocol], wires()[candidate.wire]
    clock = library.clock_hz
    hop_s = protocol.hop_cycles / clock * ports.up_latency_s / NVLINK_HOP_S
    tree = ALGORITHMS[candidate.algorithm].in_switch or candidate.algorithm == "tree"
    wire_s = (wire.tree_hop if tree else wire.hop) * ports.out_latency_s
    latency = protocol.call_cycles / clock + moved.up_hops * hop_s + moved.out_hops * wire_s
    up_rate = protocol.share * ports.up_bytes_per_s
    out_rate = wire.share * ports.out_bytes_per_s
    transfer = np.maximum(size * moved.up_share / up_rate, size * moved.out_share / out_rate)
    # m channels leave a node together, one per adapter.
    through = np.where(np.asarray(moved.out_share) > 0, np.minimum(up_rate, m * out_rate), up_rate)
    chunk = size * moved.chunk_share
    fill = moved.pieces * np.minimum(chunk, protocol.piece_bytes) / through
    return np.asarray(latency + transfer + fill + _block_seconds(protocol, clock, size, moved))


def _block_seconds(protocol: Protocol, clock: float, size: Array, moved: Traffic) -> Number:
    """Return what one block of threads does alone: a message's first grain, steps without sends."""
    seconds: Number = 0.0
    if protocol.channel_bytes_per_cycle:
        grain = np.minimum(size * moved.chunk_share, protocol.grain_bytes)
        seconds = seconds + grain / (protocol.channel_bytes_per_cycle * clock)
    if protocol.copy_bytes_per_cycle:
        seconds = seconds + size * moved.local_share / (protocol.copy_bytes_per_cycle * clock)
    return seconds
