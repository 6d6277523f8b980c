"""A fused layer of gated experts on one rank: gather, two grouped products, combine.

The rank is the busiest of ep (`routing`): R rows on D touched experts of L = E / ep, each of width
F = ffn / tp. Seconds are

    t = launch + sum over products + passes                                                   (1)

- Products (n, k): gate and up together (2 F, hidden), then down (hidden, F). An expert's rows are
  padded to tiles of m rows; a tile costs its rows and ``tile_rows`` more (operands it shares with
  no other tile), and walks k and ``edge`` elements more (prologue and epilogue). The arithmetic
  takes, for the best m of `TILES`,

      a = min over m of tiles(m) (m + tile_rows) 2 n (k + edge) / (peak_share peak)           (2)

  Weights of touched experts are read once, whatever their rows; operands and results once a row:

      b = (D n (k + edge) w + R (k x + n y)) / (bandwidth_share HBM)                          (3)

  with w, x and y the bytes of a weight, an operand and a result. However few the tiles, the steps
  of 64 along k follow one another: s = step_cycles k / 64 / clock. Arithmetic and loads overlap
  in part, as a norm of order p = ``overlap`` (1: not at all, infinity: wholly):

      product = ((a + s)^p + (b + s)^p)^(1/p)                                                 (4)

- Weight-only integers: up to 6 rows per local expert a kernel of the vector units serves them, at
  the same share of the vector rate, without padding and without s (vLLM, moe_wna16:
  should_moe_wna16_use_cuda).
- Passes over activations (quantise and permute, activate, weigh and combine) run at HBM rate:
  ``local_passes`` over the rank's R rows, ``global_passes`` over all T k rows, of libraries whose
  buffers hold the rows of other ranks too.
- ``crowding`` is how the measured rows were drawn, not what a library does: which share of the
  rows that rounding leaves over, where rows are too few for the experts, fell on the busiest rank.

Sources: the shapes of the two products and the padding of an expert's rows to tiles are those of
vLLM's fused_moe (moe_align_block_size) and TensorRT-LLM's CUTLASS grouped products; rooflines are
those of Williams, Waterman and Patterson (2009).
"""

from __future__ import annotations

import numpy as np

from hwmodels.families.family import Array, Coefficients, Family, Shape, matrix_peak
from hwmodels.families.routing import TILES, RankLoad, busiest_rank
from hwmodels.hardware import Chip
from simcore.dtypes import dtype_bytes

VECTOR_ROWS = 6.0  # rows per local expert up to which weight-only formats run on vector units
STEP = 64.0  # elements of k per step of a tile
GROUP_SCALE = 2 / 128  # bytes per integer weight: a 16-bit scale for 128 (GPTQ, AWQ)


def _seconds(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    tokens, hidden, ffn, top, experts, tp, ep, alpha = (
        np.asarray(shape[name], dtype=np.float64) for name in MOE.columns
    )
    load = _crowded(busiest_rank(tokens, experts, top, ep, alpha), c["crowding"])
    width = ffn / tp
    vector_rows = (VECTOR_ROWS if dtype.endswith("_wo") else 0.0) * np.ceil(experts / ep)
    vector = tokens * top <= vector_rows
    seconds = c["launch_s"] + _passes(tokens, hidden, width, top, load, chip, dtype, c)
    for n, k in ((2 * width, hidden), (hidden, width)):
        tiled = np.where(vector, 0.0, _arithmetic(n, k, load, chip, dtype, c))
        served = 2 * np.minimum(load.rows, vector_rows) * n * k
        arithmetic = np.maximum(tiled, served / (chip.vector_flops_per_s * c["peak_share"]))
        steps = np.where(vector, 0.0, c["step_cycles"] * k / STEP / chip.clock_hz)
        loads = _loads(n, k, load, chip, dtype, c)
        seconds = seconds + _overlapped(arithmetic + steps, loads + steps, c["overlap"])
    return np.asarray(seconds)


def _overlapped(a: Array, b: Array, order: float) -> Array:
    """Return the norm of equation (4), scaled by its larger part so that no power underflows."""
    most = np.maximum(a, b)
    return np.asarray(most * (1 + (np.minimum(a, b) / most) ** order) ** (1 / order))


def _crowded(load: RankLoad, share: float) -> RankLoad:
    """Return the load with a share of the crowded experts on it, one row and one tile each."""
    more = share * load.crowded
    tiles = tuple(count + more for count in load.tiles)
    return RankLoad(load.rows + more, load.touched + more, load.crowded - more, tiles)


def _arithmetic(
    n: Array, k: Array, load: RankLoad, chip: Chip, dtype: str, c: Coefficients
) -> Array:
    """Return seconds of the padded tiles of one product, equation (2)."""
    costs = [count * (m + c["tile_rows"]) for count, m in zip(load.tiles, TILES, strict=True)]
    flops = 2 * np.minimum.reduce(costs) * n * (k + c["edge"])
    return np.asarray(flops / (matrix_peak(chip, dtype) * c["peak_share"]))


def _loads(n: Array, k: Array, load: RankLoad, chip: Chip, dtype: str, c: Coefficients) -> Array:
    """Return seconds of the memory traffic of one product, equation (3)."""
    weight, operand, result = _bytes(dtype)
    moved = load.touched * n * (k + c["edge"]) * weight + load.rows * (k * operand + n * result)
    return np.asarray(moved / (chip.hbm.bytes_per_s * c["bandwidth_share"]))


def _passes(
    tokens: Array, hidden: Array, width: Array, top: Array, load: RankLoad, chip: Chip, dtype: str,
    c: Coefficients,
) -> Array:  # fmt: skip
    """Return seconds of the passes over activations around and between the products."""
    _, operand, result = _bytes(dtype)
    activated = 3 * width * result  # gate and up read, their product written
    local = load.rows * (hidden * (operand + result) + activated) + 2 * tokens * hidden * result
    everywhere = tokens * top * (hidden * result + activated)
    moved = c["local_passes"] * local + c["global_passes"] * everywhere
    return np.asarray(moved / chip.hbm.bytes_per_s)


def _bytes(dtype: str) -> tuple[float, float, float]:
    """Return bytes of a weight, of an operand and of a result; results have at least 16 bits."""
    weight = dtype.removesuffix("_wo")
    size = dtype_bytes("fp8" if weight == "mxfp8" else weight)
    if weight == dtype:
        return size, size, max(size, 2.0)
    scales = GROUP_SCALE if weight.startswith("int") else 0.0
    return size + scales, 2.0, 2.0


MOE = Family(
    "moe",
    {
        "tokens": "rows before routing",
        "hidden": "model width",
        "ffn": "expert width before tp",
        "experts_per_token": "experts chosen per row",
        "experts": "experts of the layer, over all ranks",
        "tp": "ranks that split each expert",
        "ep": "ranks that share out the experts",
        "alpha": "exponent of the power law of expert popularity; 0: balanced",
    },
    {
        "launch_s": (2e-5, 0.0, 2e-4),
        "step_cycles": (200.0, 0.0, 8000.0),
        "edge": (100.0, 0.0, 512.0),
        "peak_share": (0.75, 0.05, 1.0),
        "bandwidth_share": (0.85, 0.1, 1.0),
        "tile_rows": (25.0, 0.0, 256.0),
        "overlap": (2.2, 1.0, 6.0),
        "local_passes": (1.0, 0.0, 8.0),
        "global_passes": (1.0, 0.0, 5.0),
        "crowding": (0.1, 0.0, 1.0),
    },
    _seconds,
)
