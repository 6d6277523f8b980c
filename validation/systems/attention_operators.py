"""Checks of attention that reads fewer tokens, streams them, merges them or lets them halt."""

from __future__ import annotations

from itertools import product

import numpy as np

from hwmodels.catalogue import load_chip
from hwmodels.families.family import matrix_peak
from hwmodels.mixers import MATRIX_SHARE, mixer_seconds
from simcore.mixers import mixer_cost
from simcore.mixers.attention import merging_layer_flops, stage_lengths
from validation.systems.agreement import SIZES, agrees, execute_forms
from validation.systems.frame import Finding, check, have_torch, need_torch

HALF_BYTES = 2
HEADS = SIZES["aaren"]
ON_CPU = "executed in float64 on the CPU, 16 tokens"


@check("G6.5", mutant={"lag": 1})
def aaren_scan(*, lag: int = 0) -> Finding:
    """The scan equals softmax attention over every prefix, in log2 S steps and constant state."""
    ran = execute_forms("aaren", HEADS, lag)
    longer = execute_forms("aaren", {**HEADS, "seq_len": 64}, lag)
    depth = ran.serial_steps["scan"], longer.serial_steps["scan"]
    same_state = ran.state_bytes["recurrent"] == longer.state_bytes["recurrent"]
    return Finding(
        ran.same and longer.same and depth == (4, 6) and same_state,
        f"{depth[0]} and {depth[1]} dependent steps at 16 and 64 tokens, "
        f"{ran.state_bytes['recurrent']} bytes of state at both; differ by {ran.error:.0e}",
        "maximum, sum and weighted values of two spans merge associatively"
        if ran.same
        else f"the forms differ by {ran.error:.0e}",
        (ON_CPU,),
        "cpu",
    )


# ------------------------------------------------------------------ G6.7


@check("G6.7", mutant={"fixed_block": 4096.0})
def combiner_exponents(*, fixed_block: float | None = None) -> Finding:
    """Cost against length: sqrt(S) blocks give S^1.5, a tree over blocks gives S log S."""
    lengths = 4.0 ** np.arange(6, 11)
    shape = {"batch": 1, "heads": 8, "d_k": 64, "d_v": 64, "element_bytes": HALF_BYTES}
    block = np.sqrt(lengths) if fixed_block is None else np.full_like(lengths, fixed_block)
    roots = mixer_cost("combiner", "chunked", {**shape, "seq_len": lengths, "block": block})
    slope = float(np.polyfit(np.log(lengths), np.log(np.asarray(roots.matrix_flops)), 1)[0])
    tree = mixer_cost("combiner_tree", "chunked", {**shape, "seq_len": lengths, "block": 1.0})
    per_token = np.asarray(tree.matrix_flops) / lengths
    rises = np.diff(per_token)  # constant, as each factor of four adds two levels
    logarithmic = bool(np.allclose(rises, rises[0]))
    chip = load_chip("a100-sxm-80gb")
    fine = 4.0 ** np.arange(3, 11)
    mine = mixer_cost("combiner", "chunked", {**shape, "seq_len": fine, "block": np.sqrt(fine)})
    dense = mixer_cost("attention", "fused", {**shape, "seq_len": fine, "chunk": 64.0})
    wins = mixer_seconds(mine, chip, "bf16") < mixer_seconds(dense, chip, "bf16")
    first = f"{fine[int(np.argmax(wins))]:.0f} tokens" if wins.any() else "no length"
    agree, executed = agrees("combiner")
    agree = agree and agrees("combiner_tree")[0]
    return Finding(
        abs(slope - 1.5) < 0.02 and logarithmic and agree,
        f"exponent {slope:.2f} with blocks of sqrt(S); S log S with a tree; faster than dense "
        f"attention from {first} on an A100",
        "a query sees its block and one summary per region"
        if agree
        else "the executed forms do not agree",
        ("8 heads of 64, causal", ON_CPU),
        executed,
    )


# ------------------------------------------------------------------ G6.8


def attention_share(speedup_all: float, speedup_part: float) -> float:
    """Return the share f of time that a part takes if 1/(1 - f + f/part) = all (Amdahl 1967)."""
    return (1 - 1 / speedup_all) / (1 - 1 / speedup_part)


@check("G6.8", mutant={"kept_shards": 1})
def s2_shards(
    *,
    speedup_attention: float = 25.3,
    speedup_training: float = 6.0,
    shards: int = 4,
    kept_shards: int | None = None,
) -> Finding:
    """The two speedups imply attention's share; a head keeps one shard of keys and values."""
    share = attention_share(speedup_training, speedup_attention)
    lengths = 2.0 ** np.arange(11, 19)
    found = _share_of_attention(lengths)
    at = float(np.interp(share, found, lengths))
    reached = bool(found[0] < share < found[-1])
    sizes = {**HEADS, "heads": 4, "block": 2, "shards": kept_shards or shards}
    falls, covers, agree = float(kept_shards or shards), True, True
    if have_torch():
        from backends.mixers.attention import shard_of

        ran = execute_forms("s2_attention", sizes)
        full = 2 * 4 * 16 * (HEADS["d_k"] + HEADS["d_v"]) * 8  # keys and values of all tokens
        falls = full / ran.state_bytes["chunked"]
        covers, agree = bool(shard_of(sizes).any(0).all()), ran.same
    return Finding(
        abs(share - 0.87) < 0.01 and falls == shards and covers and agree and reached,
        f"attention is {share:.1%} of baseline time, predicted at {at:.0f} tokens (1.3B, A100); "
        f"keys and values per head fall {falls:g}-fold",
        "each head reads and keeps one strided shard; all shards together cover the sequence",
        (
            "both speedups come from one setting",
            "1.3B model: width 2048, 24 layers, causal fused attention in training",
            ON_CPU,
        ),
        "cpu" if have_torch() else "no",
    )


