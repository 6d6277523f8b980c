"""Coefficients of the engines' all_reduce and of DeepEP from their measured calls."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.catalogue import make_cluster
from hwmodels.collectives.experts import ALL_TOKENS, Phase, Routing
from hwmodels.collectives.experts import price as price_experts
from hwmodels.collectives.peer_memory import Engine
from hwmodels.collectives.peer_memory import price as price_engine
from hwmodels.collectives.tuner import GroupLayout, choose
from hwmodels.hardware import Cluster
from simcore.errors import InputError

Array = NDArray[np.float64]
# engine -> (its kernel's label, versions that have this kernel; none given: all)
ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "vllm": ("vLLM_custom", ()),
    "sglang": ("SGLang_CustomAllReduce", ("sglang 0.5.14",)),
    "sglang-0.5.10": ("SGLang_CustomAllReduce", ("sglang 0.5.9", "sglang 0.5.10")),
    "trtllm": ("TRTLLM", ()),
}
# What the engines' registered buffers hold (vLLM: below 8 MiB, SGLang: up to 8 MiB, since 2026 16
# MiB, custom_all_reduce.py; TensorRT-LLM: its workspace of 8 MiB).
LIMIT_BYTES = {"vllm": 2**23 - 1, "sglang": 2**24, "sglang-0.5.10": 2**23, "trtllm": 2**23}
ENGINE_START = Engine(6e3, 0.7, 12e3, 0.7, 150.0, 0.0)
ENGINE_NAMES = ("one_call_cycles", "one_share", "two_call_cycles", "two_share", "peer_cycles")
EAGER_START = {"copy_s": 4e-6, "copy_share": 0.8}
HOST_BYTES = 2**16  # eager calls up to here last as long as the host needs
# mode -> start; a term that starts at 0 stays there.
PHASE_START = {
    "normal": Phase(5e4, 0.8, 5e3, knee_tokens=100.0, sm_bytes_per_cycle=8.0),
    "low-latency": Phase(2e4, 0.8, 5e3, expert_cycles=20.0),
}
PHASE_NAMES = (
    "call_cycles",
    "share",
    "token_cycles",
    "knee_tokens",
    "expert_cycles",
    "sm_bytes_per_cycle",
)
UNITS = 132  # of H100 and H200, all of which low latency takes


@dataclass(frozen=True, slots=True)
class EngineCall:
    """One measured all_reduce of an engine, or a call of DeepEP with its routing."""

    chip: str
    version: str
    size: float  # bytes, or tokens per rank
    seconds: float
    ranks: int = 8
    eager: bool = False
    routing: Routing | None = None
    sms: int = UNITS


def read_engine_calls(path: Path) -> dict[str, list[EngineCall]]:
    """Return the rows of ``collectives/custom_allreduce.csv`` by engine."""
    found: dict[str, list[EngineCall]] = {name: [] for name in ENGINES}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            version, _, kernel = row["framework"].partition(" / ")
            name = next(
                name
                for name, (label, versions) in ENGINES.items()
                if kernel.startswith(label) and (not versions or version in versions)
            )
            size = float(row["batch_or_concurrency"].removeprefix("message_bytes="))
            call = EngineCall(row["hardware"], version, size, float(row["value"]) * 1e-3)
            eager = kernel.endswith("_eager")
            found[name].append(replace(call, ranks=int(row["n_gpus"]), eager=eager))
    return found


def read_expert_calls(path: Path) -> dict[str, list[EngineCall]]:
    """Return the rows of ``collectives/moe_all_to_all.csv`` by "mode/phase"; one node of 8."""
    found: dict[str, list[EngineCall]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            mode = "low-latency" if "DeepEP ll" in row["framework"] else "normal"
            phase = row["metric"].partition("_")[0]
            sizes = json.loads(row["extra"])
            routing = Routing(sizes["hidden_size"], sizes["num_topk"], sizes["num_experts"])
            version = re.findall(r"\((.*)\)", row["framework"])[0]
            call = EngineCall(
                row["hardware"], version, float(sizes["num_token"]), float(row["value"]) * 1e-6
            )
            call = replace(call, routing=routing, sms=int(sizes.get(f"{phase}_sms", UNITS)))
            found.setdefault(f"{mode}/{phase}", []).append(call)
    return found


def _grouped(calls: Sequence[EngineCall], key: Callable[[EngineCall], object]) -> list[list[int]]:
    places: dict[object, list[int]] = {}
    for index, call in enumerate(calls):
        places.setdefault(key(call), []).append(index)
    return list(places.values())


@lru_cache(maxsize=16)
def _node(chip: str) -> Cluster:
    return make_cluster(chip, 8)


@lru_cache(maxsize=64)
def _nccl_seconds(chip: str, ranks: int, sizes: tuple[float, ...]) -> Array:
    cluster = _node(chip)
    group = GroupLayout(ranks, ranks, cluster.scale_up, cluster.scale_out)
    return choose("all_reduce", np.array(sizes), group, "nccl")[0]


def predict_engine(engine: Engine, calls: Sequence[EngineCall]) -> Array:
    """Return the seconds of an engine's calls."""
    seconds = np.empty(len(calls))
    for rows in _grouped(calls, lambda call: (call.chip, call.ranks, call.eager)):
        first = calls[rows[0]]
        cluster = _node(first.chip)
        group = GroupLayout(first.ranks, first.ranks, cluster.scale_up, cluster.scale_out)
        size = np.array([calls[i].size for i in rows])
        beyond = _nccl_seconds(first.chip, first.ranks, tuple(size))
        seconds[rows] = price_engine(engine, size, group, cluster.chip, beyond, first.eager)[0]
    return seconds


