"""A small member of every family of fabrics, for tests that hold for all."""

from __future__ import annotations

from collections.abc import Callable

from hwmodels.fabric import Fabric
from hwmodels.fabrics import TOPOLOGIES, edge_hub, rail_fat_tree, torus

SMALL: dict[str, Callable[..., Fabric]] = {
    **{name: make for name, make in TOPOLOGIES.items() if name != "nvl72"},
    "nvl72": lambda: rail_fat_tree(2, 12, "nvlink5"),
    "fat-tree-pods": lambda: rail_fat_tree(4, 2, pod_nodes=2, spines=2, oversubscription=2.0),
    "fat-tree-hashed": lambda: rail_fat_tree(4, 2, spines=4, routing="hash"),
    "torus-3d": lambda: torus((2, 3, 4)),
    "grid": lambda: torus((3, 3), wrap=False),
    "wireless": lambda: edge_hub(["wifi6"] * 3),
}
