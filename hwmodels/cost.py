"""The cost model of a cluster: kernels, collectives and links behind simcore's two protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwmodels.catalogue import load_link
from hwmodels.collectives import (
    Footprint,
    GroupLayout,
    collective_seconds,
    deviation,
    footprint,
)
from hwmodels.curves import Choice, Curve, choose_curves
from hwmodels.hardware import Cluster
from hwmodels.hosts import NO_HOST, Host
from hwmodels.kernels import KERNELS, OTHERS, KernelFit, family, fitted, product_dtype, roofline
from hwmodels.linear import LINEAR_KERNELS
from hwmodels.memory import copy_seconds
from hwmodels.mixers import mixer_seconds
from hwmodels.profile import Profile
from hwmodels.topology import Topology, is_mesh, make_topology, max_min_rates, members_per_node
from simcore.linear import SCAN
from simcore.ops import COPIES, FREE, Op, Size, work
from simcore.program import axis_degree, folded

# log(real / predicted) of prices that rest on no measurement: a factor of 1.5 either way in 80 %.
DATASHEET_DEVIATION = 0.32
ATTENTION_KINDS = ("attention", "attention_backward")


@dataclass(frozen=True, slots=True)
class ClusterCost:
    """Seconds of ops on one rank of ``mesh`` over ``cluster``, and its network.

    ``profile``: what was measured on this very machine. Without one an accelerator's kernels follow
    the curves of ``implementation`` (all libraries alike where it is ""), a CPU's the roofline.
    ``host``: what it takes to launch an accelerator's kernels.
    """

    cluster: Cluster
    mesh: Mapping[str, int]
    profile: Profile | None = None
    implementation: str = ""
    host: Host = NO_HOST
    curves: tuple[Curve, ...] | None = None  # None: those shipped
    topology: Topology = field(init=False)
    layouts: dict[str, GroupLayout] = field(default_factory=dict)
    choices: dict[tuple[str, str], Choice] = field(default_factory=dict)
    priced: dict[Any, Size] = field(default_factory=dict)
    footprints: dict[Any, Footprint] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "topology", make_topology(self.cluster))
        if self.profile is not None:
            object.__setattr__(self, "profile", self.profile.among(self.cluster.world))

    @property
    def synchronous(self) -> bool:
        """A CPU rank computes in the thread that issues."""
        return self.profile is not None or self.cluster.chip.kind == "cpu"

    def layout(self, group: str) -> GroupLayout:
        """Return how the groups along ``group`` lie on nodes."""
        if group not in self.layouts:
            if group in ("ends", "mirror"):  # mirrored pairs as the outermost, which are the ends
                degree, inner = 2, self.cluster.world // 2
            elif (sizes := folded(group)) is not None:
                inner, degree = sizes
            else:
                degree = axis_degree(self.mesh, group)
                inner = _inner(self.mesh, group.rsplit("*", maxsplit=1)[-1])
            shared = int(members_per_node(inner, degree, self.cluster.gpus_per_node))
            self.layouts[group] = GroupLayout(
                degree, shared, self.cluster.scale_up, self.cluster.scale_out
            )
        return self.layouts[group]

    def seconds(self, op: Op) -> Size:
        """Return the seconds of ``op`` on its stream; equal ops of one size are priced once."""
        key = (op.kind, op.dtype, op.group, tuple(op.dims.items()), tuple(op.attrs.items()))
        try:
            if key not in self.priced:
                self.priced[key] = self._seconds(op)
            return self.priced[key]
        except TypeError:  # arrays, of many sizes at once, have no hash
            return self._seconds(op)

    def _seconds(self, op: Op) -> Size:
        if not op.is_communication:
            return self._kernel_seconds(op)
        fit = self.profile.collectives if self.profile else None
        payload = work(op).payload_bytes
        if "beside_bytes" in op.attrs and not is_mesh(self.cluster):
            payload = payload + op.attrs["beside_bytes"]  # both ways leave through one port
        if op.kind == SCAN:
            return self._scan_seconds(op)
        group = self.layout(op.group)
        return sum(
            collective_seconds(name, payload, group, fit=fit, dtype=op.dtype)
            for name in CALLED.get(op.kind, (op.kind,))
        )

    def _scan_seconds(self, op: Op) -> Size:
        """Return the seconds until the last rank has the state of all before it.

        Hops follow one another: of one slice all the way, then of the other slices over the
        slowest link. Each is a message, and the sum with the rank's own state before the next.
        """
        group, slices = self.layout(op.group), op.attrs["slices"]
        ranks, shared = int(np.max(group.ranks)), int(np.max(group.ranks_per_node))
        first, last = op.attrs.get("between", (0, ranks - 1))
        crossing = last // shared - first // shared
        counts = {1: crossing, 2: last - first - crossing}  # members of the hop on one node
        slice_op = Op("add", {"t": op.dims["n"] / slices, "n": 1}, op.dtype, (), ())
        added = self._kernel_seconds(slice_op)
        each = {m: self._hop_seconds(op, slices, m) + added for m, times in counts.items() if times}
        others = (slices - 1) * max(each.values())
        if "behind" in op.attrs:
            return others + max(each.values())
        passing = sum(counts[members] * seconds for members, seconds in each.items())
        return passing if "last_slice" in op.attrs else passing + others

    def _hop_seconds(self, op: Op, slices: int, members: int) -> Size:
        """Return the seconds of a slice of a state between ranks, so many of two on one node."""
        payload = work(op).payload_bytes / slices
        if self.profile is not None:
            latency_s, s_per_byte = self.profile.messages
            return latency_s + s_per_byte * payload
        pair = GroupLayout(2, members, self.cluster.scale_up, self.cluster.scale_out)
        return collective_seconds("send_recv", payload, pair, dtype=op.dtype)

    def _kernel_seconds(self, op: Op) -> Size:
        if op.kind in FREE:
            return 0.0
        chip = self.cluster.chip
        if op.kind in COPIES and chip.host_link:
            moved = work(op)
            size = moved.read_bytes + moved.write_bytes  # of the device, which is one end
            return float(copy_seconds(size, load_link(chip.host_link)))
        measured = self.measured(op)
        if measured is not None:
            return fitted(op, measured[1]) * self._contention(op)
        if self.synchronous:
            return roofline(op, chip)
        if op.kind in LINEAR_KERNELS:
            return mixer_seconds(LINEAR_KERNELS[op.kind](op), chip, op.dtype)
        name, shape = KERNELS[op.kind](op)
        return self.choice(name, product_dtype(op)).seconds(shape, chip, cold=True)

    def uncertainty(self, op: Op) -> tuple[str, Size]:
        """Return what ``op``'s seconds rest on and the standard deviation of their logarithm."""
        if op.is_communication:
            link = self.cluster.scale_up.name
            return "collectives", deviation(called(op), work(op).payload_bytes, link)
        measured = self.measured(op)
        if measured is not None:
            # Of a normal variable, the median absolute value is 0.6745 standard deviations.
            return measured[0], measured[1].residual / 0.6745
        if self.synchronous or op.kind in (*FREE, *COPIES, *LINEAR_KERNELS):
            return "datasheet", DATASHEET_DEVIATION
        name, shape = KERNELS[op.kind](op)
        return name, self.choice(name, product_dtype(op)).deviation(shape, self.cluster.chip)

    def measured(self, op: Op) -> tuple[str, KernelFit] | None:
        """Return the family and the fit that price a measured machine's op; None without one."""
        kernels = self.profile.kernels if self.profile else {}
        return next(((n, kernels[n]) for n in (family(op), OTHERS) if n in kernels), None)

    def choice(self, name: str, dtype: str) -> Choice:
        """Return the curves that price a kernel family in ``dtype``."""
        if (name, dtype) not in self.choices:
            found = choose_curves(name, self.cluster.chip, dtype, self.implementation, self.curves)
            self.choices[name, dtype] = found
        return self.choices[name, dtype]

    def _contention(self, op: Op) -> float:
        """Measured kernels had every rank busy; a rank alone has the memory to itself.

        Ranks beyond the cores take turns on them: this is the time where all compute at once.
        """
        if self.profile is None:
            return 1.0
        if self.cluster.world > 1:
            return self.crowding
        limit = "compute" if op.kind in ("matmul", "grouped_matmul", *ATTENTION_KINDS) else "memory"
        return self.profile.alone.get(limit, 1.0)

    @property
    def crowding(self) -> float:
        """Ranks per processor of the measured machine, at least 1."""
        ranks = self.cluster.world
        return max(1.0, ranks / (self.profile.cores or ranks)) if self.profile else 1.0

    def issue_seconds(self, op: Op) -> Size:
        """Return the host's time to start ``op``; a CPU's measured kernels contain their own."""
        if self.profile is None:
            return 0.0 if op.kind in FREE else self.host.issue_s
        return self.profile.issue_s if op.kind in ("send", "recv") else 0.0

    def slowdown(self, op: Op, beside: Op) -> Size:
        """Return how many times longer ``op`` takes beside a collective; 1 where it was measured.

        The two share the chip's units and its memory (`hwmodels.collectives.sharing`).
        """
        if self.synchronous or op.kind in FREE or op.kind in COPIES:
            return 1.0
        chip, done = self.cluster.chip, work(op)
        moving = (done.read_bytes + done.write_bytes) / chip.hbm.bytes_per_s
        bound = np.minimum(moving / self.seconds(op), 1.0)
        return self._footprint(beside).slowdown(bound)

    def _footprint(self, op: Op) -> Footprint:
        payload, group = work(op).payload_bytes, self.layout(op.group)
        if np.ndim(payload):
            return footprint(called(op), payload, group, self.cluster.chip)
        key = op.kind, op.group, payload
        if key not in self.footprints:
            self.footprints[key] = footprint(called(op), payload, group, self.cluster.chip)
        return self.footprints[key]

    def pass_overhead_seconds(self, sequences: Size) -> Size:
        """Return the seconds of software that a pass over ``sequences`` adds to its ops."""
        return self.host.pass_seconds(sequences)

    def blocking_share(self, op: Op) -> float:
        """Return the share of a communication in which its rank cannot compute."""
        return self.profile.blocking if self.profile else 0.0

    def path(self, src: int, dst: int) -> Sequence[int]:
        """Return the links between two ranks."""
        return self.topology.path(src, dst)

    def latency(self, path: Sequence[int]) -> float:
        """Return the latency of a message along ``path``, software included."""
        if self.profile is not None:
            return self.profile.messages[0]
        return self.topology.latency(tuple(path)) + self.cluster.scale_out.base_s

    def rates(self, paths: Sequence[Sequence[int]]) -> Sequence[float]:
        """Return max-min fair rates, in bytes per second."""
        if self.profile is not None:
            capacities = [1.0 / self.profile.messages[1]] * len(self.topology.capacities)
            return list(max_min_rates(paths, capacities))
        return list(max_min_rates(paths, self.topology.capacities))


# Ops that are others, by nccl-tests' names, one after the other.
CALLED = {
    "ring_shift": ("send_recv",),
    SCAN: ("send_recv",),
    "quorum": ("all_gather",),
    "quorum_reduce": ("reduce", "broadcast"),
}


def called(op: Op) -> str:
    """Return the collective, by nccl-tests' name, that an op runs, or the first of them."""
    return CALLED.get(op.kind, (op.kind,))[0]


def _inner(mesh: Mapping[str, int], axis: str) -> int:
    """Return the product of the axes that vary faster than ``axis``."""
    names = list(mesh)
    product = 1
    for name in names[names.index(axis) + 1 :]:
        product *= mesh[name]
    return product
