"""Published systems: all rows, and the checks that hold predictions against published figures."""

from __future__ import annotations

from importlib import import_module

from validation.systems.frame import (
    CHECKS,
    Check,
    Finding,
    NotCoveredError,
    Row,
    Verdict,
    check,
    groups,
    judge,
    rows,
    select,
)

# Modules whose checks register when imported; a new module of checks is one name here.
MODULES = (
    "linear_operators",
    "attention_operators",
    "recurrent_operators",
    "closed_forms",
    "training_closed_forms",
    "training_parallel",
    "training_exchange",
    "training_elastic",
    "training_swarm",
    "training_experts",
    "training_runs",
    "training_pipelines",
    "training_meshes",
    "training_sequences",
    "training_states",
    "training_lengths",
    "training_balance",
    "training_activations",
)
for _module in MODULES:
    import_module(f"validation.systems.{_module}")

__all__ = [
    "CHECKS",
    "MODULES",
    "Check",
    "Finding",
    "NotCoveredError",
    "Row",
    "Verdict",
    "check",
    "groups",
    "judge",
    "rows",
    "select",
]
