"""Units of work: `Op`, the buffers that ops touch, and the FLOPs and bytes of every op kind.

An op's ``kind`` keys three registries: `WORK` here (FLOPs and bytes), the seconds in
`hwmodels.kernels`, and the torch function in `backends.torch_ops`. The dimensions of an op are
numbers, or numpy arrays when one lowering prices a whole lattice of candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from simcore.dtypes import dtype_bytes

Size = Any  # int, float, or a numpy array of either: one value per candidate of a lattice

COMPUTE = "compute"


@dataclass(frozen=True, slots=True)
class Op:
    """One unit of work on one rank.

    ``reads`` and ``writes`` name buffers of the surrounding block; a trailing ``+`` means the
    next layer's buffer of that name. ``group`` is the mesh axis of a collective.
    """

    kind: str
    dims: Mapping[str, Size]
    dtype: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    stream: str = COMPUTE
    group: str = ""
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_communication(self) -> bool:
        """Whether other ranks take part."""
        return self.kind in COMMUNICATION


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor of a block: local dims, dtype and lifetime.

    ``scope``: ``weight``, ``grad``, ``state`` (kept between steps), ``cache`` (kept between
    passes), ``data`` (given), ``act`` (one microbatch; freed after its last reader), ``host`` (as
    act, in the host's memory) or ``work`` (one action; freed after its last reader).
    A buffer with a ``base`` is a view of ``dims`` at element ``offset`` of that flat buffer.
    """

    dims: tuple[Size, ...]
    dtype: str
    scope: str = "act"
    layered: bool = True  # False: one instance for all layers (embedding and head weights)
    base: str = ""
    offset: Size = 0
    part: str = ""  # a view of the rank's equal share of the base along this group
    pieces: tuple[Size, ...] = ()  # weights: full rows fused along dim 0, each sharded alone
    shard_dim: int = -1  # weights: the dim split over tp; -1 replicated
    partial: bool = (
        False  # a replicated weight of which every tensor rank has a part of the gradient
    )
    init: str = "normal"  # normal, ones, zeros
    experts: int = 0  # expert weights: how many the layer has, of which this rank holds dims[0]
    expert_group: str = ""  # the group that shares them out
    beside_bytes: Size = 0  # what a framework keeps with it, for as long as it lives

    @property
    def elements(self) -> Size:
        """Number of elements held by this rank."""
        total: Size = 1
        for dim in self.dims:
            total = total * dim
        return total

    @property
    def size_bytes(self) -> Size:
        """Bytes held by this rank."""
        return self.elements * dtype_bytes(self.dtype)

    @property
    def held_bytes(self) -> Size:
        """Bytes held by this rank, what lives beside the tensor included."""
        return self.size_bytes + self.beside_bytes


@dataclass(frozen=True, slots=True)
class Work:
    """What an op costs whatever runs it.

    ``flops`` are matrix-product FLOPs (2 m n k), ``vector_flops`` all other arithmetic;
    bytes are the compulsory traffic with main memory; ``payload_bytes`` is what a collective
    carries, in nccl-tests' convention.
    """

    flops: Size = 0
    vector_flops: Size = 0
    read_bytes: Size = 0
    write_bytes: Size = 0
    payload_bytes: Size = 0


def _matmul(op: Op) -> Work:
    m, n, k = op.dims["m"], op.dims["n"], op.dims["k"]
    size = dtype_bytes(op.dtype)
    weight = dtype_bytes(op.attrs.get("weight_dtype", op.dtype))
    out = dtype_bytes(op.attrs.get("out_dtype", op.dtype))
    accumulate = m * n * out if op.attrs.get("accumulate") else 0
    return Work(
        flops=2 * m * n * k,
        read_bytes=m * k * size + n * k * weight + accumulate,
        write_bytes=m * n * out,
    )


def _embedding(op: Op) -> Work:
    moved = op.dims["t"] * op.dims["n"] * dtype_bytes(op.dtype)
    return Work(read_bytes=moved, write_bytes=moved)


def _embedding_backward(op: Op) -> Work:
    rows = op.dims["t"] * op.dims["n"]
    grad = rows * dtype_bytes(op.attrs.get("out_dtype", op.dtype))
    return Work(vector_flops=rows, read_bytes=rows * dtype_bytes(op.dtype) + grad, write_bytes=grad)


def _elementwise(reads: float, writes: float, flops: float) -> Callable[[Op], Work]:
    """Return the work of a kind that touches ``t x n`` elements so many times each."""

    def work(op: Op) -> Work:
        elements = op.dims["t"] * op.dims["n"]
        size = elements * dtype_bytes(op.dtype)
        return Work(
            vector_flops=flops * elements, read_bytes=reads * size, write_bytes=writes * size
        )

    return work


