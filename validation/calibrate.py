"""Calibration of the machine at hand: microbenchmarks on every rank, fitted to a profile.

Kinds whose time follows one size keep their measured points; products and attention are fitted
by non-negative least squares on relative errors, over physical features (start-up, FLOPs, bytes).
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.kernels import FEATURES, OTHERS, elements, family
from hwmodels.linear import LINEAR_KERNELS
from hwmodels.profile import Profile, default_path, read_profile, write_atomically
from simcore.ops import Op

TIMEOUT_S = 600.0
WORLDS = (2, 4)  # ranks that run at once; kernels are measured on the first number
PRODUCT = ("one", "flops", "bytes", "packed_weights")
GROUPED = (*PRODUCT, "experts")
TRAFFIC = ("one", "bytes", "vector")
ROOFLINE = ("one", "flops", "bytes", "vector")
PAIRS = ("one", "flops", "bytes")
TILE = ("one", "flops", "bytes", "vector", "heads", "flops_per_block")
ATTENTION = ("one", "flops", "bytes", "vector", "heads", "queries", "flops_per_block")
FITTED: dict[str, tuple[str, ...]] = {
    "matmul.nt": PRODUCT,
    "matmul.nn": PRODUCT,
    "matmul.tn": PRODUCT,
    "attention": ATTENTION,
    "attention_backward": ATTENTION,
    "attention.cached": ATTENTION,
    **{f"attention_block{form}": TILE for form in ("", ".masked")},
    **{f"attention_block_backward{form}": TILE for form in ("", ".masked")},
    **{f"attention_rows{form}": TILE for form in ("", ".first")},
    **{f"attention_rows_backward{form}": TILE for form in ("", ".first")},
    **{f"grouped_matmul.{a}{b}": GROUPED for a in ("nt", "nn", "tn") for b in ("", ".sorted")},
    **dict.fromkeys(LINEAR_KERNELS, ROOFLINE),
    **dict.fromkeys(("route", "route_backward", "state_prefix"), TRAFFIC),
    **dict.fromkeys(("permute", "permute_backward", "combine", "combine_backward"), TRAFFIC),
    **dict.fromkeys(("pairs", "pairs_backward"), PAIRS),
}
"""Families with more than one size; every other family keeps its points."""

Rows = Sequence[tuple[Op, float]]


def _each(records: Sequence[Mapping[str, Any]], what: str) -> Iterator[tuple[Any, ...]]:
    """Yield every measurement of all ranks."""
    return zip(*(record[what] for record in records), strict=True)


def _quietest(same: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a measurement with the quietest sample of each rank, averaged over ranks.

    Other work on the machine only ever adds time.
    """
    return {**same[0], "seconds": statistics.mean(min(each["samples"]) for each in same)}


def op_rows(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[Op, float]]]:
    """Return (op, seconds) by family."""
    found: dict[str, list[tuple[Op, float]]] = defaultdict(list)
    for same in _each(records, "ops"):
        row = _quietest(same)
        op = Op(row["kind"], row["dims"], "fp32", tuple(row["reads"]), (), attrs=row["attrs"])
        found[family(op)].append((op, row["seconds"]))
    return found


def fit_features(rows: Rows, features: Sequence[str]) -> tuple[dict[str, float], list[float]]:
    """Return non-negative seconds per unit of each feature, and the relative errors."""
    from scipy.optimize import nnls

    measured = np.array([seconds for _, seconds in rows])
    table = np.array([[float(FEATURES[name](op)) for name in features] for op, _ in rows])
    scale = table.max(0)
    scale[scale == 0] = 1.0
    found, _ = nnls(table / scale / measured[:, None], np.ones(len(measured)))
    values = found / scale
    errors = table @ values / measured - 1
    kept = {name: float(v) for name, v in zip(features, values, strict=True) if v > 0}
    return kept, [float(e) for e in errors]


def points_of(rows: Rows) -> list[list[float]]:
    """Return rising (elements, seconds); shapes of equal size are averaged, dips are levelled."""
    sizes: dict[float, list[float]] = defaultdict(list)
    for op, seconds in rows:
        sizes[float(elements(op))].append(seconds)
    points, highest = [], 0.0
    for size in sorted(sizes):
        highest = max(highest, statistics.mean(sizes[size]))
        points.append([size, highest])
    return points


