"""Collectives that others published for chips and sizes that no fit has seen.

Nothing here is fitted or chosen by its error: the rows are what public threads on nccl-tests show,
on links that the catalogue holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.catalogue import load_link
from hwmodels.collectives import GroupLayout, bus_bytes_per_s, choose
from validation.accuracy.table import Table, percent


@dataclass(frozen=True, slots=True)
class Published:
    """One call: all_reduce of ``size_bytes`` by ``ranks`` on one link domain."""

    what: str
    link: str
    ranks: int
    size_bytes: float
    seconds: float
    dtype: str
    source: str


def _at_bus(bus_bytes_per_s: float, ranks: int, size_bytes: float) -> float:
    return size_bytes * 2 * (ranks - 1) / ranks / bus_bytes_per_s


_RACK = "coreweave/nccl-tests, pull request 43 (2025)"
PUBLISHED = (
    *(
        Published("GB200 NVL72", "nvlink5", 72, 2.0**e, us * 1e-6, "fp32", _RACK)
        for e, us in ((29, 1806.7), (30, 3108.8), (31, 5589.1), (32, 10094.0), (33, 20299.0))
    ),
    Published(
        "8 x H200", "nvlink4", 8, 2.0**32, _at_bus(475e9, 8, 2.0**32), "fp32",
        "NVIDIA/nccl-tests, issue 272 (2024)",
    ),
    Published(
        "8 x H800", "nvlink4-h800", 8, 2.0**33, _at_bus(215e9, 8, 2.0**33), "fp32",
        "NVIDIA/nccl, issue 1374 (2024)",
    ),
    Published(
        "8 x RTX 4090", "pcie4x16", 8, 8.0, 42.14e-6, "fp32", "NVIDIA/nccl, issue 1530 (2024)"
    ),
    Published(
        "8 x RTX 5090", "pcie5x16", 8, 2.0**33, _at_bus(28e9, 8, 2.0**33), "fp32",
        "NVIDIA/nccl, issue 1639 (2025)",
    ),
    Published(
        "4 x RTX 5090", "pcie5x16", 4, 2.0**33, _at_bus(35e9, 4, 2.0**33), "fp32",
        "NVIDIA/nccl, issue 1639 (2025)",
    ),
)  # fmt: skip


def published_table() -> Table:
    """Return predicted beside published calls."""
    rows = []
    for row in PUBLISHED:
        link = load_link(row.link)
        group = GroupLayout(row.ranks, row.ranks, link, link)
        seconds, name = choose("all_reduce", row.size_bytes, group, dtype=row.dtype)
        bus = [
            float(bus_bytes_per_s("all_reduce", row.size_bytes, row.ranks, each)) / 1e9
            for each in (row.seconds, seconds)
        ]
        rows.append(
            (
                row.what,
                int(row.size_bytes),
                row.seconds,
                float(seconds),
                *bus,
                percent(float(seconds) / row.seconds - 1),
                str(name),
                row.source,
            )
        )
    columns = (
        *("chips", "bytes", "published s", "predicted s"),
        *("published bus GB/s", "predicted bus GB/s", "error", "algorithm", "source"),
    )
    note = (
        "Single published calls on links whose coefficients are borrowed (H200's excepted). Cards "
        "without NVLink reach their peers through the host, whose memory and sockets are shared: "
        "that is not modelled."
    )
    return Table("all_reduce elsewhere", columns, tuple(rows), (note,))
