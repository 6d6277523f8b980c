"""Swarms: who does what, in how many seconds, and gradients of processes of which one is killed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simcore.errors import InputError
from simcore.swarm import Server, StageWork, SwarmRun, Task, simulate_swarm

WORK = StageWork((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), 100.0)
SERVERS = [Server(stage) for stage in (0, 0, 1, 1, 2, 2)]


def step(servers: list[Server], count: int = 24, **options: float) -> SwarmRun:
    given_options = {"in_flight": 8, "link_bytes_per_s": 1000.0} | options
    return simulate_swarm(WORK, servers, count, **given_options)  # type: ignore[arg-type]


def test_one_microbatch_at_a_time_takes_the_sum_of_its_passes() -> None:
    """Forward, and forward again with backward, on three stages; boundaries of 0.1 s."""
    found = step(SERVERS[::2], 5, in_flight=1)
    assert found.step_s == pytest.approx(5 * (3 * (1 + 3) + 0.1 * (1 + 1 + 2 + 1 + 1)))
    assert found.busy == pytest.approx(5 * 12 / (3 * found.step_s))


@settings(max_examples=30)
@given(
    st.lists(st.floats(1, 60), min_size=3, max_size=3),
    st.floats(0.5, 4),
    st.sampled_from([2.0, 9.0, 1e9]),
    st.integers(0, 99),
)
def test_every_gradient_is_held_once_whoever_leaves(
    leaves: list[float], speed: float, level_s: float, seed: int
) -> None:
    """Work is completed, by servers that are there, and never faster than their speed allows."""
    gone = [Server(stage, speed, leaves_s=t) for stage, t in enumerate(leaves)]
    servers = [*SERVERS, *gone, Server(1, joins_s=5.0)]
    found = step(servers, level_s=level_s, seed=seed)
    assert Counter(ticket.task for ticket in found.summed) == Counter(
        Task("B", stage, m) for stage in range(3) for m in range(24)
    )
    assert all(servers[t.server].leaves_s >= found.step_s for t in found.summed)
    assert 0 < found.busy <= 1
    assert found == step(servers, level_s=level_s, seed=seed)


def test_a_stage_with_few_servers_gets_those_of_others() -> None:
    uneven = [Server(stage) for stage in (0, 0, 0, 1, 2, 2, 2)]
    still, levelled = step(uneven), step(uneven, level_s=4.0)
    assert levelled.moves > 0
    assert levelled.step_s < 0.8 * still.step_s


def test_the_last_server_of_a_stage_is_replaced_or_the_swarm_stops() -> None:
    found = step([Server(0), Server(0), Server(1, leaves_s=7.0), Server(2)])
    assert found.moves == 1
    assert found.repeated > 0
    with pytest.raises(InputError, match="stage 1 of the swarm has no server left"):
        step([Server(0), Server(1, leaves_s=7.0), Server(2)])
    with pytest.raises(InputError, match="server 0 of the swarm"):
        step([Server(3)])


@pytest.mark.distributed
def test_processes_sum_the_dense_gradients_though_one_is_killed() -> None:
    pytest.importorskip("torch")
    from backends.swarm import SwarmJob, dense_gradients, run_swarm

    job = SwarmJob(3, 16, 8, 12, killed=1)
    servers = [Server(0), Server(1, 2.0), Server(2), Server(1)]
    found, wanted = run_swarm(job, servers, 4), dense_gradients(job)
    assert float((found.gradients - wanted).norm() / wanted.norm()) < 1e-12
    assert found.repeated > 0
    boundary = StageWork((0.0,) * 3, (0.0,) * 3, 8 * 16 * 8.0)
    assert found.sent == sum(boundary.inbound_bytes(task) for task in found.given)