def fit_kernels(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the profile's kernel table."""
    found = op_rows(records)
    table = {
        name: fit_row(rows, FITTED[name])
        if name in FITTED
        else {"points": points_of(rows), "count": len(rows)}
        for name, rows in found.items()
    }
    everything = [row for name, rows in found.items() if name != "alias" for row in rows]
    return {**table, OTHERS: fit_row(everything, ROOFLINE)}


def fit_row(rows: Rows, features: Sequence[str]) -> dict[str, Any]:
    """Return a family's row of the table: coefficients, and how well they fit."""
    coefficients, errors = fit_features(rows, features)
    sizes = sorted(abs(e) for e in errors)
    return {
        "coefficients": coefficients,
        "count": len(rows),
        "residual": statistics.median(sizes),
        "worst_residual": sizes[-1],
    }


def fit_messages(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return (latency in s, seconds per byte) of messages, fitted on relative errors."""
    from scipy.optimize import nnls

    measured = np.array([row["seconds"] for row in rows])
    sizes = np.array([float(row["bytes"]) for row in rows])
    table = np.stack((np.ones_like(sizes), sizes), 1)
    scale = table.max(0)
    found, _ = nnls(table / scale / measured[:, None], np.ones(len(measured)))
    return [float(v) for v in found / scale]


def fit_collectives(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return measured points per (op, ranks), non-decreasing in bytes."""
    found: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for same in _each(records, "collectives"):
        row = _quietest(same)
        found[row["op"], row["ranks"]][float(row["bytes"])] = row["seconds"]
    table = []
    for (op, ranks), points in found.items():
        lowest, rising = math.inf, []
        for size in sorted(points, reverse=True):  # what disturbs only adds; more bytes take longer
            lowest = min(lowest, points[size])
            rising.append([size, lowest])
        table.append({"op": op, "ranks": ranks, "points": rising[::-1]})
    return table


def blocking_share(overlap: Mapping[str, float]) -> float:
    """Return the share of a communication that compute has to wait for, 0 to 1.

    That is the processor time that it takes: with every core computing, none is left for it.
    """
    return min(1.0, overlap["processor_s"] / overlap["seconds"])


def contention(alone: Mapping[str, float], together: Mapping[str, float]) -> dict[str, float]:
    """Return the time of a rank alone over that of one among busy ranks, never above 1."""
    rates = {"compute": "flops_per_s", "memory": "bytes_per_s"}
    return {what: min(1.0, together[rate] / alone[rate]) for what, rate in rates.items()}


def fit_links(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what so many ranks, all running at once, do to one another."""
    first = records[0]
    return {
        "collectives": fit_collectives(records),
        "issue_s": first["issue_s"],
        "blocking": blocking_share(first["overlap"]),
        "messages": fit_messages([_quietest(same) for same in _each(records, "messages")]),
    }


def fit_profile(worlds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the profile of a machine from the records of the ranks of every world.

    Kernels are those of the first world, the smallest.
    """
    records, *crowds = worlds
    first = records[0]
    peaks = {name: statistics.mean(r["peaks"][name] for r in records) for name in first["peaks"]}
    fingerprint = first.get("fingerprint", {})
    return {
        "name": "this-cpu",
        "kernels": fit_kernels(records),
        **fit_links(records),
        "peaks": peaks,
        "alone": contention(first["alone"], peaks),
        "cores": fingerprint.get("cores", 0),
        "crowds": {str(len(each)): fit_links(each) for each in crowds},
        "provenance": {
            "date": datetime.now(UTC).date().isoformat(),
            "ranks": len(records),
            "measurements": sum(
                len(r["ops"]) + len(r["collectives"]) for each in worlds for r in each
            ),
            "seconds": sum(each[0]["seconds"] for each in worlds),
            "fingerprint": fingerprint,
        },
    }


def calibrate(path: Path | None = None, progress: Callable[[str], None] | None = None) -> Profile:
    """Measure this machine, write its profile to ``path``, and return it.

    Raises `RunError` where the ranks cannot be run.
    """
    from backends.launch import run_benchmarks

    worlds: list[list[dict[str, Any]]] = []
    for ranks in WORLDS:
        what = "communication" if worlds else "op kinds and communication"
        if progress:
            progress(f"measuring {what} on {ranks} ranks")
        worlds.append(run_benchmarks(ranks, TIMEOUT_S, ops=not worlds))
    target = path or default_path()
    write_atomically(target, json.dumps(fit_profile(worlds), indent=1))
    return read_profile(target)
