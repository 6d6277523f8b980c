"""Readers of measured training steps: published sweeps as runs of our own types."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from simcore.errors import InputError
from simcore.models import ModelSpec
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """One measured step: what was run, on what, and its seconds (0 where memory ran out)."""

    model: ModelSpec
    parallel: ParallelStrategy
    step: TrainStep
    chip: str
    gpus_per_node: int
    nodes: int
    seconds: float
    source: str
    link: str = ""  # between nodes; "" for the chip's usual one

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.parallel.world


def rows_of(path: Path) -> list[Row]:
    """Return a file's rows. Raises `InputError` where it is not there."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give --data DIR.") from None


def gpt(layers: int, hidden: int, heads: int, vocab: int, seq_len: int) -> ModelSpec:
    """Return a GPT-2-like network as Megatron-LM builds it: tied table, learned positions."""
    return ModelSpec(
        f"gpt-{layers}x{hidden}",
        layers,
        hidden,
        heads,
        heads,
        hidden // heads,
        4 * hidden,
        vocab,
        ffn_kind="mlp",
        activation="gelu",
        norm="layernorm",
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        position="learned",
        max_positions=seq_len,
        tied_embeddings=True,
        weights_dtype="fp16",
        compute_dtype="fp16",
    )


def padded_vocab(tp: int, vocab: int = 50257) -> int:
    """Return the rows of Megatron-LM's table: a multiple of 128 x tp (its default)."""
    each = 128 * tp
    return -(-vocab // each) * each


def megatron_runs(path: Path) -> list[Run]:
    """Return the runs of ``megatron_a100_single_node.csv``; full recomputation is on."""
    found = []
    for row in rows_of(path):
        hidden, layers, heads = (int(n) for n in re.findall(r"=(\d+)", row["model"]))
        tp, dp, pp, mbs = (int(n) for n in re.findall(r"(\d+)", row["parallel"]))
        seq_len = int(row["seq_len"])
        parallel = ParallelStrategy(
            dp_replicate=dp, tp=tp, pp=pp, microbatch=mbs, recompute="full"
        )
        step = TrainStep(int(row["batch_or_concurrency"].split("=")[1]), seq_len)
        model = gpt(layers, hidden, heads, padded_vocab(tp), seq_len)
        seconds = float(row["value"]) / 1e3
        found.append(
            Run(model, parallel, step, "a100-sxm-80gb", parallel.world, 1, seconds, row["source"])
        )
    return found
