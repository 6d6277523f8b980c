"""Results of serving benchmarks: vLLM (``vllm bench serve | latency | throughput``) and SGLang.

``vllm bench serve --save-result`` and ``sglang.bench_serving`` write one JSON object a run, with
``--append-result`` or always one a line, and nearly the same keys. Times are in milliseconds in
keys that end in ``_ms``, in seconds elsewhere (vllm/benchmarks/serve.py, sglang/bench_serving.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simcore.measurement import Measurement
from validation.importers.reading import bad, chip_name, field, json_objects, positive

METRICS = {
    "ttft": "serving.ttft",
    "tpot": "serving.tpot",
    "itl": "serving.itl",
    "e2el": "serving.e2e",
    "e2e_latency": "serving.e2e",
}
STATISTIC = re.compile(rf"(mean|median|p\d+(?:\.\d+)?)_({'|'.join(METRICS)})_ms")
COUNTS = {
    "completed": "requests",
    "total_input_tokens": "input_tokens",
    "total_output_tokens": "output_tokens",
    "max_concurrency": "concurrency",
    "request_rate": "rate_per_s",
    "tp": "tp",
    "tensor_parallel_size": "tp",
}
NAMES = {"model_id": "model", "model": "model", "backend": "engine", "dataset_name": "dataset"}


def read_serving(path: Path) -> list[Measurement]:
    """Return the run of every object: ``serving.run``, TTFT, TPOT, ITL and end-to-end latency.

    ``shape`` tells the load and, for latencies, which ``statistic`` the one sample is; with
    ``--save-detailed`` the TTFT and ITL of every request are kept as well ("each").
    """
    return [each for where, run in json_objects(path) for each in _run(run, path.name, where)]


def _run(run: Mapping[str, Any], source: str, where: str) -> Iterator[Measurement]:
    shape = _shape(run)
    machine = _machine(run)
    duration_s = positive(field(run, "duration", where), "duration", where)
    yield Measurement("serving.run", shape, (duration_s,), machine, source)
    for key, value in run.items():
        found = STATISTIC.fullmatch(key)
        if found and value:  # no time per output token where a run made one token each
            time_s = positive(value, key, where) * 1e-3
            told = {**shape, "statistic": found.group(1)}
            yield Measurement(METRICS[found.group(2)], told, (time_s,), machine, source)
    for key, subject in (("ttfts", "serving.ttft"), ("itls", "serving.itl")):
        times = tuple(_flat(run.get(key) or (), key, where))
        if times:
            yield Measurement(subject, {**shape, "statistic": "each"}, times, machine, source)


def _shape(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the load, model and engine; SGLang's results do not name the model."""
    names = {mine: run[key] for key, mine in NAMES.items() if run.get(key)}
    counts = {mine: float(run[key]) for key, mine in COUNTS.items() if _finite(run.get(key))}
    return {**names, **counts}


def _machine(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hardware where the run was labelled with it (``--metadata gpu=H100``)."""
    device = str(run.get("gpu") or run.get("hardware") or "")
    return {"device": device, "chip": chip_name(device)} if device else {}


def _finite(value: Any) -> bool:
    """Return whether a load is a number; a rate of "inf" means that all requests came at once."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _flat(values: Any, key: str, where: str) -> Iterator[float]:
    """Yield the times above zero of a list, or of a list of lists; failed requests count 0."""
    if not isinstance(values, list | tuple):
        raise bad(where, f"{key} must be a list")
    for value in values:
        if isinstance(value, list):
            yield from _flat(value, key, where)
        elif value:
            yield positive(value, key, where)


def read_latency(path: Path) -> list[Measurement]:
    """Return the runs of ``vllm bench latency``: seconds of one batch, prefill and decoding.

    The file does not tell model, batch or lengths: keep them in its name.
    """
    found = []
    for where, run in json_objects(path):
        times = tuple(_flat(field(run, "latencies", where), "latencies", where))
        if not times:
            raise bad(where, "latencies is empty")
        found.append(Measurement("generate.run", {"engine": "vllm"}, times, {}, path.name))
    return found


def read_throughput(path: Path) -> list[Measurement]:
    """Return the runs of ``vllm bench throughput``: seconds until all requests were done."""
    found = []
    for where, run in json_objects(path):
        shape = {
            "engine": "vllm",
            "requests": positive(field(run, "num_requests", where), "num_requests", where),
            "tokens": positive(field(run, "total_num_tokens", where), "total_num_tokens", where),
        }
        time_s = positive(field(run, "elapsed_time", where), "elapsed_time", where)
        found.append(Measurement("serving.run", shape, (time_s,), {}, path.name))
    return found
