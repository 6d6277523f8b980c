"""The result of any run: spans on the streams of ranks, and what they say."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from simcore.ops import COMPUTE

Intervals = list[tuple[float, float]]


class Span(NamedTuple):
    """One piece of work: seconds since the start of the step."""

    rank: int
    stream: str
    name: str
    start_s: float
    end_s: float
    action: str = ""
    size_bytes: float = 0.0
    flops: float = 0.0


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """Return sorted disjoint intervals that cover the same points."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Intervals) -> float:
    """Return the total length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def uncovered(intervals: Intervals, cover: Intervals) -> float:
    """Return the length of ``intervals`` outside ``cover``; both disjoint and sorted."""
    return length(intervals) - _overlap(intervals, cover)


def _overlap(left: Intervals, right: Intervals) -> float:
    total, j = 0.0, 0
    for start, end in left:
        while j < len(right) and right[j][1] <= start:
            j += 1
        k = j
        while k < len(right) and right[k][0] < end:
            total += min(end, right[k][1]) - max(start, right[k][0])
            k += 1
    return total


@dataclass(frozen=True, slots=True)
class RankTimes:
    """How one rank spent the step, in seconds: the three sum to the step."""

    compute_s: float
    exposed_s: float  # communication while nothing computes
    idle_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans of a step and how long it took. ``ranks`` lists the ranks that were followed."""

    step_s: float
    spans: tuple[Span, ...]
    times: dict[int, RankTimes]
    memory: dict[int, list[tuple[float, float]]] = field(default_factory=dict)  # (s, bytes)

    @property
    def bubble_fraction(self) -> float:
        """Time without compute or communication over the step, mean over ranks."""
        return _mean(t.idle_s for t in self.times.values()) / self.step_s if self.step_s else 0.0

    @property
    def exposed_communication_fraction(self) -> float:
        """Communication that no compute hides over the step, mean over ranks."""
        return _mean(t.exposed_s for t in self.times.values()) / self.step_s if self.step_s else 0.0

    def to_chrome(self) -> dict[str, Any]:
        """Return a trace in Chrome's JSON format, which ui.perfetto.dev opens."""
        streams: dict[tuple[int, str], int] = {}
        events: list[dict[str, Any]] = []
        for span in self.spans:
            thread = streams.setdefault((span.rank, span.stream), len(streams))
            events.append(
                {
                    "name": span.action or span.name,
                    "cat": span.stream,
                    "ph": "X",
                    "ts": span.start_s * 1e6,
                    "dur": (span.end_s - span.start_s) * 1e6,
                    "pid": span.rank,
                    "tid": thread,
                    "args": {"op": span.name, "bytes": span.size_bytes, "flops": span.flops},
                }
            )
        for (rank, stream), thread in streams.items():
            events.append(
                {
                    "name": "thread_name",
                    "ph": "M",
                    "pid": rank,
                    "tid": thread,
                    "args": {"name": stream},
                }
            )
        events += [
            {
                "name": "process_name",
                "ph": "M",
                "pid": rank,
                "tid": 0,
                "args": {"name": f"rank {rank}"},
            }
            for rank in {rank for rank, _ in streams}
        ]
        for rank, levels in self.memory.items():
            events += [
                {
                    "name": "memory",
                    "ph": "C",
                    "ts": s * 1e6,
                    "pid": rank,
                    "tid": 0,
                    "args": {"bytes": held},
                }
                for s, held in levels
            ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def to_chrome_text(self) -> str:
        """Return the trace as text."""
        return json.dumps(self.to_chrome(), separators=(",", ":"))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def rank_times(spans: Iterable[Span], step_s: float) -> dict[int, RankTimes]:
    """Return how every rank spent the step, from op-level spans."""
    compute: dict[int, Intervals] = defaultdict(list)
    other: dict[int, Intervals] = defaultdict(list)
    for span in spans:
        (compute if span.stream == COMPUTE else other)[span.rank].append((span.start_s, span.end_s))
    found = {}
    for rank in sorted({*compute, *other}):
        busy, talk = union(compute[rank]), union(other[rank])
        exposed = uncovered(talk, busy)
        computing = length(busy)
        found[rank] = RankTimes(computing, exposed, max(0.0, step_s - computing - exposed))
    return found


def timeline(spans: Iterable[Span], step_s: float) -> Timeline:
    """Return the timeline of op-level spans."""
    listed = tuple(spans)
    return Timeline(step_s, listed, rank_times(listed, step_s))


def met(line: Timeline) -> Timeline:
    """Return a timeline whose communication begins when every rank has come to it.

    A rank records when it posted a message or a collective; as in the simulator, waiting for the
    others is idle time. A message ends when its receiver has it. Only where all followed ranks
    share every communication, as two do.
    """
    spans = list(line.spans)
    if len({span.rank for span in spans}) != 2:
        return line
    for places in shared_communication(spans):
        start = max(spans[place].start_s for place in places)
        ends = [spans[p].end_s for p in places if not spans[p].stream.startswith("send_")]
        for place in places:
            end = min([spans[place].end_s, *ends])
            spans[place] = spans[place]._replace(start_s=min(start, end), end_s=end)
    return timeline(spans, line.step_s)


def shared_communication(spans: Sequence[Span]) -> list[list[int]]:
    """Return the places of the spans that are one communication, seen from its two ranks."""
    places: dict[tuple[str, int], list[int]] = {}
    counts: Counter[tuple[int, str]] = Counter()
    for place, span in enumerate(spans):
        if span.stream != COMPUTE:
            channel = span.stream.removeprefix("send_").removeprefix("recv_")
            places.setdefault((channel, counts[span.rank, channel]), []).append(place)
            counts[span.rank, channel] += 1
    return [same for same in places.values() if len(same) == 2]
