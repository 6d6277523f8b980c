"""Attention by fused kernels: prefill and decode, by tiles, waves, splits, memory and side kernels.

A block holds ``rows`` queries and walks over the keys that they see in steps of ``keys``. Seconds:

1. pair    = 2 (d_k + d_v) / (``matrix_share`` x FLOPs per unit) + exposed x softmax: one query and
             one key in one unit. softmax = an exponential, 16 a clock, and 4 operations of the
             ordinary lanes (scale, maximum, sum, conversion). FlashAttention-2 multiplies nothing
             beside it (exposed 1), FlashAttention-3 half of the time (two groups in turn).
2. blocks  = batch x heads x ceil(queries / rows), or, where the query heads of a group share a
             block, batch x kv_heads x ceil(queries x group / rows). The share ``grouped`` of calls
             does so; decode always does.
3. one     = max(``block_s``, rows x keys x pair): a block with its first step, no less than the
             chain of latencies from the queries' load to the results' store. The longest block
             adds rows x (keys seen - keys) x pair, whole steps where all blocks are alike.
4. whole   = ceil(blocks / units) x the longest, where all blocks are alike; else
             max(ceil(groups / units) x longest, ceil(blocks / units) one + rest / units + ``tail``
             (longest - one)): groups of blocks share keys, rest are the pairs beyond the first
             steps, and half a step more for the diagonal.
5. split   = ``kernel_s`` + p part + max(longest / p, one, all / units), where blocks leave units
             idle: the keys are cut in p parts, and a further kernel combines their sums. part =
             ``kernel_s`` / 10 (a trip to memory) + fp32 sums written and read over HBM. p is the
             best up to units / blocks. busy = min(whole, split).
6. memory  = (queries, results, cache seen) / (HBM x ``bandwidth_share``), or at the rate of L2
             where all of it lies within ``cached_share`` of L2 since the call before.
7. beside  = max(busy, memory) + less x lockstep / (less + lockstep), less = min(busy, memory):
             at first all units load and then compute together; they drift apart in
             ``lockstep_s``.
8. side    = kernels before and after, and what no step hides: ``row_passes`` over queries and
             results, ``cache_passes`` over new keys and values (rotation, write to the cache, the
             blocks' own loads and stores), at HBM x ``bandwidth_share``; a kernel that plans the
             blocks (FlashAttention-3; it shows half, being launched ahead of time); copies of
             queries and results that put a group's heads in rows (FlashAttention-2 with one
             query).
9. seconds = ``launch_s`` + ``sequence_s`` x batch + side + beside.

A window of w keys costs a block w + its queries + one step more (two where operands are bytes),
since it starts and ends inside steps. A cache narrower than the queries is multiplied in its own
format where the chip can, at ``narrow_share`` of that rate: at most half, what 16 bits give.

Every term rises in batch, lengths and width; more units, rate or bandwidth never cost time. Heads
are not a size in one case: vLLM's FlashAttention-2 never splits the keys of a decode whose query
heads have a key head each, so two heads to a key can take far less time than one (measured: 89
and 3,017 microseconds over 131,072 keys on an A100). One query a sequence belongs to decode.
Units far slower or faster than a GPU's (cores, systolic arrays) are given blocks and exponentials
in proportion to the root of their rate.

Sources: blocks, steps, when keys are split: Dao-AILab/flash-attention, csrc/flash_attn and
hopper/{tile_size,heuristics}.h, flash_prepare_scheduler.cu; vllm-project/flash-attention for
paged caches (64 x 128 blocks through the split kernel) and at most 32 splits in captured graphs.
Overlap with exponentials: Shah et al., FlashAttention-3 (2024), section 3. 16 exponentials a
clock: CUDA C++ programming guide, throughput of arithmetic instructions. Split keys: Dao et al.,
Flash-Decoding (2023). The form of (7), the tenth in (5) and the halves are assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hwmodels.families.family import Array, Coefficients, Family, Shape, matrix_peak
from hwmodels.hardware import Chip
from simcore.dtypes import dtype_bytes

_EXPONENTIALS_PER_CYCLE = 16.0
_LANE_OPERATIONS = 4.0  # of a pair: scale, maximum, sum, conversion
_SPLIT_STEP = 0.1  # of a kernel's own time, for each part that is combined
_SECTOR_BYTES = 32.0  # the least that memory moves
_PAGE_ENTRY_BYTES = 4.0
_ROW_BYTES = 2.0  # queries and results are kept in 16 bits
# FLOPs a cycle of the units that blocks are cut for (16-bit operands, a T4's to a B200's).
_USUAL_RATES = (512.0, 16384.0)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernels of an architecture cut attention, as their sources say."""

    rows: int  # queries of a block
    short_rows: int  # queries of a block where there are no more, up to width 128
    keys: int  # keys of a step in 16 bits
    exposed: float  # share of exponentials beside which nothing is multiplied
    resident: int  # blocks that share a unit
    most_splits: int
    shown: float = 1.0  # of a side kernel that starts before its predecessor has ended
    plans: bool = False  # a kernel plans the blocks of each call
    swaps: bool = False  # group and split only single queries, which copies put in order


