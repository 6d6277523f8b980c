"""Seconds and bytes of collectives, over arrays of sizes and groups.

`traffic` says what an algorithm moves, `algorithms` registers them, `nccl` prices protocols on
links, `tuner` takes the fastest, `libraries` calls one by name. `peer_memory` and `experts` are
kernels of serving engines; `uneven` and `codecs` change the payload; `sharing` says what a call
takes from the kernels beside it, `uncertainty` how sure its seconds are. `measured` holds what a
calibration of the machine at hand found.
"""

from hwmodels.collectives.algorithms import (
    ALGORITHMS,
    BUS_FACTORS,
    LIBRARIES,
    Algorithm,
    bus_bytes,
    bus_bytes_per_s,
    hops,
    traffic,
    wire_bytes,
)
from hwmodels.collectives.codecs import Codec, coded_seconds
from hwmodels.collectives.experts import Routing, distinct_groups, expert_copies, expert_seconds
from hwmodels.collectives.libraries import library_call
from hwmodels.collectives.measured import CollectiveFit, FitKey, fit_seconds, read_fit
from hwmodels.collectives.nccl import CANDIDATES
from hwmodels.collectives.peer_memory import engine_all_reduce, engines
from hwmodels.collectives.sharing import Footprint, footprint
from hwmodels.collectives.traffic import Shape, Traffic, double_tree_share
from hwmodels.collectives.tuner import (
    GroupLayout,
    algorithms_for,
    choose,
    collective_seconds,
)
from hwmodels.collectives.uncertainty import deviation, interval
from hwmodels.collectives.uneven import (
    busiest_bytes,
    gather_matrix,
    matrix_seconds,
    scatter_matrix,
)

__all__ = [
    "ALGORITHMS",
    "BUS_FACTORS",
    "CANDIDATES",
    "LIBRARIES",
    "Algorithm",
    "Codec",
    "CollectiveFit",
    "FitKey",
    "Footprint",
    "GroupLayout",
    "Routing",
    "Shape",
    "Traffic",
    "algorithms_for",
    "bus_bytes",
    "bus_bytes_per_s",
    "busiest_bytes",
    "choose",
    "coded_seconds",
    "collective_seconds",
    "deviation",
    "distinct_groups",
    "double_tree_share",
    "engine_all_reduce",
    "engines",
    "expert_copies",
    "expert_seconds",
    "fit_seconds",
    "footprint",
    "gather_matrix",
    "hops",
    "interval",
    "library_call",
    "matrix_seconds",
    "read_fit",
    "scatter_matrix",
    "traffic",
    "wire_bytes",
]
