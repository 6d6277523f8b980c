"""Calibration kit: measures a GPU or a CPU. One file that needs Python 3.11, numpy and torch alone.

Copy it to the machine and run ``python kit.py --out record.json``. It times matrix products,
attention, experts, memory-bound kernels, copies, launches, graph replay and collectives, and keeps
every sample, each in seconds. A case that fails is listed under "skipped" and the rest go on; the
record is written every few seconds, so a run that is killed keeps what it had.

How a case is timed:

    cold   device time of one call; a buffer twice the last-level cache is overwritten before it
    warm   device time of one call; its inputs are where the previous call left them
    wall   host time from an idle device to an idle device, start-up included
    issue  host time until the call has returned, the device still at work

On a GPU the device time is that between two CUDA events, and a spin kernel goes first so that the
host has queued the whole call before the device starts on it. On a CPU it is the host's clock.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FORMAT, VERSION = "meshwise-kit", 1
BUDGET_S = {"cuda": 400.0, "cpu": 90.0}
CASE_S = 0.12  # what the repeats of one case may take
REPEATS = (5, 25)
SAVE_S = 3.0
LONGEST_SPIN_S = 0.02
CALLS = 400  # launches back to back; a stream queues about a thousand before the host must wait
SHARED_CACHE_BYTES = 32 * 2**20  # where the machine does not tell
GIB = 2.0**30

Call = Callable[[], Any]
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


@dataclass(frozen=True)
class Machine:
    """What the plan depends on: "cuda" or "cpu", its cores (SMs), memory, and the largest case."""

    kind: str
    units: int
    memory_bytes: float
    max_flops: float
    devices: int = 1

    @property
    def gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.kind == "cuda"

    @property
    def max_bytes(self) -> float:
        """Most bytes that the tensors of one case may take."""
        return 0.35 * self.memory_bytes if self.gpu else min(0.1 * self.memory_bytes, GIB / 8)


@dataclass(frozen=True)
class Case:
    """One thing to time. ``calls``: how many of it one call of the built function does."""

    family: str
    implementation: str
    dtype: str
    shape: Mapping[str, Any]
    timing: str = "cold"
    calls: int = 1


@dataclass(frozen=True)
class Family:
    """Cases of one kind: their share of the time, their plan, and how one becomes a call."""

    weight: float
    cases: Callable[[Machine], Iterable[Case]]
    build: Callable[[Case, torch.device], Call]


def spread(cases: Iterable[Case]) -> list[Case]:
    """Return the cases in bit-reversed order: any first part of them covers the whole range."""
    rows = list(cases)
    bits = max(1, (len(rows) - 1).bit_length())
    order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [rows[i] for i in order if i < len(rows)]


# ---------------------------------------------------------------- matrix products

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LAYERS = (  # (n, k) of Llama 3 8B and 70B, whole and split over 8 ranks, and of small models
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
    (1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584),
    (1024, 1024), (2048, 2048), (3072, 1024),
)  # fmt: skip
SQUARES = (256, 512, 768, 1000, 1024, 1536, 2048, 3072, 4096, 4097, 6144, 8192, 12288)
TILE = 128  # rows and columns of the output tile that libraries favour on large products


def wave_shapes(units: int, depth: int = 4096) -> Iterator[tuple[int, int, int]]:
    """Yield products whose tiles fill the units exactly, a row more, and a tile more or less."""
    columns = max(d for d in range(1, math.isqrt(units) + 1) if units % d == 0)
    for waves in (1, 2, 4):
        full = units // columns * waves * TILE
        for extra in (-TILE, 0, 1, TILE):
            if full + extra > 0:
                yield full + extra, columns * TILE, depth


def matmul_cases(machine: Machine) -> Iterator[Case]:
    """Products y[m, n] = x[m, k] w[n, k]: skinny to wide, square, and about whole waves."""
    shapes = [(m, n, k) for m in ROWS for n, k in LAYERS]
    shapes += [(size, size, size) for size in SQUARES]
    shapes += wave_shapes(machine.units) if machine.gpu else []
    dtypes = {"bf16": 1, "fp8": 1, "fp16": 4, "tf32": 4, "fp32": 6, "int8": 4}
    if not machine.gpu:
        dtypes = {"fp32": 1, "bf16": 2, "int8": 4}
    for dtype, every in dtypes.items():
        for m, n, k in list(dict.fromkeys(shapes))[::every]:
            size = DTYPES[dtype].itemsize
            stored, flops = (m * k + n * k) * size + 4.0 * m * n, 2.0 * m * n * k
            ragged = dtype in ("fp8", "int8") and (n % 16 or k % 16)  # what cuBLASLt takes
            ragged = ragged or (dtype == "int8" and m <= 16)
            if flops <= machine.max_flops and stored <= machine.max_bytes and not ragged:
                shape = {"m": m, "n": n, "k": k}
                yield Case("matmul", "torch", dtype, shape)


def build_matmul(case: Case, device: torch.device) -> Call:
    """Return the product; the weights are stored as a linear layer's, [n, k]."""
    m, n, k = (int(case.shape[name]) for name in ("m", "n", "k"))
    x, w = values((m, k), case.dtype, device), values((n, k), case.dtype, device).t()
    if case.dtype == "int8":
        return functools.partial(getattr(torch, "_int_mm"), x, w)  # noqa: B009  private name
    if case.dtype == "fp8":
        one = torch.ones((), device=device)
        scaled = getattr(torch, "_scaled_mm")  # noqa: B009  private, in every torch since 2.1
        return functools.partial(scaled, x, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    return functools.partial(torch.mm, x, w)


def values(shape: Sequence[int], dtype: str, device: torch.device) -> torch.Tensor:
    """Return random values; never zeros, which draw less power and so clock higher."""
    kind = DTYPES[dtype]
    if not kind.is_floating_point:
        return torch.randint(0, 8, tuple(shape), dtype=kind, device=device)
    if dtype == "fp8":
        return torch.randn(*shape, dtype=torch.bfloat16, device=device).to(kind)
    return torch.randn(*shape, dtype=kind, device=device)


# ---------------------------------------------------------------- attention

HEADS = ((32, 8, 128), (64, 8, 128), (8, 1, 128), (32, 32, 128), (16, 16, 64))
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
SDPA = {
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
}
FLASH = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface"}  # where installed
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def _attention_cases(
    family: str, sizes: Sequence[tuple[int, int]], kernels: Sequence[str], machine: Machine
) -> Iterator[Case]:
    for kernel in kernels:
        for heads in HEADS if kernel == kernels[0] else HEADS[:2]:
            for batch, kv in sizes:
                rows = 1 if family == "attention_decode" else kv
                yield from _attention_case(family, kernel, (batch, rows, kv), heads, machine)


def _attention_case(
    family: str,
    kernel: str,
    sizes: tuple[int, int, int],
    heads: tuple[int, int, int],
    machine: Machine,
) -> Iterator[Case]:
    """Yield the case if the machine can hold and finish it."""
    batch, rows, kv = sizes
    h, hkv, d = heads
    dtype = "bf16" if machine.gpu else "fp32"
    size = DTYPES[dtype].itemsize
    # Backward does 5 products for the forward's 2 (Dao 2023, FlashAttention-2, section 3.1).
    passes = 2.5 if family == "attention_backward" else 1.0
    flops = passes * 4.0 * batch * h * d * rows * (kv - (rows - 1) / 2)
    stored = passes * batch * d * size * (2 * rows * h + 2 * kv * hkv)
    if not machine.gpu:  # its backward holds all scores
        stored += 4.0 * batch * h * rows * kv
    shape = {"batch": batch, "seq_len": rows, "kv_len": kv, "heads": h, "kv_heads": hkv}
    shape |= {"head_dim": d, "window": 0, "kv_bytes": size}
    if family == "attention_decode":
        del shape["seq_len"]
    if flops <= machine.max_flops and stored <= machine.max_bytes:
        yield Case(family, kernel, dtype, shape)


def _kernels(machine: Machine) -> list[str]:
    if not machine.gpu:
        return ["torch"]
    installed = [name for name, module in FLASH.items() if importlib.util.find_spec(module)]
    return ["torch-flash", "torch-cudnn", *installed]


def prefill_cases(machine: Machine) -> Iterator[Case]:
    """Causal self-attention over whole prompts; all head counts for the first kernel alone."""
    sizes = [(b, s) for b in BATCHES[:6] for s in CONTEXTS[:8] if b * s <= 65536]
    yield from _attention_cases("attention_prefill", sizes, _kernels(machine), machine)
    if machine.gpu:  # compiled anew for every shape, so one alone
        yield from _attention_case("attention_prefill", "flex", (1, 4096, 4096), HEADS[0], machine)


def decode_cases(machine: Machine) -> Iterator[Case]:
    """One new token per sequence over a long cache."""
    sizes = [(b, kv) for b in BATCHES for kv in CONTEXTS]
    yield from _attention_cases("attention_decode", sizes, _kernels(machine), machine)


def backward_cases(machine: Machine) -> Iterator[Case]:
    """Gradients of causal attention."""
    sizes = [(b, s) for b in (1, 2, 4, 8) for s in CONTEXTS[:7] if b * s <= 32768]
    yield from _attention_cases("attention_backward", sizes, _kernels(machine)[:1], machine)


def _sdpa(name: str, tensors: Sequence[torch.Tensor], causal: bool) -> Call:
    q, k, v = tensors
    grouped = q.shape[1] != k.shape[1]
    attend = functools.partial(
        F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=grouped
    )
    if name not in SDPA:
        return attend

    def chosen() -> torch.Tensor:
        with sdpa_kernel(SDPA[name]):
            return attend()

    return chosen


def _flash(name: str, tensors: Sequence[torch.Tensor], causal: bool) -> Call:
    attend = importlib.import_module(FLASH[name]).flash_attn_func
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in tensors)
    return functools.partial(attend, q, k, v, causal=causal)