_FA2 = Tiling(64, 64, 128, 1.0, 2, 128, swaps=True)
_FA3 = Tiling(128, 64, 128, 0.5, 1, 32, shown=0.5, plans=True)
_TILINGS = {
    "volta": _FA2,
    "turing": _FA2,
    "ampere": _FA2,
    "ampere-ga102": _FA2,
    "ada": _FA2,
    "blackwell-gb202": _FA2,  # mma.sync as Ada: no wgmma or tcgen05
    "hopper": _FA3,
}
_OTHER = Tiling(128, 64, 128, 0.5, 1, 128)


@dataclass(frozen=True, slots=True)
class Call:
    """One call as arrays that broadcast: what all kinds of attention come down to."""

    batch: Array
    queries: Array
    keys: Array  # that the last query sees
    heads: Array
    kv_heads: Array
    width: Array  # elements of a query and of a result head, together
    cached: Array  # elements of a key and value head in the cache
    kv_bytes: Array  # bytes of a cached element
    window: Array  # inf: none
    products: float = 1.0  # matrix work of a pair over that of the forward pass
    density: Array | float = 1.0  # share of the keys that is not skipped
    page: Array | float = np.inf  # keys that lie together in memory
    causal: bool = True
    decode: bool = False  # one query a sequence, by the kernels made for that

    @property
    def group(self) -> Array:
        """Query heads to a key head."""
        return self.heads / self.kv_heads

    @property
    def rows_bytes(self) -> Array:
        """Bytes of queries read and results written."""
        return self.batch * self.queries * self.heads * self.width * _ROW_BYTES

    @property
    def cache_bytes(self) -> Array:
        """Bytes of keys and values that are read, whole sectors of a page, and the page table."""
        reach = self.window + (self.queries - 1 if self.causal else 0.0)
        seen = np.minimum(self.keys, reach) * self.density
        page = np.minimum(self.page, self.keys)
        chunk = page * self.cached / 2 * self.kv_bytes  # a page's keys, or its values
        padded = np.ceil(chunk / _SECTOR_BYTES) * _SECTOR_BYTES / chunk
        entry = np.where(np.isinf(self.page), 0.0, _PAGE_ENTRY_BYTES) / page
        each = self.cached * self.kv_bytes * padded + entry
        return np.asarray(self.batch * self.kv_heads * seen * each)


def column(shape: Shape, name: str, default: float | None = None) -> Array:
    """Return a column of ``shape`` as floats, ``default`` where it is absent."""
    value = shape[name] if default is None else shape.get(name, default)
    return np.asarray(value, dtype=np.float64)


def call_of(shape: Shape) -> Call:
    """Return the call that the columns of prefill describe."""
    queries, window = column(shape, "seq_len"), column(shape, "window", 0.0)
    width = column(shape, "head_dim")
    return Call(
        column(shape, "batch"),
        queries,
        np.maximum(column(shape, "kv_len"), queries),
        column(shape, "heads"),
        column(shape, "kv_heads"),
        2 * width,
        2 * width,
        column(shape, "kv_bytes"),
        np.where(window > 0, window, np.inf),
    )


@dataclass(frozen=True, slots=True)
class _Grid:
    """Blocks of a call: how many, how large, and what a pair costs in them."""

    groups: Array  # of blocks that share keys
    blocks: Array
    rows: Array
    step: Array  # keys
    reach: Array  # keys that a block walks over at most
    alike: NDArray[np.bool_]  # all blocks do the same work
    pair_s: Array


def _edge(chip: Chip, dtype: str) -> float:
    """Return the length of a block's edge over the listed one: blocks suit the unit's rate.

    It goes as the root of the rate, from where the usual rates end.
    """
    rate = matrix_peak(chip, dtype) * _operand_bytes(dtype) / 2
    cycle = rate / (chip.units * chip.clock_hz)
    low, high = _USUAL_RATES
    return float(np.sqrt(cycle / min(max(cycle, low), high)))


def _divided(chip: Chip, dtype: str) -> Chip:
    """Return the chip with few wide units, such as a TPU's, as many units of the usual width.

    A wide unit is several arrays side by side, which work on blocks of their own.
    """
    edge = _edge(chip, dtype)
    return chip if edge <= 1 else replace(chip, units=math.ceil(chip.units * edge**2))


