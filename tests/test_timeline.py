"""Timelines: intervals, how ranks spend a step, Chrome traces; flows on the engine's links."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st
from machines import LLAMA, STRATEGIES, Bus, Constant, Wires, cluster_cost, strategy

from hwmodels.topology import max_min_rates
from simcore.engine import FluidLinks, simulate
from simcore.estimate import estimate
from simcore.lower import lower_training
from simcore.timeline import Span, Timeline, length, timeline, uncovered, union
from simcore.workloads import TrainStep

INTERVALS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 9)).map(
        lambda pair: (float(pair[0]), float(sum(pair)))
    ),
    max_size=12,
)


def covers(intervals: Sequence[tuple[float, float]], cell: int) -> bool:
    return any(a <= cell and cell + 1 <= b for a, b in intervals)


@given(left=INTERVALS, right=INTERVALS)
def test_intervals_against_counting_cells(
    left: list[tuple[float, float]], right: list[tuple[float, float]]
) -> None:
    merged = union(left)
    assert all(a[1] < b[0] for a, b in pairwise(merged))
    assert length(merged) == sum(covers(left, cell) for cell in range(60))
    assert uncovered(merged, union(right)) == sum(
        covers(left, cell) and not covers(right, cell) for cell in range(60)
    )


def test_times_of_a_rank() -> None:
    found = timeline(
        [
            Span(0, "compute", "matmul", 0, 4),
            Span(0, "tp", "all_reduce", 3, 6),
            Span(0, "dp", "all_reduce", 5, 7),
            Span(0, "compute", "add", 9, 10),
        ],
        12,
    )
    times = found.times[0]
    assert (times.compute_s, times.exposed_s, times.idle_s) == (5, 3, 4)
    assert found.bubble_fraction == pytest.approx(4 / 12)
    assert found.exposed_communication_fraction == pytest.approx(3 / 12)


@pytest.mark.parametrize("name", STRATEGIES)
def test_compute_exposed_and_idle_sum_to_the_step(name: str) -> None:
    parallel = strategy(name)
    program = lower_training(LLAMA, parallel, TrainStep(4 * parallel.dp, 128))
    cost = cluster_cost(program)
    for found in (
        estimate(program, cost, cost),
        simulate(program, cost, cost, detail=False),
        simulate(program, cost, cost, detail=True),
        simulate(program, cost, cost, every_rank=True),
    ):
        for times in found.times.values():
            parts = times.compute_s, times.exposed_s, times.idle_s
            assert all(-1e-12 * found.step_s <= part <= found.step_s * (1 + 1e-9) for part in parts)
            assert sum(parts) == pytest.approx(found.step_s, rel=1e-9)
        assert max(span.end_s for span in found.spans) == pytest.approx(found.step_s, rel=1e-9)
        assert all(0 <= span.start_s <= span.end_s for span in found.spans)


@pytest.mark.parametrize("name", ["zero3", "zero1 x tp+sp x pp"])
def test_no_stream_does_two_things_at_once(name: str) -> None:
    parallel = strategy(name)
    program = lower_training(LLAMA, parallel, TrainStep(4 * parallel.dp, 128))
    cost = cluster_cost(program)
    streams: dict[tuple[int, str], list[Span]] = {}
    for span in simulate(program, cost, cost, every_rank=True).spans:
        streams.setdefault((span.rank, span.stream), []).append(span)
    for spans in streams.values():
        spans.sort(key=lambda span: (span.start_s, span.end_s))
        for one, following in pairwise(spans):
            assert one.end_s <= following.start_s + 1e-12


def test_chrome_trace() -> None:
    spans = (
        Span(0, "compute", "matmul", 1e-3, 3e-3, "0F0", 0.0, 8.0),
        Span(1, "tp", "all_reduce", 2e-3, 2.5e-3, "", 64.0),
    )
    found = Timeline(3e-3, spans, {}, {0: [(0.0, 10.0), (1e-3, 30.0)]})
    trace = json.loads(found.to_chrome_text())
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"X", "M", "C"}
    work = [event for event in events if event["ph"] == "X"]
    assert [(e["name"], e["pid"]) for e in work] == [("0F0", 0), ("all_reduce", 1)]
    assert [e["ts"] for e in work] == pytest.approx([1000.0, 2000.0])
    assert [e["dur"] for e in work] == pytest.approx([2000.0, 500.0])
    assert work[0]["args"] == {"op": "matmul", "bytes": 0.0, "flops": 8.0}
    names = {(e["name"], e["pid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names["process_name", 1] == "rank 1"
    assert names["thread_name", 0] == "compute"
    assert [(e["ts"], e["args"]["bytes"]) for e in events if e["ph"] == "C"] == [
        (0, 10),
        (1000, 30),
    ]


def test_trace_of_a_run_names_every_stream() -> None:
    parallel = strategy("zero1 x tp+sp x pp")
    program = lower_training(LLAMA, parallel, TrainStep(4, 128))
    cost = cluster_cost(program)
    events = simulate(program, cost, cost, detail=True).to_chrome()["traceEvents"]
    threads = {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert threads == named
    for event in events:
        if event["ph"] == "X":
            assert math.isfinite(event["ts"])
            assert event["dur"] >= 0


def test_golden_step(golden: Callable[..., None]) -> None:
    """A tiny step on made-up costs: two microbatches through two stages, by op."""
    program = lower_training(LLAMA, strategy("pp"), TrainStep(2, 16))
    cost = Constant({"matmul": 1.0, "attention": 2.0, "attention_backward": 5.0, "adam": 0.5})
    found = simulate(program, cost, Wires(0.25), detail=True)
    values = {
        "step_s": found.step_s,
        "bubble_fraction": found.bubble_fraction,
        "exposed": found.exposed_communication_fraction,
        "spans": len(found.spans),
    }
    for span in found.spans:
        if span.stream != "compute":
            values[f"{span.rank} {span.action} {span.stream} start"] = span.start_s
    golden("two_stages", values)


# -- flows -----------------------------------------------------------------------------------------


class Shared:
    """Flows from even to odd ranks: flow 2 i -> 2 i + 1 crosses the listed links."""

    def __init__(self, paths: Sequence[Sequence[int]], capacities: Sequence[float]) -> None:
        self.paths, self.capacities = paths, capacities

    def path(self, src: int, dst: int) -> Sequence[int]:
        return self.paths[src // 2]

    def latency(self, path: Sequence[int]) -> float:
        return 0.0

    def rates(self, paths: Sequence[Sequence[int]]) -> Sequence[float]:
        return list(max_min_rates(paths, self.capacities))


def finish_times(network: object, flows: Sequence[tuple[float, int, float]]) -> list[float]:
    """Return when each (start, source, bytes) has arrived."""
    env = simpy.Environment()
    links = FluidLinks(env, network)
    found = [math.nan] * len(flows)

    def run(index: int, start: float, src: int, size: float) -> object:
        yield env.timeout(start)
        yield from links.send(src, src + 1, size)
        found[index] = env.now

    for index, flow in enumerate(flows):
        env.process(run(index, *flow))
    env.run()
    return found


def test_two_flows_share_a_link() -> None:
    """10 and 30 bytes at 1 byte/s: half each until 20, then 20 bytes alone."""
    assert finish_times(Bus(), [(0, 0, 10), (0, 2, 30)]) == pytest.approx([20, 40])


def test_a_late_flow_slows_the_first() -> None:
    """40 bytes alone until 10; both at half until the 10 of the second are there at 30."""
    assert finish_times(Bus(), [(0, 0, 40), (10, 2, 10)]) == pytest.approx([50, 30])


def test_latency_comes_before_the_bytes() -> None:
    assert finish_times(Bus(3.0, 2.0), [(1, 0, 10)]) == pytest.approx([9])
    assert finish_times(Bus(3.0, 2.0), [(1, 0, 0)]) == pytest.approx([4])


def test_rates_are_max_min_fair() -> None:
    """Link 0 of 1 byte/s carries flows a and b, link 1 of 5 bytes/s carries b and c.

    a and b get 1/2 each, c the other 9/2; when c's 9 bytes are gone nothing changes for a and b.
    """
    network = Shared([(0,), (0, 1), (1,)], [1.0, 5.0])
    assert finish_times(network, [(0, 0, 10), (0, 2, 20), (0, 4, 9)]) == pytest.approx([20, 30, 2])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 50)), min_size=1, max_size=6))
def test_a_shared_link_is_never_idle_while_bytes_wait(flows: list[tuple[int, int]]) -> None:
    """A link works on one byte after the other whatever the sharing: the last arrival is known."""
    finish = 0.0
    for start, size in sorted(flows):
        finish = max(finish, start) + size
    listed = [(float(start), 2 * i, float(size)) for i, (start, size) in enumerate(flows)]
    found = finish_times(Bus(), listed)
    assert max(found) == pytest.approx(finish)
    assert all(
        end >= start + size - 1e-9 for end, (start, _, size) in zip(found, listed, strict=True)
    )


@pytest.mark.parametrize("detail", [False, True])
def test_a_message_waits_for_both_ends(detail: bool) -> None:
    """The receiver is ready from the start, the message leaves when its buffer is written."""
    program = lower_training(LLAMA, strategy("pp"), TrainStep(1, 16))
    cost = Constant({"matmul": 1.0})
    spans = simulate(program, cost, Wires(0.25), detail=detail).spans
    (sent,) = (span for span in spans if span.stream == "send_f")
    (received,) = (span for span in spans if span.stream == "recv_f")
    forward_s = 2 * 4 * 1.0  # two layers of four products
    assert (sent.start_s, sent.end_s) == pytest.approx((forward_s, forward_s + 0.25))
    assert (received.start_s, received.end_s) == (sent.start_s, sent.end_s)
