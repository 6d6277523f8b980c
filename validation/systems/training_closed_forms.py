"""Closed forms of training: arithmetic on published figures, and the laws behind schedules."""

from __future__ import annotations

import itertools
import math

import numpy as np

from hwmodels.catalogue import load_chip
from simcore.catalogue import load_model
from simcore.metrics import model_flops_per_token
from simcore.pipelines.unit import run_units
from simcore.schedules import SCHEDULES
from simcore.stragglers import exponential_kth_s
from validation.systems.frame import Finding, check

ONE_SETTING = "both figures come from one setting"


@check("D1", mutant={"tokens": 2e12})
def frontier_flops(*, params: float = 1e12, tokens: float = 20e12) -> Finding:
    """6 N D of a trillion parameters at 20 tokens each; the counter agrees on a real model."""
    total = 6 * params * tokens
    model = load_model("gpt3-175b")
    attention = 12 * model.layers * model.hidden * 2048
    count = model_flops_per_token(model, 2048) - attention
    return Finding(
        math.isclose(total, 120e6 * 1e18) and abs(count / (6 * 175e9) - 1) < 0.005,
        f"{total:.3g} FLOP; GPT-3's counter gives {count / 6e9:.1f}e9 parameters",
        "6 FLOP per parameter and token",
        ("published: 120 million exaFLOP",),
    )


@check("D2", mutant={"gpus": 1536})
def megatron_peak(*, flops_per_s: float = 502e15, gpus: int = 3072, share: float = 0.52) -> Finding:
    """The peak that Megatron-LM's throughput and utilisation imply, against the data file."""
    each, peak = flops_per_s / gpus, load_chip("a100-sxm-80gb").peak_flops_per_s["bf16"]
    low, high = each / (share + 0.005), each / (share - 0.005)
    return Finding(
        round(each / 1e12, 1) == 163.4 and low <= peak <= high,
        f"{each / 1e12:.1f} TFLOP/s per GPU imply {each / share / 1e12:.0f}; "
        f"the chip's file has {peak / 1e12:.0f}",
        "throughput over utilisation, the latter rounded to a per cent",
    )


@check("D3", mutant={"devices": 32})
def zeco_weak_scaling(*, tokens: int = 2**20, devices: int = 64) -> Finding:
    """Tokens per rank of ZeCO's two settings, and the ratio that weak scaling allows."""
    each, large = tokens // devices, 8 * 2**20 // 256
    return Finding(
        each == 16384 and large == 32768,
        f"{each} and {large} tokens per rank",
        "linear attention costs each rank its own tokens, so equal shares take equal time",
    )


@check("D16", mutant={"exchange_shrinks": 1.0})
def eight_bit_speedups(
    *, gpus: int = 96, speedup: float = 23.0, exchange_shrinks: float = 2.0
) -> Finding:
    """Efficiencies at 96 GPUs, and the speedups if transfers halve or quarter without overlap."""
    ratio = gpus / speedup - 1
    half, quarter = (
        gpus / (1 + ratio / exchange_shrinks),
        gpus / (1 + ratio / (2 * exchange_shrinks)),
    )
    return Finding(
        round(half) == 37 and abs(quarter - 53.5) < 0.1 and half < 50 < quarter,
        f"communication is {ratio:.2f} of compute; {half:.1f}x and {quarter:.1f}x; "
        f"efficiency {speedup / gpus:.0%} and {50 / gpus:.0%}",
        "step = compute + exchange, fitted to the 32-bit speedup alone",
    )


@check("D17", mutant={"hours": 4.0})
def surrogate_rate(*, data_bytes: float = 8e12, hours: float = 2.0, gain: float = 13.0) -> Finding:
    """Sustained rate of 8 TB in two hours, and of the offline path."""
    rate = data_bytes / (hours * 3600)
    return Finding(
        round(rate / 1e9, 2) == 1.11 and round(rate / gain / 1e9, 3) == 0.085,
        f"{rate / 1e9:.3f} GB/s online, {rate / gain / 1e9:.4f} offline",
        "the data over the time",
        ("both paths are bound by input",),
    )


@check("D25", mutant={"over_lasp": 1.366})
def lasp_over_ring(*, over_ring: float = 1.366, over_lasp: float = 1.152) -> Finding:
    """The speed of LASP over Ring Attention that LASP-2's two figures imply."""
    ratio, tokens = over_ring / over_lasp, 2**21 // 64
    return Finding(
        round(ratio, 3) == 1.186 and tokens == 32768,
        f"{ratio:.3f}x at {tokens} tokens per rank",
        "the quotient of two speedups of one system",
        (ONE_SETTING,),
    )


