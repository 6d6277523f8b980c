"""Checks of activation memory: tokens swapped beside compute, and streamed backward passes."""

from __future__ import annotations

from hwmodels.catalogue import load_chip, load_link, make_cluster
from hwmodels.families.family import matrix_peak
from simcore.catalogue import load_model
from simcore.models import ModelSpec, parameter_count
from validation.systems.frame import Finding, check, need_torch
from validation.systems.training_machine import exchange_seconds, layer_seconds, utilisation
from validation.systems.training_sequences import largest

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
    pcie = load_link("pcie4x16").bytes_per_s * pcie_share
    able = min(window * pcie, host_bytes / ranks / model.layers)
    share = min(max(0.0, able - kept) / (whole - kept), 1.0)
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
    need_torch()
    from backends.references.streaming import swapped_equals_kept

    same = swapped_equals_kept(0.5)
    return Finding(
        same and fits and abs(causal / published - 1) <= TOLERANCE,
        f"MFU {causal:.3f} counted causal, {dense:.3f} dense; {share:.0%} of the tokens swapped, "
        f"{working / 1e9:.0f} GB on a device and {on_host / 1e9:.0f} GB on the host",
        "the host's memory caps the share, not the link" if able < window * pcie
        else "the link caps the share",
        (f"{host_bytes / 1e12:g} TB of host memory for 8 ranks", "inputs and attention outputs "
         "always swapped, the rest by token", f"causal counting, within {TOLERANCE:.0%}",
         "executed on the CPU: half of the tokens' activations kept, half recomputed"),
        "cpu",
    )  # fmt: skip


def backward_bytes(model: ModelSpec, tokens: float, chunks: float) -> float:
    """Return a backward's bytes beside weights: checkpoints, one chunk's layer and logits.

    Weights and gradients in bf16; logits in bf16, fp32 and their gradient.
    """
    layer = 2 * (6 * model.hidden + 3 * model.ffn + 2 * model.kv_heads * model.head_dim)
    logits = (2 + 4 + 4) * model.vocab
    kept = 2 * model.hidden * model.layers + 4 * 2 * model.kv_heads * model.head_dim
    return 4 * parameter_count(model) + tokens * (kept + max(layer, logits) / chunks)


@check("G5.2", mutant={"drop": 1})
def stream_bp(*, drop: int = 0, chunks: int = 32) -> Finding:
    """Longest sequence against checkpointing on 80 GB, exact gradients, and backward time."""
    need_torch()
    from backends.references.streaming import streamed_equals_whole

    same, most, least = streamed_equals_whole(8, drop)
    memory = 0.9 * load_chip("a800-sxm-80gb").hbm.size_bytes
    ratios = {}
    for name in ("qwen3-4b", "qwen3-8b", "qwen3-14b"):
        model = load_model(name)
        long, short = (
            largest(lambda s, c=c, m=model: backward_bytes(m, s, c) <= memory)  # type: ignore[misc]
            for c in (chunks, 1)
        )
        ratios[name] = long / short
    causal = (chunks + 1) / (2 * chunks)  # of the scores, where a chunk stops at its own keys
    return Finding(
        same and least < most and causal <= 1 and all(2.8 <= r <= 5.5 for r in ratios.values()),
        ", ".join(f"{r:.1f}x {name}" for name, r in ratios.items())
        + f"; saved bytes {least} of {most} executed; {causal:.0%} of the scores computed",
        "only one chunk's logits and layer are alive; checkpoints and keys stay"
        if same and max(ratios.values()) <= 5.5
        else "gradients differ"
        if not same
        else "a small model with a large vocabulary gains more than published: the allocator's "
        "fragmentation and the chunked kernels' own buffers are not modelled",
        (f"{chunks} chunks, 80 GB less a tenth, weights and gradients bf16", "equal work but for "
         "masked scores, so no slower", "executed in float64 on the CPU"),
        "cpu",
    )  # fmt: skip
