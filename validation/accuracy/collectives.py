"""Scores of collectives: fitted on some sizes or chips, scored on the others.

Two splits: every other size (each size is scored once, by the fit that had not seen it), and each
chip in turn (a chip whose generation of links was measured on another chip takes that one's
coefficients, else those of the others).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwmodels.collectives.algorithms import bus_bytes
from hwmodels.collectives.uncertainty import SIZE_CLASSES
from validation.accuracy.elsewhere import published_table
from validation.accuracy.nccl_fit import Calls, fit, links_of, predict, read_calls
from validation.accuracy.scores import Score, pair_order, score
from validation.accuracy.table import Table, percent

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
TARGETS = {"sizes": 0.10, "chips": 0.15, "small": 0.25, "large": 0.08}
LARGE_BYTES = 2.0**29  # the 8-GPU all_reduce that serving and training lean on
COLUMNS = ("op", "size", "calls", "median", "90 %")


def halves(calls: Calls) -> Mask:
    """Return which calls lie in the first half of the sizes: every other power of two."""
    return np.asarray(np.round(np.log2(calls.size)) % 2 == 0)


def by_sizes(calls: Calls) -> Array:
    """Return seconds predicted for each call by a fit on the other sizes of its link."""
    found = np.empty(len(calls))
    links = links_of(calls.chip)
    link = np.array([links[chip] for chip in calls.chip])
    first = halves(calls)
    for name in np.unique(link):
        for half in (first, ~first):
            held = half & (link == name)
            known = ~half & (link == name)
            found[held] = predict(calls.where(held), fit(calls.where(known)))
    return found


def by_chips(calls: Calls, generations: bool = False) -> Array:
    """Return seconds predicted for each call by a fit on other chips.

    ``generations``: on other generations of links alone.
    """
    found = np.empty(len(calls))
    links = links_of(calls.chip)
    link = np.array([links[chip] for chip in calls.chip])
    for chip in np.unique(calls.chip):
        held = calls.chip == chip
        kin = ~held & (link == links[chip])
        known = kin if kin.any() and not generations else link != links[chip]
        found[held] = predict(calls.where(held), fit(calls.where(known)))
    return found


# -- baselines -----------------------------------------------------------------------------------


def _series(calls: Calls) -> list[NDArray[np.intp]]:
    """Return the rows of every measured curve, by rising size."""
    columns = (calls.chip, calls.version, calls.op, calls.ranks, calls.dtype)
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, key in enumerate(zip(*columns, strict=True)):
        groups.setdefault(key, []).append(index)
    return [np.array(sorted(rows, key=lambda i: calls.size[i])) for rows in groups.values()]


def neighbour_size(calls: Calls) -> Array:
    """Return seconds at the bus bandwidth of the next smaller size (of the next one, below all)."""
    found = np.empty(len(calls))
    for rows in _series(calls):
        other = np.concatenate([rows[1:2], rows[:-1]])
        found[rows] = calls.seconds[other] * calls.size[rows] / calls.size[other]
    return found


def interpolated(calls: Calls) -> Array:
    """Return seconds read from the same curve's other half of the sizes, log by log.

    The ends hold: flat below, the same bandwidth above.
    """
    found, first = np.empty(len(calls)), halves(calls)
    for rows in _series(calls):
        for half in (first, ~first):
            held, known = rows[half[rows]], rows[~half[rows]]
            at, ends = np.log(calls.size[held]), np.log(calls.size[known])
            inside = np.interp(at, ends, np.log(calls.seconds[known]))
            found[held] = np.exp(inside + np.maximum(at - ends[-1], 0.0))
    return found


def constant_bandwidth(calls: Calls) -> Array:
    """Return seconds at one bus bandwidth per chip: the median of the large calls not asked for."""
    moved = np.empty(len(calls))
    for op in np.unique(calls.op):
        rows = calls.op == op
        moved[rows] = bus_bytes(str(op), calls.size[rows], calls.ranks[rows])
    found = np.empty(len(calls))
    first, large = halves(calls), size_class(calls.size) == "large"
    for chip in np.unique(calls.chip):
        for half in (first, ~first):
            held, known = half & (calls.chip == chip), ~half & (calls.chip == chip) & large
            found[held] = moved[held] / np.median(moved[known] / calls.seconds[known])
    return found


def nearest_chip(calls: Calls) -> Array:
    """Return the seconds that the same call took on the nearest other chip, NaN where none did.

    Nearest: of the same generation of links, else the first one by name.
    """
    links = links_of(calls.chip)
    table: dict[tuple[object, ...], list[float]] = {}
    for i, chip in enumerate(calls.chip):
        key = (chip, calls.op[i], calls.ranks[i], calls.dtype[i], calls.size[i])
        table.setdefault(key, []).append(float(calls.seconds[i]))
    near = {
        chip: min((c for c in links if c != chip), key=lambda c: (links[c] != links[chip], c))
        for chip in links
    }
    found = np.full(len(calls), np.nan)
    for i, chip in enumerate(calls.chip):
        key = (near[chip], calls.op[i], calls.ranks[i], calls.dtype[i], calls.size[i])
        if key in table:
            found[i] = np.median(table[key])
    return found


def version_spread(calls: Calls) -> Array:
    """Return the median seconds of the same call under other versions, NaN where there is none.

    What they differ by is the floor of a figure that does not name the version.
    """
    columns = (calls.chip, calls.op, calls.ranks, calls.dtype, calls.size)
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, key in enumerate(zip(*columns, strict=True)):
        groups.setdefault(key, []).append(index)
    found = np.full(len(calls), np.nan)
    for rows in groups.values():
        for row in rows:
            others = [float(calls.seconds[i]) for i in rows if i != row]
            found[row] = np.median(others) if others else np.nan
    return found


# -- tables --------------------------------------------------------------------------------------


def size_class(size: Array) -> NDArray[np.str_]:
    """Return the class of every size."""
    return np.array(list(SIZE_CLASSES))[np.searchsorted(list(SIZE_CLASSES.values()), size)]


def _cells(calls: Calls) -> list[tuple[str, str, Mask]]:
    classes = size_class(calls.size)
    every = np.ones(len(calls), dtype=np.bool_)
    found = [("all", "all", every)]
    found += [("all", name, classes == name) for name in SIZE_CLASSES]
    for op in np.unique(calls.op):
        here = calls.op == op
        found.append((str(op), "all", here))
        found += [(str(op), name, here & (classes == name)) for name in SIZE_CLASSES]
    return found


def _median(predicted: Array, calls: Calls, rows: Mask) -> str:
    known = rows & ~np.isnan(predicted)
    if not known.any():
        return "-"
    return percent(score(predicted[known], calls.seconds[known]).median)


def _table(title: str, calls: Calls, own: Array, beside: Mapping[str, Array], note: str) -> Table:
    rows = []
    for op, name, mask in _cells(calls):
        found = score(own[mask], calls.seconds[mask])
        others = [_median(each, calls, mask) for each in beside.values()]
        rows.append((op, name, found.rows, percent(found.median), percent(found.p90), *others))
    return Table(title, (*COLUMNS, *beside), tuple(rows), (note,))


def _missed(what: str, found: Score, target: float) -> tuple[str, ...]:
    if found.median <= target:
        return ()
    return (f"collectives, {what}: median {percent(found.median)}, target {percent(target)}.",)


def large_all_reduce(calls: Calls) -> Mask:
    """Return which calls are the half-precision all_reduce of 512 MiB on 8 GPUs."""
    half = np.isin(calls.dtype, ("fp16", "bf16"))
    op = calls.op == "all_reduce"
    return np.asarray(half & op & (calls.ranks == 8) & (calls.size == LARGE_BYTES))


def chips_table(calls: Calls, own: Array) -> Table:
    """Return the scores of each chip held out."""
    beside = {
        "nearest chip's table": nearest_chip(calls),
        "one bandwidth": constant_bandwidth(calls),
        "between versions": version_spread(calls),
    }
    links, small = links_of(calls.chip), size_class(calls.size) == "small"
    big, rows = large_all_reduce(calls), []
    missed: tuple[str, ...] = ()
    for chip in links:
        mask = calls.chip == chip
        found = score(own[mask], calls.seconds[mask])
        latency = score(own[mask & small], calls.seconds[mask & small])
        large = score(own[mask & big], calls.seconds[mask & big])
        others = [_median(each, calls, mask) for each in beside.values()]
        figures = (found.median, found.p90, latency.median, large.median)
        rows.append((chip, found.rows, *(percent(x) for x in figures), *others))
        missed += _missed(f"{chip} held out", found, TARGETS["chips"])
        missed += _missed(f"{chip} held out, small messages", latency, TARGETS["small"])
        missed += _missed(f"{chip} held out, all_reduce of 512 MiB", large, TARGETS["large"])
    columns = ("chip", "calls", "median", "90 %", "small messages", "all_reduce 512 MiB", *beside)
    note = (
        "NCCL, each chip held out in turn: an H100 takes the coefficients of H200 and the reverse, "
        "an A100 those of both. Targets: median 15 %, small messages (up to 128 KiB) 25 %, "
        "half-precision all_reduce of 512 MiB on 8 GPUs 8 %."
    )
    return Table("NCCL, other chips", columns, tuple(rows), (note,), missed)


def groups_table(calls: Calls, own: Array) -> Table:
    """Return the scores by group size, dtype and version of the library."""
    rows = []
    splits: tuple[tuple[str, Sequence[object], Callable[[object], Mask]], ...] = (
        ("ranks", np.unique(calls.ranks).tolist(), lambda v: np.asarray(calls.ranks == v)),
        ("dtype", np.unique(calls.dtype).tolist(), lambda v: np.asarray(calls.dtype == v)),
        ("NCCL", np.unique(calls.version).tolist(), lambda v: np.asarray(calls.version == v)),
        ("chip", np.unique(calls.chip).tolist(), lambda v: np.asarray(calls.chip == v)),
    )
    for what, values, where in splits:
        for value in values:
            mask = where(value)
            found = score(own[mask], calls.seconds[mask])
            rows.append((what, str(value), found.rows, percent(found.median), percent(found.p90)))
    columns = ("by", "value", "calls", "median", "90 %")
    return Table("NCCL, held-out sizes by group", columns, tuple(rows))


def residual_quantiles(
    calls: Calls, predicted: Array, symmetric: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Return the 10th and 90th percentile of log(measured / predicted) by op and size class.

    ``symmetric``: the 80th percentile of its absolute value, either way: a generation's bias says
    nothing about that of the next one.
    """
    residual, classes = np.log(calls.seconds / predicted), size_class(calls.size)
    found: dict[str, dict[str, list[float]]] = {}
    for op in ("any", *np.unique(calls.op).tolist()):
        rows = np.ones(len(calls), dtype=np.bool_) if op == "any" else calls.op == op
        found[op] = {}
        for name in SIZE_CLASSES:
            here = residual[rows & (classes == name)]
            wide = float(np.quantile(np.abs(here), 0.8))
            edges = [-wide, wide] if symmetric else np.quantile(here, (0.1, 0.9)).tolist()
            found[op][name] = [float(f"{edge:.4g}") for edge in edges]
    return found


