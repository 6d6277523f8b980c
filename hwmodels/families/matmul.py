"""Dense matrix products: y[m, n] = x[m, k] w[n, k], by tiles, waves, memory and power.

A kernel cuts y into tiles of a x b elements, one per unit (SM, CU, core) at a time, and walks k in
steps of one 128-byte line per row. Seconds, the least over tile shapes and splits s of k:

1. step = max(mma | vector, feed). mma = 2 a b e / (``peak_share`` x FLOPs per unit), e elements to
   a line; a library's smallest kernel sets a floor, ``smallest_tile`` of a 128 x 128 tile's mma,
   rising to ``grown_tile`` of it at 256 rows. feed = (a + b) lines over the unit's port to L2, 64
   bytes a clock, x ``feed_share``. vector: equation 9.
2. p | q = max(p, q) + ``unhidden_share`` min(p, q): two activities side by side.
3. tile = (k's steps / s) step + ends on units that issue a product and wait for it, and that | ends
   where products are asynchronous. ends, its fill and drain: ``tile_cycles`` for 128 x 128.
4. busy = ceil(tiles s / units) tile + (s - 1) join: whole waves, and partial sums joined through
   L2, ``split_cycles`` for each 128 x 128.
5. cooled = (busy^2 energy / power)^(1/3) where that is longer. Power goes as rate x voltage^2 and
   voltage as frequency f, so the clock falls until (energy / busy) f^3 meets the limit. energy =
   2 m n k ``flop_energy_j``, stated for 16-bit operands at 4 nm and in proportion to the operand's
   bytes and to (process / 4 nm)^0.64. The clock follows in about a millisecond.
6. memory = bytes of x, w and y over HBM x ``bandwidth_share``, or at the L2's rate where they are
   within ``warm_share`` of it: a benchmark that repeats a product finds small operands there.
   Zero describes operands that other work has driven out.
7. quantise = ``quantise_bytes`` m k over HBM x ``bandwidth_share``, for activations narrowed to
   under 16 bits by a kernel of its own (3: read 16 bits, write 8; 5: first read for the scale).
8. seconds = kernels x ``launch_cycles`` / clock + (cooled | memory) + quantise.
9. vector: weights narrower than the activations are converted, 2 operations each; sums of fp8 with
   block scales are added up outside the matrix units, one operation per 128 of k, unless the chip
   applies scales itself.

For a given tile and split every term rises in m, n and k, and so does the least of them.

A shape may add ``groups``, equal products in one launch (the experts of a layer): tiles, bytes and
energy are those of all of them. It may add ``out_bytes``, what an element of y moves: 2 as 16 bits
(the default), 4 as fp32, 8 where it is added to an fp32 sum. `LAYOUTS` holds it for the products of
a training step. Their sizes say the rest: a transposed 16-bit operand costs nothing, as units read
either order from shared memory (ldmatrix.trans, the major-ness bits of wgmma); an 8-bit one has to
be stored transposed as well, which belongs to the op that quantises it.

Sources: tiles, waves, split k: NVIDIA, Matrix Multiplication Background User's Guide (2023);
CUTLASS, Efficient GEMM (2024). 64 bytes a clock: NVIDIA A100 white paper (2020). Asynchronous
products: NVIDIA H100 white paper (2022). Power: dynamic power C V^2 f; TSMC gives N5, of which 4N
is a variant, 30 % less power than N7 at equal speed, hence the exponent. Block scales: DeepSeek-V3
(2024), section 3.3. Assumptions: the list of tiles, the millisecond, 2 operations a conversion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwmodels.families.family import Array, Coefficients, Family, Shape, matrix_peak
from hwmodels.hardware import Chip
from simcore.dtypes import dtype_bytes

_LINE_BYTES = 128.0
_PORT_BYTES_PER_CYCLE = 64.0
_TILES = ((16, 128), (32, 128), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
_SQUARE = 128 * 128  # the tile that the coefficients are stated for
_GROWN_ROWS = 256.0  # rows from which libraries take their largest tiles
_SPLITS = (1, 2, 4, 8, 16, 32)
_CONVERT_OPERATIONS = 2.0  # per weight
_SCALE_BLOCK = 128  # elements of k that share a scale
_CLOCK_REACTS_S = 1e-3
_REFERENCE_NM, _SHRINK_EXPONENT = 4.0, 0.64  # (4 / 7)^0.64 = 0.7

# Architectures whose warps issue products and wait for them (mma.sync, MFMA): a tile's fill and
# drain stand before and after its products. On the others a tile is stored beside the next one's.
_SYNCHRONOUS = frozenset(
    {"pascal", "volta", "turing", "ampere", "ampere-ga102", "ada", "blackwell-gb202"}
    | {"cdna2", "cdna3"}
)
# Units between these rates (FLOPs a cycle on 16-bit operands) use the tiles as listed, from an RTX
# 4090's to a B300's. A CPU core's are smaller, a systolic array's larger: edges go as the root.
_USUAL_RATES = (512.0, 16384.0)
# An A100's rate is what one port feeds. Faster units are fed in proportion: by neighbours that load
# for each other (Hopper's multicast, Blackwell's pairs of SMs), or by wider ports.
_FED_RATE = 2048.0

# The format whose units, and bytes an element, block formats use beside the scales.
_BLOCKS = {"fp8_block": "fp8", "mxfp8": "fp8"}
_SCALED_BY_CHIP = ("nvfp4", "mxfp4")  # a chip with units for these takes block scales itself


# Layout of the operands -> columns that it adds to a shape: forward y = x w^T, the gradient of
# the input dx = dy w, and of the weights dw = dy^T x, which is added to a sum in fp32.
LAYOUTS: dict[str, dict[str, float]] = {"nt": {}, "nn": {}, "tn": {"out_bytes": 8.0}}


@dataclass(frozen=True, slots=True)
class _Operands:
    """What is multiplied: the format, bytes of an element of x and of w, and the work beside it."""

    format: str
    x_bytes: float
    w_bytes: float
    quantised: bool = False  # x is narrowed before the product
    converted: bool = False  # w is widened within it
    promoted: bool = False  # blocks of k are summed outside the matrix units


def _operands(chip: Chip, dtype: str) -> _Operands:
    """Return how ``dtype`` is multiplied: in its own units, or widened to 16 bits without them."""
    weight = dtype.removesuffix("_wo")
    size = dtype_bytes(_BLOCKS.get(weight, weight))
    if size >= 2:
        return _Operands(dtype, size, size)
    if dtype != weight or _BLOCKS.get(dtype, dtype) not in chip.peak_flops_per_s:
        wide = "bf16" if "bf16" in chip.peak_flops_per_s else "fp16"
        return _Operands(wide, 2.0, size, converted=True)
    scales_itself = any(name in chip.peak_flops_per_s for name in _SCALED_BY_CHIP)
    promoted = dtype == "fp8_block" and not scales_itself
    return _Operands(dtype, size, size, quantised=True, promoted=promoted)


@dataclass(frozen=True, slots=True)
class _Unit:
    """One of a chip's units: rates per cycle, and how its tiles compare with the listed ones."""

    flops: float
    lanes: float  # ordinary multiply-adds
    port_bytes: float
    edge: float  # length of a tile's edge over the listed one
    synchronous: bool


