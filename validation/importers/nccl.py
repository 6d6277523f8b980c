"""Logs and JSON reports of nccl-tests and rccl-tests (all_reduce_perf and its siblings).

A log's header names the columns, since these differ by version: older ones lack redop or root,
newer ones may add times of single iterations and a time stamp. Sizes follow nccl-tests: the buffer
of one rank for all_reduce, the full gathered buffer for all_gather and reduce_scatter. Each row
gives two measurements, out of place and in place; a time is a mean over the log's iterations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simcore.measurement import Measurement
from validation.importers.reading import bad, chip_name, json_object, open_text, positive
from validation.importers.reading import field as entry

OPS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoallv": "all_to_all_v",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "sendrecv": "send_recv",
    "hypercube": "hypercube",
}
DTYPES = {
    "float": "fp32",
    "half": "fp16",
    "bfloat16": "bf16",
    "double": "fp64",
    "f8e4m3": "fp8",
    "fp8_e4m3": "fp8",
}
UNITS = {"(us)": 1e-6, "(ms)": 1e-3, "(s)": 1.0}
TIMES = ("time", "cputime")
PROGRAM = re.compile(rf"\b({'|'.join(sorted(OPS, key=len, reverse=True))})_perf")
PREFIX = re.compile(r"^(?:\[\d+,\d+\]<std(?:out|err)>:\s?|\s*\d+:\s)")  # of mpirun and of srun
RANK = re.compile(r"#\s+Rank\s+(\d+)\s.*?\bon\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s+(.+)")
ALONE = re.compile(r"\S {30,}\S")  # a row measured in place alone has blanks for the other
LAUNCH = re.compile(r"#\s*nThread\s+(\d+)\s+nGpus\s+(\d+)")
LIBRARY = re.compile(r"(?:n|r)ccl-library=(\d+)|NCCL version (\d+\.\d+\.\d+)")
HEADER = re.compile(r"#?\s*size\s+count\s+type\b.*\b(?:cpu)?time\s+algbw\s+busbw\b")


@dataclass
class _Log:
    """What a log has said so far."""

    name: str
    program: str = ""
    library: str = ""
    family: str = "nccl"
    threads: int = 1
    devices: dict[int, tuple[str, str]] = field(default_factory=dict)  # rank -> host, device
    columns: list[str] = field(default_factory=list)
    unit_s: float | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Return what is known of the machine."""
        names = sorted({device for _, device in self.devices.values()})
        known = {"device": names[0], "chip": chip_name(names[0])} if names else {}
        return {**known, **({"library": self.library} if self.library else {})}

    def measurement(
        self, size: float, dtype: str, place: int, times_s: tuple[float, ...]
    ) -> Measurement:
        """Return one row's times, out of place (0) or in place (1)."""
        shape = {
            "op": OPS[self.program],
            "bytes": size,
            "ranks": max(len(self.devices), self.threads),
            "nodes": len({host for host, _ in self.devices.values()}) or 1,
            "in_place": place,
            "dtype": DTYPES.get(dtype, dtype),
            "implementation": self.family,
        }
        return Measurement("collective", shape, times_s, self.fingerprint(), self.name)


def is_nccl_log(text: str) -> bool:
    """Return whether ``text`` is a log of nccl-tests: it has the header of its table."""
    return HEADER.search(text) is not None


def read_nccl_log(path: Path) -> list[Measurement]:
    """Return the measurements of a log, line by line; rows of no bytes are left out."""
    found = PROGRAM.search(path.name)
    log = _Log(path.name, found.group(1) if found else "")
    rows: list[Measurement] = []
    with open_text(path) as stream:
        for number, raw in enumerate(stream, start=1):
            line, where = PREFIX.sub("", raw.rstrip()), f"{path.name}, line {number}"
            if HEADER.match(line) or line.lstrip("# ").startswith("(B)"):
                _read_header(log, line)
            elif line.startswith("#") or not _is_row(line, log):
                _read_remark(log, line)
            else:
                rows += _read_row(log, line, where)
    if not rows:
        raise bad(path.name, "a log of nccl-tests without a row of results")
    return rows


