"""Scores of the engines' own all_reduce and of expert dispatch, and of which of two is faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from validation.accuracy.engines_fit import (
    LIMIT_BYTES,
    EngineCall,
    fit_engine,
    fit_phase,
    predict_engine,
    predict_experts,
    read_engine_calls,
    read_expert_calls,
)
from validation.accuracy.nccl_fit import read_calls
from validation.accuracy.scores import WORTH, score
from validation.accuracy.table import Table, percent

Array = NDArray[np.float64]
Fitted = TypeVar("Fitted")
COLUMNS = ("what", "calls", "sizes: median", "90 %", "chips: median", "90 %", "nearest chip")


def seconds_of(calls: Sequence[EngineCall]) -> Array:
    """Return the measured seconds."""
    return np.array([call.seconds for call in calls])


def held_out(
    calls: Sequence[EngineCall],
    part: Callable[[EngineCall], object],
    fit: Callable[[Sequence[EngineCall]], Fitted],
    predict: Callable[[Fitted, Sequence[EngineCall]], Array],
) -> Array:
    """Return seconds of every call from a fit on the calls of other parts; NaN with one part."""
    labels = [part(call) for call in calls]
    found = np.full(len(calls), np.nan)
    for label in set(labels):
        held = [i for i, each in enumerate(labels) if each == label]
        known = [call for call, each in zip(calls, labels, strict=True) if each != label]
        if known:
            found[held] = predict(fit(known), [calls[i] for i in held])
    return found


def odd_size(call: EngineCall) -> bool:
    """Return whether the call's size is an odd power of two (rounded)."""
    return bool(round(np.log2(call.size)) % 2)


def chip_of(call: EngineCall) -> str:
    """Return the call's chip."""
    return call.chip


def nearest_chip(calls: Sequence[EngineCall]) -> Array:
    """Return the seconds of the same call on another chip (the last by name), NaN without."""
    table: dict[object, dict[str, float]] = {}
    for call in calls:
        key = (call.version, call.size, call.ranks, call.eager, call.routing, call.sms)
        table.setdefault(key, {})[call.chip] = call.seconds
    found = []
    for call in calls:
        key = (call.version, call.size, call.ranks, call.eager, call.routing, call.sms)
        others = [chip for chip in sorted(table[key]) if chip != call.chip]
        found.append(table[key][others[-1]] if others else np.nan)
    return np.array(found)


def _row(name: str, calls: Sequence[EngineCall], sizes: Array, chips: Array) -> tuple[object, ...]:
    measured = seconds_of(calls)
    cells: list[object] = [name, len(calls)]
    for predicted in (sizes, chips):
        found = score(predicted, measured)
        cells += [percent(found.median), percent(found.p90)]
    near = nearest_chip(calls)
    known = ~np.isnan(near)
    cells.append(percent(score(near[known], measured[known]).median) if known.any() else "-")
    return tuple(cells)


def engines_table(by_engine: dict[str, list[EngineCall]]) -> Table:
    """Return the scores of the engines' all_reduce, graph and eager."""
    rows = []
    for name, every in by_engine.items():
        calls = [call for call in every if call.size <= LIMIT_BYTES[name]]
        sizes = held_out(calls, odd_size, partial(fit_engine, name), predict_engine)
        chips = held_out(calls, chip_of, partial(fit_engine, name), predict_engine)
        for eager, label in ((False, "graph"), (True, "eager")):
            place = [i for i, call in enumerate(calls) if call.eager == eager]
            if place:
                part = [calls[i] for i in place]
                rows.append(_row(f"{name}, {label}", part, sizes[place], chips[place]))
    note = (
        "All versions of an engine together (sglang: its newer kernel, and that up to 0.5.10). "
        "Calls that fit the engine's own buffer; beyond it NCCL runs. Eager calls below a few MiB "
        "last as long as the host needs, which no datasheet tells: the A100 machines' took twice "
        "as long."
    )
    return Table("Engines' own all_reduce", COLUMNS, tuple(rows), (note,))


def experts_table(by_phase: dict[str, list[EngineCall]]) -> Table:
    """Return the scores of DeepEP's dispatch and combine."""
    rows = []
    for name, calls in by_phase.items():
        fit, predict = partial(fit_phase, name), partial(predict_experts, name)
        sizes = held_out(calls, odd_size, fit, predict)
        chips = held_out(calls, chip_of, fit, predict)
        rows.append(_row(name, calls, sizes, chips))
    note = "DeepEP on one node of 8: token counts held out by every other power of two, then chips."
    return Table("Expert dispatch and combine", COLUMNS, tuple(rows), (note,))


def choice_table(folder: Path, by_engine: dict[str, list[EngineCall]]) -> Table:
    """Return how often the faster of two all_reduce implementations is known.

    Pairs of the same chip, ranks and bytes that differ by over 10 %; each predicted by a fit on
    other sizes.
    """
    from validation.accuracy.collectives import by_sizes

    nccl = read_calls(folder / "nccl.csv")
    predicted = by_sizes(nccl)
    found: dict[tuple[object, ...], dict[str, list[tuple[float, float]]]] = {}
    for i in np.flatnonzero((nccl.op == "all_reduce") & (nccl.dtype == "fp16")).tolist():
        key = (str(nccl.chip[i]), int(nccl.ranks[i]), float(nccl.size[i]))
        pair = (float(predicted[i]), float(nccl.seconds[i]))
        found.setdefault(key, {}).setdefault("nccl", []).append(pair)
    for name, calls in by_engine.items():
        sizes = held_out(calls, odd_size, partial(fit_engine, name), predict_engine)
        for call, own in zip(calls, sizes, strict=True):
            label = f"{name}, eager" if call.eager else name
            key = (call.chip, call.ranks, call.size)
            found.setdefault(key, {}).setdefault(label, []).append((float(own), call.seconds))
    right: dict[str, list[bool]] = {"nccl and an engine": [], "two engines": []}
    for each in found.values():
        medians = {k: np.median(np.array(v), axis=0) for k, v in each.items()}
        for a, b in combinations(sorted(medians), 2):
            ours, real = np.log(medians[a] / medians[b])
            if abs(real) > np.log(1 + WORTH):
                kind = "nccl and an engine" if "nccl" in (a, b) else "two engines"
                right[kind].append(bool((ours > 0) == (real > 0)))
    shares = {kind: float(np.mean(answers)) for kind, answers in right.items()}
    rows = tuple((kind, len(right[kind]), percent(share)) for kind, share in shares.items())
    missed = tuple(
        f"collectives, order of {kind}: {percent(share)}, target 95 %."
        for kind, share in shares.items()
        if share < 0.95
    )
    note = "Median over versions; pairs of the same chip, ranks and bytes that differ by over 10 %."
    return Table("Which all_reduce is faster", ("of", "pairs", "known"), rows, (note,), missed)


def engine_tables(folder: Path) -> list[Table]:
    """Return the tables on engines and experts from the folder of collectives' measurements."""
    by_engine = read_engine_calls(folder / "custom_allreduce.csv")
    by_phase = read_expert_calls(folder / "moe_all_to_all.csv")
    return [engines_table(by_engine), choice_table(folder, by_engine), experts_table(by_phase)]