def _operand_bytes(dtype: str) -> float:
    """Return bytes of an element in the products: weight-only formats leave it at 16 bits."""
    if dtype.endswith("_wo"):
        return 2.0
    return min(dtype_bytes("fp8" if dtype in ("fp8_block", "mxfp8") else dtype), 2.0)


def _narrow(call: Call, chip: Chip, dtype: str) -> NDArray[np.bool_]:
    """Return where the cache's format is multiplied instead of the wider one of the queries."""
    narrower = call.kv_bytes < _operand_bytes(dtype)
    return np.asarray(narrower & ("fp8" in chip.peak_flops_per_s))


def _grid(
    call: Call, chip: Chip, dtype: str, tiling: Tiling, grouped: bool, c: Coefficients
) -> _Grid:
    edge, narrow = _edge(chip, dtype), _narrow(call, chip, dtype)
    rate = np.where(
        narrow,
        matrix_peak(chip, "fp8") * c["narrow_share"],
        matrix_peak(chip, dtype) * c["matrix_share"],
    )
    lanes = chip.vector_flops_per_s / chip.units / 2
    softmax = 1 / (_EXPONENTIALS_PER_CYCLE * edge * chip.clock_hz) + _LANE_OPERATIONS / lanes
    pair_s = 2 * call.width * call.products / (rate / chip.units) + tiling.exposed * softmax
    group = call.group if grouped else np.ones_like(call.group)
    filled = call.queries * group
    short = (filled <= tiling.short_rows * edge) & (call.width <= 256)
    rows = np.where(short, tiling.short_rows, tiling.rows) * edge
    each = np.ceil(filled / rows)
    byte = narrow | (_operand_bytes(dtype) <= 1)
    step = np.asarray(tiling.keys * edge)
    here = np.minimum(call.queries, np.ceil(rows / group))  # queries of a block
    reach = np.minimum(call.window + here - 1 + np.where(byte, 2.0, 1.0) * step, call.keys)
    groups = call.batch * call.heads / group
    blocks = groups * each
    return _Grid(groups, blocks, rows, step, reach, (each == 1) | (not call.causal), pair_s)


def _beyond(grid: _Grid, last: Array) -> Array:
    """Return the sum over a query per key up to ``last`` of keys it walks beyond a first step."""
    rising = np.maximum(np.minimum(last, grid.reach) - grid.step, 0.0)
    level = np.maximum(grid.reach - grid.step, 0.0)
    return np.asarray(rising * (rising + 1) / 2 + np.maximum(last - grid.reach, 0.0) * level)


def _busy(call: Call, chip: Chip, tiling: Tiling, grid: _Grid, c: Coefficients) -> Array:
    """Return the seconds that the units compute: equations (3) to (5)."""
    per_key = grid.rows * grid.pair_s
    waves = grid.blocks / chip.units
    over = np.maximum(grid.reach - grid.step, 0.0) * call.density
    half = np.where(over > 0, grid.step / 2, 0.0)
    one = np.maximum(c["block_s"], per_key * grid.step)
    steps = grid.step * np.ceil(over / grid.step)
    longest = one + per_key * steps
    if call.causal:
        beyond = _beyond(grid, call.keys) - _beyond(grid, call.keys - call.queries)
        rows = np.minimum(call.queries, np.maximum(call.keys - grid.step, 0.0))
        rest = beyond * call.density + half * rows
    else:
        rest = call.queries * (over + half)
    share = call.batch * call.heads * rest * grid.pair_s / chip.units
    mixed = np.ceil(waves) * one + share + c["tail"] * (longest - one)
    # Every group has a longest block, and these fill whole waves of their own.
    last = np.ceil(grid.groups / chip.units) * longest
    whole = np.where(grid.alike, np.ceil(waves) * longest, np.maximum(last, mixed))
    walk = longest - one + per_key * grid.step
    total = np.where(grid.alike, walk * waves, per_key * grid.step * waves + share)
    # Each part's sums are written and read in 32 bits: twice the bytes of queries and results.
    part = c["kernel_s"] * _SPLIT_STEP + 2 * call.rows_bytes / chip.hbm.bytes_per_s
    most = np.clip(tiling.resident / waves, 1.0, tiling.most_splits)
    floor = np.maximum(one, total)
    parts = np.clip(np.minimum(np.sqrt(walk / part), walk / floor), 1.0, most)
    shortest = np.maximum(walk / parts, floor)
    split = c["kernel_s"] * tiling.shown + part * parts + shortest
    able = waves < 0.8 * tiling.resident
    if tiling.swaps:
        able &= call.decode & (call.group > 1)
    return np.minimum(whole, np.where(able, split, np.inf))


