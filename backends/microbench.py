"""Microbenchmarks of one machine: op kinds, collectives, messages and their overlap.

A job of `backends.worker`. All ranks measure at the same time, so that what they share (memory,
caches, links) is shared as in a real run. Ops run through the interpreter, so their times contain
its overhead. Inputs that a step finds cold (weights, gradients, optimizer states) rotate through
copies larger than the caches. Seconds of ops are processor time of the rank's thread, which no
other work on the machine adds to; those of communication are wall time.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from backends.bench_cases import Case, attention_cases, elementwise_cases, matmul_cases
from backends.bench_linear_cases import linear_cases
from backends.bench_links import (
    measure_collectives,
    measure_issue,
    measure_messages,
    measure_overlap,
    measure_peaks,
)
from backends.bench_recommend_cases import recommend_cases
from backends.bench_split_cases import (
    block_cases,
    chunk_cases,
    codec_cases,
    group_cases,
    route_cases,
    row_cases,
    tile_cases,
)
from backends.interpreter import Interpreter
from backends.transport import Local
from simcore.ops import Buffer, Op, work
from simcore.program import Action, Block, Call, Program

COLD_BYTES = 64e6  # copies of cold inputs fill at least this much: beyond most last-level caches
WARM_BYTES = 16e6  # activations are met again from the last-level cache
MAX_COPIES = 48
ROUND_FLOPS = 1e9
POOL_ELEMENTS = 64 * 2**20
MIN_SAMPLE_S = 0.006
SAMPLES = {"ops": 2, "links": 3}  # far apart, so that no one spell of noise reaches all
WARM_ROUNDS = 1  # and the one that counts how many are needed: allocator and caches settle
MESH = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "matmul": matmul_cases,
    "elementwise": elementwise_cases,
    "attention": attention_cases,
    "tiles": tile_cases,
    "chunks": chunk_cases,
    "blocks": block_cases,
    "routes": route_cases,
    "rows": row_cases,
    "groups": group_cases,
    "codecs": codec_cases,
    "linear": linear_cases,
    "recommend": recommend_cases,
}


class Pool:
    """One large tensor from which every case cuts its inputs, so that none is drawn anew."""

    def __init__(self) -> None:
        self.numbers = torch.full((POOL_ELEMENTS,), 0.1)
        self.used = 0

    def cut(self, buffer: Buffer) -> torch.Tensor:
        """Return a tensor of the buffer's shape; earlier cuts come round again at the end."""
        dims = [int(d) for d in buffer.dims]
        if buffer.dtype == "int64":
            return torch.randint(0, 512, dims)
        if buffer.dtype == "uint8":
            return torch.zeros(dims, dtype=torch.uint8)
        size = math.prod(dims)
        if self.used + size > POOL_ELEMENTS:
            self.used = 0
        found = self.numbers[self.used : self.used + size].view(dims)
        self.used += -(-size // 16) * 16
        return found


SWEEP = Op("fill", {"n": 2**19}, "fp32", (), ("sweep",))  # 2 MiB: a core's own caches
SWEEP_BUFFERS = {"sweep": Buffer((2**19,), "fp32", "state", layered=False)}


def swept(case: Case) -> bool:
    """Whether the op is so small that a loop of it alone would find the core's caches warm.

    In a step other ops' data have passed through them in between, and the interpreter's own.
    """
    size = sum(float(buffer.size_bytes) for buffer in case.buffers.values())
    return size < float(SWEEP_BUFFERS["sweep"].size_bytes)


def bench_program(case: Case, copies: int) -> Program:
    """Return a program of one action per set of buffers, and a last one that sweeps the caches.

    Results are kept until the next round, as a step keeps activations for the backward.
    """
    kept = tuple(name for name, buffer in case.buffers.items() if buffer.scope == "act")
    bodies = {f"{layer}F": (Call("op", layer),) for layer in range(copies)}
    bodies[f"{copies}F"] = (Call("sweep", -1),)
    order = tuple(Action(stage, "F", 0) for stage in range(copies + 1))
    return Program(
        MESH,
        {"op": Block("op", (case.op,)), "sweep": Block("sweep", (SWEEP,))},
        {**SWEEP_BUFFERS, **case.buffers},
        bodies,
        (order,),
        (0,) * (copies + 1),
        {"keep": kept},
    )


def copies_of(case: Case) -> int:
    """Return how many copies of the op's buffers defeat the caches as a real step does."""
    sizes = {name: float(b.size_bytes) for name, b in case.buffers.items() if b.scope == "state"}
    cold = sum(sizes[name] for name in case.cold)
    needed = COLD_BYTES / cold if cold else WARM_BYTES / max(sum(sizes.values()), 1.0)
    room = 4 * POOL_ELEMENTS / (sum(sizes.values()) + 1024)
    quick = ROUND_FLOPS / max(work(case.op).flops, 1.0)  # arithmetic hides what a cold input costs
    return int(min(MAX_COPIES, room, max(2, min(needed, quick))))


def prepared(case: Case, copies: int, pool: Pool) -> Interpreter:
    """Return an interpreter that holds so many sets of the op's buffers."""
    program = bench_program(case, copies)
    runner = Interpreter(program, 0, Local(MESH, 0), torch.device("cpu"))
    runner.context.cached = case.cached
    runner.context.rows = max(case.cached + 1, 1024)
    for name, buffer in program.buffers.items():
        if buffer.scope == "state":
            for layer in range(copies if buffer.layered else 1):
                tensor = case.given[name] if name in case.given else pool.cut(buffer)
                runner.tensors[program.key(name, layer, 0)] = tensor
    return runner


def time_case(case: Case, pool: Pool, meet: Callable[[], None]) -> float:
    """Return processor seconds per op, once every rank is ready, sweeps of caches left out."""
    copies = copies_of(case)
    pool.used = 0
    runner = prepared(case, copies, pool)
    *actions, sweep = runner.program.order[0]
    sweeping = swept(case)

    def once() -> float:
        if not sweeping:
            start = time.thread_time()
            for action in actions:
                runner.run_action(action)
            return time.thread_time() - start
        spent = 0.0
        for action in actions:
            runner.run_action(sweep)
            start = time.thread_time()
            runner.run_action(action)
            spent += time.thread_time() - start
        return spent

    for _ in range(WARM_ROUNDS):
        once()
    start = time.perf_counter()
    once()
    rounds = max(1, int(MIN_SAMPLE_S / max(time.perf_counter() - start, 1e-7)))
    meet()
    return sum(once() for _ in range(rounds)) / rounds / copies


def light(case: Case) -> bool:
    """Whether a round takes little time, so that start-up and noise are a part of it.

    Judged by the op's size, on which all ranks agree.
    """
    done = work(case.op)
    moved = float(done.read_bytes + done.write_bytes)
    return copies_of(case) * (float(done.flops) / ROUND_FLOPS + moved / COLD_BYTES) < 0.5


def measure_ops(
    cases: Sequence[tuple[str, Case]], pool: Pool, meet: Callable[[], None]
) -> list[dict[str, Any]]:
    """Return one record per case; light ones have further samples, far apart."""
    found: list[dict[str, Any]] = [
        {
            "group": group,
            "kind": case.op.kind,
            "dims": dict(case.op.dims),
            "attrs": dict(case.op.attrs),
            "reads": list(case.op.reads),
            "samples": [],
        }
        for group, case in cases
    ]
    for number in range(SAMPLES["ops"]):
        for record, (_, case) in zip(found, cases, strict=True):
            if number and not light(case):
                continue
            gc.collect()  # the last case's interpreter and its results
            record["samples"].append(time_case(case, pool, meet))
    return found


def pooled(rounds: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return each measurement with its samples of all rounds."""
    return [
        {**same[0], "samples": [sample for each in same for sample in each["samples"]]}
        for same in zip(*rounds, strict=True)
    ]


def _nobody() -> Any:
    """Wait for no other rank."""


def measure(rank: int, ranks: int, *, ops: bool = True) -> dict[str, Any]:
    """Return what this rank measured, all ranks together; the process group must exist.

    Without ``ops`` only what ranks do to one another is measured.
    """
    started = time.perf_counter()
    meet = dist.barrier if ranks > 1 else _nobody
    record: dict[str, Any] = {"rank": rank, "ranks": ranks}
    if ranks > 1:
        record["overlap"] = measure_overlap(rank, ranks)
        record["issue_s"] = measure_issue(rank, ranks)
    record["peaks"] = measure_peaks(meet)
    record["alone"] = measure_peaks(_nobody) if rank == 0 else {}
    meet()
    pool = Pool()
    cases = [(group, case) for group, make in CASES.items() for case in make()] if ops else []
    collectives, messages = [], []
    record["ops"] = measure_ops(cases, pool, meet)
    for _ in range(SAMPLES["links"] if ranks > 1 else 0):
        collectives.append(measure_collectives(rank, ranks))
        messages.append(measure_messages(rank))
    record |= {"collectives": pooled(collectives), "messages": pooled(messages)}
    record["seconds"] = time.perf_counter() - started
    return record
