"""The cost model of a cluster: kernels, collectives and links behind simcore's two protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hwmodels.collectives import GroupLayout, collective_seconds
from hwmodels.hardware import Cluster
from hwmodels.kernels import kernel_seconds
from hwmodels.profile import Profile
from hwmodels.topology import Topology, make_topology, max_min_rates, members_per_node
from simcore.ops import Op, Size, work
from simcore.program import axis_degree

ATTENTION_KINDS = ("attention", "attention_backward")


@dataclass(frozen=True, slots=True)
class ClusterCost:
    """Seconds of ops on one rank of ``mesh`` over ``cluster``, and its network.

    Without a profile kernels follow the datasheet's roofline.
    """

    cluster: Cluster
    mesh: Mapping[str, int]
    profile: Profile | None = None
    topology: Topology = field(init=False)
    layouts: dict[str, GroupLayout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "topology", make_topology(self.cluster))

    @property
    def synchronous(self) -> bool:
        """A CPU rank computes in the thread that issues."""
        return self.profile is not None or self.cluster.chip.vendor == "generic"

    def layout(self, group: str) -> GroupLayout:
        """Return how the groups along ``group`` lie on nodes."""
        if group not in self.layouts:
            if group == "ends":
                degree, inner = 2, self.cluster.world // 2
            else:
                degree = axis_degree(self.mesh, group)
                inner = _inner(self.mesh, group.rsplit("*", maxsplit=1)[-1])
            shared = int(members_per_node(inner, degree, self.cluster.gpus_per_node))
            self.layouts[group] = GroupLayout(
                degree, shared, self.cluster.scale_up, self.cluster.scale_out
            )
        return self.layouts[group]

    def seconds(self, op: Op) -> Size:
        """Return the seconds of ``op`` on its stream."""
        if not op.is_communication:
            fits = self.profile.kernels if self.profile else {}
            return kernel_seconds(op, self.cluster.chip, fits) * self._contention(op)
        fit = self.profile.collectives if self.profile else None
        return collective_seconds(op.kind, work(op).payload_bytes, self.layout(op.group), fit=fit)

    def _contention(self, op: Op) -> float:
        """Measured kernels had every rank busy; a rank alone has the memory to itself."""
        if self.profile is None or self.cluster.world > 1:
            return 1.0
        limit = "compute" if op.kind in ("matmul", *ATTENTION_KINDS) else "memory"
        return self.profile.alone.get(limit, 1.0)

    def issue_seconds(self, op: Op) -> Size:
        """Return the host's time to start ``op``; measured kernels contain their own."""
        if self.profile is None:
            return 0.0
        return self.profile.issue_s if op.kind in ("send", "recv") else 0.0

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


def _inner(mesh: Mapping[str, int], axis: str) -> int:
    """Return the product of the axes that vary faster than ``axis``."""
    names = list(mesh)
    product = 1
    for name in names[names.index(axis) + 1 :]:
        product *= mesh[name]
    return product
