"""Pipeline schedules played with unit costs, from their definitions; no cost model, no program.

A microbatch passes ``stages`` virtual stages; ``Home`` says which rank holds each for it. A
rank's forward work on one microbatch takes 1 and its backward 2, divided over its chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Task = tuple[int, str, int]  # (virtual stage, "F" or "B", microbatch)
Home = Callable[[int, int], int]  # (virtual stage, microbatch) -> rank
Orders = list[list[Task]]


@dataclass(frozen=True, slots=True)
class Shape:
    """``ranks`` x ``chunks`` virtual stages (chunks per rank and microbatch), and unit times."""

    ranks: int
    microbatches: int
    chunks: int = 1
    forward: float = 1.0
    backward: float = 2.0
    hop: float = 0.0  # of one message, while both ranks may compute

    @property
    def stages(self) -> int:
        """Virtual stages."""
        return self.ranks * self.chunks

    def seconds(self, kind: str) -> float:
        """Return the time of one chunk."""
        return (self.forward if kind == "F" else self.backward) / self.chunks

    @property
    def ideal(self) -> float:
        """Busy time of every rank."""
        return self.microbatches * (self.forward + self.backward)


@dataclass(slots=True)
class Played:
    """Makespan, bubble over ideal time, starts, and peak activations per rank.

    Activations count in whole rank-microbatches: one chunk is 1 / chunks.
    """

    makespan: float
    bubble: float
    starts: list[tuple[float, Task]]  # by time
    peaks: list[float]

    @property
    def tasks(self) -> list[Task]:
        """The tasks by start."""
        return [task for _, task in self.starts]


def straight(shape: Shape) -> Home:
    """Stage s on rank s mod p: plain and interleaved pipelines (Narayanan et al. 2021)."""
    return lambda s, m: s % shape.ranks


def wave(shape: Shape) -> Home:
    """Down and back over the ranks, again and again (Hanayo, Liu et al. 2023)."""

    def home(s: int, m: int) -> int:
        turn, at = divmod(s, shape.ranks)
        return shape.ranks - 1 - at if turn % 2 else at

    return home


def both_ways(shape: Shape, one: Home) -> Home:
    """Even microbatches as ``one``, odd ones mirrored, on a second replica of the weights."""
    return lambda s, m: shape.ranks - 1 - one(s, m) if m % 2 else one(s, m)


def looped(shape: Shape) -> Orders:
    """Breadth-first: all microbatches pass a chunk before the next (Lamy-Poirier 2023)."""
    p, v, m = shape.ranks, shape.chunks, range(shape.microbatches)
    return [
        [(c * p + r, "F", i) for c in range(v) for i in m]
        + [(c * p + r, "B", i) for c in reversed(range(v)) for i in m]
        for r in range(p)
    ]


def interleaved(shape: Shape) -> Orders:
    """1F1B over ``chunks`` chunks per rank, microbatches in groups of p (Narayanan et al. 2021)."""
    p, v = shape.ranks, shape.chunks
    total, orders = shape.microbatches * v, []

    def task(k: int, r: int, kind: str) -> Task:
        chunk = k % (p * v) // p
        chunk = chunk if kind == "F" else v - 1 - chunk
        return (chunk * p + r, kind, k // (p * v) * p + k % p)

    for r in range(p):
        warm = p - r - 1 if v == 1 else min((p - r - 1) * 2 + (v - 1) * p, total)
        warm = min(warm, total)
        order = [task(k, r, "F") for k in range(warm)]
        for k in range(total - warm):
            order += [task(warm + k, r, "F"), task(k, r, "B")]
        order += [task(k, r, "B") for k in range(total - warm, total)]
        orders.append(order)
    return orders


@dataclass(slots=True)
class _Board:
    """Which tasks are done, when, and what follows."""

    shape: Shape
    home: Home
    done: dict[Task, float] = field(default_factory=dict)

    def before(self, task: Task) -> tuple[Task, bool] | None:
        """Return what the task waits for, and whether another rank did it."""
        s, kind, m = task
        if kind == "F":
            if s == 0:
                return None
            other = (s - 1, "F", m)
        else:
            other = (s, "F", m) if s == self.shape.stages - 1 else (s + 1, "B", m)
        return other, self.home(s, m) != self.home(other[0], m)

    def ready(self, task: Task) -> float | None:
        """Return when the task's input is there; None while it is not known."""
        needs = self.before(task)
        if needs is None:
            return 0.0
        ended = self.done.get(needs[0])
        return None if ended is None else ended + self.shape.hop * needs[1]


