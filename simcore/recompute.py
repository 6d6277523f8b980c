"""Recomputation: which results of a layer backward computes again, and the ops that do so.

A policy names ops of the forward pass. Their results die with their last reader there, and backward
starts by running again those of them that it needs; what these read is kept. ``full`` runs the
whole layer again and keeps its input alone (Chen et al. 2016); ``selective`` runs some modules
again, by default attention's core, whose inputs are kept (Korthikanti et al. 2022, section 5);
``keep_attention`` runs all but attention again, whose output and logarithms of sums are kept:
its gradients follow from these (Dao 2023, algorithm 2), so that neither its products nor the
exchanges inside it run twice (LightSeq, Li et al. 2023, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simcore.errors import InputError, unknown
from simcore.ops import Op
from simcore.strategy import ParallelStrategy

POLICIES = ("none", "selective", "keep_attention", "full")
# Kinds of op that a module consists of. Around a ring, attention's blocks travel again.
MODULES: dict[str, frozenset[str]] = {
    "attention": frozenset(
        {
            *("attention", "attention_block", "attention_merge", "attention_tasks"),
            *("take_columns", "ring_shift"),
            *("linear_attention", "linear_carry"),  # the state that came is kept
        }
    ),
    "norms": frozenset({"rmsnorm", "layernorm"}),
    "activation": frozenset({"swiglu", "gelu", "relu"}),
    "gathers": frozenset({"all_gather"}),  # inputs of products under sequence parallelism
}
DEFAULT_MODULES = ("attention",)
ENDS_OF_ATTENTION = frozenset(
    {"attention", "attention_merge", "attention_tasks"}
)  # what they write is kept


def check_recompute(parallel: ParallelStrategy, layers: Sequence[int]) -> None:
    """Raise `InputError` where the policy is unknown or does not fit ``layers`` per stage."""
    policy, counts = parallel.recompute, parallel.recompute_layers
    if policy not in POLICIES:
        raise unknown("recompute", policy, POLICIES)
    for name in parallel.recompute_modules:
        if name not in MODULES:
            raise unknown("module to recompute", name, MODULES)
    if parallel.recompute_modules and policy != "selective":
        raise InputError(
            f"[parallel].recompute_modules goes with recompute = 'selective', not {policy!r}: "
            "change one of them."
        )
    if counts and policy == "none":
        raise InputError(
            "[parallel].recompute_layers needs a policy: set recompute = 'full' or 'selective'."
        )
    if len(counts) > 1 and len(counts) != len(layers):
        raise InputError(
            f"[parallel].recompute_layers lists {len(counts)} stages but there are {len(layers)}: "
            "give one number, or one per stage."
        )
    for stage, (count, present) in enumerate(zip(counts, layers, strict=False)):
        if len(counts) > 1 and count > present:
            raise InputError(
                f"[parallel].recompute_layers has {count} for stage {stage}, which holds {present} "
                "layers: lower it."
            )


def recomputed_layers(parallel: ParallelStrategy, stage: int, layers: Sequence[int]) -> set[int]:
    """Return which of a stage's ``layers`` recompute: all, or the first ones of them."""
    if parallel.recompute == "none":
        return set()
    counts = parallel.recompute_layers
    if not counts:
        return set(layers)
    return set(layers[: counts[stage % len(counts)]])  # a second copy has the first one's numbers


def recompute_ops(
    parallel: ParallelStrategy, forward: Sequence[Op], backward: Iterable[Op]
) -> tuple[Op, ...]:
    """Return the ops of a layer's forward pass that its backward begins with."""
    if parallel.recompute == "none":
        return ()
    if parallel.recompute == "full":
        return tuple(forward)
    backward = tuple(backward)
    if parallel.recompute == "keep_attention":
        wanted = given_to(backward)
        ends = [op for op in forward if op.kind in ENDS_OF_ATTENTION]
        kept = {name for op in ends for name in op.writes if name in wanted}
        results = {name for op in forward for name in op.writes if name.endswith("+")}
        return needed(forward, (wanted | results) - kept, kept)
    wanted = {name for op in backward for name in op.reads}
    modules = parallel.recompute_modules or DEFAULT_MODULES
    kinds = frozenset().union(*(MODULES[name] for name in modules))
    return needed([op for op in forward if op.kind in kinds], wanted)


def given_to(ops: Iterable[Op]) -> set[str]:
    """Return the buffers that ``ops`` read before they write them."""
    found: set[str] = set()
    written: set[str] = set()
    for op in ops:
        found.update(name for name in op.reads if name not in written)
        written.update(op.writes)
    return found


def needed(ops: Sequence[Op], wanted: Iterable[str], kept: Iterable[str] = ()) -> tuple[Op, ...]:
    """Return those of ``ops``, in order, from which the ``wanted`` buffers follow.

    ``kept`` ones are there already.
    """
    open_names, found = set(wanted), []
    for op in reversed(ops):
        if not open_names.isdisjoint(op.writes):
            open_names.update(name for name in op.reads if name not in kept)
            found.append(op)
    return tuple(reversed(found))
