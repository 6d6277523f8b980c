"""CSV tables of published measurements: kernels, collectives, serving and training.

Two kinds of layout. Wide tables have a column per quantity. Long ones have ``class``, ``metric``,
``value`` and ``unit``, one figure a row. A figure that is a rate becomes its inverse, the seconds
per request or per token of the whole system; ratios (MFU, speedups, accepted lengths) are no times
and are left out, as are runs without one (out of memory).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simcore.errors import InputError
from simcore.measurement import Measurement
from validation.datasets import CHIPS, DTYPES, LAYOUTS, Row, implementation
from validation.importers.reading import bad, chip_name, open_text, positive

UNITS_S: dict[str, Callable[[float], float]] = {
    "s": lambda value: value,
    "ms": lambda value: value * 1e-3,
    "us": lambda value: value * 1e-6,
    "req/s": lambda value: 1 / value,
    "tok/s": lambda value: 1 / value,
    "tok/s/GPU": lambda value: 1 / value,
    "output tok/s (system)": lambda value: 1 / value,
}
RATIOS = frozenset({"%", "x", "tokens/step"})
SUBJECTS = {  # metric of a long table -> subject
    "prompt_time": "serving.ttft",
    "ttft_mean": "serving.ttft",
    "token_time": "serving.tpot",
    "itl_mean": "serving.itl",
    "e2e_time": "serving.e2e",
    "request_throughput": "serving.request_interval",
    "throughput": "serving.output_token_interval",
    "output_throughput": "serving.output_token_interval",
    "output_token_throughput": "serving.output_token_interval",
    "total_token_throughput": "serving.total_token_interval",
    "iteration_time": "training.step",
    "tokens_per_s_per_gpu": "training.token_per_gpu",
}
PRECISIONS = {**DTYPES, "half": "fp16", "float": "fp32"}
LONG = frozenset({"class", "hardware", "metric", "value", "unit", "source"})
NOT_SHAPE = LONG | {"framework", "precision"}
COLLECTIVES = {"alltoall": "all_to_all"}


def _known(row: Row, *without: str) -> dict[str, Any]:
    """Return the filled columns of a row, numbers as numbers."""
    return {
        name: _plain(text) for name, text in row.items() if text and name and name not in without
    }


def _plain(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _chip(hardware: str) -> dict[str, Any]:
    return {"device": hardware, "chip": CHIPS.get(hardware) or chip_name(hardware)}


def _column(row: Row, name: str, where: str) -> float:
    return positive(row[name], name, where)


# -- kernels -------------------------------------------------------------------------------------


def _kernel(*families: str) -> Callable[[Row, str], Iterator[Measurement]]:
    def read(row: Row, where: str) -> Iterator[Measurement]:
        for name in families:
            layout = LAYOUTS[name]
            if not layout.keep(row):
                continue
            try:
                shape: dict[str, Any] = dict(layout.shape(row))
            except ValueError as error:
                raise bad(where, str(error)) from None
            dtype = row[layout.dtype]
            shape |= {"dtype": DTYPES.get(dtype, dtype), "implementation": implementation(row)}
            time_s = _column(row, layout.latency_ms, where) * 1e-3
            yield Measurement(name, shape, (time_s,), _chip(row["hardware"]), row["source"])

    return read


# -- long tables ---------------------------------------------------------------------------------


def _long(row: Row, where: str) -> Iterator[Measurement]:
    unit = row["unit"]
    if unit in RATIOS:
        return
    if unit not in UNITS_S:
        raise bad(where, f"unit {unit!r} is none of {', '.join(UNITS_S)}")
    time_s = UNITS_S[unit](_column(row, "value", where))
    subject, shape = (
        _collective(row, where) if row["class"] == "collective" else _system(row, where)
    )
    yield Measurement(subject, shape, (time_s,), _chip(row["hardware"]), row["source"])


def _collective(row: Row, where: str) -> tuple[str, dict[str, Any]]:
    """Return a collective's shape, or that of an expert dispatch or combine."""
    load, _, amount = row["batch_or_concurrency"].partition("=")
    library, _, kernel = row["framework"].partition(" / ")
    if load == "message_bytes":
        op = row["metric"].removesuffix(" latency")
        shape = {
            "op": COLLECTIVES.get(op, op),
            "bytes": positive(amount, load, where),
            "ranks": _column(row, "n_gpus", where),
            "dtype": PRECISIONS.get(row["precision"], row["precision"]),
            "implementation": kernel.lower(),
        }
        return "collective", shape
    try:
        details = json.loads(row["extra"])
        shape = {
            "op": row["metric"].removesuffix("_us").removesuffix("_avg_t"),
            "tokens": positive(amount, load, where),
            "hidden": float(details["hidden_size"]),
            "experts": float(details["num_experts"]),
            "experts_per_token": float(details["num_topk"]),
            "nodes": float(row["n_gpus"].split()[0]),
            "implementation": re.sub(r"\s*\(.*", "", library).lower().replace(" ", "-"),
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise bad(where, f"neither message_bytes nor an expert exchange ({error!r:.60})") from None
    return "expert_exchange", shape


def _system(row: Row, where: str) -> tuple[str, dict[str, Any]]:
    """Return a serving or training figure's subject and what its row says of the run."""
    if row["metric"] not in SUBJECTS:
        raise bad(where, f"metric {row['metric']!r} is none of {', '.join(SUBJECTS)}")
    names = {"implementation": row.get("framework", ""), "dtype": row.get("precision", "")}
    return SUBJECTS[row["metric"]], {**_known(row, *NOT_SHAPE), **names}


# -- wide tables ---------------------------------------------------------------------------------


def _serving(row: Row, where: str) -> Iterator[Measurement]:
    times = {"silicon_ttft_ms": "serving.ttft", "silicon_tpot_ms": "serving.tpot"}
    shape = _known(row, "system", "source", "origin", *times)
    for column, subject in times.items():
        if row[column]:
            time_s = _column(row, column, where) * 1e-3
            yield Measurement(subject, shape, (time_s,), _chip(row["system"]), row["source"])


def _nanotron(row: Row, where: str) -> Iterator[Measurement]:
    if row["status"] == "Success":
        time_s = 1 / _column(row, "tok/s/gpu", where)
        shape = _known(row, "tok/s/gpu", "source", "status", "mfu")
        machine = _chip("h100_sxm")  # the only chip of this layout's source
        yield Measurement("training.token_per_gpu", shape, (time_s,), machine, row["source"])


def _megatron(row: Row, where: str) -> Iterator[Measurement]:
    column = "iter_time_s_median_after_warmup"
    if row[column]:
        shape = _known(row, "platform", "source", column, "iter_time_s_min", "iter_time_s_max")
        machine = {"device": row["platform"]}
        yield Measurement(
            "training.step", shape, (_column(row, column, where),), machine, row["source"]
        )


@dataclass(frozen=True, slots=True)
class Table:
    """A layout: the columns that tell it, and how a row becomes measurements."""

    columns: frozenset[str]
    read: Callable[[Row, str], Iterator[Measurement]]


_KERNEL = frozenset({"hardware", "framework", "kernel_source", "source"})
TABLES: dict[str, Table] = {
    "gemm": Table(_KERNEL | {"gemm_dtype", "m", "n", "k", "latency"}, _kernel("matmul")),
    "attention": Table(
        _KERNEL | {"phase", "attn_dtype", "kv_cache_dtype", "batch_size", "isl", "kv_len"}
        | {"num_heads", "num_key_value_heads", "head_dim", "window_size", "latency_ms"},
        _kernel("attention_prefill", "attention_decode"),
    ),
    "moe": Table(
        _KERNEL | {"moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts"}
        | {"moe_tp_size", "moe_ep_size", "distribution", "latency"},
        _kernel("moe"),
    ),
    "long": Table(LONG, _long),
    "serving": Table(
        frozenset({"system", "silicon_ttft_ms", "silicon_tpot_ms", "source"}), _serving
    ),
    "nanotron": Table(frozenset({"tok/s/gpu", "tp_mode", "status", "source"}), _nanotron),
    "megatron": Table(
        frozenset({"platform", "iter_time_s_median_after_warmup", "source"}), _megatron
    ),
}  # fmt: skip


def table_of(first_line: str) -> str | None:
    """Return the name of the layout whose columns a CSV file's first line has, else None."""
    columns = set(next(csv.reader([first_line.strip()]), []))
    return next((name for name, table in TABLES.items() if table.columns <= columns), None)


def read_table(path: Path) -> list[Measurement]:
    """Return the measurements of a CSV file of any layout in ``TABLES``, read row by row."""
    found: list[Measurement] = []
    with open_text(path) as stream:
        first = stream.readline()
        name = table_of(first)
        if name is None:
            raise InputError(f"{path.name}: its columns fit none of {', '.join(TABLES)}.")
        columns = next(csv.reader([first.strip()]))
        rows = csv.DictReader(stream, columns)
        try:
            for number, row in enumerate(rows, start=2):
                found += TABLES[name].read(_whole(row, columns, path, number), _at(path, number))
        except csv.Error as error:
            raise bad(_at(path, rows.line_num + 1), f"not CSV ({error})") from None
    return found


def _at(path: Path, number: int) -> str:
    return f"{path.name}, row {number}"


def _whole(row: Mapping[Any, Any], columns: list[str], path: Path, number: int) -> Row:
    if None in row or None in row.values():
        raise bad(_at(path, number), f"a row of {len(columns)} columns is expected")
    return row