def _attention_pairs(op: Op) -> Size:
    """Return the query-key pairs that are multiplied, before any causal saving.

    Tasks of several sizes have the ``area`` of them all.
    """
    if "area" in op.dims:
        return op.dims["h"] * op.dims["area"]
    return op.dims["b"] * op.dims["h"] * op.dims["s"] * op.dims["kv"]


def _attention_io(op: Op) -> tuple[Size, Size]:
    """Return the bytes of queries (or outputs) and of keys plus values."""
    d, tokens = op.dims, op.dims["b"]
    queries = tokens * d["s"] * d["h"] * d["d"] * dtype_bytes(op.dtype)
    cached = tokens * d["kv"] * d["hkv"] * (d["d"] + d["dv"])
    return queries, cached * dtype_bytes(op.attrs.get("kv_dtype", op.dtype))


def _attention(op: Op) -> Work:
    queries, keys_values = _attention_io(op)
    pairs = _attention_pairs(op)
    lse = op.dims["b"] * op.dims["h"] * op.dims["s"] * 4
    return Work(
        flops=2 * pairs * (op.dims["d"] + op.dims["dv"]),
        vector_flops=5 * pairs,  # scale, max, subtract, exp, sum
        read_bytes=queries + keys_values,
        write_bytes=queries + lse,
    )


def _attention_backward(op: Op) -> Work:
    """Five products: scores again, dV, dP, dQ, dK (FlashAttention-2, algorithm 2)."""
    queries, keys_values = _attention_io(op)
    pairs = _attention_pairs(op)
    return Work(
        flops=2 * pairs * (3 * op.dims["d"] + 2 * op.dims["dv"]),
        vector_flops=8 * pairs,
        read_bytes=3 * queries + keys_values,
        write_bytes=queries + keys_values,
    )


def _attention_rows_backward(op: Op) -> Work:
    """As above; the gradients of keys and values are added to those of other rows."""
    done, (_, keys_values) = _attention_backward(op), _attention_io(op)
    return replace(done, read_bytes=done.read_bytes + keys_values)


def _cache_append(op: Op) -> Work:
    moved = op.dims["t"] * op.dims["n"]
    return Work(
        read_bytes=moved * dtype_bytes(op.dtype),
        write_bytes=moved * dtype_bytes(op.attrs.get("kv_dtype", op.dtype)),
    )


def _adam(op: Op) -> Work:
    """Read gradient, parameter, two moments; write the last three (and a low-precision copy)."""
    n = op.dims["n"]
    grad = dtype_bytes(op.attrs["grad_dtype"])
    weight = dtype_bytes(op.dtype)
    master = 4.0 if op.attrs.get("master") else 0.0
    return Work(
        vector_flops=12 * n,
        read_bytes=n * (grad + weight + 8 + master),
        write_bytes=n * (weight + 8 + master),
    )


def _fill(op: Op) -> Work:
    return Work(write_bytes=op.dims["n"] * dtype_bytes(op.dtype))


def _grouped_matmul(op: Op) -> Work:
    """Every row times its expert's matrix; ``tn`` adds to the gradients of the matrices."""
    d, size = op.dims, dtype_bytes(op.dtype)
    weights, rows = d["touched"] * d["n"] * d["k"], d["m"]
    flops = 2 * rows * d["n"] * d["k"]
    if op.attrs["layout"] == "tn":
        moved = weights * dtype_bytes(op.attrs["out_dtype"])
        return Work(flops, read_bytes=rows * (d["n"] + d["k"]) * size + moved, write_bytes=moved)
    moved = weights * dtype_bytes(op.attrs.get("weight_dtype", op.dtype))
    return Work(flops, read_bytes=rows * d["k"] * size + moved, write_bytes=rows * d["n"] * size)


def _route(op: Op) -> Work:
    """Read the scores; write gates and the two index tables (read gates and choices backward)."""
    scores = op.dims["t"] * op.dims["n"]
    chosen = op.dims["t"] * op.attrs["top"]
    size = dtype_bytes(op.dtype)
    return Work(
        vector_flops=scores + 4 * chosen,
        read_bytes=scores * size,
        write_bytes=chosen * (size + 2 * dtype_bytes("int64")),
    )


def _route_backward(op: Op) -> Work:
    scores = op.dims["t"] * op.dims["n"]
    chosen = op.dims["t"] * op.attrs["top"]
    size = dtype_bytes(op.dtype)
    return Work(
        vector_flops=5 * chosen,
        read_bytes=chosen * (2 * size + dtype_bytes("int64")),
        write_bytes=scores * size,
    )


