"""Kernels of linear attention: what each op's work costs as one or two fused kernels.

No kernel of this family was measured here: seconds come from the chip's datasheet and the shares
that good libraries reach (`hwmodels.mixers`).
"""

from __future__ import annotations

from collections.abc import Callable

from simcore.mixers import MixerCost
from simcore.ops import Op, Size, work

FP32_BYTES = 4


def _kernel(op: Op, launches: int, chunks: Size) -> MixerCost:
    """Return the cost of an op whose blocks each hold a state and a chunk's rows on the chip.

    ``chunks``: those that follow one another in a block, or 1 where all work side by side.
    """
    d, done = op.dims, work(op)
    return MixerCost(
        matrix_flops=done.flops,
        vector_flops=done.vector_flops,
        hbm_bytes=done.read_bytes + done.write_bytes,
        serial_depth=chunks,
        launches=launches,
        state_bytes=d["b"] * d["hkv"] * d["d"] ** 2 * FP32_BYTES,
        on_chip_bytes=d["d"] ** 2 * FP32_BYTES + d["c"] * (2 * d["d"] + d["c"]) * 2,
        pieces=d["b"] * d["h"] * -(-d["s"] // d["c"]),
    )


def _chunked(launches: int) -> Callable[[Op], MixerCost]:
    """Return kernels that write every chunk's state in turn, and others that read them."""
    return lambda op: _kernel(op, launches, -(-op.dims["s"] // op.dims["c"]))


def _one(op: Op) -> MixerCost:
    return _kernel(op, 1, 1)


# op kind -> its kernels: states of chunks by one, outputs or gradients by another (Yang et al.
# 2023, GLA, section 3.3; flash-linear-attention's chunk_fwd_h, chunk_fwd_o, chunk_bwd_dh, ...)
LINEAR_KERNELS: dict[str, Callable[[Op], MixerCost]] = {
    "linear_attention": _chunked(2),
    "linear_attention_backward": _chunked(3),
    "linear_state": _one,
    "linear_state_backward": _one,
    "linear_carry": _one,
    "linear_carry_backward": _one,
}
