"""Collectives whose payload is compressed: fewer bytes, and the seconds of coding and decoding.

An op that adds values on the way has to decode before it adds and to code again what it passes on.
The passes below are those of direct exchanges, which code each value once per stage (ZeRO++, Wang
et al. 2023): reduce_scatter codes S and decodes the S that n ranks sent; all_gather codes the
rank's shard and decodes the whole; all_reduce is one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hwmodels.collectives.algorithms import known_op, sizes
from hwmodels.collectives.traffic import Array
from hwmodels.collectives.tuner import GroupLayout, collective_seconds
from simcore.errors import InputError

# op -> (buffers coded, buffers decoded) by the busiest rank of n
CODER_PASSES: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "all_reduce": lambda n: (1 + 1 / n, np.full_like(n, 2.0)),
    "reduce_scatter": lambda n: (np.ones_like(n), np.ones_like(n)),
    "all_gather": lambda n: (1 / n, np.ones_like(n)),
    "all_to_all": lambda n: (np.ones_like(n), np.ones_like(n)),
    "broadcast": lambda n: (np.ones_like(n), np.ones_like(n)),
    "send_recv": lambda n: (np.ones_like(n), np.ones_like(n)),
    "gather": lambda n: (1 / n, np.ones_like(n)),
    "scatter": lambda n: (np.ones_like(n), 1 / n),
    "reduce": lambda n: (np.ones_like(n), n),
    "exclusive_scan": lambda n: (np.ones_like(n), np.ones_like(n)),
}


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to send fewer bytes: coded over plain bytes, seconds to code and decode one buffer."""

    ratio: float
    encode_s: float
    decode_s: float


def coded_seconds(
    op: str,
    size_bytes: ArrayLike,
    group: GroupLayout,
    codec: Codec,
    algorithm: str = "auto",
    dtype: str = "int8",
) -> Array:
    """Return the seconds of ``op`` on coded payload, coding and decoding included.

    ``codec.encode_s`` and ``decode_s`` are those of the whole buffer of ``size_bytes``; ``dtype``
    is the coded one. An all_reduce is a reduce_scatter, then an all_gather. One rank costs 0.
    Raises `InputError` for a ratio that is not above 0.
    """
    known_op(op)
    if codec.ratio <= 0:
        raise InputError(f"a codec's ratio is coded over plain bytes, above 0: got {codec.ratio}.")
    n, _, _ = sizes(group.ranks, group.ranks_per_node)
    coded = np.asarray(size_bytes, dtype=np.float64) * codec.ratio
    stages = ("reduce_scatter", "all_gather") if op == "all_reduce" else (op,)
    wire_s = sum(collective_seconds(s, coded, group, algorithm, dtype=dtype) for s in stages)
    encodes, decodes = CODER_PASSES[op](n)
    return np.where(n > 1, wire_s + encodes * codec.encode_s + decodes * codec.decode_s, 0.0)