def timed(shape: Shape, orders: Orders, home: Home) -> Played:
    """Play fixed orders. Raises RuntimeError where they deadlock."""
    board, at = _Board(shape, home), [0] * shape.ranks
    free, starts = [0.0] * shape.ranks, list[tuple[float, Task]]()
    while any(at[r] < len(order) for r, order in enumerate(orders)):
        moved = False
        for r, order in enumerate(orders):
            while at[r] < len(order):
                ready = board.ready(order[at[r]])
                if ready is None:
                    break
                start = max(free[r], ready)
                free[r] = board.done[order[at[r]]] = start + shape.seconds(order[at[r]][1])
                starts.append((start, order[at[r]]))
                at[r] += 1
                moved = True
        if not moved:
            raise RuntimeError(f"the order deadlocks at {at}")
    return _summary(shape, starts, max(free), home)


def greedy(shape: Shape, home: Home, in_flight: int) -> Played:
    """Play whatever is ready: backward first, then the deepest forward.

    At most ``in_flight`` microbatches are between their first forward and their last backward.
    """
    board, free = _Board(shape, home), [0.0] * shape.ranks
    starts, flying, entered = list[tuple[float, Task]](), 0, 0
    waiting: list[Task] = []
    left = list(range(shape.microbatches))
    ends: list[float] = []
    while len(board.done) < 2 * shape.stages * shape.microbatches:
        while left and flying < in_flight:
            waiting.append((0, "F", left.pop(0)))
            flying += 1
            entered += 1
        opened = ends[entered - in_flight - 1] if entered > in_flight else 0.0
        best: tuple[float, int, int, int, Task] | None = None
        for task in waiting:
            ready = board.ready(task)
            assert ready is not None
            if task[0] == 0 and task[1] == "F":
                ready = max(ready, opened if task[2] >= in_flight else 0.0)
            start = max(free[home(task[0], task[2])], ready)
            key = (start, int(task[1] == "F"), -task[0] if task[1] == "F" else task[0], task[2])
            if best is None or key < best[:4]:
                best = (*key, task)
        assert best is not None
        start, task = best[0], best[4]
        waiting.remove(task)
        s, kind, m = task
        end = start + shape.seconds(kind)
        free[home(s, m)] = board.done[task] = end
        starts.append((start, task))
        if kind == "F":
            waiting.append((s, "B", m) if s == shape.stages - 1 else (s + 1, "F", m))
        elif s:
            waiting.append((s - 1, "B", m))
        else:
            flying -= 1
            ends.append(end)
    return _summary(shape, starts, max(free), home)


def _summary(
    shape: Shape, starts: Sequence[tuple[float, Task]], makespan: float, home: Home
) -> Played:
    ordered = sorted(starts, key=lambda item: item[0])
    level, peaks = [0.0] * shape.ranks, [0.0] * shape.ranks
    moves = sorted(
        (start + (kind == "B") * shape.seconds("B"), kind == "F", home(s, m))
        for start, (s, kind, m) in ordered
    )
    for _, forward, rank in moves:
        level[rank] += (1 if forward else -1) / shape.chunks
        peaks[rank] = max(peaks[rank], level[rank])
    return Played(makespan, makespan / shape.ideal - 1, ordered, peaks)