def _rows(tokens: float, rows: float, flops: float, *, back: bool) -> Callable[[Op], Work]:
    """Return the work of moving ``t`` tokens to ``rows`` rows of ``n``, or back.

    It reads so many times the one and the other, and writes the rows, or with ``back`` the tokens.
    """

    def work(op: Op) -> Work:
        size = op.dims["n"] * dtype_bytes(op.dtype)
        token_bytes, row_bytes = op.dims["t"] * size, op.dims["rows"] * size
        return Work(
            vector_flops=flops * op.dims["t"] * op.attrs["top"] * op.dims["n"],
            read_bytes=tokens * token_bytes + rows * row_bytes,
            write_bytes=token_bytes if back else row_bytes,
        )

    return work


def _descend_rows(op: Op) -> Work:
    """Read ``t`` gradients of rows of ``n``; read, change and write the rows of the tables."""
    size = op.dims["t"] * op.dims["n"] * dtype_bytes(op.dtype)
    return Work(vector_flops=2 * op.dims["t"] * op.dims["n"], read_bytes=2 * size, write_bytes=size)


def _pairs(op: Op) -> Work:
    """Every row of a sample times every other; keep the row given and each pair's product once."""
    t, rows, n = op.dims["t"], op.dims["rows"], op.dims["n"]
    size = t * dtype_bytes(op.dtype)
    out = n + rows * (rows - 1) / 2
    read, written = (rows * n, out) if op.kind == "pairs" else (rows * n + out, rows * n)
    return Work(2 * t * rows * rows * n, read_bytes=read * size, write_bytes=written * size)


def _encode(op: Op) -> Work:
    """Read ``t`` pieces of ``n`` values, and what was lost before; write their ``coded`` bytes."""
    values, times = op.dims["t"] * op.dims["n"], len(op.reads)
    return Work(
        vector_flops=(op.attrs["flops"] + 2 * (times - 1)) * values,
        read_bytes=times * values * dtype_bytes(op.dtype),
        write_bytes=op.dims["t"] * op.attrs["coded"] + (times - 1) * values * dtype_bytes(op.dtype),
    )


def _decode(op: Op) -> Work:
    """Read ``t`` coded pieces; write their values, or with ``summed`` the sum of the pieces."""
    values = op.dims["t"] * op.dims["n"]
    written = op.dims["n"] if op.attrs["summed"] else values
    return Work(
        vector_flops=(2 if op.attrs["summed"] else 1) * values,
        read_bytes=op.dims["t"] * op.attrs["coded"],
        write_bytes=written * dtype_bytes(op.dtype),
    )


def _linear(
    products: tuple[float, float, float],
    reads: tuple[float, float, float],
    writes: tuple[float, float, float],
    *,
    chunked: bool = False,
) -> Callable[[Op], Work]:
    """Return the work of a part of linear attention (`simcore.linear`).

    ``products``: with a chunk's tokens per query, with the state per query, and per key;
    ``reads`` and ``writes``: how often the columns of queries (or outputs), of keys and values,
    and a state in fp32, which ``chunked`` exists for every chunk of ``c`` tokens.
    """

    def work(op: Op) -> Work:
        d = op.dims
        chunks = -(-d["s"] // d["c"]) if chunked else 1
        rows = d["b"] * (chunks * d["c"] if chunked else d["s"])  # the last chunk is filled up
        queries, keys = rows * d["h"] * d["d"], rows * d["hkv"] * d["d"]
        within, out, into = products
        states = d["b"] * d["hkv"] * chunks * d["d"] ** 2
        columns = d["b"] * d["s"] * d["d"] * dtype_bytes(op.dtype)
        sizes = columns * d["h"], columns * 2 * d["hkv"], states * 4.0
        return Work(
            flops=2 * (queries * (within * d["c"] + out * d["d"]) + into * keys * d["d"]),
            vector_flops=within / 2 * rows * d["h"] * d["c"] + queries + keys + 2 * states,
            read_bytes=sum(times * size for times, size in zip(reads, sizes, strict=True)),
            write_bytes=sum(times * size for times, size in zip(writes, sizes, strict=True)),
        )

    return work


def _state_prefix(op: Op) -> Work:
    """Sum the states of ``parts`` ranks, each faded."""
    size = op.dims["t"] * dtype_bytes(op.dtype)
    parts = op.dims["parts"]
    return Work(vector_flops=2 * parts * op.dims["t"], read_bytes=parts * size, write_bytes=size)


def _collective(op: Op) -> Work:
    return Work(payload_bytes=op.dims["n"] * dtype_bytes(op.dtype))


COMMUNICATION = frozenset(
    {
        *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "ring_shift"),
        *("state_scan", "quorum", "quorum_reduce", "send", "recv"),
    }
)

