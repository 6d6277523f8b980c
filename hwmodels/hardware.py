"""Hardware as numbers: chips, links and clusters, each read from one data file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class MemoryTier:
    """One level of memory of a chip: capacity and bandwidth (bytes, bytes per second)."""

    name: str  # "l2", "hbm", "host", "disk"
    size_bytes: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip from its datasheet. Peaks are dense matrix rates per dtype."""

    name: str
    vendor: str
    peak_flops_per_s: Mapping[str, float]
    vector_flops_per_s: float  # fp32 outside the matrix units
    tiers: tuple[MemoryTier, ...]  # nearest first; "hbm" is the main memory, whatever its kind
    units: int  # SMs, CUs or cores
    clock_hz: float
    launch_s: float  # from one kernel's end to the next one's start in a stream
    power_w: float
    scale_up: str = ""  # default link inside a node
    host_link: str = ""
    price_per_hour: float | None = None  # US dollars, rented
    price_usd: float | None = None  # US dollars, bought
    architecture: str = ""  # "hopper"; chips of one architecture share the curves of kernels
    on_chip_bytes: float = 0.0  # memory that a kernel addresses, per unit (shared memory, SBUF)
    kind: str = "accelerator"  # or "cpu": computes in the thread that issues
    process_nm: float = 0.0  # manufacturing node, in the foundry's name for it
    sources: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    calibrated: bool = False  # True where the numbers were measured on the machine at hand

    def tier(self, name: str) -> MemoryTier | None:
        """Return the tier called ``name``, or None where the chip documents none."""
        return next((tier for tier in self.tiers if tier.name == name), None)

    @property
    def hbm(self) -> MemoryTier:
        """The main memory."""
        return next(tier for tier in self.tiers if tier.name == "hbm")


@dataclass(frozen=True, slots=True)
class Link:
    """A link as one rank sees it: per-direction bandwidth and latency.

    ``kind`` says what a rank's port leads to: "switch" (any peer at full rate), "mesh" (a wire per
    peer, each ``peer_bytes_per_s``), "bus" (as a switch, through the host) or "nic". A NIC as
    loaded from its file has the bandwidth of one adapter; inside a `Cluster` it is resolved to
    each rank's share (see `Link.shared`).
    """

    name: str
    bytes_per_s: float  # each direction, per rank
    latency_s: float
    duplex: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    kind: str = "switch"
    peer_bytes_per_s: float | None = None  # to one peer, each direction; None: bytes_per_s
    nics_per_node: int = 0  # adapters that a node's ranks share; 0: one per rank
    efficiency: float = 1.0  # share of bytes_per_s left for payload after protocol overhead
    base_s: float = 0.0  # software cost of one collective call over this link

    @property
    def peer_rate_bytes_per_s(self) -> float:
        """Bandwidth between one pair of ranks, each direction."""
        return self.bytes_per_s if self.peer_bytes_per_s is None else self.peer_bytes_per_s

    def shared(self, gpus_per_node: int) -> Link:
        """Return the link with ``bytes_per_s`` as one rank's share of its node's adapters.

        Share = adapters x bandwidth / ranks: all ranks of a node send at once, as they do in a
        collective over every node. Links that are no NICs come back unchanged.
        """
        if self.kind != "nic" or self.nics_per_node in (0, gpus_per_node):
            return self
        rate = self.bytes_per_s * self.nics_per_node / gpus_per_node
        return replace(self, bytes_per_s=rate)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes of equal chips: ``scale_up`` joins the ranks of a node, ``scale_out`` the nodes.

    ``scale_out.bytes_per_s`` is one rank's share of its node's adapters. A node is the domain of
    the scale-up link, so a rack of 72 chips on one switch fabric is one node.
    """

    name: str
    chip: Chip
    gpus_per_node: int
    nodes: int
    scale_up: Link
    scale_out: Link

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.gpus_per_node * self.nodes
