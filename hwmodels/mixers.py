"""Seconds of a sequence mixer on a chip: launches, and the slowest of arithmetic, bytes, steps.

    seconds = launches x gap + max(matrix, vector, memory, cache, chain)

A kernel's blocks share the chip's units; fewer blocks than units leave units idle. Batches of small
matrices are padded to the tiles of the kernels. The chain is the dependent steps inside kernels, in
as many spans as a block's working set needs to fit its unit; steps that wait for a launch are
already among the launches.
Nothing here is fitted to a mixer: the shares are those of good libraries, latencies are
microbenchmarks of the chips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.families.family import matrix_peak
from hwmodels.hardware import Chip
from simcore.mixers import MixerCost

# Share of the matrix peak that fused kernels reach: 50 to 73 % on A100 (Dao 2023,
# FlashAttention-2, section 4.1). Share of the memory's rate that streaming kernels reach: 80 to
# 93 % (Deakin et al. 2018, BabelStream, on P100 and V100).
MATRIX_SHARE = 0.6
MEMORY_SHARE = 0.85
# Cycles of latency (Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU
# Architecture": shared memory 29 on A100 and H100; L2 262 and 263) and of one dependent matrix
# instruction (Sun et al. 2022, "Dissecting Tensor Cores": m16n8k16 on A100).
SHARED_CYCLES = 29
L2_CYCLES = 263
MATRIX_CYCLES = 33
# A barrier over all blocks of a kernel (Zhang et al. 2020, "A Study of Single and Multi-device
# Synchronization Methods in Nvidia GPUs": cooperative groups on V100, one block per unit).
GRID_BARRIER_S = 1.4e-6
# Host work of one eager operation, from Python to the driver's queue: 5 to 25 us before the kernel
# starts (J. Lin 2025, "From PyTorch op to kernel launch", jiahuanglin.xyz). Where it is longer than
# the gap between kernels, a chain of small kernels waits for it.
EAGER_OP_S = (5e-6, 25e-6)
# The smallest tile of a general product and its step in depth (cuBLAS: sgemm_32x32_sliced1x4 is
# the least of its kernels); a batch of smaller matrices does the work of whole tiles.
TILE_SIDE, TILE_DEPTH = 32, 8
REGISTER_BYTES = 65536 * 4  # per unit; CUDA programming guide, every capability since 3.7

Seconds = NDArray[np.float64]


def step_seconds(step: str, chip: Chip) -> float:
    """Return the latency of one dependent step that waits at ``step`` ("unit", "grid", "launch").

    Inside a block: the state through shared memory (write, read) and one matrix instruction.
    Over a grid: that, the state through L2 (write, read) and the barrier.
    """
    unit = (2 * SHARED_CYCLES + MATRIX_CYCLES) / chip.clock_hz
    if step == "grid":
        return unit + 2 * L2_CYCLES / chip.clock_hz + GRID_BARRIER_S
    return unit if step == "unit" else 0.0


def padding_flops(side: Any) -> Seconds:
    """Return the FLOPs that one small square product of a batch wastes on filling its tiles.

    Matrices of one entry are numbers and need no tile.
    """
    n = np.asarray(side, dtype=np.float64)
    tile = (np.ceil(n / TILE_SIDE) * TILE_SIDE) ** 2 * np.ceil(n / TILE_DEPTH) * TILE_DEPTH
    return np.asarray(np.where(n > 1, 2 * (tile - n**3), 0.0))


def mixer_parts(cost: MixerCost, chip: Chip, dtype: str, op_s: float = 0.0) -> dict[str, Seconds]:
    """Return seconds by cause: launch, matrix, vector, memory, cache, chain.

    ``op_s``: host time of one operation where the host issues them eagerly; the gap between
    kernels is the longer of it and the chip's.
    """
    busy = np.minimum(1.0, np.asarray(cost.pieces, dtype=np.float64) / chip.units)
    peak = matrix_peak(chip, dtype) * MATRIX_SHARE
    spans = np.ceil(np.asarray(cost.on_chip_bytes) / (REGISTER_BYTES + chip.on_chip_bytes))
    executed = cost.matrix_flops + cost.small_products * padding_flops(cost.small_side)
    parts: dict[str, Any] = {
        "launch": np.asarray(cost.launches) * max(chip.launch_s, op_s),
        "matrix": executed / (peak * busy),
        "vector": cost.vector_flops / (chip.vector_flops_per_s * busy),
        "memory": cost.hbm_bytes / (chip.hbm.bytes_per_s * MEMORY_SHARE),
        "cache": np.maximum(cost.hbm_bytes, cost.l2_bytes) / _l2_rate(chip),
        "chain": np.asarray(cost.serial_depth)
        * np.maximum(1.0, spans)
        * step_seconds(cost.step, chip),
    }
    return {name: np.asarray(value, dtype=np.float64) for name, value in parts.items()}


def _l2_rate(chip: Chip) -> float:
    """Return bytes per second of L2, infinite where the chip documents none."""
    tier = chip.tier("l2")
    return tier.bytes_per_s if tier else np.inf


def mixer_seconds(cost: MixerCost, chip: Chip, dtype: str, op_s: float = 0.0) -> Seconds:
    """Return the seconds of a form, vectorised over the cost's arrays (see `mixer_parts`)."""
    parts = mixer_parts(cost, chip, dtype, op_s)
    launch = parts.pop("launch")
    longest = np.zeros_like(launch)
    for part in parts.values():
        longest = np.maximum(longest, part)
    return np.asarray(launch + longest)


