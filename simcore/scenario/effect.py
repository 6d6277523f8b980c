"""Keys of [parallel] that would change nothing: refused, or told of where only a degree is 1."""

from __future__ import annotations

from collections.abc import Callable

from simcore.errors import InputError
from simcore.strategy import ParallelStrategy

# What a generation has not: gradients, optimizer states, microbatches, split sequences.
TRAINING_ALONE = (
    *("microbatch", "schedule", "update_every", "virtual_stages", "backup_workers", "balance"),
    *("sequence_parallel", "grad_codec", "error_feedback", "act_codec"),
    *("recompute", "recompute_modules"),
    *("recompute_layers", "stream_chunks", "swap_fraction", "loss_chunks"),
    *("cp_kind", "cp_layout", "cp_ring", "cp_ulysses", "cp_window", "cp_slices", "task_rows"),
    "ping_pong",
)

# Key -> where it has nothing to act on, and whether that is so.
_IDLE: dict[str, tuple[str, Callable[[ParallelStrategy], bool]]] = {
    "sequence_parallel": ("tp is 1", lambda p: p.tp == 1),
    "zero_stage": ("dp and cp are 1", lambda p: p.dp * p.cp == 1 and p.zero > 0),
    "cp_kind": ("cp is 1", lambda p: p.cp == 1),
    "cp_layout": ("cp is 1", lambda p: p.cp == 1),
    "task_rows": ("cp is 1", lambda p: p.cp == 1),
}


def _given(parallel: ParallelStrategy, key: str) -> bool:
    return bool(getattr(parallel, key) != getattr(ParallelStrategy(), key))


def check_generates(parallel: ParallelStrategy) -> None:
    """Raise `InputError` where the strategy has keys that serve training alone."""
    for key in TRAINING_ALONE:
        if _given(parallel, key):
            raise InputError(f"[parallel].{key} serves training alone: remove it to generate.")
    if parallel.zero_stage:
        raise InputError(
            f"[parallel].zero_stage {parallel.zero_stage} shards what training keeps: remove it to "
            "generate."
        )


def check_effective(parallel: ParallelStrategy) -> None:
    """Raise `InputError` where a key acts on something that another key has not chosen."""
    if parallel.task_rows and parallel.cp_kind != "servers":
        raise InputError(
            f"[parallel].task_rows {parallel.task_rows} needs cp_kind = 'servers', not "
            f"{parallel.cp_kind!r}: leave it out, or change it."
        )
    layout = parallel.split.layout if parallel.split.ring > 1 else "contiguous"
    if parallel.cp > 1 and _given(parallel, "cp_layout") and parallel.cp_layout != layout:
        raise InputError(
            f"[parallel].cp_layout {parallel.cp_layout!r} does not go with cp_kind "
            f"{parallel.cp_kind!r}, whose ranks hold {layout} rows: leave it out, or choose 'ring'."
        )


def idle_keys(parallel: ParallelStrategy) -> tuple[str, ...]:
    """Return a sentence for every key that has no effect because its degree is 1."""
    return tuple(
        f"[parallel].{key} = {getattr(parallel, key)} has no effect where {where}."
        for key, (where, idle) in _IDLE.items()
        if _given(parallel, key) and idle(parallel)
    )
