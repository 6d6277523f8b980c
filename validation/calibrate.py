"""Calibration of the machine at hand: microbenchmarks on every rank, fitted to a profile.

Kinds whose time follows one size keep their measured points; products and attention are fitted
by non-negative least squares on relative errors, over physical features (start-up, FLOPs, bytes).
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.kernels import FEATURES, elements, family
from hwmodels.profile import Profile, default_path, read_profile, write_atomically
from simcore.ops import Op

RANKS = 2
TIMEOUT_S = 600.0
PRODUCT = ("one", "flops", "bytes", "packed_weights")
ATTENTION = ("one", "flops", "bytes", "vector", "heads", "queries", "flops_per_block")
FITTED: dict[str, tuple[str, ...]] = {
    "matmul.nt": PRODUCT,
    "matmul.nn": PRODUCT,
    "matmul.tn": PRODUCT,
    "attention": ATTENTION,
    "attention_backward": ATTENTION,
    "attention.cached": ATTENTION,
}
"""Families with more than one size; every other family keeps its points."""

Rows = Sequence[tuple[Op, float]]


def op_rows(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[Op, float]]]:
    """Return (op, seconds) by family: the quietest sample of each rank, averaged over ranks.

    Other work on the machine only ever adds time.
    """
    found: dict[str, list[tuple[Op, float]]] = defaultdict(list)
    for same in zip(*(record["ops"] for record in records), strict=True):
        row = same[0]
        op = Op(row["kind"], row["dims"], "fp32", tuple(row["reads"]), (), attrs=row["attrs"])
        quietest = [min(each["samples"]) for each in same]
        found[family(op)].append((op, statistics.mean(quietest)))
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
    table: dict[str, Any] = {}
    for name, rows in op_rows(records).items():
        if name not in FITTED:
            table[name] = {"points": points_of(rows), "count": len(rows)}
            continue
        coefficients, errors = fit_features(rows, FITTED[name])
        sizes = sorted(abs(e) for e in errors)
        table[name] = {
            "coefficients": coefficients,
            "count": len(rows),
            "residual": statistics.median(sizes),
            "worst_residual": sizes[-1],
        }
    return table


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
    for same in zip(*(record["collectives"] for record in records), strict=True):
        samples = [seconds for each in same for seconds in each["samples"]]
        row = same[0]
        found[row["op"], row["ranks"]][float(row["bytes"])] = statistics.median(samples)
    table = []
    for (op, ranks), points in found.items():
        highest, rising = 0.0, []
        for size in sorted(points):
            highest = max(highest, points[size])
            rising.append([size, highest])
        table.append({"op": op, "ranks": ranks, "points": rising})
    return table


def blocking_share(overlap: Mapping[str, float]) -> float:
    """Return the share of a communication that compute had to wait for, 0 to 1."""
    extra = overlap["both_s"] - overlap["compute_s"]
    return min(1.0, max(0.0, extra / overlap["communication_s"]))


def contention(alone: Mapping[str, float], together: Mapping[str, float]) -> dict[str, float]:
    """Return the time of a rank alone over that of one among busy ranks, never above 1."""
    rates = {"compute": "flops_per_s", "memory": "bytes_per_s"}
    return {what: min(1.0, together[rate] / alone[rate]) for what, rate in rates.items()}


def fit_profile(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the profile of a machine from the records of its two ranks."""
    first = records[0]
    kernels = fit_kernels(records)
    peaks = {name: statistics.mean(r["peaks"][name] for r in records) for name in first["peaks"]}
    return {
        "name": "this-cpu",
        "kernels": kernels,
        "collectives": fit_collectives(records),
        "issue_s": first["issue_s"],
        "blocking": blocking_share(first["overlap"]),
        "messages": fit_messages(first["messages"]),
        "peaks": peaks,
        "alone": contention(first["alone"], peaks),
        "provenance": {
            "date": datetime.now(UTC).date().isoformat(),
            "ranks": len(records),
            "measurements": sum(len(r["ops"]) for r in records),
            "seconds": first["seconds"],
            "fingerprint": first.get("fingerprint", {}),
        },
    }


def calibrate(path: Path | None = None, progress: Callable[[str], None] | None = None) -> Profile:
    """Measure this machine, write its profile to ``path``, and return it.

    Raises `RunError` where the ranks cannot be run.
    """
    if progress:
        progress(f"measuring op kinds and collectives on {RANKS} ranks")
    from backends.launch import run_benchmarks

    table = fit_profile(run_benchmarks(RANKS, TIMEOUT_S))
    target = path or default_path()
    write_atomically(target, json.dumps(table, indent=1))
    return read_profile(target)