@check("D26", mutant={"tokens": 53248})
def counting_conventions(*, tokens: int = 208 * 1024, gpus: int = 16) -> Finding:
    """How far dense and causal counting of FLOPs differ for Llama-3-8B at 208K tokens."""
    model = load_model("llama-3-8b")
    ratio = model_flops_per_token(model, tokens) / model_flops_per_token(model, tokens, causal=True)
    return Finding(
        round(ratio, 2) == 1.78 and tokens / gpus == 13312,
        f"{ratio:.3f}; {tokens / gpus:.0f} tokens per GPU",
        "6 N + 12 L h s over 6 N + 6 L h s",
        ("208K is 208 x 1024 tokens",),
    )


@check("D28", mutant={"bytes_per_parameter": 14})
def states_of_175b(*, bytes_per_parameter: int = 16, gpus: int = 32) -> Finding:
    """Model states of 175 billion parameters on each of 32 GPUs."""
    need, memory = 175e9 * bytes_per_parameter / gpus, load_chip("a100-sxm-80gb").hbm.size_bytes
    return Finding(
        need == 87.5e9 and need > memory,
        f"{need / 1e9:.1f} GB of {memory / 1e9:.1f}",
        "half-precision weights and gradients, single-precision copy and two moments: 16 bytes",
    )


@check("D32", mutant={"off": 1})
def bubbles(*, off: int = 0) -> Finding:
    """Bubbles of GPipe, 1F1B, interleaved and flush-free schedules, played action by action.

    ``off`` shifts the microbatches of the formula.
    """
    worst, cases = 0.0, 0
    for p, m in ((2, 4), (4, 8), (8, 8), (4, 32)):
        for name, v in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)):
            found = run_units(SCHEDULES[name](p, m, v)).bubble_ratio
            worst, cases = max(worst, abs(found - (p - 1) / (v * (m + off)))), cases + 1
    endless = run_units(SCHEDULES["1f1b"](4, 400)).line  # without flushes, steps are one run
    inside = (0.25 * endless.step_s, 0.75 * endless.step_s)
    busy = sum(
        max(0.0, min(span.end_s, inside[1]) - max(span.start_s, inside[0]))
        for span in endless.spans
    ) / (4 * (inside[1] - inside[0]))
    return Finding(
        worst < 1e-9 and abs(busy - 1) < 1e-9,
        f"largest difference {worst:.2g} over {cases} schedules; busy {busy:.3f} without a flush",
        "idle time over ideal time: (p-1)/m, (p-1)/(v m) with v chunks, none without a flush",
        ("stages of equal time, free messages",),
    )


@check("D33", mutant={"off": 1})
def backup_order_statistics(*, workers: int = 16, off: int = 0) -> Finding:
    """The expected wait for the fastest n - b workers against 40,000 draws."""
    draws = np.sort(np.random.default_rng(3).exponential(size=(40_000, workers)), axis=1)
    worst = max(
        abs(draws[:, workers - b - 1].mean() / exponential_kth_s(workers, b + off, 1.0) - 1)
        for b in (0, 1, 4, 8)
    )
    return Finding(
        worst < 0.02,
        f"within {worst:.2%} for b in 0, 1, 4, 8 of {workers}",
        "gaps between ordered exponentials are exponential with rate (workers left) mu",
    )


@check("D37", mutant={"gain": 1.3})
def c4_bound(*, gain: float = 1.15) -> Finding:
    """The share of a step that has to be exposed communication for 15 % more throughput."""
    share = 1 - 1 / gain
    return Finding(
        round(share, 2) == 0.13,
        f"{share:.3f} of the step",
        "routing can at best remove all exposed communication",
    )


@check("D41", mutant={"ring": 4.0})
def lightseq_volumes(*, tensor: float = 14.0, ring: float = 3.0) -> Finding:
    """The quotient of the volumes per layer, in units of tokens x width."""
    return Finding(
        abs(tensor / ring - 4.7) < 0.05,
        f"{tensor / ring:.2f}",
        "14 S h against 3 S h per layer, forward and backward",
        ("volumes from background knowledge of both papers; G3.5 counts them",),
    )


@check("D42", mutant={"gpus": 6})
def patch_parallel_ceilings(*, gpus: int = 8, speedup: float = 6.54) -> Finding:
    """DualParal's share of linear, and ParaStep's ceiling for its warm-up steps."""
    share = speedup / gpus
    warm = [50 / (w + (50 - w) / gpus) for w in range(51)]
    falling = all(a > b for a, b in itertools.pairwise(warm))
    return Finding(
        round(share, 2) == 0.82 and falling and warm[0] == gpus and warm[-1] == 1,
        f"{share:.1%} of linear; ceiling {warm[0]:.1f}x without warm-up, {warm[4]:.2f}x with 4 of "
        "50 steps",
        "S / (w + (S - w) / P): warm-up is serial",
        ("the baseline is one device",),
    )
