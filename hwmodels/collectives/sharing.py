"""What a collective takes from kernels that run beside it: SMs, and bandwidth of the memory.

NCCL runs one block of threads per channel and a block fills an SM (640 threads, NCCL_MAX_NTHREADS),
so C channels leave units - C to kernels. Every byte that a rank sends was read from memory once,
every byte that it receives is written once, and a reduction reads its own part besides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hwmodels.collectives.algorithms import algorithm_of, sizes
from hwmodels.collectives.nccl import CANDIDATES
from hwmodels.collectives.traffic import Array
from hwmodels.collectives.tuner import GroupLayout, choose
from hwmodels.hardware import Chip

# kind of link -> channels of a large call: 24 rings over NVLink (NCCL's log in nccl-tests issue
# 194); assumption: 4 over PCIe, 8 where a rank has only its adapter.
CHANNELS = {"switch": 24, "mesh": 24, "bus": 4, "nic": 8}
# A channel is opened per 64 bytes for each of 512 threads (NCCL, src/include/enqueue.h).
CHANNEL_BYTES = 64 * 512
REDUCING = frozenset({"all_reduce", "reduce_scatter", "reduce", "exclusive_scan"})


@dataclass(frozen=True, slots=True)
class Footprint:
    """Shares of the chip's units and of its memory's bandwidth that a call holds, 0 to 1."""

    units: Array
    memory: Array

    def slowdown(self, memory_bound: ArrayLike) -> Array:
        """Return how many times longer a kernel takes beside the call.

        ``memory_bound``: the kernel's time in memory over its whole time, 0 to 1. A kernel needs
        units and memory at once, hence the worse of both: 1 / (1 - units), or its use of memory
        plus the call's where that exceeds the whole.
        """
        wanted = np.asarray(memory_bound, dtype=np.float64) + self.memory
        return np.asarray(np.maximum(1 / (1 - self.units), np.maximum(wanted, 1.0)))


def footprint(
    op: str, size_bytes: ArrayLike, group: GroupLayout, chip: Chip, algorithm: str = "auto"
) -> Footprint:
    """Return what a call of ``op`` holds of ``chip`` while it runs; nothing for one rank."""
    seconds, names = choose(op, size_bytes, group, algorithm)
    n, m, k = sizes(group.ranks, group.ranks_per_node)
    size = np.broadcast_to(np.asarray(size_bytes, dtype=np.float64), seconds.shape)
    sent = np.zeros(seconds.shape)
    for name in np.unique(names):
        shape = CANDIDATES[name].algorithm if name in CANDIDATES else str(name)
        moved = algorithm_of(op, shape).ops[op](n, m, k)
        sent = np.where(names == name, size * (moved.up_share + moved.out_share), sent)
    touched = sent * (3 if op in REDUCING else 2)
    busy = seconds > 0
    traffic = np.divide(touched, seconds, out=np.zeros(seconds.shape), where=busy)
    channels = np.clip(np.ceil(size / CHANNEL_BYTES), 1, CHANNELS[group.scale_up.kind])
    units = np.where(busy, np.minimum(channels, chip.units - 1) / chip.units, 0.0)
    return Footprint(units, np.minimum(traffic / chip.hbm.bytes_per_s, 1.0))
