"""NCCL's coefficients from measured calls: the rows, the fit, the file that the project ships."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwmodels.catalogue import make_cluster
from hwmodels.collectives.algorithms import ALGORITHMS
from hwmodels.collectives.nccl import (
    CANDIDATES,
    Nccl,
    Ports,
    Protocol,
    call_seconds,
    candidates,
    offered,
    on_link,
)
from hwmodels.collectives.traffic import Traffic
from hwmodels.collectives.tuner import rate
from simcore.errors import InputError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
OPS = {"alltoall": "all_to_all"}
DTYPES = {"half": "fp16"}
# A message between two ranks never leaves its channel.
WHOLE_MESSAGE = 1e12
# Where the search starts and what it is weakly drawn to. The latencies of LL128 and Simple are what
# they add to LL's: both wait for more than one flag.
START: dict[str, float] = {
    "ll.call_cycles": 9e3,
    "ll.hop_cycles": 1.6e3,
    "ll.share": 0.34,
    "ll.channel_bytes_per_cycle": 2.6,
    "ll.grain_bytes": 4e3,
    "ll.copy_bytes_per_cycle": 100.0,
    "ll128.call_cycles": 20e3,
    "ll128.hop_cycles": 2e2,
    "ll128.share": 0.6,
    "ll128.copy_bytes_per_cycle": 200.0,
    "simple.call_cycles": 20e3,
    "simple.hop_cycles": 1e3,
    "simple.share": 0.97,
    "simple.piece_bytes": 12e6,
    "simple.copy_bytes_per_cycle": 450.0,
    "nvls.call_cycles": 88e3,
    "nvls.share": 0.8,
    "nvls.piece_bytes": 4e6,
    "send-ll.call_cycles": 12e3,
    "send-ll.hop_cycles": 4e2,
    "send-simple.call_cycles": 26e3,
    "send-simple.hop_cycles": 6e2,
    "send-simple.share": 0.9,
    "send-simple.piece_bytes": 6e6,
}
# What the protocol's layout allows at most.
LIMITS = {"ll.share": 0.5, "ll128.share": 120 / 128}
PULL = 0.05  # weight of the start: a parameter without evidence stays there


@dataclass(frozen=True, slots=True)
class Calls:
    """Measured calls as columns; one row per (chip, version, op, ranks, dtype, size)."""

    chip: NDArray[np.str_]
    version: NDArray[np.str_]
    op: NDArray[np.str_]
    ranks: Array
    dtype: NDArray[np.str_]
    size: Array
    seconds: Array

    def __len__(self) -> int:
        return len(self.seconds)

    def where(self, mask: Mask) -> Calls:
        """Return the rows of ``mask``."""
        return Calls(*(getattr(self, name)[mask] for name in self.__slots__))


def read_calls(path: Path) -> Calls:
    """Return the rows of ``collectives/nccl.csv``; equal rows give their median."""
    if not path.is_file():
        raise InputError(f"{path} is missing: name the folder of the calibration data with --data.")
    found: dict[tuple[str, str, str, int, str, int], list[float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            op = row["metric"].removesuffix(" latency")
            size = int(row["batch_or_concurrency"].removeprefix("message_bytes="))
            dtype = DTYPES.get(row["precision"], row["precision"])
            version = row["framework"].split()[1]
            key = (row["hardware"], version, OPS.get(op, op), int(row["n_gpus"]), dtype, size)
            found.setdefault(key, []).append(float(row["value"]) * 1e-3)
    chip, versions, op_, ranks, dtypes, sizes = zip(*found, strict=True)
    return Calls(
        np.array(chip),
        np.array(versions),
        np.array(op_),
        np.array(ranks, dtype=np.float64),
        np.array(dtypes),
        np.array(sizes, dtype=np.float64),
        np.array([np.median(each) for each in found.values()]),
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """Calls of one chip, op and dtype, made ready to be priced many times."""

    rows: NDArray[np.intp]
    link: str
    dtype: str
    size: Array
    ranks: Array
    moved: Mapping[str, Traffic]
    ports: Ports


def _batches(calls: Calls) -> list[_Batch]:
    found = []
    for chip, op, dtype in sorted(set(zip(calls.chip, calls.op, calls.dtype, strict=True))):
        rows = np.flatnonzero((calls.chip == chip) & (calls.op == op) & (calls.dtype == dtype))
        link = make_cluster(str(chip), 8).scale_up
        n = calls.ranks[rows]
        moved = {
            name: ALGORITHMS[CANDIDATES[name].algorithm].ops[str(op)](n, n, np.ones_like(n))
            for name in candidates(str(op))
            if not CANDIDATES[name].spans_only
        }
        ports = Ports(rate(link, n), rate(link, n), link.latency_s, link.latency_s)
        found.append(_Batch(rows, link.name, str(dtype), calls.size[rows], n, moved, ports))
    return found


def _price(batch: _Batch, library: Nccl) -> Array:
    best = np.full(len(batch.rows), np.inf)
    for name, moved in batch.moved.items():
        candidate = CANDIDATES[name]
        if offered(candidate, library, batch.dtype):
            found = call_seconds(candidate, library, batch.size, moved, batch.ranks, batch.ports)
            two = ALGORITHMS[candidate.algorithm].in_switch & (batch.ranks <= 2)
            best = np.minimum(best, np.where(two, np.inf, found))
    return best


def _library(link: str, protocols: Mapping[str, Protocol]) -> Nccl:
    known = on_link(link)
    if known is None:
        raise InputError(f"no coefficients may be fitted on link {link!r}: it is not of NCCL's.")
    return Nccl(protocols, known.clock_hz, known.in_switch, fitted=True, scope=link)


def predict(calls: Calls, protocols: Mapping[str, Protocol]) -> Array:
    """Return the seconds of ``calls`` under one set of coefficients, each chip at its clock."""
    seconds = np.empty(len(calls))
    for batch in _batches(calls):
        seconds[batch.rows] = _price(batch, _library(batch.link, protocols))
    return seconds


def protocols_of(values: Mapping[str, float]) -> dict[str, Protocol]:
    """Return the protocols that the flat ``values`` describe."""
    nested: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        protocol, name = key.split(".")
        nested.setdefault(protocol, {})[name] = value
    for slower in ("ll128", "simple"):
        for latency in ("call_cycles", "hop_cycles"):
            nested[slower][latency] += nested["ll"][latency]
    nested["nvls"]["hop_cycles"] = 0.0
    nested["send-ll"] |= {
        "share": LIMITS["ll.share"],
        "channel_bytes_per_cycle": values["ll.channel_bytes_per_cycle"],
        "grain_bytes": WHOLE_MESSAGE,
    }
    copy = "copy_bytes_per_cycle"
    nested["send-simple"][copy] = values[f"simple.{copy}"]
    return {name: Protocol(**each) for name, each in nested.items()}


def fit(calls: Calls) -> dict[str, Protocol]:
    """Return the coefficients that fit ``calls`` best, every generation of links counting alike.

    Least squares of log residuals with a soft l1 loss beyond 10 %.
    """
    from scipy.optimize import least_squares

    names = list(START)
    start = np.log(list(START.values()))
    top = np.log([LIMITS.get(n, 1.0) if n.endswith(".share") else 1e15 for n in names])
    batches = _batches(calls)
    links = sorted({batch.link for batch in batches})
    weight = np.empty(len(calls))
    for link in links:
        rows = np.concatenate([batch.rows for batch in batches if batch.link == link])
        weight[rows] = np.sqrt(len(calls) / len(links) / len(rows))
    measured = np.log(calls.seconds)

    def residuals(point: Array) -> Array:
        protocols = protocols_of(dict(zip(names, np.exp(point), strict=True)))
        errors = np.empty(len(calls))
        for batch in batches:
            errors[batch.rows] = np.log(_price(batch, _library(batch.link, protocols)))
        return np.concatenate([(errors - measured) * weight, PULL * (point - start)])

    bounds = (-np.inf, top)
    found = least_squares(
        residuals, np.minimum(start, top - 1e-3), loss="soft_l1", f_scale=0.1, bounds=bounds
    )
    return protocols_of(dict(zip(names, map(float, np.exp(found.x)), strict=True)))


def to_table(protocols: Mapping[str, Protocol]) -> dict[str, dict[str, float]]:
    """Return the protocols as the data file writes them: six digits, terms that are 0 left out."""
    return {
        name: {k: float(f"{v:.6g}") for k, v in asdict(p).items() if v or k == "hop_cycles"}
        for name, p in protocols.items()
    }


def links_of(chips: Iterable[str]) -> dict[str, str]:
    """Return the link inside a node of each chip."""
    return {chip: make_cluster(chip, 8).scale_up.name for chip in sorted(set(chips))}
