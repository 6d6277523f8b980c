"""Readers of measured training steps: published sweeps as runs of our own types."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import median

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
    link_bytes_per_s: float = 0.0  # a rank's share of it, as measured on the nodes; 0: datasheet's
    state: str = ""  # of the hosts, where a sweep knows several

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
        parallel = ParallelStrategy(dp_replicate=dp, tp=tp, pp=pp, microbatch=mbs, recompute="full")
        step = TrainStep(int(row["batch_or_concurrency"].split("=")[1]), seq_len)
        model = gpt(layers, hidden, heads, padded_vocab(tp), seq_len)
        seconds = float(row["value"]) / 1e3
        found.append(
            Run(model, parallel, step, "a100-sxm-80gb", parallel.world, 1, seconds, row["source"])
        )
    return found


_MPT = {  # layers, hidden, heads of llm-foundry's scripts/train/yamls/pretrain
    "MPT-125m": (12, 768, 12),
    "MPT-350m": (24, 1024, 16),
    "MPT-760m": (24, 1536, 12),
    "MPT-1b": (24, 2048, 16),
    "MPT-3b": (32, 2560, 20),
    "MPT-7b": (32, 4096, 32),
    "MPT-13b": (40, 5120, 40),
}
_MPT_VOCAB = 50368


def fsdp_runs(path: Path) -> list[Run]:
    """Return the runs of ``fsdp_a100.csv``: FULL_SHARD over all ranks, FlashAttention.

    Each run has two rows; the one in tokens a second is read. ``amp_bf16`` keeps weights in fp32,
    gathers and multiplies them in bf16 ("MP Mode" DEFAULT), and so are gradients reduced there.
    """
    found = []
    for row in rows_of(path):
        if row["metric"] != "tokens_per_s_per_gpu":
            continue
        layers, hidden, heads = _MPT[row["model"]]
        extra = json.loads(row["extra"])
        seq_len, world = int(row["seq_len"]), int(row["n_gpus"])
        model = replace(
            gpt(layers, hidden, heads, _MPT_VOCAB, seq_len),
            name=row["model"],
            weights_dtype="bf16",
            compute_dtype="bf16",
        )
        again = extra["Activation Checkpointing"] == "True"
        parallel = ParallelStrategy(
            dp_shard=world,
            microbatch=int(extra["MicroBatchSize"]),
            recompute="full" if again else "none",
        )
        step = TrainStep(int(extra["GlobalBatchSize"]), seq_len, grads_dtype="bf16")
        tokens = step.global_batch * seq_len
        chip = row["hardware"].lower()
        found.append(
            Run(
                model,
                parallel,
                step,
                chip,
                min(8, world),
                max(1, world // 8),
                tokens / world / float(row["value"]),
                row["source"],
                "roce-200",  # 1600 Gb/s a node, says the file
            )
        )
    return found


def nanotron_model(row: Row) -> ModelSpec:
    """Return the Llama-like network of a row of ``nanotron_h100_3.6b.csv``."""
    hidden, heads = int(row["hidden_size"]), int(row["num_heads"])
    return ModelSpec(
        "nanotron-3.6b",
        int(row["num_layers"]),
        hidden,
        heads,
        int(row["num_kv_heads"]),
        hidden // heads,
        int(row["interm_dim"]),
        int(row["vocab_size"]),
        tied_embeddings=row["tie_word_embeddings"] == "True",
    )


# Jobs from here on, over several nodes, ran where each collective of tensor ranks took the host
# about 0.4 ms for every rank, whatever its size (the file's own notes): another state of the hosts.
# Their own all-reduce test inside a node shows it too: 424 GB/s where earlier jobs had 458.
CONTENDED_JOB = 14_018_000
_OUTLIER = 3.0
_PEERS = 3


def without_outliers(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that are not over three times as slow as their peers.

    Slow is time per layer and slot of the pipeline, seconds x pp / (microbatches + pp - 1); peers
    are runs of the same tp, microbatch and state of the hosts, at least three. No prediction is
    asked.
    """
    peers: dict[tuple[int, int, str], list[float]] = {}

    def key(run: Run) -> tuple[int, int, str]:
        return run.parallel.tp, run.parallel.microbatch, run.state

    for run in runs:
        peers.setdefault(key(run), []).append(_slot_seconds(run))
    limit = {k: _OUTLIER * median(v) for k, v in peers.items() if len(v) >= _PEERS}
    return [run for run in runs if _slot_seconds(run) <= limit.get(key(run), inf)]


def _slot_seconds(run: Run) -> float:
    parallel = run.parallel
    count = run.step.global_batch // parallel.dp // parallel.microbatch
    return run.seconds * parallel.pp / (count + parallel.pp - 1)


def layers_by_cost(model: ModelSpec, pp: int) -> tuple[int, ...]:
    """Return nanotron's layers per stage (models/base.py, build_model).

    Blocks go to a stage until their cumulated cost, the head counted as layers of its size, passes
    that stage's share of the whole. So late stages may hold no layers, and sometimes the head alone
    or nothing but the loss: here the head is always on the last.
    """
    layer, head = 4 * model.hidden + 3 * model.ffn, model.vocab
    whole = model.layers * layer + head
    counts, stage = [0] * pp, 0
    for number in range(1, model.layers + 1):
        counts[stage] += 1
        if number * layer * pp > whole * (stage + 1):
            stage += 1
    return tuple(counts)


def nanotron_runs(path: Path) -> list[Run]:
    """Return the runs of ``nanotron_h100_3.6b.csv``, those out of memory with 0 seconds.

    1F1B, sequence parallelism, fp32 gradients; ZeRO 1 shards states over dp. The link between
    nodes has what the run's own all-reduce test measured: an eighth of its bus bandwidth per rank.
    """
    found = []
    for row in rows_of(path):
        dp, pp, tp, mbs = (int(row[name]) for name in ("dp", "pp", "tp", "mbs"))
        batch = dp * mbs * int(float(row["batch_accum"]))
        zero = int(row["zero_stage"])
        sharded = zero > 0 and dp > 1
        parallel = ParallelStrategy(
            dp_replicate=1 if sharded else dp,
            dp_shard=dp if sharded else 1,
            tp=tp,
            pp=pp,
            microbatch=mbs,
            zero_stage=1 if sharded else 0,
            sequence_parallel=True,
            layers_per_stage=layers_by_cost(nanotron_model(row), pp),
        )
        seq_len, rate, bus = int(row["seq_len"]), row["tok/s/gpu"], row["AllReduce (GB/s)"]
        world = parallel.world
        state = "contended" if int(row["job_id"]) >= CONTENDED_JOB and world > 8 else ""
        seconds = batch * seq_len / float(rate) / world if rate else 0.0
        nodes = max(1, world // 8)
        found.append(
            Run(
                nanotron_model(row),
                parallel,
                TrainStep(batch, seq_len),
                "h100-sxm-80gb",
                min(8, world),
                nodes,
                seconds,
                row["job_id"],
                "efa-100x32",
                round(float(bus) / 8 / 0.5) * 0.5e9 if bus and world > 8 and not state else 0.0,
                state,
            )
        )
    return found
