"""Attention served in tasks: queries of a block and all keys that they see, on whichever rank.

Attention has no weights, so any rank can serve any task (core attention disaggregation: Zhuang et
al. 2025, DistCA). A sequence is a packed row of documents, which do not see one another; rank r
holds the r-th run of it. A task is a block of query rows of one document with the document's keys
up to the block's end. Tasks are moved from the busiest to the idlest server while that helps, so
that at the end the busiest has at most one task more than any other. Queries, keys and values go
out by one all-to-all of unequal parts each, outputs come back by another; the ranks themselves are
the servers, in place. Backward does the same with gradients; what a server was sent, it keeps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from simcore.errors import InputError
from simcore.ops import Op
from simcore.sequence import Run, Served, task_dims

if TYPE_CHECKING:
    from simcore.adjoints import Tape
    from simcore.models import ModelSpec
    from simcore.network import Builder, Rows
    from simcore.strategy import ParallelStrategy
    from simcore.workloads import TrainStep

STREAM = "cp"
BLOCKS_PER_RANK = 8  # of queries, where task_rows does not say


@dataclass(frozen=True, slots=True)
class Task:
    """Query rows [first, end) of a sequence, and its document's first row."""

    sequence: int
    start: int
    first: int
    end: int

    @property
    def pairs(self) -> float:
        """(query, key) pairs that the causal mask leaves."""
        rows = self.end - self.first
        return rows * (self.first - self.start) + rows * (rows + 1) / 2