# ------------------------------------------------------------------ tiles of a fused network


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a head's recurrent matrix is cut over blocks: by gate columns and by state rows."""

    columns: int
    rows: int
    block_bytes: float  # weights and accumulators that one block holds


# A warp's tile of the matrix instructions that FlashRNN is built on: 32 gate columns, 16 state
# rows, 8 sequences (its published tuning rules, NX-AI/flashrnn, autotune/tune.rules).
TILE_COLUMNS, TILE_ROWS, TILE_BATCH = 32, 16, 8


def fused_tilings(
    hidden: int, heads: int, gates: int, chip: Chip, element_bytes: float = 2.0
) -> Iterator[Tiling]:
    """Yield every tiling of a fused recurrent kernel that the chip can hold.

    Constraints, as FlashRNN states them: the blocks of all heads run at once, at most one per
    unit; columns and rows divide into whole tiles; a block's weights and its accumulators (fp32)
    fit into the unit's registers and shared memory.
    """
    if hidden % heads:
        return
    head = hidden // heads
    wide = gates * head
    for columns in _divisors(wide // TILE_COLUMNS if wide % TILE_COLUMNS == 0 else 0):
        for rows in _divisors(head // TILE_ROWS if head % TILE_ROWS == 0 else 0):
            weights = element_bytes * wide * head / (columns * rows)
            held = weights + 4 * TILE_BATCH * wide / columns
            fits = held <= REGISTER_BYTES + chip.on_chip_bytes
            if fits and heads * columns * rows <= chip.units:
                yield Tiling(columns, rows, held)


def largest_fused_hidden(chip: Chip, heads: int, gates: int, element_bytes: float = 2.0) -> int:
    """Return the widest state whose recurrent weights one fused kernel can keep on the chip."""
    held = chip.units * (REGISTER_BYTES + chip.on_chip_bytes)
    most = int((held * heads / (gates * element_bytes)) ** 0.5)
    grain = heads * TILE_ROWS
    for hidden in range(most - most % grain, 0, -grain):
        if next(fused_tilings(hidden, heads, gates, chip, element_bytes), None):
            return hidden
    return 0


def largest_one_block_head(chip: Chip, gates: int, element_bytes: float = 2.0) -> int:
    """Return the widest head that one block can train, a power of two as block compilers want.

    The weights lie in shared memory; their gradient accumulates in registers in fp32 and must
    leave some of them free.
    """
    head = 1
    while (
        gates * (2 * head) ** 2 * element_bytes <= chip.on_chip_bytes
        and gates * (2 * head) ** 2 * 4 < REGISTER_BYTES
    ):
        head *= 2
    return head


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