def _share_of_attention(lengths: np.ndarray) -> np.ndarray:
    """Return attention's share of a layer's training time by length (width 2048, A100)."""
    chip = load_chip("a100-sxm-80gb")
    width = 2048.0
    shape = {
        "batch": 1,
        "heads": 16,
        "d_k": 128,
        "d_v": 128,
        "chunk": 64,
        "element_bytes": HALF_BYTES,
        "seq_len": lengths,
    }
    causal = mixer_seconds(mixer_cost("attention", "fused", shape), chip, "bf16") / 2
    products = 24 * width**2 * lengths / (matrix_peak(chip, "bf16") * MATRIX_SHARE)
    return np.asarray(3.5 * causal / (3.5 * causal + 3 * products))


# ------------------------------------------------------------------ G6.9, G6.10, G6.11


@check("G6.9", mutant={"slots_per_token": 2.0})
def gam_crossover(
    *,
    width: float = 512,
    slots: float = 512,
    kernel: float = 3,
    slots_per_token: float = 0.0,
) -> Finding:
    """Convolution and slots are linear in N; beyond a crossover they beat fused attention."""
    chip = load_chip("a100-sxm-80gb")
    lengths = 2.0 ** np.arange(6, 18)
    held = slots if slots_per_token == 0 else lengths * slots_per_token
    shape = {"batch": 8, "seq_len": lengths, "element_bytes": HALF_BYTES}
    mine = mixer_cost("gam", "parallel", {**shape, "width": width, "kernel": kernel, "slots": held})
    heads = {"heads": width / 64, "d_k": 64, "d_v": 64, "chunk": 64}
    dense = mixer_cost("attention", "fused", {**shape, **heads})
    seconds = mixer_seconds(mine, chip, "fp16")
    faster = seconds < mixer_seconds(dense, chip, "fp16")
    crosses = bool(faster[-1]) and not bool(faster[0])
    at = lengths[int(np.argmax(faster))] if faster.any() else np.inf
    memory = np.asarray(mine.hbm_bytes)
    linear = bool(np.isclose(memory[-1] / memory[-2], 2, rtol=0.01))
    agree, executed = agrees("gam")
    return Finding(
        crosses and linear and agree,
        f"faster from {at:.0f} tokens on; bytes grow {memory[-1] / memory[-2]:.2f}x per doubling",
        "a fixed number of slots against all earlier tokens"
        if crosses
        else "no crossover: the slots cost as much as the tokens they stand for",
        ("A100, fp16, width 512, 512 slots, 3 taps, batch 8; the paper gives no factor", ON_CPU),
        executed,
    )


@check("G6.10", mutant={"switch_share": 0.25})
def merging_switch(
    *,
    seq_len: int = 8192,
    layers: int = 10,
    merge: int = 2,
    width: int = 256,
    switch_share: float = 1.0,
) -> Finding:
    """Cost is the sum over layers at n_l; the best switch is where the two operators cost alike."""
    lengths = np.asarray(stage_lengths(seq_len, layers, merge))
    linear, exact = merging_layer_flops(lengths, width)
    plans = list(product((0, 1), repeat=layers))
    costs = [float(np.where(plan, exact, linear).sum()) for plan in plans]
    shape = {
        "batch": 1,
        "seq_len": seq_len,
        "layers": layers,
        "merge": merge,
        "switch": width * switch_share,
        "width": width,
        "element_bytes": HALF_BYTES,
    }
    rule = float(mixer_cost("merging", "parallel", shape).matrix_flops)
    best = min(costs)
    agree, executed = agrees("merging")
    return Finding(
        bool(np.isclose(rule, best)) and agree,
        f"switch at {width * switch_share:g} tokens costs {rule / best:.3f} of the best of "
        f"{len(plans)} assignments",
        "4 n d^2 of linear attention and 4 n^2 d of softmax cross at n = d"
        if np.isclose(rule, best)
        else "a switch away from the crossing pays the dearer operator",
        ("10 layers that halve 8192 tokens, width 256", ON_CPU),
        executed,
    )


@check("G6.11", mutant={"counted_steps": 1})
def universal_halting(*, max_steps: int = 5, counted_steps: int = 0) -> Finding:
    """Useful FLOPs follow the mean steps, padded ones the most steps; weights are read once each.

    ``counted_steps`` is added to the mean, the mutant of an off-by-one.
    """
    need_torch()
    from backends.mixers import draw_inputs, run_mixer

    sizes = {"batch": 2, "seq_len": 16, "width": 4, "max_steps": max_steps}
    halts = draw_inputs("universal_transformer", sizes)
    mean = float(halts["halt"].double().mean()) + counted_steps
    padded, useful = (
        run_mixer("universal_transformer", f, sizes) for f in ("parallel", "compacted")
    )
    same = float((padded.output - useful.output).abs().max()) < 1e-9
    ratio = useful.matrix_flops / padded.matrix_flops
    weights = sum(halts[name].numel() for name in ("wq", "wkv", "wo", "up", "down"))
    return Finding(
        same and bool(np.isclose(ratio, mean / max_steps)) and weights == 12 * sizes["width"] ** 2,
        f"useful over padded FLOPs {ratio:.3f}, mean over most steps {mean / max_steps:.3f}; "
        f"{weights} weights whatever the steps",
        "halted tokens keep their state; only active ones are worked on",
        ("steps drawn evenly from 1 to 5", ON_CPU),
        "cpu",
    )