def tasks_of(
    documents: Sequence[int], length: int, batch: int, rows: int, block: int
) -> list[Task]:
    """Return the tasks of a microbatch, no query block beyond ``block`` or over two ranks' rows."""
    found = []
    ends = list(accumulate(documents or (length,)))
    for sequence in range(batch):
        for start, end in zip([0, *ends], ends, strict=False):
            first = start
            while first < end:
                last = min(end, first + block, (first // rows + 1) * rows)
                found.append(Task(sequence, start, first, last))
                first = last
    return found


def assigned(tasks: Sequence[Task], homes: Sequence[int], ranks: int) -> list[int]:
    """Return the server of every task: its home, but for tasks moved to even out the pairs.

    A move takes from the busiest server the task whose move to the idlest leaves the two nearest
    to each other. The last one leaves max - min <= the smallest task of the busiest.
    """
    servers = list(homes)
    loads = np.zeros(ranks)
    held: dict[int, set[int]] = defaultdict(set)
    for number, (task, server) in enumerate(zip(tasks, servers, strict=True)):
        loads[server] += task.pairs
        held[server].add(number)
    while True:
        busiest, idlest = int(loads.argmax()), int(loads.argmin())
        gap = loads[busiest] - loads[idlest]
        better = [number for number in held[busiest] if tasks[number].pairs < gap]
        if not better:
            return servers
        moved = min(better, key=lambda number: (abs(gap - 2 * tasks[number].pairs), number))
        held[busiest].remove(moved)
        held[idlest].add(moved)
        servers[moved] = idlest
        loads[busiest] -= tasks[moved].pairs
        loads[idlest] += tasks[moved].pairs


@dataclass(slots=True)
class Shipping:
    """Which local rows every rank sends to every server, and what the server does with them."""

    queries: list[list[list[Run]]]  # source, server -> runs
    keys: list[list[list[Run]]]
    served: list[list[Served]] = field(default_factory=list)  # server -> tasks

    def counts(self, runs: list[list[list[Run]]]) -> tuple[tuple[int, ...], ...]:
        """Return the rows that each source sends to each server."""
        return tuple(tuple(sum(b - a for a, b in one) for one in row) for row in runs)


@cache
def shipping(
    documents: tuple[int, ...], length: int, batch: int, ranks: int, block: int
) -> Shipping:
    """Return what is shipped for a microbatch of ``batch`` sequences with the same documents."""
    rows = length // ranks
    tasks = tasks_of(documents, length, batch, rows, block)
    servers = assigned(tasks, [task.first // rows for task in tasks], ranks)
    queries: list[list[list[Run]]] = [[[] for _ in range(ranks)] for _ in range(ranks)]
    needed: list[list[set[Run]]] = [[set() for _ in range(ranks)] for _ in range(ranks)]
    for task, server in zip(tasks, servers, strict=True):
        home, base = task.first // rows, task.sequence * rows
        shift = base - home * rows
        queries[home][server].append((task.first + shift, task.end + shift))
        for source, run in _parts(task, rows):
            needed[source][server].add(run)
    keys = [[_union(runs) for runs in row] for row in needed]
    found = Shipping(queries, keys)
    at = _offsets(found.counts(queries)), _offsets(found.counts(keys))
    taken = np.array(at[0])
    served: list[list[Served]] = [[] for _ in range(ranks)]
    for task, server in zip(tasks, servers, strict=True):
        home, count = task.first // rows, task.end - task.first
        first = int(taken[home][server])
        taken[home][server] += count
        places = tuple(
            _within(keys[source][server], run, at[1][source][server])
            for source, run in _parts(task, rows)
        )
        served[server].append((first, first + count, places))
    found.served = served
    return found


def _parts(task: Task, rows: int) -> list[tuple[int, Run]]:
    """Return by rank the local rows of a task's keys."""
    found = []
    for source in range(task.start // rows, (task.end - 1) // rows + 1):
        shift = task.sequence * rows - source * rows
        first, end = max(task.start, source * rows), min(task.end, (source + 1) * rows)
        found.append((source, (first + shift, end + shift)))
    return found


def _union(runs: set[Run]) -> list[Run]:
    """Return runs that touch or overlap as one."""
    found: list[Run] = []
    for first, end in sorted(runs):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return found


def _offsets(counts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return where each source's rows begin on each server, sources in order."""
    return [
        [sum(counts[before][server] for before in range(source)) for server in range(len(counts))]
        for source in range(len(counts))
    ]


def _within(runs: Sequence[Run], wanted: Run, offset: int) -> Run:
    """Return where the ``wanted`` rows lie on a server that holds ``runs`` from ``offset`` on."""
    for first, end in runs:
        if first <= wanted[0] and wanted[1] <= end:
            return offset + wanted[0] - first, offset + wanted[1] - first
        offset += end - first
    raise AssertionError("every key that a task needs is shipped")


# ---------------------------------------------------------------- ops


def serve(b: Builder, rows: Rows, qkv: str, heads: int, kv_heads: int, d: int) -> str:
    """Append attention of packed rows in tasks; return the output, rows in their order."""
    ranks, tokens = rows.split.degree, rows.tokens
    widths = heads * d, 2 * kv_heads * d
    length = rows.new * ranks
    block = rows.task_rows or default_block(rows.new)
    plan = shipping(rows.documents, length, rows.batch, ranks, block)
    q, kv = b.act("q.0", tokens, widths[0]), b.act("kv.0", tokens, widths[1])
    b.op("split_columns", (qkv,), (q, kv), t=tokens, n=sum(widths), attrs={"first": widths[0]})
    if ranks > 1:
        q, kv = _shipped(b, ((q, plan.queries, widths[0]), (kv, plan.keys, widths[1])))
    most = b.buffers[q].dims[0]
    out = b.act("o.served" if ranks > 1 else "o", most, widths[0])
    lse = b.act("lse", heads, most, dtype="fp32")
    served = tuple(map(tuple, plan.served))
    busiest = max(map(task_dims, served), key=lambda dims: int(dims["area"]))
    dims: dict[str, Any] = {**busiest, "h": heads, "hkv": kv_heads, "d": d, "dv": d}
    attrs = {"causal": False, "tasks": served, "axis": "cp"}
    b.op("attention_tasks", (q, kv), (out, lse), attrs=attrs, **dims)
    if ranks == 1:
        return out
    counts = tuple(zip(*plan.counts(plan.queries), strict=True))
    came = _moved(b, out, "o.came", counts, tokens, widths[0])
    home = [_inverse([run for runs in row for run in runs]) for row in plan.queries]
    return _gathered(b, came, "o", home, tokens, widths[0])


def default_block(rows: int) -> int:
    """Return the query rows of a task where nothing is said."""
    return max(1, rows // BLOCKS_PER_RANK)


def _shipped(b: Builder, wanted: Sequence[tuple[str, list[list[list[Run]]], int]]) -> list[str]:
    """Append what ships rows (a buffer, its runs, its width) to servers; return what comes.

    All are gathered before the first leaves, so that backward has all on their way before it
    waits for one.
    """
    ready = []
    for x, runs, width in wanted:
        counts = tuple(tuple(sum(e - a for a, e in one) for one in row) for row in runs)
        flat = [[run for one in row for run in one] for row in runs]
        most = max(map(sum, counts))
        ready.append((_gathered(b, x, f"{x}.sent", flat, most, width), counts))
    return [
        _moved(b, sent, f"{x}.served", counts, max(map(sum, zip(*counts, strict=True))), width)
        for (x, _, width), (sent, counts) in zip(wanted, ready, strict=True)
    ]


def _gathered(
    b: Builder, x: str, out: str, runs: Sequence[Sequence[Run]], rows: int, width: int
) -> str:
    """Append the op that copies each rank's runs of rows one after another."""
    attrs: dict[str, Any] = {
        "runs": tuple(map(tuple, runs)), "axis": "cp", "rows": b.buffers[x].dims[0]
    }  # fmt: skip
    return b.op("gather_rows", (x,), (b.act(out, rows, width),), t=rows, n=width, attrs=attrs)


def _moved(
    b: Builder, x: str, out: str, counts: tuple[tuple[int, ...], ...], rows: int, width: int
) -> str:
    """Append an all-to-all of unequal parts: ``counts`` of rows, by source and destination."""
    most = max(*map(sum, counts), *map(sum, zip(*counts, strict=True)))
    attrs = {"counts": counts, "width": width}
    b.act(out, rows, width)
    return b.op("all_to_all", (x,), (out,), n=most * width, group="cp", stream=STREAM, attrs=attrs)


def _inverse(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Return the runs that put rows back which ``runs`` took, each row once."""
    offsets = accumulate((end - first for first, end in runs), initial=0)
    placed = sorted(
        (first, at, at + end - first) for (first, end), at in zip(runs, offsets, strict=False)
    )
    return tuple((at, end) for _, at, end in placed)


def tasks_adjoint(op: Op, tape: Tape) -> None:
    """A server's gradients follow from what it was sent and what it gave."""
    (q, kv), (out, lse) = op.reads, op.writes
    tape.seed(kv)
    reads = (f"d.{out}", q, kv, out, lse)
    kind = "attention_tasks_backward"
    tape.contribute(q, kind, op.dims, op.dtype, reads, (f"d.{kv}",), **op.attrs)


def split_columns_adjoint(op: Op, tape: Tape) -> None:
    """Gradients of the parts are joined."""
    grads = tuple(f"d.{name}" for name in op.writes)
    tape.contribute(op.reads[0], "join_columns", op.dims, op.dtype, grads)


def gather_rows_adjoint(op: Op, tape: Tape) -> None:
    """Gradients of copies of a row add up."""
    dims = {"t": op.attrs["rows"], "n": op.dims["n"]}
    grads = (f"d.{op.writes[0]}",)
    tape.contribute(op.reads[0], "scatter_rows", dims, op.dtype, grads, **op.attrs)


# ---------------------------------------------------------------- checks


def check_documents(model: ModelSpec, parallel: ParallelStrategy, workload: TrainStep) -> None:
    """Raise `InputError` where packed documents, or serving attention, are not covered."""
    serves = parallel.cp_kind == "servers" and parallel.cp > 1
    if not workload.documents and not serves:
        return
    if workload.documents and (
        sum(workload.documents) != workload.seq_len or min(workload.documents) < 1
    ):
        raise InputError(
            f"[workload].documents add up to {sum(workload.documents)} tokens, not to seq_len "
            f"{workload.seq_len}: list the lengths of the documents of one sequence."
        )
    needs = {
        "a causal model": not model.causal,
        "a model with full attention in every layer": bool(model.frames)
        or "linear" in model.mixers,
        "no [workload].lengths": bool(workload.lengths),
        "[parallel].cp_kind = 'servers'": parallel.cp > 1 and not serves,
        "[parallel].stream_chunks = 1": parallel.stream_chunks > 1,
    }
    what = "attention in tasks" if serves else "packed documents"
    for need, missing in needs.items():
        if missing:
            raise InputError(f"{what} need {need}: change that, or leave documents out.")
