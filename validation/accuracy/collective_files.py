"""Writes the coefficients of collectives that the project ships, from the calibration data.

    python -m validation.accuracy.collective_files DATA DATE

Each set stands with its source, the date, the number of samples and its errors on calls that the
fit had not seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.collectives import experts, nccl, peer_memory
from validation.accuracy.collectives import by_chips, by_sizes, residual_quantiles
from validation.accuracy.engines import chip_of, held_out, odd_size, seconds_of
from validation.accuracy.engines_fit import (
    EngineCall,
    fit_engine,
    fit_phase,
    predict_engine,
    predict_experts,
    read_engine_calls,
    read_expert_calls,
)
from validation.accuracy.nccl_fit import Calls, fit, links_of, predict, read_calls, to_table
from validation.accuracy.scores import score

Array = NDArray[np.float64]
SOURCE = "ai-dynamo/aiconfigurator (Apache-2.0), measured on {chips}; {versions}"


def _six(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers with six digits, counts exactly, nested tables alike; terms of 0 left out."""
    return {key: _rounded(value) for key, value in values.items() if value}


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _six(value)
    return value if value == int(value) else float(f"{value:.6g}")


def _errors(predicted: Array, measured: Array) -> dict[str, float]:
    known = ~np.isnan(predicted)
    found = score(predicted[known], measured[known])
    return {"median": round(found.median, 4), "p90": round(found.p90, 4)}


def _source(chips: Sequence[str], versions: Sequence[str]) -> str:
    return SOURCE.format(chips=", ".join(sorted(set(chips))), versions=", ".join(sorted(versions)))


def write_nccl(calls: Calls, date: str) -> None:
    """Write NCCL's coefficients, one set per generation of links and one of all."""
    table = json.loads(nccl.DATA.read_text(encoding="utf-8"))
    links = links_of(calls.chip)
    link = np.array([links[chip] for chip in calls.chip])
    sizes, chips, generations = by_sizes(calls), by_chips(calls), by_chips(calls, True)
    sets = {}
    for name in (*np.unique(link).tolist(), "all"):
        rows = np.ones(len(calls), dtype=np.bool_) if name == "all" else link == name
        here = calls.where(rows)
        protocols = fit(here)
        if not any(library.in_switch for library in map(nccl.on_link, set(link[rows])) if library):
            del protocols["nvls"]  # nothing measured
        versions = [f"NCCL {v}" for v in np.unique(here.version)]
        sets[name] = {
            "source": _source(here.chip.tolist(), versions),
            "date": date,
            "samples": len(here),
            "residual": _errors(predict(here, protocols), here.seconds),
            "held_out_sizes": _errors(sizes[rows], here.seconds),
            "held_out_chips": _errors(chips[rows], here.seconds),
            "held_out_generations": _errors(generations[rows], here.seconds),
            "never_taken": _never_taken(here, protocols),
            "protocols": to_table(protocols),
        }
    table["coefficients"] = sets
    table["intervals"] = {
        "measured": residual_quantiles(calls, sizes),
        "borrowed": residual_quantiles(calls, generations, symmetric=True),
    }
    _write(nccl.DATA, table)


def _never_taken(calls: Calls, protocols: Mapping[str, nccl.Protocol]) -> list[str]:
    """Return the protocols without which the prices are the same: the search left their start."""
    own = predict(calls, protocols)
    without = {n: {k: p for k, p in protocols.items() if k != n} for n in protocols}
    return [name for name, rest in without.items() if np.array_equal(predict(calls, rest), own)]


def _row(calls: Sequence[EngineCall], own: Array, sizes: Array, chips: Array) -> dict[str, Any]:
    measured = seconds_of(calls)
    return {
        "source": _source([c.chip for c in calls], sorted({c.version for c in calls})),
        "samples": len(calls),
        "residual": _errors(own, measured),
        "held_out_sizes": _errors(sizes, measured),
        "held_out_chips": _errors(chips, measured),
    }


def write_engines(by_engine: Mapping[str, Sequence[EngineCall]], date: str) -> None:
    """Write the engines' coefficients."""
    rows = {}
    for name, calls in by_engine.items():
        engine = fit_engine(name, calls)
        sizes = held_out(calls, odd_size, partial(fit_engine, name), predict_engine)
        chips = held_out(calls, chip_of, partial(fit_engine, name), predict_engine)
        row = _row(calls, predict_engine(engine, calls), sizes, chips)
        rows[name] = {**row, "coefficients": _six(asdict(engine))}
    _write(peer_memory.DATA, {"date": date, "engines": rows})


def write_experts(by_phase: Mapping[str, Sequence[EngineCall]], date: str) -> None:
    """Write DeepEP's coefficients."""
    rows = {}
    for name, calls in by_phase.items():
        phase = fit_phase(name, calls)
        scores = [
            held_out(
                calls,
                part,
                partial(fit_phase, name),
                partial(predict_experts, name),
            )
            for part in (odd_size, chip_of)
        ]
        row = _row(calls, predict_experts(name, phase, calls), *scores)
        rows[name] = {**row, "coefficients": _six(asdict(phase))}
    _write(experts.DATA, {"date": date, "phases": rows})


def _write(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def write_collectives(data: Path, date: str) -> None:
    """Fit and write all files of collectives from the folder of the calibration data."""
    folder = data / "collectives"
    write_nccl(read_calls(folder / "nccl.csv"), date)
    nccl.read_again()  # the engines' fits take NCCL's new seconds
    write_engines(read_engine_calls(folder / "custom_allreduce.csv"), date)
    write_experts(read_expert_calls(folder / "moe_all_to_all.csv"), date)


if __name__ == "__main__":
    write_collectives(Path(sys.argv[1]), sys.argv[2])
