"""Training steps of recommendation models: lowered for a scenario, predicted and measured."""

from __future__ import annotations

from meshwise.setting import Setting
from simcore.metrics import Metrics, recommendation_metrics
from simcore.program import Program
from simcore.recommendation import lower_recommender
from simcore.scenario import Scenario
from simcore.timeline import Timeline
from simcore.workloads import RecommendStep


def lowered(scenario: Scenario, work: RecommendStep, setting: Setting) -> Program:
    """Return the program. Raises `InputError` where it cannot be shared out over the cluster."""
    return lower_recommender(scenario.recommender(), setting.cluster.world, work.global_batch)


def metrics_of(
    scenario: Scenario, work: RecommendStep, program: Program, setting: Setting, found: Timeline
) -> Metrics:
    """Return the metrics of a step, whichever machine gave the timeline."""
    return recommendation_metrics(
        work.global_batch,
        program,
        found,
        chip_peak_flops_per_s=setting.peak_flops_per_s(scenario.recommender().dtype),
        memory_bytes=setting.memory_bytes,
        reserve_bytes=setting.reserve_bytes,
    )


def notes(program: Program) -> tuple[str, ...]:
    """Return what the prediction of a step rests on."""
    return (
        f"tables and samples are dealt out evenly over {program.world} ranks, which all hold the "
        "dense networks; every row of a table is as likely as any other.",
        "all ranks do the same and one of them is followed.",
    )