def covered(
    calls: Calls, predicted: Array, quantiles: Mapping[str, Mapping[str, Sequence[float]]]
) -> tuple[float, float]:
    """Return the share of calls inside their interval, and its mean width over the prediction."""
    residual, classes = np.log(calls.seconds / predicted), size_class(calls.size)
    edges = np.array([quantiles[op][name] for op, name in zip(calls.op, classes, strict=True)])
    inside = (residual >= edges[:, 0]) & (residual <= edges[:, 1])
    return float(np.mean(inside)), float(np.mean(np.exp(edges[:, 1]) - np.exp(edges[:, 0])))


def intervals_table(calls: Calls, sizes: Array, chips: Array) -> Table:
    """Return how many calls lie in 80 % intervals that were taken from other calls."""
    first, hopper = halves(calls), calls.chip != "a100_sxm"
    rows = []
    missed: tuple[str, ...] = ()
    for what, predicted, part, symmetric in (
        ("other sizes", sizes, first, False),
        ("another generation", chips, hopper, True),
    ):
        for held in (part, ~part):
            quantiles = residual_quantiles(calls.where(~held), predicted[~held], symmetric)
            share, width = covered(calls.where(held), predicted[held], quantiles)
            rows.append((what, int(held.sum()), percent(share), percent(width)))
            if not 0.7 <= share <= 0.9:
                missed += (f"collectives, 80 % interval, {what}: holds {percent(share)}.",)
    note = (
        "Intervals from the residuals of one half of the held-out calls, scored on the other half: "
        "halves by size, and by generation of links."
    )
    columns = ("split", "calls", "inside", "mean width")
    return Table("NCCL, 80 % intervals", columns, tuple(rows), (note,), missed)


