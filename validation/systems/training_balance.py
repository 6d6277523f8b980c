"""Checks of attention over sequences of unequal length: servers, masks, long prefills."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from hwmodels.catalogue import load_chip
from hwmodels.memory import room_bytes
from simcore.catalogue import load_model
from simcore.lower import lower_pass, lower_training
from simcore.metrics import GENERATE_PARTS, memory_metrics
from simcore.models import parameter_count
from simcore.servers import Task, assigned, tasks_of
from simcore.strategy import ParallelStrategy
from validation.systems.frame import Finding, check, need_torch
from validation.systems.training_cells import CELLS, SIZES, WAYS, loads
from validation.systems.training_machine import ON_RANKS, exact
from validation.systems.training_sequences import largest

LAYERS, WIDTH = 32, 4096  # a 7B network
MODEL = "llama-2-7b"


def drawn(count: int, sigma: float, seed: int, longest: float = 262144.0) -> list[float]:
    """Return log-normal lengths around 2048 tokens, longest first."""
    random = np.random.default_rng(seed)
    found = np.clip(random.lognormal(math.log(2048), sigma, count), 128, longest)
    return sorted(found.tolist(), reverse=True)


@check("G3.10", mutant={"task": 1e9})
def attention_servers(*, ranks: int = 64, task: float = 2048.0) -> Finding:
    """Attention cut into tasks of equal rows and packed on servers against packed documents.

    ``task``: query rows of a task; the mutant never cuts a document.
    """
    same, error = exact("causal servers 16/4", "documents servers 16/4")
    bounds, gains, left = [], [], []
    for sigma in (0.6, 1.0, 1.4):
        for seed in range(3):
            lengths = drawn(ranks * 24, sigma, seed, 131072.0)
            linear = [0.0] * ranks
            baseline = [0.0] * ranks
            tasks: list[Task] = []
            homes: list[int] = []
            for length in map(int, lengths):  # packed by tokens, as a packed batch is
                r = int(np.argmin(linear))
                linear[r] += length
                cut = tasks_of((length,), length, 1, length, int(task))
                tasks, homes = tasks + cut, homes + [r] * len(cut)
                baseline[r] += sum(each.pairs for each in cut)
            ends = [0.0] * ranks
            for each, server in zip(tasks, assigned(tasks, homes, ranks), strict=True):
                ends[server] += each.pairs
            mean = sum(ends) / ranks
            left.append((max(ends) - mean) / max(each.pairs for each in tasks))
            dense = 6 * parameter_count(load_model(MODEL)) / (12 * LAYERS * WIDTH)
            before = max(t * dense + a for t, a in zip(linear, baseline, strict=True))
            after = max(linear) * dense + max(ends)
            gains.append(before / after)
            bounds.append(max(baseline) / mean)
    bounded = all(1 <= g <= b for g, b in zip(gains, bounds, strict=True))
    small = max(left) <= 1 and max(gains) >= 1.2
    reached = max(gains) >= 1.35
    return Finding(
        same and bounded and small and reached,
        f"gain {min(gains):.2f}x to {max(gains):.2f}x, stragglers {min(bounds):.2f} to "
        f"{max(bounds):.2f}; at most {max(left):.2f} of a task above the mean; losses differ by "
        f"{error:.1e}",
        "attention has no weights, so any server can take any rows; transfers hide behind the other"
        " microbatch"
        if small
        else "whole documents cannot be balanced",
        ("64 ranks, log-normal documents packed to equal tokens, 7B", "tasks of 2048 rows",
         "transfers are taken as hidden, which the executed servers' are not", ON_RANKS),
        "cpu",
    )  # fmt: skip


def tiles(seen: np.ndarray, side: int) -> int:
    """Return how many tiles of a mask have anything to compute."""
    rows = seen.shape[0] // side
    return int(seen.reshape(rows, side, -1, side).any((1, 3)).sum())


@check("G3.11", mutant={"shift": 1})
def attention_grid(*, shift: int = 0) -> Finding:
    """Ways x masks x layouts x ranks: each rank's pairs are its unmasked area, and it runs so.

    ``shift``: by how many positions the predicted diagonal is off.
    """
    same, error = exact(*CELLS)
    areas, busiest = True, {}
    for name, cell in CELLS.items():
        found, right = loads(cell, lower_training(cell.model, cell.parallel, cell.work), shift)
        areas &= right
        if cell.mask != "full" and cell.ranks == 4:
            busiest[name] = max(found) / (sum(found) / len(found))
    spots = np.arange(4096)
    causal_mask = spots[:, None] >= spots
    window = causal_mask & (spots[:, None] - spots < 512)
    documents = causal_mask & (spots[:, None] // 1024 == spots // 1024)
    near = [tiles(mask, 64) * 64**2 / int(mask.sum()) for mask in (causal_mask, window, documents)]
    return Finding(
        same and areas and max(near) < 1.15,
        f"{len(CELLS)} cells, losses differ by {error:.1e}; busiest rank "
        + ", ".join(f"{name} {load:.2f}" for name, load in busiest.items())
        + f"; tiles hold {', '.join(f'{n:.2f}' for n in near)} times the unmasked pairs",
        "a rank computes what its rows see, or an even share; a kernel skips empty tiles",
        (
            "cells: "
            + "; ".join(f"{mask} over {len(ways)} ways" for mask, ways in WAYS.items())
            + "; tokens / ranks "
            + ", ".join(f"{tokens}/{ranks}" for tokens, ranks in SIZES)
            + "; where ranks help one another the sum of pairs is compared",
            "causal, window and document masks of 4096 tokens in tiles of 64; sliding windows "
            "are in no cell",
            ON_RANKS,
        ),
        "cpu",
    )


@check("G3.12", mutant={"keep_logits": True})
def long_vita(*, gpus: int = 8, keep_logits: bool = False) -> Finding:
    """Longest prefill on one node with context parallelism and without the S x V logits.

    The baseline is the released server (https://github.com/VITA-MLLM/Long-VITA) without its logit
    mask: tensor parallel over the node, and every rank gathers all logits (parallel_output=False).
    """
    need_torch()
    from backends.references.streaming import last_row_is_enough

    room = float(room_bytes(load_chip("h100-sxm-80gb").hbm.size_bytes, gpus))
    model = load_model("qwen2.5-14b")

    @cache
    def holds(rows: int, logits: bool, tp: int) -> bool:
        # as many sequences of one token hold as many rows, the same cache, and every row's logits
        batch, new = (rows, 1) if logits else (1, rows)
        held = lower_pass(model, ParallelStrategy(tp=tp), batch, new, 0)
        return bool(memory_metrics(held, GENERATE_PARTS, room, 0)["fits"])

    def fits(tokens: float, logits: bool, cp: int) -> bool:
        return holds(1024 * math.ceil(tokens / cp / 1024), logits, gpus // cp)

    before = largest(lambda s: fits(s, True, 1))
    after = largest(lambda s: fits(s, keep_logits, 1))
    split = largest(lambda s: fits(s, keep_logits, 2))
    same = last_row_is_enough()
    longest = max(after, split)
    return Finding(
        same and longest / before >= 4,
        f"{before / 1e3:.0f}K tokens with logits, {after / 1e3:.0f}K without, {split / 1e3:.0f}K "
        f"over 2 x {gpus // 2} context and tensor ranks: {longest / before:.1f}x",
        "a prefill needs the last row of logits alone"
        if longest / before >= 4
        else "what is saved per token is under four times",
        ("Qwen2.5-14B in bf16 on 8 H100, all but what a process holds beside tensors; the peak of "
         "the lowered passes, logits gathered over tensor ranks", "buffers go with their last "
         "reader: what an engine holds longer, and a ring's travelling block, are missing",
         "executed in float64 on the CPU"),
        "cpu",
    )  # fmt: skip
