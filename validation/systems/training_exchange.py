"""Checks of training systems outside one mesh: chunks of states over both memories."""

from __future__ import annotations

from hwmodels.catalogue import load_chip
from validation.systems.frame import Finding, check

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
