"""A program's actions run one after the other in this process: what ranks must agree with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from backends.data import training_data
from backends.interpreter import Interpreter
from backends.transport import Local
from backends.watchers import Gradients
from simcore.program import Program


@dataclass(frozen=True, slots=True)
class Replayed:
    """The loss of a step, and the gradients that its last updates used, by buffer and layer."""

    loss: float
    gradients: Mapping[str, object]


def run_here(program: Program, seed: int) -> Replayed:
    """Run one step of a program of one rank in float64."""
    cpu = torch.device("cpu")
    runner = Interpreter(
        program, 0, Local(program.mesh, 0), cpu, seed, dtype=torch.float64, watcher=Gradients()
    )
    runner.prepare()
    runner.run_step(training_data(program, 0, seed, cpu))
    assert isinstance(runner.watcher, Gradients)
    loss = torch.stack(runner.results["loss"]).sum() / program.info["updates"]
    return Replayed(float(loss), runner.watcher.found)
