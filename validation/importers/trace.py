"""Chrome traces of the torch profiler: GPU kernels by name, matrix products by shape.

Traces reach gigabytes, so events are decoded one by one from the stream. Times are microseconds.
A kernel's "External id" is that of the operator that launched it; operators have "Input Dims" where
the profiler recorded shapes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from simcore.measurement import Measurement
from validation.importers.reading import bad, chip_name, open_text, positive

CHUNK_CHARACTERS = 2**20
EVENTS = re.compile(r'"traceEvents"\s*:\s*\[')
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
DTYPES = {
    "c10::BFloat16": "bf16",
    "c10::Half": "fp16",
    "float": "fp32",
    "c10::Float8_e4m3fn": "fp8",
}
PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2)}  # operator: places of x[m, k] and w[k, n]

Call = tuple[str, str, str]  # operator, dims and dtypes as text


@dataclass
class _Trace:
    """What a trace holds, gathered event by event."""

    header: dict[str, Any] = field(default_factory=dict)
    calls: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # external id -> operator
    kernels: list[tuple[str, int, float]] = field(default_factory=list)  # name, external id, s

    def add(self, event: Mapping[str, Any], where: str) -> None:
        """Keep a kernel, or an operator with shapes; other events say nothing here."""
        category = str(event.get("cat", "")).lower()
        details = event.get("args")
        details = details if isinstance(details, Mapping) else {}
        number = details.get("External id", details.get("external id"))
        number = number if isinstance(number, int) else -1
        if category == "cpu_op" and details.get("Input Dims"):
            self.calls[number] = {"name": str(event.get("name", "")), **details}
        elif category in KERNELS and event.get("dur"):
            time_s = positive(event["dur"], "dur", where) * 1e-6
            self.kernels.append((str(event.get("name", "")), number, time_s))


def read_trace(path: Path) -> list[Measurement]:
    """Return one measurement per kernel name and operator shape, then the matrix products.

    A ``kernel`` holds the seconds of every launch; its ``shape`` the ``calls``, their ``total_s``
    and ``share`` of all kernel time, which the fingerprint gives as ``cuda_s``. A ``matmul`` sums
    the kernels of one call, so that split sums count whole.
    """
    trace = _Trace()
    with open_text(path) as stream:
        for number, event in enumerate(events(stream, path.name, trace.header), start=1):
            trace.add(event, f"{path.name}, event {number}")
    if not trace.kernels:
        raise bad(path.name, "a trace without GPU kernels (record it with ProfilerActivity.CUDA)")
    machine = _machine(trace)
    return [*_kernels(trace, machine, path.name), *_products(trace, machine, path.name)]


def events(stream: TextIO, name: str, header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a trace one by one, and put what stands before them into ``header``.

    Raises `InputError` naming the event where the text is not JSON, or ends too early.
    """
    text = _beginning(stream, name, header)
    decoder, at, count = json.JSONDecoder(), 0, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and text[at] == "]":
            return
        try:
            event, at = decoder.raw_decode(text, at)
        except ValueError:  # the event goes on in the next chunk, or is broken
            more = stream.read(CHUNK_CHARACTERS)
            if not more:
                where = f"{name}, event {count + 1}"
                raise bad(where, "the trace ends or breaks off in the middle of it") from None
            text, at = text[at:] + more, 0
            continue
        count += 1
        if isinstance(event, dict):
            yield event


def _beginning(stream: TextIO, name: str, header: dict[str, Any]) -> str:
    """Return the text from the first event on; traces are objects, or bare lists of events."""
    text = ""
    while more := stream.read(CHUNK_CHARACTERS):
        text += more
        if text.lstrip()[:1] == "[":
            return text.lstrip()[1:]
        if found := EVENTS.search(text):
            before = text[: found.start()].rstrip().rstrip(",")
            try:
                header.update(json.loads(before + "}"))
            except ValueError:
                raise bad(name, "what stands before traceEvents is not JSON") from None
            return text[found.end() :]
    raise bad(name, "no traceEvents")


def _machine(trace: _Trace) -> dict[str, Any]:
    total = {"cuda_s": sum(time_s for _, _, time_s in trace.kernels)}
    devices = trace.header.get("deviceProperties")
    if not isinstance(devices, list) or not devices or not isinstance(devices[0], dict):
        return total
    device = str(devices[0].get("name", ""))
    return {"device": device, "chip": chip_name(device), **total}


def _kernels(trace: _Trace, machine: dict[str, Any], source: str) -> Iterator[Measurement]:
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for name, number, time_s in trace.kernels:
        call = trace.calls.get(number, {})
        groups[name, str(call.get("name", "")), json.dumps(call.get("Input Dims"))].append(time_s)
    for (name, op, dims), times in sorted(groups.items(), key=lambda item: -sum(item[1])):
        known = {"op": op, "input_dims": dims} if op else {}
        total_s = sum(times)
        counts = {"calls": len(times), "total_s": total_s, "share": total_s / machine["cuda_s"]}
        yield Measurement(
            "kernel", {"kernel": name, **known, **counts}, tuple(times), machine, source
        )


def _products(trace: _Trace, machine: dict[str, Any], source: str) -> Iterator[Measurement]:
    spent: dict[int, float] = defaultdict(float)
    for _, number, time_s in trace.kernels:
        spent[number] += time_s
    groups: dict[tuple[int, int, int, str], list[float]] = defaultdict(list)
    for number, time_s in spent.items():
        if product := _product(trace.calls.get(number, {})):
            groups[product].append(time_s)
    for (m, n, k, dtype), times in sorted(groups.items()):
        shape = {"m": m, "n": n, "k": k, "dtype": dtype, "implementation": "torch"}
        yield Measurement("matmul", shape, tuple(times), machine, source)


def _product(call: Mapping[str, Any]) -> tuple[int, int, int, str] | None:
    """Return (m, n, k, dtype) of a matrix product, None for other operators."""
    places = PRODUCTS.get(str(call.get("name", "")))
    dims, types = call.get("Input Dims"), call.get("Input type", ())
    if places is None or not isinstance(dims, list) or len(dims) <= places[1]:
        return None
    x, w = (dims[place] for place in places)
    if len(x) != 2 or len(w) != 2 or len(types) <= places[0]:
        return None
    return x[0], w[1], x[1], DTYPES.get(types[places[0]], str(types[places[0]]))