def order_table(calls: Calls, sizes: Array, chips: Array) -> Table:
    """Return the share of pairs of calls whose order is predicted right."""
    rows = []
    missed: tuple[str, ...] = ()
    for what, predicted in (("held-out sizes", sizes), ("held-out chips", chips)):
        right = pair_order(predicted, calls.seconds)
        rows.append((what, "any two calls", percent(right)))
        if right < 0.95:
            missed += (f"collectives, order of calls, {what}: {percent(right)}, target 95 %.",)
    note = "Of pairs that differ by over 10 % when measured."
    columns = ("split", "pairs", "ordered right")
    return Table("NCCL, order", columns, tuple(rows), (note,), missed)


def nccl_tables(calls: Calls) -> list[Table]:
    """Return the tables on NCCL."""
    sizes, chips, generations = by_sizes(calls), by_chips(calls), by_chips(calls, True)
    beside = {
        "its own table, interpolated": interpolated(calls),
        "nearest size's bandwidth": neighbour_size(calls),
        "one bandwidth": constant_bandwidth(calls),
        "between versions": version_spread(calls),
    }
    note = (
        "NCCL, every other size held out, fitted per generation of links. Target: median 10 %. "
        "Small: up to 128 KiB; middle: up to 32 MiB."
    )
    own = _table("NCCL, other sizes", calls, sizes, beside, note)
    total = score(sizes, calls.seconds)
    own = Table(
        own.title, own.columns, own.rows, own.notes, _missed("sizes", total, TARGETS["sizes"])
    )
    return [
        own,
        groups_table(calls, sizes),
        chips_table(calls, chips),
        intervals_table(calls, sizes, generations),
        order_table(calls, sizes, chips),
    ]


def collective_tables(data: Path) -> list[Table]:
    """Return the accuracy of collectives. Raises `InputError` where ``data`` lacks a file."""
    from validation.accuracy.engines import engine_tables

    folder = data / "collectives"
    nccl = nccl_tables(read_calls(folder / "nccl.csv"))
    return [*nccl, *engine_tables(folder), published_table()]