def predict_experts(name: str, phase: Phase, calls: Sequence[EngineCall]) -> Array:
    """Return the seconds of DeepEP's calls."""
    mode, kind = name.split("/")
    seconds = np.empty(len(calls))
    for rows in _grouped(calls, lambda call: (call.chip, call.routing)):
        first = calls[rows[0]]
        if first.routing is None:
            raise InputError(f"a call of {name} has no routing: read it with read_expert_calls.")
        cluster = _node(first.chip)
        group = GroupLayout(8, 8, cluster.scale_up, cluster.scale_out)
        tokens = np.array([calls[i].size for i in rows])
        sms = np.array([calls[i].sms for i in rows])
        seconds[rows] = price_experts(phase, mode, kind, tokens, first.routing, group, sms)
    return seconds


def _search(
    start: Mapping[str, float], predict: Callable[[dict[str, Any]], Array], measured: Array
) -> dict[str, Any]:
    """Return the values that fit best: log residuals, soft l1 beyond 10 %, shares at most 1."""
    from scipy.optimize import least_squares

    names = list(start)
    top = np.log([1.0 if name.endswith("share") else 1e15 for name in names])

    def residuals(point: Array) -> Array:
        return np.log(predict(dict(zip(names, np.exp(point), strict=True))) / measured)

    found = least_squares(
        residuals,
        np.log(list(start.values())),
        loss="soft_l1",
        f_scale=0.1,
        bounds=(-np.inf, top),
    )
    return dict(zip(names, map(float, np.exp(found.x)), strict=True))


def fit_engine(name: str, calls: Sequence[EngineCall]) -> Engine:
    """Return the engine that fits its calls: the kernels from graphs, the host from eager calls."""
    engine = replace(ENGINE_START, limit_bytes=float(LIMIT_BYTES[name]))
    graphs = [call for call in calls if not call.eager]
    engine = replace(engine, **_values(engine, ENGINE_NAMES, graphs))
    eager = [call for call in calls if call.eager]
    if not eager:
        return engine
    hosts = {
        _node(chip).chip.name: float(
            np.median([c.seconds for c in eager if c.chip == chip and c.size <= HOST_BYTES])
        )
        for chip in sorted({call.chip for call in eager})
    }
    hosts["other"] = sorted(hosts.values())[(len(hosts) - 1) // 2]  # the lower median
    engine = replace(engine, host_s=hosts, **EAGER_START)
    return replace(engine, **_values(engine, tuple(EAGER_START), eager))


def _values(engine: Engine, names: Sequence[str], calls: Sequence[EngineCall]) -> dict[str, Any]:
    start = {name: getattr(engine, name) for name in names}
    measured = np.array([call.seconds for call in calls])
    return _search(start, lambda v: predict_engine(replace(engine, **v), calls), measured)


def fit_phase(name: str, calls: Sequence[EngineCall]) -> Phase:
    """Return the phase that fits its calls."""
    base = PHASE_START[name.split("/", maxsplit=1)[0]]
    whole = ("knee_tokens",) if base.knee_tokens == ALL_TOKENS else ()
    start = {n: getattr(base, n) for n in PHASE_NAMES if getattr(base, n) and n not in whole}
    found = _search(
        start,
        lambda values: predict_experts(name, replace(base, **values), calls),
        np.array([call.seconds for call in calls]),
    )
    return replace(base, **found)