def _unit(chip: Chip, form: _Operands) -> _Unit:
    cycles = chip.units * chip.clock_hz
    flops = matrix_peak(chip, form.format) / cycles
    rate = flops * form.x_bytes / 2
    usual = min(max(rate, _USUAL_RATES[0]), _USUAL_RATES[1])
    edge = float(np.sqrt(rate / usual))
    port = _PORT_BYTES_PER_CYCLE * edge * max(1.0, usual / _FED_RATE)
    lanes = chip.vector_flops_per_s / (2 * cycles)
    return _Unit(flops, lanes, port, edge, chip.architecture in _SYNCHRONOUS)


def _beside(a: Array, b: Array, unhidden: float) -> Array:
    return np.asarray(np.maximum(a, b) + unhidden * np.minimum(a, b))


def _step_cycles(
    a: float, b: float, least: Array, unit: _Unit, form: _Operands, c: Coefficients
) -> Array:
    """Return cycles of one line of k for a tile of a x b elements: equations 1 and 9."""
    elements = _LINE_BYTES / form.x_bytes
    area = np.maximum(a * b, least * _SQUARE * unit.edge**2)
    mma = 2 * area * elements / (unit.flops * c["peak_share"])
    operations = form.promoted * a * b * elements / _SCALE_BLOCK
    operations += form.converted * b * elements * _CONVERT_OPERATIONS
    arithmetic = _beside(mma, np.asarray(operations / unit.lanes), c["unhidden_share"])
    loaded = (a * form.x_bytes + b * form.w_bytes) * elements
    return np.maximum(arithmetic, loaded / (unit.port_bytes * c["feed_share"]))


