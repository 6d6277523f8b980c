"""Do a mixer's forms, executed in torch, give one answer and do the work that is predicted?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from simcore.mixers import mixer_cost
from validation.systems.frame import Executed, have_torch, need_torch

FLOAT64_BYTES = 8
TOLERANCE = 1e-9  # float64 sums of a few hundred terms in another order

# Sizes at which every form is executed; more than one head, chunk and level each.
_TOKENS = {"batch": 2, "seq_len": 16}
_HEADS = {**_TOKENS, "heads": 2, "d_k": 4, "d_v": 6}
_NETWORK = {**_TOKENS, "inputs": 5, "hidden": 4}
SIZES: dict[str, dict[str, int]] = {
    "attention": {**_HEADS, "chunk": 4},
    "sliding_attention": {**_HEADS, "window": 4},
    "aaren": _HEADS,
    "combiner": {**_HEADS, "block": 4},
    "combiner_tree": {**_HEADS, "block": 2},
    "s2_attention": {**_HEADS, "block": 2, "shards": 2},
    "gam": {**_TOKENS, "width": 4, "kernel": 3, "slots": 5},
    "merging": {**_TOKENS, "layers": 3, "merge": 2, "switch": 8, "width": 4},
    "linear_attention": {**_HEADS, "chunk": 4},
    "retnet": {**_HEADS, "chunk": 4},
    "mamba2": {**_HEADS, "chunk": 4},
    "gla": {**_HEADS, "chunk": 4},
    "deltanet": {**_HEADS, "chunk": 4},
    "hydra": {**_HEADS, "chunk": 4},
    "s4": {**_TOKENS, "channels": 3, "d_state": 4},
    "gru": {**_NETWORK, "rounds": 12},
    "diagonal_gru": {**_NETWORK, "rounds": 12},
    "lstm": {**_NETWORK, "heads": 2},
    "min_gru": _NETWORK,
    "min_lstm": _NETWORK,
    "pgn": {**_NETWORK, "window": 4},
    "plstm": {"batch": 2, "side": 4, "width": 3},
}


@dataclass(frozen=True, slots=True)
class Agreement:
    """Executed forms of one mixer: the largest difference of outputs, and what was counted."""

    error: float  # over the largest output
    serial_steps: Mapping[str, int]
    state_bytes: Mapping[str, int]
    flops_agree: bool

    @property
    def same(self) -> bool:
        """Whether all forms give one answer with the predicted matrix products."""
        return self.error < TOLERANCE and self.flops_agree


def execute_forms(name: str, sizes: Mapping[str, int], lag: int = 0) -> Agreement:
    """Execute every form of a mixer on the CPU in float64 and compare.

    ``lag`` shifts all forms but the first by so many tokens (axis of the sequence: the last but
    one), the mutant of an off-by-one. Raises `NotCoveredError` without torch.
    """
    need_torch()
    from backends.mixers import TORCH_MIXERS, run_mixer

    runs = {form: run_mixer(name, form, dict(sizes)) for form in TORCH_MIXERS[name].forms}
    outputs = [run.output for run in runs.values()]
    first, scale = outputs[0], float(outputs[0].abs().max())
    shifted = [out.roll(lag, -2) for out in outputs[1:]]
    error = max((float((out - first).abs().max()) for out in shifted), default=0.0) / scale
    costs = {
        form: mixer_cost(name, form, {**sizes, "element_bytes": FLOAT64_BYTES}) for form in runs
    }
    agree = all(float(costs[f].matrix_flops) == run.matrix_flops for f, run in runs.items())
    return Agreement(
        error,
        {form: run.serial_steps for form, run in runs.items()},
        {form: run.state_bytes for form, run in runs.items()},
        agree,
    )


def agrees(name: str, lag: int = 0) -> tuple[bool, Executed]:
    """Return whether a mixer's executed forms agree at its usual sizes, and where they ran.

    Without torch nothing is executed and nothing disagrees: (True, "no").
    """
    if not have_torch():
        return True, "no"
    return execute_forms(name, SIZES[name], lag).same, "cpu"
