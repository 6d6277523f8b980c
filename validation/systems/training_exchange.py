"""Checks of training systems outside one mesh: embeddings, codecs, churn, stragglers, chunks."""

from __future__ import annotations

import itertools
import math

from hwmodels.catalogue import load_chip
from validation.systems.frame import Finding, check, need_torch

ON_CPU = "executed in float64 on the CPU; ranks in one process exchange their parts"


# ------------------------------------------------------------------ G1.6


@check("G1.6", mutant={"boundary_power": 2})
def swarm(*, boundary_power: int = 1, link_bytes_per_s: float = 25e6) -> Finding:
    """Stage compute over transfer as the width grows at 200 Mb/s, and work done under churn.

    ``boundary_power``: of the width, in the bytes of a boundary.
    """
    need_torch()
    from backends.references.exchange import churn_changes_nothing

    rate = 0.3 * load_chip("t4").peak_flops_per_s["fp16"]
    ratios, busy = [], []
    for width in (768, 1536, 3072, 6144):
        compute = 3 * 3 * 24 * width**2 / rate  # three layers, forward and backward, per token
        moved = 2 * 1 * 768 * (width / 768) ** boundary_power / link_bytes_per_s  # int8, both ways
        ratios.append(compute / moved)
        busy.append(1 / (1 + moved / compute))
    linear = all(math.isclose(b / a, 2) for a, b in itertools.pairwise(ratios))
    calm, finished, repeated = churn_changes_nothing(12, 3, 0.3)
    exact = calm and finished == 12 and repeated > 0
    return Finding(
        linear and exact and all(a < b for a, b in itertools.pairwise(busy)),
        f"compute over transfer {', '.join(f'{r:.2f}' for r in ratios)}, busy "
        f"{', '.join(f'{b:.0%}' for b in busy)} at widths 768 to 6144; 12 of 12 microbatches done "
        f"with {repeated} repeated passes",
        "work grows with the width's square, a boundary with the width"
        if linear
        else "boundaries that grow as fast as the work gain nothing",
        ("T4 at 0.3 of its peak, 25 MB/s, 8-bit boundaries, three layers per stage", ON_CPU),
        "cpu",
    )


# ------------------------------------------------------------------ G1.11


@check("G1.11", mutant={"chunk_share": 0.3})
def patrickstar(*, chunk_share: float = 0.8) -> Finding:
    """Largest model of chunks over both memories against a static split, on two nodes.

    Chunks: 14 bytes per parameter (gradients reuse weights) over GPU and CPU; static: 16 on the
    CPU, weights replicated on every GPU. ``chunk_share``: of GPU memory that chunks may fill.
    """
    ratios = {}
    for name, gpus, gpu_bytes, cpu_bytes in (
        ("8 V100 32GB, 240 GB", 8, 34.4e9, 240e9), ("8 A100 40GB, 1 TB", 8, 42.9e9, 1e12),
    ):  # fmt: skip
        chunks = (gpus * gpu_bytes * chunk_share + 0.9 * cpu_bytes) / 14
        static = min(0.9 * cpu_bytes / 16, 0.7 * gpu_bytes / 2)
        ratios[name] = chunks / static
    need = 175e9 * 16 / 32
    infeasible = need > load_chip("a100-sxm-80gb").hbm.size_bytes
    host = 175e9 * 14 <= 32 * 0.8 * 42.9e9 + 4 * 0.9 * 1e12
    return Finding(
        infeasible and host and min(ratios.values()) >= 2.27,
        f"175B needs {need / 1e9:.1f} GB per GPU; "
        + ", ".join(f"{r:.2f}x on {n}" for n, r in ratios.items()),
        "chunks fill whichever memory is free"
        if min(ratios.values()) >= 2.27
        else "the static baseline's pinned buffers and fragmentation are missing",
        ("ZeRO-Offload keeps half-precision weights on every GPU and 16 bytes per parameter on the "
         "CPU", "a tenth of each memory in reserve"),
    )  # fmt: skip
