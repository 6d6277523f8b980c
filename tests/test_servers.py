"""Attention in tasks: every pair served once, evenly; volumes, times, refusals."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import LLAMA, Constant, Wires, cluster_cost

from simcore.accounting import block_totals, step_totals
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.estimate import estimate
from simcore.lower import lower_training
from simcore.metrics import executed_flops
from simcore.program import Program
from simcore.sequence import Run
from simcore.servers import Task, assigned, shipping, tasks_of
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep


def lowered(length: int, *documents: int, **parallel: object) -> Program:
    strategy = ParallelStrategy(cp_kind="servers", **parallel)  # type: ignore[arg-type]
    return lower_training(LLAMA, strategy, TrainStep(2, length, documents=documents))


@st.composite
def packings(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """Draw documents, ranks, and the rows of a rank."""
    ranks, rows = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    cuts = draw(st.sets(st.integers(1, max(1, ranks * rows - 1)), max_size=6))
    ends = [0, *sorted(cut for cut in cuts if cut < ranks * rows), ranks * rows]
    return tuple(b - a for a, b in itertools.pairwise(ends)), ranks, rows


def held(runs: list[list[list[Run]]], server: int, rows: int) -> list[tuple[int, int]]:
    """Return (sequence, position) of what a server is sent, in its order."""
    return [
        (row // rows, source * rows + row % rows)
        for source, sent in enumerate(runs)
        for first, end in sent[server]
        for row in range(first, end)
    ]


@given(packings(), st.integers(1, 2), st.integers(1, 5))
def test_every_query_is_served_once_with_the_keys_that_it_sees(
    packing: tuple[tuple[int, ...], int, int], batch: int, block: int
) -> None:
    documents, ranks, rows = packing
    plan = shipping(documents, ranks * rows, batch, ranks, block)
    starts = np.repeat(np.cumsum((0, *documents[:-1])), documents)
    served = Counter[tuple[int, int]]()
    for server, tasks in enumerate(plan.served):
        queries, keys = (held(runs, server, rows) for runs in (plan.queries, plan.keys))
        for q0, q1, runs in tasks:
            seen = [keys[row] for first, end in runs for row in range(first, end)]
            mine = queries[q0:q1]
            served.update(mine)
            sequence, last = mine[-1]
            assert seen == [(sequence, p) for p in range(starts[last], last + 1)]
            assert seen[-len(mine) :] == mine
    every = itertools.product(range(batch), range(ranks * rows))
    assert served == dict.fromkeys(every, 1)


@given(packings(), st.integers(1, 4))
def test_the_busiest_server_has_at_most_one_task_more(
    packing: tuple[tuple[int, ...], int, int], block: int
) -> None:
    documents, ranks, rows = packing
    tasks = tasks_of(documents, ranks * rows, 1, rows, block)
    homes = [task.first // rows for task in tasks]
    loads, at_home = np.zeros(ranks), np.zeros(ranks)
    on: dict[int, list[Task]] = {rank: [] for rank in range(ranks)}
    for task, server in zip(tasks, assigned(tasks, homes, ranks), strict=True):
        loads[server] += task.pairs
        at_home[task.first // rows] += task.pairs
        on[server].append(task)
    assert loads.sum() == sum(n * (n + 1) / 2 for n in documents)
    assert loads.max() <= at_home.max()
    busiest = int(loads.argmax())
    assert np.ptp(loads) <= min(task.pairs for task in on[busiest])


@settings(max_examples=20)
@given(packings())
def test_flops_are_those_of_tasks(packing: tuple[tuple[int, ...], int, int]) -> None:
    """Whatever serves them: the same tasks on one rank multiply as much."""
    documents, ranks, rows = packing
    apart = lowered(ranks * rows, *documents, cp=ranks, task_rows=1)
    alone = lowered(ranks * rows, *documents, task_rows=1)
    assert executed_flops(apart) == pytest.approx(executed_flops(alone), rel=1e-12)


def test_what_is_shipped_is_what_tasks_need() -> None:
    """Two documents that fill their ranks leave nothing to even out: each rank serves itself."""
    for documents, share in (((128, 128), 0.0), ((192, 64), 0.1)):
        program = lowered(256, *documents, cp=2)
        plan = shipping(documents, 256, 1, 2, 16)
        for runs, least in ((plan.queries, share), (plan.keys, share)):
            counts = np.array(plan.counts(runs))
            assert (1 - counts.trace() / counts.sum() > least) == (share > 0)
        wide = LLAMA.heads * LLAMA.head_dim, 2 * LLAMA.kv_heads * LLAMA.head_dim
        for rank in range(2):
            out = sum(plan.counts(plan.queries)[rank])
            home = sum(row[rank] for row in plan.counts(plan.queries))
            keys = sum(plan.counts(plan.keys)[rank])
            found = block_totals(program, rank)["layer.F"].payload_bytes["all_to_all", "cp"]
            assert found == 2 * ((out + home) * wide[0] + keys * wide[1])


def test_served_attention_outruns_the_busiest_rank() -> None:
    """One long document beside short ones: its rank is relieved, and no rank does more."""
    documents = (16384, *(1024,) * 48)
    busy = {}
    for name, block in (("tasks", 0), ("at home", 16384)):
        program = lowered(65536, *documents, cp=4, task_rows=block)
        cost, wires = cluster_cost(program), Wires(2e-6, 20e9)
        line = simulate(program, cost, wires, every_rank=True)
        ends = [
            sum(s.end_s - s.start_s for s in line.spans if s.rank == rank and "tasks" in s.name)
            for rank in range(4)
        ]
        busy[name] = max(ends) / (sum(ends) / 4)
        whole, detail = estimate(program, cost, wires), simulate(program, cost, wires, detail=True)
        assert whole.step_s == pytest.approx(detail.step_s, rel=1e-9)
    assert busy["tasks"] < 1.1
    assert busy["at home"] > 2


@pytest.mark.parametrize(("products_s", "whole", "left"), [(4.0, 5, 0), (0.0, 6, 3)])
def test_halves_in_turn_hide_transfers(products_s: float, whole: int, left: int) -> None:
    """A whole microbatch waits for three transfers each way; halves, at most for those at the ends.

    Of those in backward one has a product of weight gradients beside it in any case. A half's
    attention covers the other's transfers between; the first to leave and the last to come home
    have the products beside attention, or nothing where these take no time.
    """
    seconds = {"attention_tasks": 10.0, "attention_tasks_backward": 20.0, "matmul": products_s}
    waited, work = {}, {}
    for halves in (1, 2):
        program = lowered(64, cp=2, microbatch=2, ping_pong=halves == 2)
        took = []
        for transfer in (1.0, 0.0):
            each = {**seconds, "all_to_all": transfer}
            cost = Constant({kind: s / halves for kind, s in each.items()})
            took.append(estimate(program, cost, Wires()).step_s)
            simulated = simulate(program, cost, Wires(), detail=True).step_s
            assert simulated == pytest.approx(took[-1], rel=1e-12)
        waited[halves] = took[0] - took[1]
        work[halves] = executed_flops(program), step_totals(program, 0).payload_bytes
    assert waited[1] == pytest.approx(whole * LLAMA.layers)
    assert waited[2] == pytest.approx(left * LLAMA.layers)
    assert work[1] == work[2]


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"cp": 2}, ("ping_pong", "even number")),
        ({"microbatch": 2}, ("ping_pong", "cp > 1")),
        ({"cp": 2, "microbatch": 2, "tp": 2, "sequence_parallel": True}, ("sequence_parallel",)),
        ({"cp": 2, "microbatch": 2, "pp": 2, "schedule": "zb_h1"}, ("ping_pong", "'zb_h1'")),
    ],
)
def test_halves_that_cannot_take_turns_are_refused(
    parallel: dict[str, object], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        lowered(64, ping_pong=True, **parallel)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("documents", "parallel", "words"),
    [
        ((60, 60), {"cp": 2}, ("add up to 120", "128")),
        ((64, 64), {"cp": 2, "cp_kind": "ring"}, ("cp_kind = 'servers'",)),
        ((64, 64), {"stream_chunks": 2}, ("stream_chunks",)),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    documents: tuple[int, ...], parallel: dict[str, object], words: tuple[str, ...]
) -> None:
    strategy = ParallelStrategy(**{"cp_kind": "servers", **parallel})  # type: ignore[arg-type]
    with pytest.raises(InputError) as caught:
        lower_training(LLAMA, strategy, TrainStep(2, 128, documents=documents))
    assert all(word in str(caught.value) for word in words)
