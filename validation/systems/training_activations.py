"""Checks of activation memory: tokens swapped beside compute, and streamed backward passes."""

from __future__ import annotations

from dataclasses import replace

from hwmodels.catalogue import load_chip, load_link, make_cluster
from hwmodels.families.family import matrix_peak
from hwmodels.memory import swapped_share
from hwmodels.training_memory import Keeping, as_kept
from simcore.catalogue import load_model
from simcore.liveness import activation_peaks
from simcore.lower import lower_training
from simcore.models import ModelSpec, parameter_count
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from validation.systems.frame import Finding, check
from validation.systems.training_machine import (
    exact_on_one_rank,
    exchange_seconds,
    layer_seconds,
    step,
    utilisation,
)

TOLERANCE = 0.15  # of a utilisation whose counting the abstract does not state


@check("G5.1", mutant={"pcie_share": 1e-3})
def memo(
    *, tokens: int = 2**20, ranks: int = 8, host_bytes: float = 1e12, pcie_share: float = 1.0,
    published: float = 0.523,
) -> Finding:  # fmt: skip
    """A 7B network at a million tokens on 8 A800: what is swapped, what fits, utilisation.

    ``host_bytes``: main memory that the 8 ranks share; ``pcie_share``: of each rank's link.
    """
    model, chip = load_model("llama-2-7b"), load_chip("a800-sxm-80gb")
    found = layer_seconds("llama-2-7b", "a800-sxm-80gb", tokens)
    each, width = tokens / ranks, model.hidden
    whole = each * (34 * width)  # bytes of a layer's activations, scores recomputed by the kernel
    kept = each * 2 * width * 2  # layer input and attention output always go to the host
    window = (found.attention_forward + found.linear_forward) / ranks
    link = load_link("pcie4x16")
    link = replace(link, bytes_per_s=link.bytes_per_s * pcie_share)
    pcie, room = link.bytes_per_s * link.efficiency, host_bytes / ranks / model.layers
    share = swapped_share(whole - kept, kept, window, link, room)
    late = max(0.0, kept / pcie - window)
    again = (1 - share) * found.linear_forward / ranks
    gather = exchange_seconds("all_to_all", 4 * each * width * 2, ranks,
                              make_cluster("a800-sxm-80gb", ranks))  # fmt: skip
    seconds = model.layers * (found.both / ranks + again + 3 * gather + 2 * late)
    seconds += found.head / ranks
    states = 16 * parameter_count(model) / ranks
    working = 2 * whole + states + 2 * each * 32000 * 4 / ranks
    on_host = model.layers * (kept + share * (whole - kept)) * ranks
    peak = matrix_peak(chip, "bf16")
    dense = utilisation("llama-2-7b", tokens, tokens, seconds, ranks, peak, causal=False)
    causal = utilisation("llama-2-7b", tokens, tokens, seconds, ranks, peak, causal=True)
    fits = working <= 0.9 * chip.hbm.size_bytes and on_host <= host_bytes
    same = exact_on_one_rank()["swapped"] < 1e-9
    return Finding(
        same and fits and abs(causal / published - 1) <= TOLERANCE,
        f"MFU {causal:.3f} counted causal, {dense:.3f} dense; {share:.0%} of the tokens swapped, "
        f"{working / 1e9:.0f} GB on a device and {on_host / 1e9:.0f} GB on the host",
        "the host's memory caps the share, not the link" if room < window * pcie
        else "the link caps the share",
        (f"{host_bytes / 1e12:g} TB of host memory for 8 ranks", "inputs and attention outputs "
         "always swapped, the rest by token", f"causal counting, within {TOLERANCE:.0%}",
         "executed on the CPU: half of the tokens' activations kept, half recomputed"),
        "cpu",
    )  # fmt: skip


# Logits in bf16, in fp32 for the loss, and their gradient in fp32: 6 bytes beside the program's 4.
LOSS_IN_FP32 = Keeping({"d.logits": 6.0})


def longest(model: ModelSpec, parallel: ParallelStrategy, memory_bytes: float) -> float:
    """Return the tokens of one sequence whose backward fits beside weights and bf16 gradients.

    Everything that comes and goes grows in proportion to the tokens; every layer beyond the second
    adds its input.
    """
    tokens = 8192
    work = TrainStep(1, tokens, grads_dtype="bf16")
    two = replace(model, layers=2, mixers=model.mixers[:2])
    program = as_kept(lower_training(two, parallel, work), LOSS_IN_FP32)
    each = activation_peaks(program, 0)[0] / tokens + 2 * model.hidden * (model.layers - 2)
    return (memory_bytes - 4 * parameter_count(model)) / each


def step_seconds(model: ModelSpec, parallel: ParallelStrategy, tokens: int) -> float:
    """Return the seconds of a step over one sequence on an A800; all layers are alike."""
    cluster, work = make_cluster("a800-sxm-80gb", 1), TrainStep(1, tokens, grads_dtype="bf16")
    few, more = (
        step(replace(model, layers=count, mixers=model.mixers[:count]), cluster, parallel, work)
        for count in (2, 4)
    )
    return float(few["step_s"] + (more["step_s"] - few["step_s"]) * (model.layers - 2) / 2)


@check("G5.2", mutant={"chunks": 1})
def stream_bp(*, chunks: int = 32) -> Finding:
    """Longest sequence against checkpointing on 80 GB, exact gradients, and backward time."""
    error = exact_on_one_rank()["streamed"]
    memory = 0.9 * load_chip("a800-sxm-80gb").hbm.size_bytes
    plans = [ParallelStrategy(stream_chunks=chunks), ParallelStrategy(recompute="full")]
    ratios = {}
    for name in ("qwen3-4b", "qwen3-8b", "qwen3-14b"):
        long, short = (longest(load_model(name), plan, memory) for plan in plans)
        ratios[name] = long / short
    times = [step_seconds(load_model("qwen3-8b"), plan, 16384) for plan in plans]
    slower = times[0] / times[1]
    within = all(2.8 <= ratio <= 5.5 for ratio in ratios.values())
    return Finding(
        error < 1e-9 and slower <= 1 and within,
        ", ".join(f"{ratio:.1f}x {name}" for name, ratio in ratios.items())
        + f"; a step of 16K tokens takes {slower:.2f} of the checkpointed one's time; gradients "
        f"differ by {error:.0e} of the largest",
        "only one chunk's logits and layer are alive; checkpoints and packed rows stay"
        if within and slower <= 1
        else "a small model with a large vocabulary gains more than published: the allocator's "
        "fragmentation and the chunked kernels' own buffers are not modelled; at 16K tokens chunks "
        "of 512 rows fill the chip badly and add to all weight gradients every time",
        (f"{chunks} chunks, 80 GB less a tenth, weights and gradients bf16, logits in bf16 and "
         "fp32", "both sides from the lowered program", "executed in float64 on the CPU"),
        "cpu",
    )  # fmt: skip
