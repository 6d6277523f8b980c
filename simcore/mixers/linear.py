"""Mixers with a linear state: S_t = A_t S_(t-1) + k_t v_t^T and o_t = q_t S_t.

They differ in A_t: the identity (linear attention), a constant per head (RetNet), a number per
token and head (Mamba-2), a vector per token (GLA), a reflection I - b k k^T (DeltaNet).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from simcore.mixers.mixer import BATCH, HEADS, Array, Dims, Form, Mixer, MixerCost

CHUNKED = {**HEADS, "chunk": "tokens of a chunk; divides seq_len"}
FP32_BYTES = 4  # states are kept in fp32 on the chip


def _tokens(s: Dims) -> Array:
    return np.asarray(s["batch"] * s["heads"] * s["seq_len"])


def _state(s: Dims) -> Array:
    return np.asarray(s["batch"] * s["heads"] * s["d_k"] * s["d_v"] * s["element_bytes"])


def _streams(s: Dims, gates: Array | float) -> Array:
    """Return the bytes of queries, keys, values, ``gates`` numbers per token, and outputs."""
    return np.asarray(_tokens(s) * (2 * s["d_k"] + 2 * s["d_v"] + gates) * s["element_bytes"])


Gates = Callable[[Dims], "Array | float"]


def _parallel(gates: Gates) -> Form:
    def form(s: Dims) -> MixerCost:
        pairs = _tokens(s) * s["seq_len"]
        return MixerCost(
            matrix_flops=2 * pairs * (s["d_k"] + s["d_v"]),
            vector_flops=pairs,
            hbm_bytes=_streams(s, gates(s)),
            serial_depth=np.ones_like(pairs),
            launches=np.ones_like(pairs),
            state_bytes=_state(s),
            on_chip_bytes=64 * 64 * FP32_BYTES + 0 * pairs,
            pieces=_tokens(s) / 64,
        )

    return form


def _chunked(gates: Gates, per_token: Callable[[Dims], Array], kernels: float) -> Form:
    """Return the chunked form: products inside chunks, one state handed from chunk to chunk.

    The states of all chunks are written by one kernel and read by the next, so that the chunks
    of the second can work side by side (the materialised variant of GLA 2023, section 3.3).
    """

    def form(s: Dims) -> MixerCost:
        chunks = s["seq_len"] / s["chunk"]
        states = chunks * _state(s)
        return MixerCost(
            matrix_flops=_tokens(s) * per_token(s),
            vector_flops=_tokens(s) * s["chunk"] + chunks * _state(s) / s["element_bytes"],
            hbm_bytes=_streams(s, gates(s))
            + _tokens(s) * s["d_k"] * s["element_bytes"]
            + 2 * states,
            serial_depth=chunks,
            launches=kernels + 0 * chunks,
            state_bytes=_state(s),
            on_chip_bytes=s["d_k"] * s["d_v"] * FP32_BYTES
            + s["chunk"] * (s["d_k"] + s["d_v"] + s["chunk"]) * s["element_bytes"],
            pieces=s["batch"] * s["heads"] * chunks,
        )

    return form


def _recurrent(gates: Gates, products: float, elementwise: float) -> Form:
    """Return decoding: a kernel per token reads and writes the state."""

    def form(s: Dims) -> MixerCost:
        cells = _tokens(s) * s["d_k"] * s["d_v"]
        return MixerCost(
            matrix_flops=2 * products * cells,
            vector_flops=elementwise * cells,
            hbm_bytes=_streams(s, gates(s)) + 2 * s["seq_len"] * _state(s),
            serial_depth=s["seq_len"],
            launches=s["seq_len"],
            state_bytes=_state(s),
            on_chip_bytes=s["d_k"] * s["d_v"] * FP32_BYTES,
            pieces=s["batch"] * s["heads"],
            step="launch",
        )

    return form


def _chunk_products(s: Dims) -> Array:
    """Return FLOPs per token and head: inside the chunk, from the state, into the state."""
    return np.asarray(2 * s["chunk"] * (s["d_k"] + s["d_v"]) + 4 * s["d_k"] * s["d_v"])


def _wy_products(s: Dims) -> Array:
    """Return FLOPs per token and head of the WY form (DeltaNet 2024, section 3.2).

    K K^T, T K, Q K^T and T V, P U inside the chunk; W S, Q S and K^T U with the state.
    """
    k, v = s["d_k"], s["d_v"]
    return np.asarray(s["chunk"] * (6 * k + 4 * v) + 6 * k * v)


def _twice(form: Form) -> Form:
    """Return two scans, forward and backward, that share their inputs (Hydra 2024, section 4)."""

    def both(s: Dims) -> MixerCost:
        one = form(s)
        own_output = _tokens(s) * s["d_v"] * s["element_bytes"]
        return replace(
            one,
            matrix_flops=2 * one.matrix_flops,
            vector_flops=2 * one.vector_flops,
            hbm_bytes=2 * one.hbm_bytes - _streams(s, 1.0) + own_output,
            launches=2 * one.launches,
            state_bytes=2 * one.state_bytes,
            pieces=2 * one.pieces,
        )

    return both


def _matrix_mixer(s: Dims) -> MixerCost:
    """Return the quasiseparable matrix itself: two triangles of scores, one product with values."""
    base = _parallel(lambda _: 1.0)(s)
    pairs = _tokens(s) * s["seq_len"]
    return replace(
        base,
        matrix_flops=4 * pairs * s["d_k"] + 2 * pairs * s["d_v"],
        vector_flops=2 * pairs,
        state_bytes=2 * base.state_bytes,
    )


# ------------------------------------------------------------------ diagonal state space


def _s4_state(s: Dims) -> Array:
    return np.asarray(s["batch"] * s["channels"] * s["d_state"] * s["element_bytes"])


def _s4_io(s: Dims) -> Array:
    return np.asarray(2 * s["batch"] * s["seq_len"] * s["channels"] * s["element_bytes"])


def _s4_convolution(s: Dims) -> MixerCost:
    """Return three FFTs of twice the length, 5 n log2 n FLOPs each (Cooley and Tukey's count)."""
    n = 2 * s["seq_len"]
    transforms = s["channels"] * (2 * s["batch"] + 1)
    io = _s4_io(s)
    return MixerCost(
        matrix_flops=2 * s["channels"] * s["d_state"] * s["seq_len"],
        vector_flops=transforms * 5 * n * np.log2(n),
        hbm_bytes=5 * io,  # the signal, its padded complex spectrum written and read, the output
        serial_depth=np.log2(n),
        launches=8 + 0 * n,  # kernel, powers, three transforms, product, cut, skip
        state_bytes=_s4_state(s),
        on_chip_bytes=n * 2 * s["element_bytes"],
        pieces=s["batch"] * s["channels"],
    )


def _s4_recurrent(s: Dims) -> MixerCost:
    cells = s["batch"] * s["channels"] * s["d_state"] * s["seq_len"]
    return MixerCost(
        matrix_flops=2 * cells,
        vector_flops=3 * cells,
        hbm_bytes=_s4_io(s) + 2 * s["seq_len"] * _s4_state(s),
        serial_depth=s["seq_len"],
        launches=s["seq_len"],
        state_bytes=_s4_state(s),
        on_chip_bytes=s["d_state"] * FP32_BYTES,
        pieces=s["batch"] * s["channels"],
        step="launch",
    )


def _family(name: str, gates: Gates, elementwise: float, source: str) -> Mixer:
    forms = {
        "parallel": _parallel(gates),
        "chunked": _chunked(gates, _chunk_products, 2),
        "recurrent": _recurrent(gates, 1, elementwise),
    }
    return Mixer(name, CHUNKED, forms, source)


LINEAR_MIXERS = (
    _family("linear_attention", lambda s: 0.0, 2, "Katharopoulos et al. 2020"),
    _family("retnet", lambda s: 0.0, 3, "Sun et al. 2023: RetNet"),
    _family("mamba2", lambda s: 1.0, 3, "Dao and Gu 2024: SSD"),
    _family("gla", lambda s: s["d_k"], 3, "Yang et al. 2023: gated linear attention"),
    Mixer(
        "deltanet",
        CHUNKED,
        {
            "chunked": _chunked(lambda s: 1.0, _wy_products, 3),
            "recurrent": _recurrent(lambda s: 1.0, 2, 2),
        },
        "Yang et al. 2024: parallelizing linear transformers with the delta rule",
    ),
    Mixer(
        "hydra",
        CHUNKED,
        {
            "parallel": _matrix_mixer,
            "chunked": _twice(_chunked(lambda s: 1.0, _chunk_products, 2)),
            "recurrent": _twice(_recurrent(lambda s: 1.0, 1, 3)),
        },
        "Hwang et al. 2024: Hydra",
    ),
    Mixer(
        "s4",
        {**BATCH, "channels": "independent channels", "d_state": "numbers of state per channel"},
        {"parallel": _s4_convolution, "recurrent": _s4_recurrent},
        "Gu et al. 2021: S4, with a diagonal state matrix (S4D, Gu et al. 2022)",
    ),
)
