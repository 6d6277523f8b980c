"""Generators of fabrics: how accelerators are wired, from a node to a pod.

A new topology is one function that yields wires and one line in `TOPOLOGIES`. Rates are payload
bytes per second of each direction: a link's bandwidth times its efficiency. A switch's latency is
split over the two wires of a path through it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from hwmodels.catalogue import load_cluster, load_link
from hwmodels.fabric import Array, Fabric, Node, Wire, make_fabric
from hwmodels.hardware import Cluster, Link
from simcore.errors import InputError

# NVLinks between pairs of GPUs of a DGX-1 with V100 (`nvidia-smi topo -m`; NVIDIA DGX-1 white
# paper, 2017, hybrid cube mesh): six of 25 GB/s per GPU.
DGX1_LINKS = {
    **{(0, 1): 1, (0, 2): 1, (0, 3): 2, (0, 4): 2, (1, 2): 2, (1, 3): 1, (1, 5): 2, (2, 3): 2},
    **{(2, 6): 1, (3, 7): 1, (4, 5): 1, (4, 6): 1, (4, 7): 2, (5, 6): 2, (5, 7): 1, (6, 7): 2},
}
# Infinity Fabric links of 50 GB/s between the dies of a Frontier node (OLCF Frontier user guide,
# node diagram; Pearson 2023, arXiv 2302.14827): quad, dual and single.
FRONTIER_LINKS = {
    **{(0, 1): 4, (2, 3): 4, (4, 5): 4, (6, 7): 4, (0, 6): 2, (2, 4): 2},
    **{(0, 2): 1, (1, 3): 1, (1, 5): 1, (3, 7): 1, (4, 6): 1, (5, 7): 1},
}
XGMI_BYTES_PER_S = 50e9  # one Infinity Fabric link, each direction (OLCF Frontier user guide)
# An adapter's PCIe 4 link to its die, 50 GB/s each direction (OLCF Frontier user guide).
FRONTIER_SLOT_BYTES_PER_S = 50e9
# Between sockets (NCCL src/graph/topo.h): AMD, and Intel Broadwell as in the DGX-1.
AMD_SOCKET_BYTES_PER_S = 16e9
BROADWELL_SOCKET_BYTES_PER_S = 6e9
HOP_S = 1e-6  # over PCIe or between sockets (NCCL src/graph/tuning.cc, PCI)

Pairs = dict[tuple[int, int], int]


def _rate(link: Link) -> float:
    return link.bytes_per_s * link.efficiency


def _star(ranks: Sequence[Node], hub: str, link: Link) -> Iterator[Wire]:
    """A wire from every rank to a switch, which passes everything."""
    kind = "duplex" if link.duplex else "shared"
    for rank in ranks:
        yield Wire(rank, hub, _rate(link), link.latency_s / 2, kind)


def _full(ranks: Sequence[Node], link: Link) -> Iterator[Wire]:
    """A wire per pair."""
    rate = link.peer_rate_bytes_per_s * link.efficiency
    for a, b in itertools.combinations(ranks, 2):
        yield Wire(a, b, rate, link.latency_s, "duplex" if link.duplex else "shared")


def _bundles(first: int, pairs: Pairs, bytes_per_s: float, latency_s: float) -> Iterator[Wire]:
    """Pairs joined by several links each."""
    for (a, b), count in pairs.items():
        yield Wire(first + a, first + b, count * bytes_per_s, latency_s)


def _pcie(
    first: int, gpus: int, sockets: int, per_socket: int, link: Link, socket_bytes_per_s: float
) -> Iterator[Wire]:
    """GPUs under PCIe switches under sockets, sockets in a row; tried after faster wires."""
    if gpus % (sockets * per_socket):
        raise InputError(
            f"{gpus} GPUs do not split over {sockets} sockets of {per_socket} PCIe switches: "
            "use a multiple."
        )
    share = gpus // (sockets * per_socket)
    rate, kind = _rate(link), "duplex" if link.duplex else "shared"
    for gpu in range(gpus):
        yield Wire(first + gpu, f"{first}.plx{gpu // share}", rate, link.latency_s / 2, kind, 1)
    for switch in range(sockets * per_socket):
        bridge = f"{first}.socket{switch // per_socket}"
        yield Wire(f"{first}.plx{switch}", bridge, rate, link.latency_s / 2, kind, 1)
    for a, b in itertools.pairwise(range(sockets)):
        ends = f"{first}.socket{a}", f"{first}.socket{b}"
        yield Wire(*ends, socket_bytes_per_s, HOP_S, order=1)


# -- nodes ---------------------------------------------------------------------------------------


def nvswitch_node(gpus: int = 8, link: str = "nvlink4") -> Fabric:
    """Return a node whose GPUs hang on NVSwitches (DGX A100, H100, B200; a rack of NVL72)."""
    return make_fabric("nvswitch-node", _star(range(gpus), "nvswitch", load_link(link)), gpus)


def full_mesh(gpus: int = 8, link: str = "infinity-fabric-mi300x") -> Fabric:
    """Return a node with a link per pair of GPUs (MI300X platform)."""
    return make_fabric("full-mesh", _full(range(gpus), load_link(link)), gpus)


def hybrid_cube_mesh(link: str = "nvlink2", host: str = "pcie3x16") -> Fabric:
    """Return a DGX-1: single and double NVLinks; pairs without one meet over PCIe and sockets."""
    nvlink = load_link(link)
    wires = [
        *_bundles(
            0, DGX1_LINKS, nvlink.peer_rate_bytes_per_s * nvlink.efficiency, nvlink.latency_s
        ),
        *_pcie(0, 8, 2, 2, load_link(host), BROADWELL_SOCKET_BYTES_PER_S),
    ]
    return make_fabric("hybrid-cube-mesh", wires, 8)


def pcie_tree(
    gpus: int = 8, sockets: int = 2, switches_per_socket: int = 2, link: str = "pcie4x16"
) -> Fabric:
    """Return GPUs under PCIe switches under the sockets of a host (NUMA)."""
    wires = _pcie(0, gpus, sockets, switches_per_socket, load_link(link), AMD_SOCKET_BYTES_PER_S)
    return make_fabric("pcie-tree", wires, gpus)


def nvlink_pairs(
    gpus: int = 8, bridge: str = "nvlink3-bridge-a100", host: str = "pcie4x16"
) -> Fabric:
    """Return a PCIe tree of two sockets whose neighbours are joined in pairs by NVLink bridges."""
    link = load_link(bridge)
    pairs = [Wire(a, a + 1, _rate(link), link.latency_s) for a in range(0, gpus - 1, 2)]
    tree = _pcie(0, gpus, 2, 1, load_link(host), AMD_SOCKET_BYTES_PER_S)
    return make_fabric("nvlink-pairs", [*pairs, *tree], gpus)


def frontier(nodes: int = 2) -> Fabric:
    """Return Frontier nodes: unequal links between dies, an adapter at every odd die.

    Dies pass on what is not for them; the Slingshot network between nodes never blocks.
    """
    nic = load_link("slingshot11")
    wires: list[Wire] = []
    for first in range(0, 8 * nodes, 8):
        wires += _bundles(first, FRONTIER_LINKS, XGMI_BYTES_PER_S, HOP_S)
        if nodes > 1:
            adapters = range(first + 1, first + 8, 2)
            wires += [Wire(die, f"{die}.nic", FRONTIER_SLOT_BYTES_PER_S) for die in adapters]
            wires += _star([f"{die}.nic" for die in adapters], "slingshot", nic)
    return make_fabric("frontier", wires, 8, forwarding=True)


# -- clusters ------------------------------------------------------------------------------------


def two_level(cluster: Cluster | None = None, oversubscription: float = 1.0) -> Fabric:
    """Return the graph of which `topology.make_topology` is the closed form; dgx-h100 by default.

    ``oversubscription``: bandwidth of a node's adapters over that of its uplink.
    """
    cluster = cluster or load_cluster("dgx-h100", 2)
    up, out, share = cluster.scale_up, cluster.scale_out, cluster.gpus_per_node
    adapters = min(out.nics_per_node or share, share)
    node_rate, kind = _rate(out) * share, "duplex" if out.duplex else "shared"
    wires: list[Wire] = []
    for node in range(cluster.nodes):
        ranks = range(node * share, (node + 1) * share)
        if share > 1:
            wires += _full(ranks, up) if up.kind == "mesh" else _star(ranks, f"{node}.switch", up)
        core = "fabric" if oversubscription <= 1 else f"{node}.leaf"
        wires += [
            Wire(rank, f"{node}.nic{i * adapters // share}", math.inf, order=1)
            for i, rank in enumerate(ranks)
        ]
        for nic in range(adapters):
            ends = f"{node}.nic{nic}", core
            wires.append(Wire(*ends, node_rate / adapters, out.latency_s / 2, kind))
        if oversubscription > 1:
            wires.append(Wire(core, "fabric", node_rate / oversubscription))
    return make_fabric(cluster.name, wires, share)


def rail_fat_tree(
    nodes: int = 4,
    gpus_per_node: int = 8,
    link: str = "nvlink4",
    nic: str = "ib-ndr-400",
    pod_nodes: int = 32,
    spines: int = 16,
    oversubscription: float = 1.0,
    routing: str = "spread",
) -> Fabric:
    """Return switched nodes whose i-th adapters meet at the i-th leaf of their pod (DGX SuperPOD).

    Leaves join at ``spines``, or at the most below that which divide a pod's nodes evenly.
    ``oversubscription``: bandwidth of a leaf's ports down over that of its ports up. GPU and
    adapter share a PCIe 5 slot.
    """
    up, out, slot = load_link(link), load_link(nic), load_link("pcie5x16")
    pod = min(pod_nodes, nodes)
    tops = max(count for count in range(1, min(spines, pod) + 1) if pod % count == 0)
    wires: list[Wire] = []
    for node in range(nodes):
        ranks = range(node * gpus_per_node, (node + 1) * gpus_per_node)
        wires += _star(ranks, f"{node}.nvswitch", up)
        for rail, rank in enumerate(ranks):
            wires.append(Wire(rank, f"{rank}.nic", slot.bytes_per_s))
            wires += _star([f"{rank}.nic"], f"{node // pod}.leaf{rail}", out)
    uplink = _rate(out) * pod / tops / oversubscription
    leaves = itertools.product(range(math.ceil(nodes / pod)), range(gpus_per_node))
    wires += [
        Wire(f"{p}.leaf{rail}", f"spine{top}", uplink) for p, rail in leaves for top in range(tops)
    ]
    return make_fabric("rail-fat-tree", wires, gpus_per_node, routing=routing)


def nvl72_racks(racks: int = 2, nic: str = "ib-ndr-400") -> Fabric:
    """Return racks of 72 GPUs on one NVSwitch fabric (GB200 NVL72), 72 rails between racks."""
    return rail_fat_tree(racks, 72, "nvlink5", nic)


def dragonfly(
    routers: int = 4, ranks_per_router: int = 2, global_links: int = 2, nic: str = "slingshot11"
) -> Fabric:
    """Return a balanced dragonfly (Kim et al. 2008): routers x global_links + 1 groups.

    Routers of a group are joined all to all; every pair of groups has one link. Minimal routing.
    """
    link, groups = load_link(nic), routers * global_links + 1
    ports = routers * global_links
    wires: list[Wire] = []
    for rank in range(groups * routers * ranks_per_router):
        wires += _star([rank], f"router{rank // ranks_per_router}", link)
    for group in range(groups):
        names = [f"router{group * routers + i}" for i in range(routers)]
        wires += [Wire(a, b, _rate(link)) for a, b in itertools.combinations(names, 2)]
        for port in range(ports):
            peer = (group + port + 1) % groups
            far = peer * routers + (ports - 1 - port) // global_links
            if group < peer:
                wires.append(Wire(names[port // global_links], f"router{far}", _rate(link)))
    return make_fabric("dragonfly", wires, ranks_per_router)


def torus(shape: Sequence[int] = (4, 4), link: str = "ici-v4", wrap: bool = True) -> Fabric:
    """Return a torus (TPU pods: 2-D or 3-D), the last dimension numbered first.

    Messages go in dimension order, the last dimension first; half way round a ring, every other
    source goes the other way. A dimension of two has one wire, and none closes the ring without
    ``wrap``.
    """
    wire, wires = load_link(link), list[Wire]()
    rate = wire.peer_rate_bytes_per_s * wire.efficiency
    ranks = np.arange(math.prod(shape)).reshape(tuple(shape))
    for order, axis in enumerate(reversed(range(ranks.ndim))):
        length = ranks.shape[axis]
        pairs = np.stack([ranks, np.roll(ranks, -1, axis)], axis=-1)
        steps = length if wrap and length > 2 else length - 1
        pairs = np.take(pairs, range(steps), axis=axis).reshape(-1, 2)
        for ends in (pairs, pairs[:, ::-1]):  # every node's way up comes before its way down
            wires += [Wire(int(a), int(b), rate, wire.latency_s, "one-way", order) for a, b in ends]
    return make_fabric("torus", wires, forwarding=True)


# -- unequal networks ----------------------------------------------------------------------------


def site_matrices(lines: Sequence[str]) -> tuple[Array, Array]:
    """Return bandwidths and latencies between sites on these lines, [n, n] each.

    A pair has the lesser bandwidth and the mean latency of its two lines.
    """
    links = [load_link(line) for line in lines]
    rates = np.array([_rate(link) for link in links])
    delays = np.array([link.latency_s for link in links])
    return np.minimum.outer(rates, rates), np.add.outer(delays, delays) / 2


def wide_area(
    bytes_per_s: ArrayLike | None = None,
    latency_s: ArrayLike | None = None,
    access_bytes_per_s: ArrayLike = math.inf,
) -> Fabric:
    """Return peers with a link of its own per ordered pair: [n, n] bandwidths and latencies.

    ``access_bytes_per_s``: what a peer's own line carries each way, over all its pairs. Without
    matrices: four sites on unlike lines.
    """
    if bytes_per_s is None or latency_s is None:
        bytes_per_s, latency_s = site_matrices(("wan-1g", "wan-1g", "wan-200m", "wan-200m"))
    rates, delays = (np.asarray(x, dtype=np.float64) for x in (bytes_per_s, latency_s))
    if rates.ndim != 2 or rates.shape[0] != rates.shape[1] or rates.shape != delays.shape:
        raise InputError(
            f"wide-area: bytes_per_s {rates.shape} and latency_s {delays.shape} must be square "
            "matrices of one size."
        )
    peers = len(rates)
    access = np.broadcast_to(np.asarray(access_bytes_per_s, dtype=np.float64), peers)
    wires = [Wire(i, f"{i}.line", float(access[i])) for i in range(peers)]
    wires += [
        Wire(f"{i}.line", f"{j}.line", float(rates[i, j]), float(delays[i, j]), "one-way")
        for i, j in itertools.permutations(range(peers), 2)
    ]
    return make_fabric("wide-area", wires)


def edge_hub(links: Sequence[str] = ("ethernet-1g", "ethernet-1g", "wifi6")) -> Fabric:
    """Return devices on one switch or access point, each over a link of its own."""
    wires: list[Wire] = []
    for device, name in enumerate(links):
        wires += _star([device], "hub", load_link(name))
    return make_fabric("edge-hub", wires)


# (ranks, link inside, adapter, adapters) of a node
NodeKind = tuple[int, str, str, int]
EXAMPLE_NODES: tuple[NodeKind, ...] = (
    (4, "nvlink4", "ib-ndr-400", 4),
    (4, "nvlink3", "ib-hdr-200", 4),
    (2, "pcie4x16", "ethernet-100g", 1),
)


def mixed_nodes(nodes: Sequence[NodeKind] = EXAMPLE_NODES) -> Fabric:
    """Return nodes of unlike chips and links around a network that never blocks."""
    wires: list[Wire] = []
    first = 0
    for number, (count, inside, adapter, adapters) in enumerate(nodes):
        ranks = range(first, first + count)
        up, out = load_link(inside), load_link(adapter)
        wires += _full(ranks, up) if up.kind == "mesh" else _star(ranks, f"{number}.switch", up)
        nics = [f"{number}.nic{i}" for i in range(adapters)]
        wires += [
            Wire(rank, nics[i * adapters // count], math.inf, order=1)
            for i, rank in enumerate(ranks)
        ]
        wires += _star(nics, "network", out)
        first += count
    return make_fabric("mixed-nodes", wires)


TOPOLOGIES: dict[str, Callable[..., Fabric]] = {
    "nvswitch-node": nvswitch_node,
    "full-mesh": full_mesh,
    "hybrid-cube-mesh": hybrid_cube_mesh,
    "nvlink-pairs": nvlink_pairs,
    "pcie-tree": pcie_tree,
    "frontier": frontier,
    "cluster": two_level,
    "rail-fat-tree": rail_fat_tree,
    "nvl72": nvl72_racks,
    "dragonfly": dragonfly,
    "torus": torus,
    "wide-area": wide_area,
    "edge-hub": edge_hub,
    "mixed": mixed_nodes,
}