def _is_row(line: str, log: _Log) -> bool:
    tokens = line.split()
    return bool(log.columns) and len(tokens) > 2 and tokens[0].isdigit() and tokens[1].isdigit()


def _read_remark(log: _Log, line: str) -> None:
    """Learn program, library, ranks and devices from a line that is no row."""
    if found := PROGRAM.search(line):
        log.program = found.group(1)
    if "rccl" in line.lower():
        log.family = "rccl"
    if found := LIBRARY.search(line):
        log.library = found.group(1) or found.group(2)
    if found := LAUNCH.match(line):  # another test begins
        log.threads, log.devices = int(found.group(1)) * int(found.group(2)), {}
    if found := RANK.match(line):
        log.devices[int(found.group(1))] = (found.group(2), found.group(3).strip())


def _read_header(log: _Log, line: str) -> None:
    """Learn the columns, or from the line below them their units."""
    tokens = line.lstrip("# ").split()
    if tokens[0] == "size":
        log.columns, log.unit_s = tokens, None
        return
    log.unit_s = next((UNITS[token] for token in tokens if token in UNITS), None)


def _read_row(log: _Log, line: str, where: str) -> Iterator[Measurement]:
    """Yield the out-of-place and in-place times of a row; old rows have fewer leading columns."""
    if log.unit_s is None:
        raise bad(where, "no line of units, (us) or (ms), stands between the header and this row")
    tokens = line.split()
    starts = [i for i, name in enumerate(log.columns) if name in TIMES]
    stamped = log.columns.count("timestamp")
    values = tokens[: len(tokens) - 2 * stamped]  # date and hour
    block = (len(log.columns) - stamped - starts[0]) // len(starts)
    blocks = 1 if ALONE.search(line) else len(starts)
    if len(values) - block * blocks not in (3, 4, 5):
        raise bad(where, f"{len(tokens)} values do not fit the header's {len(log.columns)} columns")
    size = int(tokens[0])
    if size == 0:
        return
    if not log.program:
        raise bad(
            where, "neither the log nor its file name says which test it is, as all_reduce_perf"
        )
    for index in range(blocks):
        at = len(values) - block * (blocks - index)
        time_s = positive(values[at], "time", where) * log.unit_s
        place = index if blocks == len(starts) else 1
        yield log.measurement(float(size), tokens[2], place, (time_s,))


# -- the JSON report (nccl-tests -J) -------------------------------------------------------------


def read_nccl_json(path: Path) -> list[Measurement]:
    """Return the measurements of a JSON report, with the times of single iterations if it has them.

    Times are in microseconds (nccl-tests, src/util.cu).
    """
    with open_text(path) as stream:
        report = json_object(stream.read(), path.name)
    try:
        return list(_reported(report, path.name))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad(path.name, f"not a report of nccl-tests ({error!r:.60})") from None


def _reported(report: Mapping[str, Any], name: str) -> Iterator[Measurement]:
    config = entry(report, "config", name)
    found = PROGRAM.search(" ".join(str(word) for word in report.get("args", ())))
    if not found:
        raise bad(name, "args does not name the test, as all_reduce_perf")
    log = _Log(name, found.group(1), str(report.get("nccl_version", "")))
    log.threads = int(config.get("nthreads", 1)) * int(config.get("ngpus", 1))
    for each in config.get("devices", ()):
        log.devices[int(each["rank"])] = (str(each["hostname"]), str(each["device_info"]))
    for number, row in enumerate(entry(report, "results", name), start=1):
        where = f"{name}, result {number}"
        size, dtype = float(entry(row, "size", where)), str(entry(row, "type", where))
        for place, key in enumerate(("out_of_place", "in_place")):
            if size and row.get(key):
                mean_us = row[key].get("time", row[key].get("cpu_time"))
                times_us = row.get(f"{key}_per_iter", {}).get("times_us") or [mean_us]
                times_s = tuple(positive(time, "time", where) * 1e-6 for time in times_us)
                yield log.measurement(size, dtype, place, times_s)