FREE = frozenset({"alias", "release"})  # no kernel runs: a name, a place to wait
COPIES = frozenset({"offload", "fetch"})  # between a device and its host
WORK: dict[str, Callable[[Op], Work]] = {
    "matmul": _matmul,
    "embedding": _embedding,
    "embedding_backward": _embedding_backward,
    "rmsnorm": _elementwise(1, 1, 4),
    "rmsnorm_backward": _elementwise(2, 1, 10),
    "layernorm": _elementwise(1, 1, 7),
    "layernorm_backward": _elementwise(2, 1, 14),
    "head_norm": _elementwise(1, 1, 4),
    "head_norm_backward": _elementwise(2, 1, 10),
    "rope": _elementwise(1, 1, 6),
    "swiglu": _elementwise(2, 1, 5),
    "swiglu_backward": _elementwise(3, 2, 10),
    "gelu": _elementwise(1, 1, 8),
    "gelu_backward": _elementwise(2, 1, 12),
    "relu": _elementwise(1, 1, 1),
    "relu_backward": _elementwise(2, 1, 1),
    "add": _elementwise(2, 1, 1),
    "bias": _elementwise(1, 1, 1),
    "sum_rows": _elementwise(1, 0, 1),
    "softmax_stats": _elementwise(1, 0, 4),
    "softmax_loss": _elementwise(1, 0, 4),
    "softmax_backward": _elementwise(1, 1, 4),
    "last_rows": _elementwise(1, 1, 0),
    "sample": _elementwise(1, 0, 1),
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_block": _attention,
    "attention_block_backward": _attention_backward,
    "attention_rows": _attention,
    "attention_rows_backward": _attention_rows_backward,
    "take_rows": _elementwise(1, 1, 0),
    "offload": _elementwise(1, 0, 0),  # the host's memory is not the device's
    "fetch": _elementwise(0, 1, 0),
    "release": lambda op: Work(),
    "put_rows": _elementwise(1, 1, 0),
    "attention_tasks": _attention,
    "attention_tasks_backward": _attention_backward,
    "attention_merge": _elementwise(2, 1, 3),
    "take_columns": _elementwise(1, 1, 0),
    "split_columns": _elementwise(1, 1, 0),
    "join_columns": _elementwise(1, 1, 0),
    "gather_rows": _elementwise(1, 1, 0),
    "scatter_rows": _elementwise(2, 1, 1),
    "regroup": _elementwise(1, 1, 0),
    "linear_attention": _linear((2, 1, 1), (1, 1, 1), (1, 0, 1), chunked=True),
    "linear_attention_backward": _linear((5, 2, 3), (2, 1, 2), (1, 1, 2), chunked=True),
    "linear_state": _linear((0, 0, 1), (0, 1, 0), (0, 0, 1)),
    "linear_state_backward": _linear((0, 0, 2), (0, 1, 1), (0, 1, 0)),
    "linear_carry": _linear((0, 1, 0), (2, 0, 1), (1, 0, 0)),
    "linear_carry_backward": _linear((0, 2, 0), (2, 0, 1), (1, 0, 1)),
    "state_prefix": _state_prefix,
    "cache_append": _cache_append,
    "route": _route,
    "route_backward": _route_backward,
    "permute": _rows(1, 0, 0, back=False),
    "permute_backward": _rows(0, 1, 1, back=True),
    "combine": _rows(0, 1, 2, back=True),
    "combine_backward": _rows(1, 1, 3, back=False),
    "swap_blocks": _elementwise(1, 1, 0),
    "grouped_matmul": _grouped_matmul,
    "lookup": _embedding,
    "descend_rows": _descend_rows,
    "pairs": _pairs,
    "pairs_backward": _pairs,
    "encode": _encode,
    "decode": _decode,
    "adam": _adam,
    "fill": _fill,
    "alias": lambda op: Work(),
    "all_reduce": _collective,
    "all_gather": _collective,
    "reduce_scatter": _collective,
    "all_to_all": _collective,
    "ring_shift": _collective,
    "quorum": _collective,
    "quorum_reduce": _collective,
    "state_scan": _collective,
    "send": _collective,
    "recv": _collective,
}


def work(op: Op) -> Work:
    """Return the FLOPs and bytes of ``op``."""
    return WORK[op.kind](op)