def _memory(call: Call, chip: Chip, c: Coefficients) -> Array:
    """Return the seconds of the call's traffic: equation (6)."""
    moved = call.rows_bytes + call.cache_bytes
    rate = chip.hbm.bytes_per_s * c["bandwidth_share"]
    near = chip.tier("l2")
    if near is None or not c["cached_share"]:
        return np.asarray(moved / rate)
    # Twice over: what does not fit drives out as much that would.
    missed = np.clip(2 * (moved - c["cached_share"] * near.size_bytes), 0.0, moved)
    return np.maximum(missed / rate, moved / max(near.bytes_per_s, rate))


def _side(call: Call, chip: Chip, tiling: Tiling, c: Coefficients) -> Array:
    """Return the seconds of kernels before and after: equation (8)."""
    rate = chip.hbm.bytes_per_s * c["bandwidth_share"]
    new = _ROW_BYTES * call.batch * call.queries * call.kv_heads * call.cached
    passed = c["row_passes"] * call.rows_bytes + c["cache_passes"] * new
    found = passed / rate + tiling.plans * tiling.shown * c["kernel_s"]
    if tiling.swaps and call.decode:
        single = call.group > 1
        copied = single & (call.batch > 1) & (call.kv_heads > 1)
        found = found + np.where(single, c["kernel_s"], 0.0)
        found = found + np.where(copied, 2 * (c["kernel_s"] + call.rows_bytes / rate), 0.0)
    return np.asarray(found)


def tiling_of(chip: Chip) -> Tiling:
    """Return how kernels for ``chip`` cut attention: a common way where its own is not known."""
    return _TILINGS.get(chip.architecture, _OTHER)


def seconds(
    call: Call, chip: Chip, dtype: str, c: Coefficients, tiling: Tiling | None = None
) -> Array:
    """Return the seconds of ``call`` on ``chip``, by equations (1) to (9).

    ``c``: all coefficients of both families. ``tiling``: instead of the chip's usual one.
    """
    tiling = tiling or tiling_of(chip)
    chip = _divided(chip, dtype)
    grouped = float(call.decode) if tiling.swaps else c["grouped"]
    busy = np.zeros(())
    for choice, share in ((True, grouped), (False, 1 - grouped)):
        if share > 0:
            grid = _grid(call, chip, dtype, tiling, choice, c)
            busy = busy + share * _busy(call, chip, tiling, grid, c)
    memory = _memory(call, chip, c)
    less, lockstep = np.minimum(busy, memory), c["lockstep_s"] + 1e-12
    beside = np.maximum(busy, memory) + less * lockstep / (less + lockstep)
    fixed = c["launch_s"] + c["sequence_s"] * call.batch
    return np.asarray(fixed + _side(call, chip, tiling, c) + beside)


PREFILL_KEEPS = {"sequence_s": 0.0, "cached_share": 0.0}
DECODE_KEEPS = {"tail": 0.0, "row_passes": 0.0, "cache_passes": 0.0, "grouped": 1.0}


def _prefill(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    return seconds(call_of(shape), chip, dtype, {**PREFILL_KEEPS, **c})


def _decode(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    call = replace(call_of({**shape, "seq_len": 1.0}), decode=True)
    return seconds(call, chip, dtype, {**DECODE_KEEPS, **c})


_COLUMNS = {
    "batch": "sequences",
    "kv_len": "keys that the last query sees, new ones included",
    "heads": "query heads on this rank",
    "kv_heads": "key and value heads on this rank",
    "head_dim": "width of a head",
    "window": "keys that a query sees at most; 0: all",
    "kv_bytes": "bytes per element of the cache",
}
_SHARED: Mapping[str, tuple[float, float, float]] = {
    "launch_s": (8e-6, 0.0, 5e-5),
    "block_s": (3e-6, 0.0, 1e-5),
    "kernel_s": (2e-6, 0.0, 1e-5),
    "matrix_share": (0.7, 0.1, 1.0),
    "narrow_share": (0.35, 0.2, 0.5),
    "bandwidth_share": (0.85, 0.3, 1.0),
    "lockstep_s": (2e-5, 0.0, 2e-4),
}

ATTENTION_PREFILL = Family(
    "attention_prefill",
    {"seq_len": "new queries, causal", **_COLUMNS},
    {
        **_SHARED,
        "tail": (0.5, 0.0, 1.0),
        "row_passes": (0.5, 0.0, 6.0),
        "cache_passes": (2.0, 0.0, 20.0),
        "grouped": (0.5, 0.0, 1.0),
    },
    _prefill,
)
ATTENTION_DECODE = Family(
    "attention_decode",
    _COLUMNS,
    {**_SHARED, "sequence_s": (3e-9, 0.0, 5e-8), "cached_share": (0.4, 0.0, 1.0)},
    _decode,
    cold={"cached_share": 0.0},
)
