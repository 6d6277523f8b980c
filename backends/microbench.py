"""Microbenchmarks of one machine: op kinds, collectives, messages and their overlap.

A job of `backends.worker`. All ranks measure at the same time, so that what they share (memory,
caches, links) is shared as in a real run. Ops run through the interpreter, so their times contain
its overhead. Inputs that a step finds cold (weights, gradients, optimizer states) rotate through
copies larger than the caches.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from backends.interpreter import Interpreter
from backends.transport import Distributed, Handle, Local, Transport
from simcore.ops import Buffer, Op, work
from simcore.program import Action, Block, Call, Program

COLD_BYTES = 64e6  # copies of cold inputs fill at least this much: beyond most last-level caches
WARM_BYTES = 16e6  # activations are met again from the last-level cache
MAX_COPIES = 48
ROUND_FLOPS = 3e9
POOL_ELEMENTS = 64 * 2**20
MIN_SAMPLE_S = 0.008
SHORTEST_S = 1e-7
SAMPLES = 3
WARM_ROUNDS = 2  # the allocator and the caches settle
MESH = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}


@dataclass(frozen=True, slots=True)
class Case:
    """One op to time, with the buffers that it reads and writes in place."""

    op: Op
    buffers: dict[str, Buffer]
    cold: tuple[str, ...] = ()
    cached: int = 0


def _case(
    kind: str,
    dims: dict[str, Any],
    reads: dict[str, tuple[Any, ...]],
    writes: tuple[str, ...],
    *,
    cold: tuple[str, ...] = (),
    attrs: dict[str, Any] | None = None,
    inplace: dict[str, tuple[int, ...]] | None = None,
    dtypes: dict[str, str] | None = None,
    cached: int = 0,
) -> Case:
    buffers = {
        name: Buffer(shape, (dtypes or {}).get(name, "fp32"), "state")
        for name, shape in {**reads, **(inplace or {})}.items()
    }
    for name in writes:
        buffers.setdefault(name, Buffer((1,), "fp32", "act"))
    op = Op(kind, dims, "fp32", tuple(reads), writes, attrs=attrs or {})
    return Case(op, buffers, cold, cached)


def matmul_cases() -> Iterator[Case]:
    """Products of a layer, of a head and of decoding, in the three layouts of training."""
    shapes = [
        (128, 128),
        (384, 128),
        (256, 704),
        (1408, 256),
        (512, 512),
        (1536, 512),
        (512, 1408),
        (2816, 512),
        (4096, 256),
        (1024, 1024),
        (8192, 512),
    ]
    for tokens in (1, 4, 16, 64, 256, 1024):
        for number, (n, k) in enumerate(shapes):
            if (number + tokens) % 2 or tokens * n * k > 1.5e9:
                continue
            attrs = {"weight_dtype": "fp32"}
            yield _case(
                "matmul",
                {"m": tokens, "n": n, "k": k},
                {"x": (tokens, k), "w": (n, k)},
                ("y",),
                cold=("w",),
                attrs={"layout": "nt", **attrs},
            )
            if tokens < 16:
                continue
            yield _case(
                "matmul",
                {"m": tokens, "n": k, "k": n},
                {"y": (tokens, n), "w": (n, k)},
                ("x",),
                cold=("w",),
                attrs={"layout": "nn", **attrs},
            )
            yield _case(
                "matmul",
                {"m": n, "n": k, "k": tokens},
                {"y": (tokens, n), "x": (tokens, k)},
                ("g",),
                cold=("g",),
                inplace={"g": (n, k)},
                attrs={"layout": "tn", "accumulate": True, "out_dtype": "fp32"},
            )


SIZES = (512, 16384, 131072, 524288, 2097152, 6291456)
WIDTH = 512


def elementwise_cases() -> Iterator[Case]:
    """Kinds whose time follows their number of elements."""
    for size in SIZES:
        n = min(WIDTH, size)
        t = size // n
        dims = {"t": t, "n": n}
        x, row = (t, n), (n,)
        one = {"x": x}
        yield _case("rmsnorm", dims, {"x": x, "w": row}, ("y",))
        yield _case(
            "rmsnorm_backward", dims, {"d": x, "x": x, "w": row}, ("y", "g"), inplace={"g": row}
        )
        yield _case("layernorm", dims, {"x": x, "w": row, "b": row}, ("y",))
        yield _case(
            "layernorm_backward",
            dims,
            {"d": x, "x": x, "w": row},
            ("y", "g", "h"),
            inplace={"g": row, "h": row},
        )
        for kind in ("gelu", "relu"):
            yield _case(kind, dims, one, ("y",))
            yield _case(f"{kind}_backward", dims, {"d": x, "x": x}, ("y",))
        yield _case("swiglu", dims, {"x": (t, 2 * n)}, ("y",))
        yield _case("swiglu_backward", dims, {"d": x, "x": (t, 2 * n)}, ("y",))
        yield _case("add", dims, {"x": x, "z": x}, ("y",))
        yield _case("bias", dims, {"x": x, "b": row}, ("y",))
        yield _case("sum_rows", dims, one, ("g",), inplace={"g": row})
        yield _case("fill", {"n": size}, {}, ("x",), inplace={"x": (size,)}, cold=("x",))
        yield _case("alias", dims, one, ("y",))
        yield from _head_cases(t, n)
        yield from _vocabulary_cases(size)
        yield _case(
            "adam",
            {"n": size},
            dict.fromkeys(("g", "w", "m", "v"), (size,)),
            ("w", "m", "v"),
            cold=("g", "w", "m", "v"),
            attrs={"grad_dtype": "fp32", "master": False},
        )


def _head_cases(t: int, n: int) -> Iterator[Case]:
    """Kinds that work head by head on packed queries, keys and values."""
    d = 64
    attrs = {"heads": n // d - 1, "kv_heads": 1, "head_dim": d}
    packed, scales = (t, n + d), {"q": (d,), "k": (d,)}
    dims = {"t": t, "n": n}
    yield _case("rope", dims, {"x": packed, "p": (t,)}, ("y",), attrs=attrs, dtypes={"p": "int64"})
    yield _case("head_norm", dims, {"x": packed, **scales}, ("y",), attrs=attrs)
    yield _case(
        "head_norm_backward",
        dims,
        {"d": packed, "x": packed, **scales},
        ("y", "g", "h"),
        attrs=attrs,
        inplace={"g": (d,), "h": (d,)},
    )


def _vocabulary_cases(size: int) -> Iterator[Case]:
    n = min(4096, size)
    t = max(1, size // n)
    attrs = {"vocab_axis": "", "vocab": n, "scale": 1.0, "shards": 1}
    logits = {"x": (t, n), "t": (t,)}
    dtypes = {"t": "int64"}
    dims = {"t": t, "n": n}
    yield _case("softmax_stats", dims, logits, ("s",), attrs=attrs, dtypes=dtypes)
    yield _case(
        "softmax_loss", dims, {**logits, "s": (t, 3)}, ("l", "e"), attrs=attrs, dtypes=dtypes
    )
    yield _case("softmax_backward", dims, {**logits, "e": (t,)}, ("y",), attrs=attrs, dtypes=dtypes)
    yield _case("sample", dims, {"x": (t, n)}, ("y",), attrs=attrs)
    width = min(WIDTH, size)
    rows = size // width
    table = {"w": (2048, width), "t": (rows,)}
    dims = {"t": rows, "n": width}
    yield _case("embedding", dims, table, ("y",), dtypes=dtypes, cold=("w",))
    yield _case(
        "embedding_backward",
        dims,
        {"d": (rows, width), "t": (rows,)},
        ("g",),
        inplace={"g": (2048, width)},
        dtypes=dtypes,
        cold=("g",),
    )


PREFILLS = [  # batch, rows, heads, KV heads, head dim
    (1, 32, 4, 4, 32),
    (8, 32, 8, 4, 32),
    (4, 64, 8, 8, 32),
    (1, 128, 4, 2, 64),
    (4, 128, 8, 4, 64),
    (16, 128, 8, 8, 32),
    (1, 256, 8, 4, 64),
    (2, 256, 4, 4, 32),
    (8, 256, 8, 8, 64),
    (1, 512, 8, 4, 64),
    (4, 512, 4, 2, 32),
    (2, 512, 16, 8, 64),
    (1, 1024, 8, 8, 64),
    (32, 64, 4, 4, 64),
]
CACHED = [  # batch, new rows, rows with the cached ones, heads, KV heads, head dim
    (1, 1, 64, 4, 4, 32),
    (1, 1, 512, 8, 4, 64),
    (4, 1, 128, 8, 4, 64),
    (8, 1, 512, 4, 2, 32),
    (16, 1, 128, 8, 8, 32),
    (16, 1, 1024, 8, 4, 64),
    (32, 1, 256, 8, 4, 64),
    (64, 1, 128, 4, 4, 64),
    (1, 1, 2048, 8, 8, 64),
    (1, 64, 64, 8, 4, 64),
    (4, 128, 128, 8, 4, 32),
    (16, 64, 64, 4, 4, 64),
    (1, 512, 512, 8, 4, 64),
    (32, 128, 128, 8, 4, 32),
]


def attention_cases() -> Iterator[Case]:
    """Attention with and without a cache."""
    for b, s, h, hkv, d in PREFILLS:
        dims = {"b": b, "s": s, "kv": s, "h": h, "hkv": hkv, "d": d, "dv": d}
        packed = (b * s, (h + 2 * hkv) * d)
        attrs = {"causal": True, "kv_dtype": "fp32"}
        yield _case("attention", dims, {"x": packed}, ("o", "l"), attrs=attrs)
        out = (b * s, h * d)
        yield _case(
            "attention_backward",
            dims,
            {"d": out, "x": packed, "o": out, "l": (b, h, s)},
            ("g",),
            attrs=attrs,
        )
    for b, s, kv, h, hkv, d in CACHED:
        dims = {"b": b, "s": s, "kv": kv, "h": h, "hkv": hkv, "d": d, "dv": d}
        packed, cache = (b * s, (h + 2 * hkv) * d), (2, b, hkv, kv, d)
        yield _case(
            "attention",
            dims,
            {"x": packed, "c": cache},
            ("o", "l"),
            cached=kv - s,
            attrs={"causal": True, "kv_dtype": "fp32"},
            cold=("c",),
        )
        heads = {"heads": h, "kv_heads": hkv, "head_dim": d, "b": b}
        yield _case(
            "cache_append",
            {"t": b * s, "n": 2 * hkv * d},
            {"x": packed},
            ("c",),
            inplace={"c": cache},
            cached=kv - s,
            attrs=heads,
            cold=("c",),
        )


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "matmul": matmul_cases,
    "elementwise": elementwise_cases,
    "attention": attention_cases,
}


class Pool:
    """One large tensor from which every case cuts its inputs, so that none is drawn anew."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.numbers = torch.full((POOL_ELEMENTS,), 0.1, device=device)
        self.used = 0

    def cut(self, buffer: Buffer) -> torch.Tensor:
        """Return a tensor of the buffer's shape; earlier cuts come round again at the end."""
        dims = [int(d) for d in buffer.dims]
        if buffer.dtype == "int64":
            return torch.randint(0, 512, dims, device=self.device)
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
    """Return a program whose one action runs the op on ``copies`` sets of buffers.

    Results are kept until the next round, as a step keeps activations for the backward.
    """
    block = Block("op", (case.op, SWEEP) if swept(case) else (case.op,))
    body = tuple(Call("op", layer) for layer in range(copies))
    kept = tuple(name for name, buffer in case.buffers.items() if buffer.scope == "act")
    return Program(
        MESH,
        {"op": block},
        {**SWEEP_BUFFERS, **case.buffers},
        {"0F": body},
        ((Action(0, "F", 0),),),
        (0,),
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


def time_case(case: Case, pool: Pool, meet: Callable[[], None], sweep_s: float = 0.0) -> float:
    """Return seconds per op, once every rank is ready; ``sweep_s`` is that of a sweep alone."""
    gc.collect()  # the last case's interpreter and its results
    copies, device = copies_of(case), pool.device
    pool.used = 0
    program = bench_program(case, copies)
    runner = Interpreter(program, 0, Local(MESH, 0), device)
    runner.context.cached = case.cached
    runner.context.rows = max(case.cached + 1, 1024)
    for name, buffer in program.buffers.items():
        if buffer.scope == "state":
            for layer in range(copies if buffer.layered else 1):
                runner.tensors[program.key(name, layer, 0)] = pool.cut(buffer)
    action = Action(0, "F", 0)
    for _ in range(WARM_ROUNDS):
        runner.run_action(action)
    _synchronise(device)
    start = time.perf_counter()
    runner.run_action(action)
    _synchronise(device)
    once = max(time.perf_counter() - start, 1e-7)
    rounds = max(1, int(MIN_SAMPLE_S / once))
    meet()
    start = time.perf_counter()
    for _ in range(rounds):
        runner.run_action(action)
    _synchronise(device)
    each = (time.perf_counter() - start) / rounds / copies
    return max(each - sweep_s, SHORTEST_S) if swept(case) else each


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ops(
    cases: Sequence[tuple[str, Case]], pool: Pool, meet: Callable[[], None]
) -> list[dict[str, Any]]:
    """Return one record per case, with one sample."""
    sweep_s = time_case(Case(SWEEP, SWEEP_BUFFERS), pool, meet)
    return [
        {
            "group": group,
            "kind": case.op.kind,
            "dims": dict(case.op.dims),
            "attrs": dict(case.op.attrs),
            "reads": list(case.op.reads),
            "samples": [time_case(case, pool, meet, sweep_s)],
        }
        for group, case in cases
    ]


def pooled(rounds: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return each measurement with its samples of all rounds."""
    return [
        {**same[0], "samples": [sample for each in same for sample in each["samples"]]}
        for same in zip(*rounds, strict=True)
    ]


COLLECTIVE_SIZES = tuple(4**i for i in range(4, 14))


def measure_collectives(transport: Transport, ranks: int) -> list[dict[str, Any]]:
    """Return seconds of every collective by size; each is waited for at once."""
    found = []
    for size in COLLECTIVE_SIZES:
        for kind in ("all_reduce", "all_gather", "reduce_scatter"):
            whole = torch.ones(size // 4)
            part = torch.ones(size // 4 // ranks)
            calls: dict[str, Callable[[], Handle]] = {
                "all_reduce": partial(transport.all_reduce, whole, "tp"),
                "all_gather": partial(transport.all_gather, whole, part, "tp"),
                "reduce_scatter": partial(transport.reduce_scatter, part, whole, "tp"),
            }
            rounds = max(3, min(50, int(0.02 / (2e-4 + size / 1e9))))
            samples = _time_rounds(partial(_complete, calls[kind]), rounds, samples=3)
            found.append(
                {
                    "op": kind,
                    "bytes": size,
                    "ranks": ranks,
                    "seconds": statistics.median(samples),
                    "samples": samples,
                }
            )
    return found


def _complete(call: Callable[[], Handle]) -> None:
    call().wait()


def _time_rounds(call: Callable[[], Any], rounds: int, samples: int = 5) -> list[float]:
    call()
    found = []
    for _ in range(samples):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        found.append((time.perf_counter() - start) / rounds)
    return found


def measure_messages(rank: int) -> list[dict[str, Any]]:
    """Return seconds of one message from rank 0 to rank 1, from ping-pongs."""
    found = []
    for size in COLLECTIVE_SIZES:
        buffer = torch.ones(size // 4)

        def ping_pong(buffer: torch.Tensor = buffer) -> None:
            for turn in (0, 1):
                if rank == turn:
                    dist.send(buffer, 1 - rank)
                else:
                    dist.recv(buffer, 1 - rank)

        rounds = max(3, min(50, int(0.02 / (2e-4 + size / 1e9))))
        samples = [s / 2 for s in _time_rounds(ping_pong, rounds)]
        found.append(
            {
                "op": "send_recv",
                "bytes": size,
                "ranks": 2,
                "seconds": statistics.median(samples),
                "samples": samples,
            }
        )
    return found


def measure_overlap(transport: Transport) -> dict[str, float]:
    """Return the seconds of compute, of an all-reduce, and of both started together."""
    x, w = torch.randn(256, 512), torch.randn(512, 512)
    payloads = [torch.ones(1 << 20) for _ in range(8)]

    def compute() -> None:
        for _ in range(60):
            torch.mm(x, w)

    def communicate() -> None:
        for handle in [transport.all_reduce(payload, "tp") for payload in payloads]:
            handle.wait()

    def both() -> None:
        handles = [transport.all_reduce(payload, "tp") for payload in payloads]
        compute()
        for handle in handles:
            handle.wait()

    timed = {
        "compute_s": _time_rounds(compute, 3),
        "communication_s": _time_rounds(communicate, 3),
        "both_s": _time_rounds(both, 3),
    }
    return {name: statistics.median(samples) for name, samples in timed.items()}


def measure_issue(transport: Transport) -> float:
    """Return the host's seconds to start a communication."""
    payload = torch.ones(256)
    found = []
    for _ in range(50):
        start = time.perf_counter()
        handle = transport.all_reduce(payload, "tp")
        found.append(time.perf_counter() - start)
        handle.wait()
    return statistics.median(found)


def measure_peaks(meet: Callable[[], None]) -> dict[str, float]:
    """Return the best rate of a large product (FLOP/s) and of a large copy (bytes/s)."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)

    def best(call: Callable[[], Any]) -> float:
        meet()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return {
        "flops_per_s": 2 * 1024**3 / best(lambda: torch.mm(a, b)),
        "bytes_per_s": 2 * source.numel() * 4 / best(lambda: target.copy_(source)),
    }


def _nobody() -> Any:
    """Wait for no other rank."""


def measure(rank: int, ranks: int) -> dict[str, Any]:
    """Return what this rank measured, all ranks together; the process group must exist."""
    started = time.perf_counter()
    meet = dist.barrier if ranks > 1 else _nobody
    record: dict[str, Any] = {"rank": rank, "ranks": ranks, "peaks": measure_peaks(meet)}
    transport: Transport = Local(MESH, 0)
    if ranks > 1:
        transport = Distributed({**MESH, "tp": ranks}, rank, {"tp"})
        record["messages"] = measure_messages(rank) if ranks == 2 else []
        record["overlap"] = measure_overlap(transport)
        record["issue_s"] = measure_issue(transport)
        record["alone"] = measure_peaks(_nobody) if rank == 0 else {}
        meet()
    cases = [(group, case) for group, make in CASES.items() for case in make()]
    pool = Pool(torch.device("cpu"))
    ops, collectives = [], []
    for _ in range(SAMPLES):  # far apart, so that no one spell of noise reaches all samples
        ops.append(measure_ops(cases, pool, meet))
        collectives.append(measure_collectives(transport, ranks) if ranks > 1 else [])
    record |= {"ops": pooled(ops), "collectives": pooled(collectives)}
    record["seconds"] = time.perf_counter() - started
    return record
