"""Comparisons without a real run: the simulator plays the machine, 10 % slower than predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from backends.launch import GenerationJob, Job, RankResult, RunResult
from hwmodels.catalogue import load_cluster
from hwmodels.collectives import CollectiveFit
from hwmodels.cost import ClusterCost
from hwmodels.profile import Profile
from simcore.engine import simulate
from simcore.program import Program
from simcore.timeline import Timeline
from validation.compare import Comparison, joined, validate_grid

SLOWER = 1.1
PROFILE = Profile(
    "made-up",
    kernels={},
    collectives=CollectiveFit(
        coefficients={
            (op, 2): (2e-4, 1e-9) for op in ("all_reduce", "all_gather", "reduce_scatter")
        }
    ),
    issue_s=1e-5,
    blocking=0.5,
    messages=(1e-4, 5e-10),
    peaks={"flops_per_s": 8e10, "bytes_per_s": 2e10},
    provenance={"date": "2026-01-01", "measurements": 3},
)
GRID = """
title = "Made-up"
[defaults.cluster]
gpu = "this-cpu"
gpus_per_node = 2
[defaults.run]
repeats = 4
warmup = 1
[models.tiny]
layers = 2
hidden = 64
heads = 4
ffn = 128
vocab = 128
weights_dtype = "fp32"
kv_dtype = "fp32"
compute_dtype = "fp32"
[[case]]
name = "tiny dp"
model = "tiny"
parallel = { dp_replicate = 2, microbatch = 1 }
workload = { kind = "train", global_batch = 4, seq_len = 32 }
[[case]]
name = "tiny tp <b>"
model = "tiny"
parallel = { tp = 2, microbatch = 2 }
workload = { kind = "train", global_batch = 4, seq_len = 32 }
[[case]]
name = "tiny pp"
model = "tiny"
parallel = { pp = 2, schedule = "1f1b" }
workload = { kind = "train", global_batch = 4, seq_len = 32 }
[[case]]
name = "tiny generation"
model = "tiny"
parallel = { tp = 2 }
workload = { kind = "generate", batch = 2, input_tokens = 8, output_tokens = 3 }
"""


def programs_of(work: Program | GenerationJob) -> Sequence[Program]:
    if isinstance(work, Program):
        return [work]
    return [work.prefill] + [work.decode] * (work.workload.output_tokens - 1)


def stretched(line: Timeline, factor: float) -> Timeline:
    spans = tuple(
        s._replace(start_s=s.start_s * factor, end_s=s.end_s * factor) for s in line.spans
    )
    return Timeline(line.step_s * factor, spans, line.times)


def play(job: Job) -> RunResult:
    """Return what a machine would measure that is slower than the profile says."""
    work = job.work
    programs = programs_of(work)
    cost = ClusterCost(load_cluster("this-cpu"), programs[0].mesh, PROFILE)
    line = stretched(
        joined([simulate(p, cost, cost, detail=True, every_rank=True) for p in programs]), SLOWER
    )
    seconds = (line.step_s,) * job.options.repeats
    return RunResult(
        programs[0].mesh,
        tuple(
            RankResult(
                rank,
                seconds,
                {},
                {"device": "simulated"},
                spans=tuple(span for span in line.spans if span.rank == rank),
            )
            for rank in range(job.processes)
        ),
    )


def fake_run_many(
    jobs: Sequence[Job], progress: Callable[[int], None] | None = None
) -> list[RunResult]:
    """Stand in for the launcher."""
    for done in range(len(jobs)):
        if progress:
            progress(done + 1)
    return [play(job) for job in jobs]


def write_grid(folder: Path, text: str = GRID) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.setattr("validation.compare.run_many", fake_run_many)
    return validate_grid(write_grid(tmp_path), PROFILE)