def _flex(tensors: Sequence[torch.Tensor]) -> Call:
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    q, k, v = tensors
    rows = q.shape[2]
    mask = flex.create_block_mask(
        lambda b, h, i, j: i >= j, None, None, rows, rows, device=str(q.device)
    )
    attend = torch.compile(flex.flex_attention)
    return functools.partial(attend, q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def build_attention(case: Case, device: torch.device) -> Call:
    """Return attention, or for ``attention_backward`` the gradients of a forward already done."""
    s = {name: int(value) for name, value in case.shape.items()}
    rows = s.get("seq_len", 1)
    sizes = ((s["heads"], rows), (s["kv_heads"], s["kv_len"]), (s["kv_heads"], s["kv_len"]))
    tensors = [values((s["batch"], h, n, s["head_dim"]), case.dtype, device) for h, n in sizes]
    if case.family == "attention_backward":
        return _backward(case.implementation, tensors)
    if case.implementation in FLASH:
        return _flash(case.implementation, tensors, rows > 1)
    if case.implementation == "flex":
        return _flex(tensors)
    return _sdpa(case.implementation, tensors, rows > 1)


def _backward(name: str, tensors: Sequence[torch.Tensor]) -> Call:
    with torch.enable_grad():
        inputs = [tensor.requires_grad_() for tensor in tensors]
        out = _sdpa(name, inputs, True)()
    return functools.partial(
        torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True
    )


# ---------------------------------------------------------------- experts

EXPERTS = (  # hidden, ffn, experts, experts per token: Mixtral 8x7B, Qwen3 30B and 235B, small
    (4096, 14336, 8, 2), (2048, 768, 128, 8), (4096, 1536, 128, 8), (512, 256, 16, 4),
)  # fmt: skip


def _grouped() -> Callable[..., torch.Tensor] | None:
    found = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    return found if callable(found) else None


def moe_cases(machine: Machine) -> Iterator[Case]:
    """A layer of gated experts; "torch-loop" takes the experts one by one."""
    dtype = "bf16" if machine.gpu else "fp32"
    name = "torch-grouped" if machine.gpu and _grouped() else "torch-loop"
    for hidden, ffn, experts, top in EXPERTS:
        for tokens in ROWS:
            for alpha in (0.0, 1.2) if tokens >= 64 else (0.0,):
                flops = 6.0 * tokens * top * hidden * ffn
                size = DTYPES[dtype].itemsize
                stored = size * (3.0 * experts * hidden * ffn + tokens * top * (3 * ffn + hidden))
                if flops > machine.max_flops or stored > machine.max_bytes:
                    continue
                shape = {"tokens": tokens, "hidden": hidden, "ffn": ffn, "experts": experts}
                shape |= {"experts_per_token": top, "tp": 1, "ep": 1}
                yield Case("moe", name, dtype, {**shape, "alpha": alpha})


def expert_rows(tokens: int, experts: int, top: int, alpha: float) -> list[int]:
    """Return how many rows each expert gets: shares i^-alpha, but no expert above one per token.

    What a full expert cannot take goes to the others; the sum is tokens x top.
    """
    share = np.arange(1, experts + 1, dtype=np.float64) ** -alpha
    left, rows = float(tokens * top), np.zeros(experts)
    while left > 0.5:
        room = rows < tokens
        extra = np.where(room, share, 0.0)
        rows = np.minimum(rows + left * extra / extra.sum(), tokens)
        left = tokens * top - rows.sum()
    whole = np.floor(rows + 1e-9)
    missing = round(tokens * top - whole.sum())
    whole[np.argsort(whole - rows, kind="stable")[:missing]] += 1
    return [int(count) for count in whole]


def build_moe(case: Case, device: torch.device) -> Call:
    """Return gather, gate and up product, SiLU, down product, weighted sum; routing is given."""
    names = ("tokens", "hidden", "ffn", "experts", "experts_per_token")
    tokens, hidden, ffn, experts, top = (int(case.shape[name]) for name in names)
    counts = expert_rows(tokens, experts, top, float(case.shape["alpha"]))
    ends = np.cumsum(counts)
    order = torch.arange(tokens * top, device=device) % tokens
    x = values((tokens, hidden), case.dtype, device)
    up = values((experts, 2 * ffn, hidden), case.dtype, device).transpose(1, 2)
    down = values((experts, hidden, ffn), case.dtype, device).transpose(1, 2)
    scores = values((tokens * top, 1), case.dtype, device)
    grouped = _grouped()
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)

    def product(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if case.implementation == "torch-grouped" and grouped:
            return grouped(rows, weights, offs=offsets)
        parts = zip(ends - counts, ends, weights, strict=True)
        return torch.cat([rows[a:b] @ weight for a, b, weight in parts if b > a])

    def layer() -> torch.Tensor:
        gate, value = product(x[order], up).chunk(2, -1)
        out = product(F.silu(gate) * value, down) * scores
        return torch.zeros_like(x).index_add_(0, order, out)

    return layer


# ---------------------------------------------------------------- memory

WIDTH, VOCABULARY = 4096, 131072
MOVED = {  # op: (tensors of the array's size that are read or written, arithmetic per element)
    "copy": (2, 0),
    "scale": (2, 1),
    "triad": (3, 2),
    "read": (1, 1),
    "write": (1, 0),
    "add": (3, 1),
    "gelu": (2, 8),
    "rmsnorm": (2, 4),
    "softmax": (2, 4),
    "cross_entropy": (2, 4),
    "embedding": (2, 0),
    "adam": (7, 12),
}


def memory_cases(machine: Machine) -> Iterator[Case]:
    """Kernels that wait for memory, from the caches' sizes to the main memory's."""
    largest = min(4 * GIB, machine.max_bytes / 4) if machine.gpu else 64 * 2.0**20
    sizes = [2.0**power for power in range(14, 33) if 2.0**power <= largest]
    for op, (tensors, flops) in MOVED.items():
        dtype = "fp32" if op == "adam" or not machine.gpu else "bf16"
        for size in sizes if op in ("copy", "triad", "read") else sizes[1::2]:
            elements = size / DTYPES[dtype].itemsize
            shape = {"op": op, "moved_bytes": tensors * size, "vector_flops": flops * elements}
            yield Case("memory", "torch", dtype, shape, "warm")
            if op == "copy" and size < 2**28:
                yield Case("memory", "torch-cold", dtype, shape, "cold")


def build_memory(case: Case, device: torch.device) -> Call:
    """Return the kernel over arrays of moved_bytes / tensors each."""
    op = str(case.shape["op"])
    n = int(case.shape["moved_bytes"] / MOVED[op][0] / DTYPES[case.dtype].itemsize)
    if op == "adam":
        return _adam(n, device)
    if op in ("softmax", "cross_entropy", "rmsnorm", "embedding"):
        return _rows(op, n, case.dtype, device)
    x, y, z = (values((n,), case.dtype, device) for _ in range(3))
    calls: dict[str, Call] = {
        "copy": lambda: y.copy_(x),
        "scale": lambda: torch.mul(x, 3.0, out=y),
        "triad": lambda: torch.add(x, y, alpha=3.0, out=z),
        "read": x.sum,
        "write": lambda: y.fill_(1.0),
        "add": lambda: torch.add(x, y, out=z),
        "gelu": lambda: F.gelu(x),
    }
    return calls[op]


def _rows(op: str, n: int, dtype: str, device: torch.device) -> Call:
    width = min(n, VOCABULARY if op in ("softmax", "cross_entropy") else WIDTH)
    x = values((n // width, width), dtype, device)
    labels = torch.randint(0, width, (n // width,), device=device)
    places = torch.randint(0, n // width, (n // width,), device=device)
    calls: dict[str, Call] = {
        "softmax": lambda: torch.softmax(x, -1),
        "cross_entropy": lambda: F.cross_entropy(x, labels),
        "rmsnorm": lambda: F.rms_norm(x, (width,), x[0]),
        "embedding": lambda: F.embedding(places, x),
    }
    return calls[op]


def _adam(n: int, device: torch.device) -> Call:
    parameter = torch.nn.Parameter(values((n,), "fp32", device))
    parameter.grad = values((n,), "fp32", device)
    return torch.optim.AdamW([parameter], lr=1e-4, fused=True).step


# ---------------------------------------------------------------- copies, launches, graphs


def copy_cases(machine: Machine) -> Iterator[Case]:
    """Copies between host and device, from locked and pageable memory, and both ways at once."""
    if machine.gpu:
        for size in (2**power for power in range(12, 31, 2)):
            for name in ("h2d-pinned", "d2h-pinned", "both-pinned", "h2d-pageable", "d2h-pageable"):
                yield Case("host_copy", name, "uint8", {"bytes": size}, "wall")


def build_copy(case: Case, device: torch.device) -> Call:
    """Return the copy; "both" runs one each way on streams of their own, ``bytes`` each."""
    way, memory = case.implementation.split("-")
    size = int(case.shape["bytes"])
    pairs = [
        (
            torch.empty(size, dtype=torch.uint8, pin_memory=memory == "pinned").fill_(1),
            values((size,), "uint8", device),
            torch.cuda.Stream(device),
        )
        for _ in range(2)
    ]

    def copy() -> None:
        for (host, there, stream), down in zip(pairs, (False, True), strict=True):
            if way in ("both", "d2h" if down else "h2d"):
                with torch.cuda.stream(stream):
                    source, target = (there, host) if down else (host, there)
                    target.copy_(source, non_blocking=True)

    return copy


def launch_cases(machine: Machine) -> Iterator[Case]:
    """A kernel of no work: host time to issue it, device time back to back, and to and fro."""
    dtype, shape = "fp32", {"elements": 1}
    yield Case("launch", "issue", dtype, shape, "issue", CALLS)
    yield Case("launch", "round-trip", dtype, shape, "wall")
    if machine.gpu:
        yield Case("launch", "back-to-back", dtype, shape, "warm", CALLS)
        for nodes in (1, 16, 128, CALLS):
            for name, timing in (("device", "warm"), ("round-trip", "wall"), ("issue", "issue")):
                yield Case("graph_replay", name, dtype, {"nodes": nodes}, timing, nodes)


def build_launch(case: Case, device: torch.device) -> Call:
    """Return ``calls`` tiny kernels, launched one by one or replayed as one graph."""
    x = torch.zeros(1, device=device)

    def kernels() -> None:
        for _ in range(case.calls):
            x.add_(1.0)

    if case.family == "launch":
        return kernels
    graph = torch.cuda.CUDAGraph()
    kernels()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        kernels()
    return graph.replay


FAMILIES = {
    "launch": Family(0.02, launch_cases, build_launch),
    "matmul": Family(0.40, matmul_cases, build_matmul),
    "memory": Family(0.14, memory_cases, build_memory),
    "attention_prefill": Family(0.12, prefill_cases, build_attention),
    "attention_decode": Family(0.12, decode_cases, build_attention),
    "attention_backward": Family(0.06, backward_cases, build_attention),
    "moe": Family(0.10, moe_cases, build_moe),
    "host_copy": Family(0.04, copy_cases, build_copy),
}
COLLECTIVE = "collective"  # runs in processes of its own, after the others
COLLECTIVE_SHARE = 0.15


# ---------------------------------------------------------------- clocks


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self.wiper = torch.zeros(2 * cache_bytes(device), dtype=torch.uint8, device=device)
        self.spin = getattr(torch.cuda, "_sleep", None) if self.gpu else None
        self.hertz = clock_hertz(device)

    def wait(self) -> None:
        """Return once the device is idle."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def host(self, call: Call, waits: bool) -> float:
        """Return host seconds of a call on an idle device, its completion included or not."""
        self.wait()
        start = time.perf_counter()
        call()
        if waits:
            self.wait()
        return time.perf_counter() - start

    def events(self, call: Call, lead_s: float) -> tuple[Any, Any]:
        """Queue a call between two events; the device spins ``lead_s`` before the first."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.spin:
            self.spin(int(min(lead_s, LONGEST_SPIN_S) * self.hertz))
        start.record()
        call()
        end.record()
        return start, end

    def samples(self, call: Call, timing: str) -> tuple[list[float], float]:
        """Return seconds of repeated calls, and the host's seconds to issue one."""
        call()
        issue_s = self.host(call, waits=False)
        once_s = max(self.host(call, waits=True), 1e-6)
        repeats = int(min(max(CASE_S / once_s, REPEATS[0]), REPEATS[1]))
        cold = timing == "cold"
        if timing in ("wall", "issue") or not self.gpu:
            found = []
            for _ in range(repeats):
                if cold:
                    self.wiper.add_(1)
                found.append(self.host(call, waits=timing != "issue"))
            return found, issue_s
        pairs = []
        for _ in range(repeats):
            if cold:
                self.wiper.add_(1)
            pairs.append(self.events(call, 1.5 * issue_s + 2e-5))
        self.wait()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs], issue_s


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return int(getattr(properties, "L2_cache_size", 0)) or SHARED_CACHE_BYTES
    texts = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    sizes = [text.read_text().strip() for text in texts]
    return max([int(s[:-1]) * units.get(s[-1], 1) for s in sizes], default=SHARED_CACHE_BYTES)


def clock_hertz(device: torch.device) -> float:
    """Return the device's nominal clock, 1.5 GHz where torch does not tell."""
    if device.type != "cuda":
        return 0.0
    return float(getattr(torch.cuda.get_device_properties(device), "clock_rate", 1.5e6)) * 1e3


# ---------------------------------------------------------------- record


@dataclass
class Record:
    """What has been measured, written to ``path`` in whole whenever a few seconds have passed."""

    path: Path
    machine: dict[str, Any]
    started: float = field(default_factory=time.time)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    saved: float = 0.0

    def add(self, case: Case, samples_s: Sequence[float], **more: Any) -> None:
        """Keep the samples of a case."""
        kept = [float(f"{s / case.calls:.6g}") for s in samples_s]
        self.measurements.append({**_name(case), "samples_s": kept, **more})
        self.save()

    def skip(self, case: Case, reason: str) -> None:
        """Keep that a case was not measured, and why."""
        self.skipped.append({**_name(case), "reason": reason})
        self.save()

    def save(self, complete: bool | None = None) -> None:
        """Write the record if it is due, or if ``complete`` says that this is the end."""
        now = time.monotonic()
        if complete is None and now - self.saved < SAVE_S:
            return
        self.saved = now
        table = {
            "format": FORMAT,
            "version": VERSION,
            "machine": self.machine,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "complete": bool(complete),
            "measurements": self.measurements,
            "skipped": self.skipped,
        }
        write_atomically(self.path, json.dumps(table, indent=None))


def _name(case: Case) -> dict[str, Any]:
    names = ("family", "shape", "dtype", "implementation", "timing")
    return {name: getattr(case, name) for name in names}


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader finds the old file or the new one, never a half."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"kit: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- running


class DeviceLostError(RuntimeError):
    """The device no longer answers: nothing more can be measured."""


def measure(case: Case, family: Family, clock: Clock, record: Record) -> None:
    """Time one case, or record why not. Raises `DeviceLostError` where nothing works any more."""
    reason = ""
    try:
        call = family.build(case, clock.device)
        samples, issue_s = clock.samples(call, case.timing)
        record.add(case, samples, issue_s=float(f"{issue_s:.4g}"))
    except Exception as error:  # whatever one case meets, the others go on
        reason = first_line(error)
    if reason:  # out of the handler, since the error holds what the case allocated
        record.skip(case, reason)
        if clock.gpu:
            recover(clock)


def first_line(error: BaseException) -> str:
    """Return the kind and first line of an error; every lack of memory reads the same."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}"[:200]


def recover(clock: Clock) -> None:
    """Free what the failed case held. Raises `DeviceLostError` where the device does not answer."""
    try:
        torch.cuda.empty_cache()
        clock.wait()
    except Exception as error:
        raise DeviceLostError(first_line(error)) from None


def run(machine: Machine, clock: Clock, record: Record, names: Sequence[str], end: float) -> None:
    """Measure families in turn until ``end`` (monotonic s); what one leaves over the rest share."""
    weights = [FAMILIES[name].weight for name in names]
    for number, name in enumerate(names):
        family, begun = FAMILIES[name], time.monotonic()
        cases = spread(family.cases(machine))
        share = max(0.0, end - begun) * weights[number] / sum(weights[number:])
        before, said = len(record.measurements), begun
        for done, case in enumerate(cases):
            now = time.monotonic()
            if now - begun > share:
                record.skip(case, "out of time")
                continue
            if now - said > 5:
                say(f"{name}: {done} of {len(cases)}")
                said = now
            measure(case, family, clock, record)
        if clock.gpu:
            torch.cuda.empty_cache()
        took = time.monotonic() - begun
        say(f"{name}: {len(record.measurements) - before} of {len(cases)} in {took:.1f} s")


# ---------------------------------------------------------------- collectives

COLLECTIVE_OPS = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv",
)  # fmt: skip


def collective_cases(machine: Machine, ranks: int) -> list[Case]:
    """Return collectives by size; ``bytes`` as nccl-tests counts them, gathered buffers in full."""
    backend, dtype = ("nccl", "bf16") if machine.gpu else ("gloo", "fp32")
    top = 31 if machine.gpu else 24
    return [
        Case(COLLECTIVE, backend, dtype, {"op": op, "bytes": 2**power, "ranks": ranks}, "wall")
        for power in range(10, top, 2 if machine.gpu else 3)
        for op in COLLECTIVE_OPS
    ]


def build_collective(case: Case, device: torch.device) -> Call:
    """Return the collective; ``send_recv`` passes a buffer to the next rank round a ring."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    kind = DTYPES[case.dtype]
    elements = int(case.shape["bytes"]) // kind.itemsize // ranks * ranks
    full = torch.ones(elements, dtype=kind, device=device)
    part, other = full.chunk(ranks)[rank].clone(), torch.empty_like(full)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def pass_on() -> None:
        sends = dist.P2POp(dist.isend, full, (rank + 1) % ranks)
        takes = dist.P2POp(dist.irecv, other, (rank - 1) % ranks)
        for work in dist.batch_isend_irecv([sends, takes]):
            work.wait()

    calls: dict[str, Call] = {
        "all_reduce": lambda: dist.all_reduce(full),
        "all_gather": lambda: gather(full, part),
        "reduce_scatter": lambda: scatter(part, full),
        "all_to_all": lambda: dist.all_to_all_single(other, full),
        "broadcast": lambda: dist.broadcast(full, 0),
        "send_recv": pass_on,
    }
    return calls[case.shape["op"]]


def time_together(call: Call, device: torch.device, samples: int = 5) -> list[float]:
    """Return seconds per call, each sample over as many calls as rank 0 finds worth it."""

    def rounds_s(rounds: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / rounds

    rounds_s(2)
    wanted = torch.tensor([min(100, max(2, int(0.02 / rounds_s(2))))], device=device)
    dist.broadcast(wanted, 0)
    return [rounds_s(int(wanted.item())) for _ in range(samples)]


def collective_worker(rank: int, ranks: int, folder: str, seconds: float, machine: Machine) -> None:
    """Be one rank: time every case together with the others; rank 0 writes what it found."""
    device = torch.device("cuda", rank) if machine.gpu else torch.device("cpu")
    if machine.gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if machine.gpu else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    record, end = Record(Path(folder) / "found.json", {}), time.monotonic() + seconds
    record.saved = math.inf if rank else 0.0  # the other ranks write nothing
    for case in spread(collective_cases(machine, ranks)):
        late = torch.tensor([float(time.monotonic() > end)], device=device)
        dist.broadcast(late, 0)  # all ranks stop together
        if late.item():
            record.skip(case, "out of time")
            continue
        try:
            record.add(case, time_together(build_collective(case, device), device))
        except Exception as error:  # what one rank cannot do, the others cannot either
            record.skip(case, first_line(error))
    if rank == 0:
        record.save(complete=True)
    dist.destroy_process_group()


def run_collectives(machine: Machine, record: Record, seconds: float) -> None:
    """Start one process per rank, wait for them, and take over what rank 0 measured."""
    ranks = machine.devices if machine.gpu else 2
    if ranks < 2:
        record.skip(Case(COLLECTIVE, "nccl", "bf16", {"ranks": ranks}, "wall"), "one device only")
        return
    with tempfile.TemporaryDirectory() as folder:
        job = {"ranks": ranks, "folder": folder, "machine": asdict(machine), "seconds": seconds}
        environment = os.environ | ({} if machine.gpu else {"GLOO_SOCKET_IFNAME": "lo"})
        ends = time.monotonic() + seconds + 60.0  # processes start, and torch with them
        with (Path(folder) / "said").open("wb") as said:
            workers = [
                subprocess.Popen(
                    [sys.executable, __file__, "--worker", json.dumps({"rank": rank, **job})],
                    env=environment, stdout=said, stderr=said,
                )
                for rank in range(ranks)
            ]  # fmt: skip
            codes: Sequence[int | None] = [None]
            try:
                codes = _wait_for(workers, ends)
            finally:
                _take_over(Path(folder), machine, ranks, codes, record)


def _wait_for(workers: Sequence[subprocess.Popen[bytes]], ends: float) -> list[int | None]:
    """Return exit codes; once one has failed, or time is up, the others are ended."""
    try:
        while time.monotonic() < ends:
            codes = [worker.poll() for worker in workers]
            if all(code is not None for code in codes) or any(codes):
                return codes
            time.sleep(0.05)
        return [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


def _take_over(
    folder: Path, machine: Machine, ranks: int, codes: Sequence[int | None], record: Record
) -> None:
    found: dict[str, list[dict[str, Any]]] = {"measurements": [], "skipped": []}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    record.measurements += found["measurements"]
    record.skipped += found["skipped"]
    if any(codes) or None in codes:
        words = (folder / "said").read_text(encoding="utf-8", errors="replace").strip()
        last = words.splitlines()[-1][:200] if words else f"exit codes {codes}"
        backend = "nccl" if machine.gpu else "gloo"
        record.skip(Case(COLLECTIVE, backend, "", {"ranks": ranks}, "wall"), last)
    say(f"{COLLECTIVE}: {len(found['measurements'])} on {ranks} ranks")


# ---------------------------------------------------------------- the machine


def fingerprint(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on: device, versions, host."""
    table: dict[str, Any] = {
        "kind": device.type,
        "device": cpu_model(),
        "cpu": cpu_model(),
        "cpu_threads": torch.get_num_threads(),
        "host_memory_bytes": host_memory_bytes(),
        "cache_bytes": cache_bytes(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        table |= {
            "device": found.name,
            "devices": torch.cuda.device_count(),
            "sms": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "clock_hz": clock_hertz(device),
            "capability": f"{found.major}.{found.minor}",
            "cuda": torch.version.cuda,
            "driver": smi(device, "driver_version").get("driver_version"),
        }
    return table


def cpu_model() -> str:
    """Return the processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def host_memory_bytes() -> float:
    """Return the host's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


STATE = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,utilization.gpu"


def smi(device: torch.device, query: str = STATE) -> dict[str, str]:
    """Return what nvidia-smi says of the device, {} where it does not run."""
    if device.type != "cuda":
        return {}
    where = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) or "0"
    where = where if where.isdigit() or where.startswith("GPU-") else f"GPU-{where}"
    command = ["nvidia-smi", f"--id={where}", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(query.split(","), (v.strip() for v in done.stdout.split(",")), strict=False))


def machine_of(device: torch.device) -> Machine:
    """Return what the plan depends on."""
    if device.type != "cuda":
        return Machine("cpu", os.cpu_count() or 1, host_memory_bytes(), 2e9)
    found = torch.cuda.get_device_properties(device)
    return Machine(
        "cuda", found.multi_processor_count, found.total_memory, 2e13, torch.cuda.device_count()
    )


def device_of(text: str) -> torch.device:
    """Return the device that the command line names; for argparse, which reports its error."""
    try:
        device = torch.device(text)
        if device.type not in BUDGET_S:
            raise RuntimeError("only cuda and cpu are measured")
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
            device = torch.device("cuda", device.index or 0)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot measure {text!r}: {first_line(error)}") from None
    return device


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    families = [*FAMILIES, COLLECTIVE]
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("record.json"), metavar="FILE")
    parser.add_argument("--device", type=device_of, default=here, help="cuda, cuda:1 or cpu")
    parser.add_argument("--budget-s", type=float, metavar="S", help=f"seconds; else {BUDGET_S}")
    parser.add_argument(
        "--only", nargs="+", choices=families, metavar="FAMILY", default=families,
        help=f"measure these alone: {', '.join(families)}",
    )  # fmt: skip
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.worker and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.absolute().parent}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, and return the exit code: 130 where it was interrupted."""
    options = arguments(argv)
    if options.worker:
        collective_worker(**{**options.worker, "machine": Machine(**options.worker["machine"])})
        return 0
    device, chosen = options.device, options.only
    budget_s = options.budget_s or BUDGET_S[device.type]
    begun, machine = time.monotonic(), machine_of(device)
    record = Record(options.out, {**fingerprint(device), "before": smi(device)})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    together = COLLECTIVE in chosen and (machine.devices > 1 or not machine.gpu)
    own_s = budget_s * (1 - COLLECTIVE_SHARE if together else 1)
    complete = False
    try:
        with torch.no_grad():
            names = [n for n in FAMILIES if n in chosen]
            run(machine, Clock(device), record, names, begun + own_s)
        if COLLECTIVE in chosen:
            run_collectives(machine, record, max(2.0, budget_s - (time.monotonic() - begun)))
        complete = True
    except DeviceLostError as error:
        say(f"the device no longer answers ({error}): the record ends here")
    except KeyboardInterrupt:
        say("interrupted: the record ends here")
        return 130
    finally:
        record.machine["after"] = smi(device)
        record.save(complete)
    say(f"{len(record.measurements)} measured, {len(record.skipped)} skipped: {options.out}")
    return 0 if record.measurements else 1


if __name__ == "__main__":
    sys.exit(main())
