"""One call under the name of a library: NCCL, a serving engine, an algorithm of the registry."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.collectives.measured import CollectiveFit
from hwmodels.collectives.peer_memory import engine_all_reduce, engines
from hwmodels.collectives.traffic import Array
from hwmodels.collectives.tuner import GroupLayout, choose
from hwmodels.hardware import Chip

EAGER = "-eager"


def library_call(
    op: str,
    size_bytes: ArrayLike,
    group: GroupLayout,
    chip: Chip,
    implementation: str = "",
    fit: CollectiveFit | None = None,
    dtype: str = "bf16",
) -> tuple[Array, NDArray[np.str_]]:
    """Return the seconds of ``op`` in ``implementation`` and the name of what ran.

    ``implementation``: "" for the usual library of the links (or ``fit``, where it knows the call),
    an engine ("vllm", replayed from a graph; "vllm-eager", launched by the host) whose all_reduce
    is its own and whose other collectives are NCCL's, or what `algorithms_for` takes.
    """
    name = implementation.removesuffix(EAGER)
    if name in engines():
        if op != "all_reduce":
            return choose(op, size_bytes, group, "nccl", dtype=dtype)
        return engine_all_reduce(name, size_bytes, group, chip, implementation.endswith(EAGER))
    known = fit if not implementation else None
    return choose(op, size_bytes, group, implementation or "auto", fit=known, dtype=dtype)