def _busy_seconds(
    m: Array, n: Array, k: Array, groups: Array, chip: Chip, form: _Operands, c: Coefficients
) -> Array:
    """Return seconds that the units take for the best tile and split: equations 1 to 4."""
    unit = _unit(chip, form)
    steps = np.ceil(k * form.x_bytes / _LINE_BYTES)
    runs = [np.maximum(steps / split, 1.0) for split in _SPLITS]
    least = np.maximum(c["smallest_tile"], c["grown_tile"] * np.minimum(m / _GROWN_ROWS, 1.0))
    best = np.full(np.broadcast(m, n, k, groups).shape, np.inf)
    for a, b in _TILES:
        step = _step_cycles(a * unit.edge, b * unit.edge, least, unit, form, c)
        ends = np.asarray(c["tile_cycles"] * a * b / _SQUARE)
        join = c["split_cycles"] * np.maximum(a * b / _SQUARE, least)
        tiles = groups * np.ceil(m / (a * unit.edge)) * np.ceil(n / (b * unit.edge))
        for split, run in zip(_SPLITS, runs, strict=True):
            walk = run * step
            tile = walk + ends if unit.synchronous else _beside(walk, ends, c["unhidden_share"])
            waves = np.ceil(tiles * split / chip.units)
            best = np.minimum(best, waves * tile + (split - 1) * join)
    return best / chip.clock_hz


def _cooled_seconds(
    busy: Array, flops: Array, chip: Chip, form: _Operands, c: Coefficients
) -> Array:
    """Return seconds after the clock has fallen to what the power limit allows: equation 5."""
    shrink = (chip.process_nm / _REFERENCE_NM) ** _SHRINK_EXPONENT
    energy_j = flops * c["flop_energy_j"] * shrink * form.x_bytes / 2
    slowed = np.cbrt(busy**2 * energy_j / chip.power_w)
    return np.asarray(busy + np.maximum(slowed - busy, 0.0) * busy / (busy + _CLOCK_REACTS_S))


def _memory_seconds(moved: Array, chip: Chip, c: Coefficients) -> Array:
    """Return seconds of the operands' and the result's traffic: equation 6."""
    main = chip.hbm.bytes_per_s * c["bandwidth_share"]
    cache = chip.tier("l2")
    if cache is None:
        return moved / main
    # Found whole within the warm share, and not at all from twice that on.
    found = np.clip(2 - moved / max(c["warm_share"] * cache.size_bytes, 1.0), 0.0, 1.0)
    return np.asarray(moved * (found / max(cache.bytes_per_s, main) + (1 - found) / main))


def _seconds(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    m, n, k = (np.asarray(shape[name], dtype=np.float64) for name in ("m", "n", "k"))
    groups = np.asarray(shape.get("groups", 1.0), dtype=np.float64)
    form = _operands(chip, dtype)
    busy = _busy_seconds(m, n, k, groups, chip, form, c)
    cooled = _cooled_seconds(busy, groups * 2 * m * n * k, chip, form, c)
    result = m * n * np.asarray(shape.get("out_bytes", max(2.0, form.x_bytes)), dtype=np.float64)
    moved = groups * (m * k * form.x_bytes + n * k * form.w_bytes + result)
    memory = _memory_seconds(moved, chip, c)
    main = chip.hbm.bytes_per_s * c["bandwidth_share"]
    quantise = form.quantised * c["quantise_bytes"] * groups * m * k / main
    launch = (2 if form.quantised else 1) * c["launch_cycles"] / chip.clock_hz
    return np.asarray(launch + _beside(cooled, memory, c["unhidden_share"]) + quantise)


MATMUL = Family(
    "matmul",
    {"m": "rows", "n": "columns of the result", "k": "length of the sum"},
    {
        "launch_cycles": (5e3, 0.0, 4e4),
        "peak_share": (0.92, 0.3, 1.0),
        "bandwidth_share": (0.87, 0.3, 1.0),
        "feed_share": (0.65, 0.1, 1.0),
        "smallest_tile": (0.2, 0.01, 1.5),
        "grown_tile": (0.4, 0.0, 1.0),
        "tile_cycles": (3e3, 0.0, 1e4),
        "split_cycles": (5e3, 20.0, 2e5),
        "unhidden_share": (0.25, 0.0, 1.0),
        "warm_share": (0.08, 0.001, 0.5),
        "quantise_bytes": (4.0, 0.0, 20.0),
        "flop_energy_j": (1.4e-12, 3e-13, 4e-12),
    },
    _seconds,
    cold={"warm_share": 0.0},
)
