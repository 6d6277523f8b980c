"""What the microbenchmarks measure of dense networks: ops over ranges of sizes.

Shapes are those of layers in general, of no network in particular. `backends.bench_split_cases`
holds those of split sequences and of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from simcore.ops import Buffer, Op


@dataclass(frozen=True, slots=True)
class Case:
    """One op to time, with the buffers that it reads and writes in place.

    ``cold`` buffers are found outside the caches, ``given`` ones hold these very numbers.
    """

    op: Op
    buffers: dict[str, Buffer]
    cold: tuple[str, ...] = ()
    cached: int = 0
    given: Mapping[str, Tensor] = field(default_factory=dict)


def make_case(
    kind: str,
    dims: dict[str, Any],
    reads: Mapping[str, tuple[Any, ...]],
    writes: tuple[str, ...],
    *,
    cold: tuple[str, ...] = (),
    attrs: dict[str, Any] | None = None,
    inplace: Mapping[str, tuple[int, ...]] | None = None,
    dtypes: dict[str, str] | None = None,
    cached: int = 0,
    given: Mapping[str, Tensor] | None = None,
) -> Case:
    """Return a case; buffers that an op changes are ``inplace``, all are fp32 unless named."""
    buffers = {
        name: Buffer(shape, (dtypes or {}).get(name, "fp32"), "state")
        for name, shape in {**reads, **(inplace or {})}.items()
    }
    for name in writes:
        buffers.setdefault(name, Buffer((1,), "fp32", "act"))
    op = Op(kind, dims, "fp32", tuple(reads), writes, attrs=attrs or {})
    return Case(op, buffers, cold, cached, given or {})


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
            yield make_case(
                "matmul",
                {"m": tokens, "n": n, "k": k},
                {"x": (tokens, k), "w": (n, k)},
                ("y",),
                cold=("w",),
                attrs={"layout": "nt", **attrs},
            )
            if tokens < 16:
                continue
            yield make_case(
                "matmul",
                {"m": tokens, "n": k, "k": n},
                {"y": (tokens, n), "w": (n, k)},
                ("x",),
                cold=("w",),
                attrs={"layout": "nn", **attrs},
            )
            yield make_case(
                "matmul",
                {"m": n, "n": k, "k": tokens},
                {"y": (tokens, n), "x": (tokens, k)},
                ("g",),
                cold=("g",),
                inplace={"g": (n, k)},
                attrs={"layout": "tn", "accumulate": True, "out_dtype": "fp32"},
            )


SIZES = (512, 16384, 131072, 524288, 3145728)
WIDTH = 512


def elementwise_cases() -> Iterator[Case]:
    """Kinds whose time follows their number of elements."""
    for size in SIZES:
        n = min(WIDTH, size)
        t = size // n
        dims = {"t": t, "n": n}
        x, row = (t, n), (n,)
        one = {"x": x}
        yield make_case("rmsnorm", dims, {"x": x, "w": row}, ("y",))
        yield make_case(
            "rmsnorm_backward", dims, {"d": x, "x": x, "w": row}, ("y", "g"), inplace={"g": row}
        )
        yield make_case("layernorm", dims, {"x": x, "w": row, "b": row}, ("y",))
        yield make_case(
            "layernorm_backward",
            dims,
            {"d": x, "x": x, "w": row},
            ("y", "g", "h"),
            inplace={"g": row, "h": row},
        )
        for kind in ("gelu", "relu"):
            yield make_case(kind, dims, one, ("y",))
            yield make_case(f"{kind}_backward", dims, {"d": x, "x": x}, ("y",))
        yield make_case("swiglu", dims, {"x": (t, 2 * n)}, ("y",))
        yield make_case("swiglu_backward", dims, {"d": x, "x": (t, 2 * n)}, ("y",))
        yield make_case("add", dims, {"x": x, "z": x}, ("y",))
        yield make_case("bias", dims, {"x": x, "b": row}, ("y",))
        yield make_case("sum_rows", dims, one, ("g",), inplace={"g": row})
        yield make_case("fill", {"n": size}, {}, ("x",), inplace={"x": (size,)}, cold=("x",))
        yield make_case("alias", dims, one, ("y",))
        yield from _head_cases(t, n)
        yield from _vocabulary_cases(size)
        yield make_case(
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
    yield make_case(
        "rope", dims, {"x": packed, "p": (t,)}, ("y",), attrs=attrs, dtypes={"p": "int64"}
    )
    yield make_case("head_norm", dims, {"x": packed, **scales}, ("y",), attrs=attrs)
    yield make_case(
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
    yield make_case("softmax_stats", dims, logits, ("s",), attrs=attrs, dtypes=dtypes)
    yield make_case(
        "softmax_loss", dims, {**logits, "s": (t, 3)}, ("l", "e"), attrs=attrs, dtypes=dtypes
    )
    yield make_case(
        "softmax_backward", dims, {**logits, "e": (t,)}, ("y",), attrs=attrs, dtypes=dtypes
    )
    yield make_case("sample", dims, {"x": (t, n)}, ("y",), attrs=attrs)
    width = min(WIDTH, size)
    rows = size // width
    table = {"w": (2048, width), "t": (rows,)}
    dims = {"t": rows, "n": width}
    yield make_case("embedding", dims, table, ("y",), dtypes=dtypes, cold=("w",))
    yield make_case(
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
        yield make_case("attention", dims, {"x": packed}, ("o", "l"), attrs=attrs)
        out = (b * s, h * d)
        yield make_case(
            "attention_backward",
            dims,
            {"d": out, "x": packed, "o": out, "l": (b, h, s)},
            ("g",),
            attrs=attrs,
        )
    for b, s, kv, h, hkv, d in CACHED:
        dims = {"b": b, "s": s, "kv": kv, "h": h, "hkv": hkv, "d": d, "dv": d}
        packed, cache = (b * s, (h + 2 * hkv) * d), (2, b, hkv, kv, d)
        yield make_case(
            "attention",
            dims,
            {"x": packed, "c": cache},
            ("o", "l"),
            cached=kv - s,
            attrs={"causal": True, "kv_dtype": "fp32"},
            cold=("c",),
        )
        heads = {"heads": h, "kv_heads": hkv, "head_dim": d, "b": b}
        yield make_case(
            "cache_append",
            {"t": b * s, "n": 2 * hkv * d},
            {"x": packed},
            ("c",),
            inplace={"c": cache},
            cached=kv - s,
            attrs=heads,
            cold=("c",),
        )
