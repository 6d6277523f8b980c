"""Measured kernels from CSV files: one `Sample` per chip, library and dtype of a family."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simcore.errors import InputError

Array = NDArray[np.float64]
Row = Mapping[str, str]
DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
CHIPS = {"a100_sxm": "a100-sxm-80gb", "h100_sxm": "h100-sxm-80gb", "h200_sxm": "h200-sxm-141gb"}


@dataclass(frozen=True, slots=True)
class Sample:
    """Measured seconds of one family on one chip, by one library, in one dtype.

    ``shape``: the family's columns as arrays, ``seconds`` beside them.
    """

    family: str
    chip: str
    implementation: str
    dtype: str
    shape: Mapping[str, Array]
    seconds: Array
    source: str

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, chosen: NDArray[Any]) -> Sample:
        """Return the chosen rows (a mask or indices)."""
        shape = {name: column[chosen] for name, column in self.shape.items()}
        return Sample(
            self.family, self.chip, self.implementation, self.dtype, shape, self.seconds[chosen],
            self.source,
        )  # fmt: skip


def _matmul(row: Row) -> dict[str, float]:
    return {name: float(row[name]) for name in ("m", "n", "k")}


_HEADS = {
    "batch": "batch_size",
    "kv_len": "kv_len",
    "heads": "num_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "window": "window_size",
}


def _attention(row: Row) -> dict[str, float]:
    found = {name: float(row[column]) for name, column in _HEADS.items()}
    if row["phase"] == "context":
        found["seq_len"] = float(row["isl"])
    return {**found, "kv_bytes": 1.0 if row["kv_cache_dtype"] == "fp8" else 2.0}


def _moe(row: Row) -> dict[str, float]:
    name, _, alpha = row["distribution"].rpartition("_")
    return {
        "tokens": float(row["num_tokens"]),
        "hidden": float(row["hidden_size"]),
        "ffn": float(row["inter_size"]),
        "experts_per_token": float(row["topk"]),
        "experts": float(row["num_experts"]),
        "tp": float(row["moe_tp_size"]),
        "ep": float(row["moe_ep_size"]),
        "alpha": float(alpha) if name == "power_law" else 0.0,
    }


@dataclass(frozen=True, slots=True)
class Layout:
    """How one family's CSV files are read."""

    files: str
    dtype: str
    latency_ms: str
    shape: Callable[[Row], dict[str, float]]
    keep: Callable[[Row], bool] = lambda row: True


LAYOUTS: dict[str, Layout] = {
    "matmul": Layout("gemm_*.csv", "gemm_dtype", "latency", _matmul),
    "attention_prefill": Layout(
        "attention_*.csv", "attn_dtype", "latency_ms", _attention, lambda r: r["phase"] == "context"
    ),
    "attention_decode": Layout(
        "attention_*.csv", "attn_dtype", "latency_ms", _attention, lambda r: r["phase"] != "context"
    ),
    "moe": Layout("moe_*.csv", "moe_dtype", "latency", _moe),
}


def kernel_files(data: Path, family: str) -> list[Path]:
    """Return the files under ``data``/kernels that hold ``family``."""
    return sorted((data / "kernels").glob(LAYOUTS[family].files))


def kernel_samples(data: Path, family: str) -> list[Sample]:
    """Return the samples of ``family`` under ``data``/kernels. Raises `InputError` for none."""
    layout, files = LAYOUTS[family], kernel_files(data, family)
    if not files:
        raise InputError(f"{data} holds no kernels/{layout.files}: name the data's folder.")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for path in files:
        with path.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                if layout.keep(row):
                    key = (row["hardware"], implementation(row), row[layout.dtype])
                    groups.setdefault(key, []).append(row)
    return [_sample(family, layout, key, rows) for key, rows in sorted(groups.items())]


def implementation(row: Row) -> str:
    """Return the library, and the kernel where the library has several for one dtype."""
    library = row["framework"].split()[0]
    kernel = row["kernel_source"].removeprefix("vllm_")
    return f"{library}-fa4" if kernel.endswith("fa4") else library


def _sample(family: str, layout: Layout, key: tuple[str, str, str], rows: list[Row]) -> Sample:
    chip, implementation, dtype = key
    shapes = [layout.shape(row) for row in rows]
    columns = {name: np.array([shape[name] for shape in shapes]) for name in shapes[0]}
    seconds = np.array([float(row[layout.latency_ms]) for row in rows]) * 1e-3
    source = rows[0]["source"].split(":")[0].split()[0]
    return Sample(
        family, CHIPS.get(chip, chip), implementation, DTYPES.get(dtype, dtype), columns, seconds,
        source,
    )  # fmt: skip
