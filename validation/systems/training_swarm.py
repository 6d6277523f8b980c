"""The check of stages served by machines that come and go, over slow links."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from simcore.codecs import coded_bytes
from simcore.lower import lower_training
from simcore.ops import work
from simcore.program import Program
from simcore.strategy import ParallelStrategy
from simcore.swarm import Server, StageWork, simulate_swarm, stage_work
from simcore.workloads import TrainStep
from validation.systems.frame import Finding, check, need_torch
from validation.systems.training_machine import gpt

STAGES, SEED = 3, 2
WIDTHS = (768, 1536, 3072, 6144)
SLOW_BYTES_PER_S = 25e6  # 200 Mb/s
CLOSE = 1e-9


def stages_of(width: int) -> Program:
    """Return a step of three stages of three layers each, over boundaries in 8 bits."""
    model = replace(
        gpt("wide", 3 * STAGES, width, width // 64), compute_dtype="fp16", weights_dtype="fp16"
    )
    return lower_training(model, ParallelStrategy(pp=STAGES, act_codec="int8"), TrainStep(1, 512))


def middle_flops(program: Program) -> float:
    """Return the matrix-product FLOPs of a microbatch on the second stage, all of it layers."""
    bodies = {action.body for action in program.order[1]}
    calls = (call for body in bodies for call in program.bodies[body])
    return sum(float(work(op).flops) for call in calls for op in program.blocks[call.block].ops)


@cache
def survivors() -> tuple[float, int, bool]:
    """Kill one of four processes; return the gradients' error, repeated passes, bytes as told."""
    from backends.swarm import SwarmJob, dense_gradients, run_swarm

    job = SwarmJob(STAGES, 16, 8, 12, codec="int8", seed=SEED, killed=1)
    found = run_swarm(job, [Server(0), Server(1, 2.0), Server(2), Server(1)], 4)
    wanted = dense_gradients(job)
    error = float((found.gradients - wanted).norm() / wanted.norm())
    idle = (0.0,) * STAGES
    boundary = StageWork(idle, idle, float(coded_bytes(job.rows * job.width)))
    told = sum(boundary.inbound_bytes(task) for task in found.given)
    return error, found.repeated, found.sent == told


@check("G1.6", mutant={"boundary_power": 2})
def swarm(*, boundary_power: int = 1) -> Finding:
    """Stage compute over transfer as the width grows, work done under churn, and on processes.

    ``boundary_power``: of the width, in the bytes of a boundary.
    """
    need_torch()
    cluster = make_cluster("t4", 1, STAGES)
    ratios, busy, done = [], [], True
    for width in WIDTHS:
        program = stages_of(width)
        found = stage_work(program, ClusterCost(cluster, program.mesh))
        factor = (width / WIDTHS[0]) ** (boundary_power - 1)
        found = replace(found, boundary_bytes=factor * found.boundary_bytes)
        ratios.append(middle_flops(program) / found.boundary_bytes)
        options = {"in_flight": 12, "link_bytes_per_s": SLOW_BYTES_PER_S, "seed": SEED}
        servers = [Server(s % STAGES) for s in range(9)]
        calm = simulate_swarm(found, servers, 48, **options)  # type: ignore[arg-type]
        servers[4] = replace(servers[4], leaves_s=calm.step_s / 3)
        hit = simulate_swarm(found, servers, 48, **options)  # type: ignore[arg-type]
        done &= hit.repeated > 0 and len(hit.summed) == 48 * STAGES
        busy.append(hit.busy)
    slopes = [
        (after - before) / (wider - width)
        for (before, after), (width, wider) in zip(
            itertools.pairwise(ratios), itertools.pairwise(WIDTHS), strict=True
        )
    ]
    linear = slopes[0] > 0 and all(math.isclose(s, slopes[0], rel_tol=CLOSE) for s in slopes)
    rising = all(a < b for a, b in itertools.pairwise(busy))
    error, repeated, told = survivors()
    return Finding(
        linear and rising and done and error < CLOSE and repeated > 0 and told,
        f"{', '.join(f'{r / 1e3:.0f}' for r in ratios)} kFLOP per boundary byte, busy "
        f"{', '.join(f'{b:.0%}' for b in busy)} at widths 768 to 6144, one of nine servers "
        f"leaving; on four processes of which one is killed, {repeated} passes are repeated and "
        f"gradients {error:.1e} off the dense network's",
        "work grows with the width's square, a boundary with the width"
        if linear
        else "boundaries that grow as fast as the work gain nothing",
        (
            "T4 servers with 25 MB/s each, 8-bit boundaries, three layers per stage, 512 tokens",
            "executed in float64: trainer and servers are processes",
        ),
        "cpu",
    )
