"""Accuracy of peak memory: allocations of Megatron-LM's own tests, and runs that ran out of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hwmodels.training_memory import Layer, Rank, peak_bytes
from validation.importers.training import Row, padded_vocab, rows_of

FAMILIES = ("gpt", "moe", "mixtral")
BIG = 4096  # networks this wide are told apart
TARGET = (0.06, 0.18)


def _int(row: Row, name: str, default: int) -> int:
    return int(float(row[name])) if row.get(name) else default


def family_of(row: Row) -> str:
    """Return the group that a test is reported in."""
    if row["use-megatron-fsdp"] or row["data-parallel-sharding-strategy"]:
        return "fsdp"
    if row["multi-latent-attention"]:
        return "mla"
    if row["recompute-granularity"]:
        return "recompute"
    if row["fp8-format"]:
        return "fp8"
    if _int(row, "hidden-size", 0) >= BIG:
        return "hidden >= 4096"
    return "experts" if row["num-experts"] else "dense"


def readable(row: Row) -> bool:
    """Return whether a test is one that the formula speaks of: training of a decoder-only network.

    Reinforcement learning holds an inference engine's cache, distillation a second network.
    """
    name = row["test_case"]
    other = ("grpo", "distill", "reruns", "inference", "hybrid")
    return (
        row["model_family"] in FAMILIES
        and not any(word in name for word in other)
        and bool(row["num-layers"] and row["hidden-size"] and row["seq-length"])
    )


def unfused(row: Row) -> bool:
    """Return whether attention keeps its pairs: asked for, or by the framework's own layers."""
    return row["attention-backend"] in ("unfused", "local") or row["transformer-impl"] == "local"


def predicted_bytes(row: Row) -> float:
    """Return the predicted peak of the last pipeline rank, which is the one that logs."""
    hidden, heads = _int(row, "hidden-size", 0), _int(row, "num-attention-heads", 1)
    tp, pp = (
        _int(row, "tensor-model-parallel-size", 1),
        _int(row, "pipeline-model-parallel-size", 1),
    )
    cp, ep = _int(row, "context-parallel-size", 1), _int(row, "expert-model-parallel-size", 1)
    gated, experts = bool(row["swiglu"]), _int(row, "num-experts", 0)
    # Megatron-LM's default widths: 4 h, or two thirds of it where a gate adds a third matrix.
    default = int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden
    ffn = _int(row, "ffn-hidden-size", default)
    if experts:
        ffn = _int(row, "moe-ffn-hidden-size", ffn)
    kv = _int(row, "num-query-groups", heads)
    layer = Layer(
        hidden, heads, kv, hidden // heads, ffn, gated, experts, _int(row, "moe-router-topk", 1)
    )
    world = _int(row, "n_gpus_recipe", 8)
    dp = max(1, world // (tp * pp * cp))
    layers = _int(row, "num-layers", 0)
    chunk = _int(row, "num-layers-per-virtual-pipeline-stage", 0)
    chunks = (
        layers // pp // chunk if chunk else _int(row, "num-virtual-stages-per-pipeline-rank", 1)
    )
    rank = Rank(
        tp,
        pp,
        cp,
        ep,
        _int(row, "expert-tensor-parallel-size", tp),
        dp,
        max(1, chunks),
        pp - 1,
        bool(row["sequence-parallel"]) and tp > 1,
        unfused(row),
        "full" if row["recompute-granularity"] == "full" else "none",
        grad_bytes=2.0 if row["fp16"] else 4.0,  # fp16 gradients stay in 16 bits until the step
        sharded_states=bool(row["use-distributed-optimizer"]),
        sharded_all=bool(row["data-parallel-sharding-strategy"]),
    )
    tied = not row["untie-embeddings-and-output-weights"]
    tables = 1 if pp > 1 or tied else 2
    vocab = padded_vocab(tp, _int(row, "vocab-size", 50257))
    batch, seq_len = _int(row, "micro-batch-size", 1), _int(row, "seq-length", 1024)
    count = max(1, _int(row, "global-batch-size", batch * dp) // (batch * dp))
    return peak_bytes(layer, rank, layers // pp, vocab, tables, batch, seq_len, count)


def by_test(path: Path) -> dict[str, list[Row]]:
    """Return the rows of readable tests by test case: a test ran on several platforms."""
    found: dict[str, list[Row]] = {}
    for row in rows_of(path):
        if readable(row) and row["mem_max_allocated_bytes"]:
            found.setdefault(row["test_case"], []).append(row)
    return found


def test_errors(path: Path) -> dict[str, tuple[str, float, float]]:
    """Return per test its family, its predicted over its measured peak, and its median error.

    A test counts once: the median over its platforms.
    """
    found = {}
    for name, rows in by_test(path).items():
        ratios = [predicted_bytes(row) / float(row["mem_max_allocated_bytes"]) for row in rows]
        errors = [abs(ratio - 1) for ratio in ratios]
        found[name] = (family_of(rows[0]), float(np.median(ratios)), float(np.median(errors)))
    return found
