"""What the microbenchmarks measure of split sequences, experts and codecs, over ranges of sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from backends.bench_cases import Case, make_case
from simcore.codecs import CODECS, coded_bytes

TILES = [  # batch, queries, keys, heads, KV heads, head dim
    (1, 32, 32, 4, 4, 32),
    (2, 64, 64, 8, 4, 32),
    (4, 64, 128, 8, 8, 64),
    (1, 128, 128, 8, 4, 64),
    (4, 128, 128, 4, 2, 32),
    (2, 256, 128, 8, 8, 32),
    (1, 256, 256, 8, 4, 64),
    (8, 128, 256, 8, 4, 32),
    (1, 512, 512, 8, 8, 64),
    (1, 64, 64, 4, 4, 64),
    (8, 32, 32, 8, 8, 32),
    (2, 128, 128, 16, 8, 64),
    (4, 256, 256, 4, 4, 32),
    (1, 384, 384, 4, 2, 64),
]
CHUNKS = [  # batch, rows before, rows, heads, KV heads, head dim
    (1, 0, 32, 4, 4, 32),
    (4, 0, 32, 8, 4, 32),
    (2, 0, 64, 8, 8, 64),
    (1, 0, 128, 8, 4, 64),
    (4, 0, 128, 4, 4, 32),
    (1, 0, 256, 8, 4, 64),
    (8, 0, 64, 8, 8, 32),
    (2, 0, 256, 16, 8, 32),
    (1, 32, 32, 4, 4, 32),
    (2, 64, 32, 8, 4, 32),
    (1, 192, 64, 8, 8, 64),
    (4, 128, 128, 4, 2, 32),
    (1, 384, 128, 8, 4, 64),
    (2, 768, 256, 4, 4, 64),
    (8, 64, 64, 8, 8, 32),
    (1, 1024, 64, 16, 8, 32),
]
BLOCKS = [(16, 128), (64, 256), (128, 512), (512, 512), (1024, 1024), (4096, 1024)]
ROUTES = [(16, 8, 2), (128, 8, 2), (512, 16, 2), (512, 64, 4), (2048, 8, 1), (2048, 32, 8)]
ROWS = [  # tokens, rows, width, top
    (16, 32, 128, 2),
    (64, 80, 512, 1),
    (128, 256, 256, 2),
    (256, 640, 256, 2),
    (512, 1024, 512, 2),
    (512, 2048, 256, 4),
    (1024, 2048, 1024, 2),
]
CODED = [(1, 2048), (2, 8192), (4, 16384), (2, 131072), (1, 524288), (4, 524288)]
GROUPS = [  # experts, rows, n, k
    (4, 64, 256, 128),
    (8, 128, 352, 256),
    (8, 512, 704, 256),
    (16, 512, 256, 512),
    (4, 1024, 512, 352),
    (8, 2048, 256, 704),
    (2, 1024, 1408, 512),
    (32, 2048, 256, 256),
]


def tile_cases() -> Iterator[Case]:
    """Tiles of attention between queries and a block of keys, under a causal mask or none."""
    for b, q, k, h, hkv, d in TILES:
        for masked in (True, False) if q == k else (False,):
            dims = {"b": b, "s": q, "kv": k, "h": h, "hkv": hkv, "d": d, "dv": d}
            tiles = ((0, q, 0, k, masked),)
            attrs = {"causal": masked, "tiles": tiles, "axis": "cp", "rows": q}
            packed, block = (b * q, (h + 2 * hkv) * d), (b * k, 2 * hkv * d)
            out = (b * q, h * d)
            both = {"x": packed, "z": block}
            yield make_case("attention_block", dims, both, ("o", "l"), attrs=attrs)
            reads = {"d": out, **both, "o": out, "l": (b, h, q)}
            yield make_case("attention_block_backward", dims, reads, ("q", "g"), attrs=attrs)


def chunk_cases() -> Iterator[Case]:
    """A chunk of a sequence's rows against all rows up to it."""
    for b, first, rows, h, hkv, d in CHUNKS:
        dims = {"b": b, "s": rows, "kv": first + rows, "h": h, "hkv": hkv, "d": d, "dv": d}
        packed, out = (b * (first + rows), (h + 2 * hkv) * d), (b * rows, h * d)
        attrs = {"causal": True, "first": first}
        yield make_case("attention_rows", dims, {"x": packed}, ("o", "l"), attrs=attrs)
        reads = {"g": packed, "d": out, "x": packed, "o": out, "l": (b, h, rows)}
        yield make_case("attention_rows_backward", dims, reads, ("g",), attrs=attrs)


def block_cases() -> Iterator[Case]:
    """Merges of partial outputs, and copies that divide rows or columns and put them together."""
    d, parts = 32, 2
    for t, n in BLOCKS:
        heads, out = n // d, (t, n)
        lse = (1, heads, t)
        dims = {"t": t, "n": n}
        reads = {"x": out, "l": lse, "z": out, "m": lse}
        yield make_case("attention_merge", dims, reads, ("o", "r"))
        yield make_case("take_columns", dims, {"x": (t, 2 * n)}, ("y",), attrs={"first": n})
        yield make_case("join_columns", dims, {"x": (t, n // 2), "z": (t, n // 2)}, ("y",))
        by: dict[str, dict[str, Any]] = {
            "columns": {"pieces": (n // 2, n // 4, n // 4)},
            "rows": {"batch": 2},
        }
        for name, more in by.items():
            for inverse in (False, True):
                split = (parts, t // parts, n) if name == "rows" else (parts, t, n // parts)
                x = split if inverse else out
                attrs = {"parts": parts, "by": name, "inverse": inverse, **more}
                yield make_case("regroup", dims, {"x": x}, ("y",), attrs=attrs)
        yield make_case("swap_blocks", dims, {"x": out}, ("y",), attrs={"outer": 4, "inner": 2})
        chunk = {"parts": 2, "first": 0, "total": 2 * t}
        yield make_case("take_rows", dims, {"x": (2 * t, n)}, ("y",), attrs=chunk)
        yield make_case(
            "put_rows",
            dims,
            {"z": (2 * t, n), "x": out},
            ("z",),
            inplace={"z": (2 * t, n)},
            attrs=chunk,
        )
        yield make_case("last_rows", dims, {"x": (4 * t, n)}, ("y",))


def _spread(count: int, choices: int) -> Tensor:
    """Return ``count`` different numbers below ``choices``, in no order."""
    return torch.randperm(choices, generator=torch.Generator().manual_seed(0))[:count]


def route_cases() -> Iterator[Case]:
    """The choice of experts, kept whole or up to a capacity, and its gradient."""
    for t, n, top in ROUTES:
        dims = {"t": t, "n": n}
        for capacity in (0, -(-t * top // n)):
            attrs = {"top": top, "capacity": capacity}
            writes = ("g", "c", "s", "r")[: 3 if capacity else 4]
            yield make_case("route", dims, {"x": (t, n)}, writes, attrs=attrs)
        chosen = torch.arange(t * top).view(t, top) % n
        reads = {"d": (t, top), "g": (t, top), "c": (t, top)}
        attrs, types = {"top": top}, {"c": "int64"}
        yield make_case(
            "route_backward", dims, reads, ("y",), attrs=attrs, dtypes=types, given={"c": chosen}
        )


def row_cases() -> Iterator[Case]:
    """Rows brought to experts and back, and the gradients of that."""
    for t, rows, n, top in ROWS:
        slots = _spread(t * top, max(rows, t * top)).view(t, top)
        given, types = {"s": slots}, {"s": "int64"}
        dims, attrs = {"t": t, "rows": rows, "n": n}, {"top": top}
        tokens, experts, each = (t, n), (rows, n), (t, top)

        def moved(
            kind: str,
            reads: dict[str, tuple[int, ...]],
            *writes: str,
            dims: dict[str, int] = dims,
            attrs: dict[str, int] = attrs,
            types: dict[str, str] = types,
            given: dict[str, Tensor] = given,
        ) -> Case:
            return make_case(kind, dims, reads, writes, attrs=attrs, dtypes=types, given=given)

        yield moved("permute", {"x": tokens, "s": each}, "y")
        yield moved("permute_backward", {"d": experts, "s": each}, "y")
        yield moved("combine", {"x": experts, "g": each, "s": each}, "y")
        yield moved("combine_backward", {"d": tokens, "x": experts, "g": each, "s": each}, "y", "h")


def group_cases() -> Iterator[Case]:
    """Products of rows with their experts' matrices: equal shares in a batch, and sorted rows."""
    for e, m, n, k in GROUPS:
        share = m // e
        uneven = torch.tensor([share + (i % 2 * 2 - 1) * (share // 2) for i in range(e)])
        for counts in (None, uneven):
            more = {} if counts is None else {"c": (e,)}
            given = {} if counts is None else {"c": counts}
            types = {"c": "int64"}
            for layout in ("nt", "nn", "tn"):
                rows, width = (n, k) if layout != "nn" else (k, n)
                dims = {"e": e, "touched": e, "m": m, "n": n, "k": k}
                if layout == "tn":
                    reads = {"d": (m, n), "x": (m, k), **more}
                    attrs = {"layout": "tn", "out_dtype": "fp32"}
                    yield make_case(
                        "grouped_matmul",
                        dims,
                        reads,
                        ("g",),
                        attrs=attrs,
                        inplace={"g": (e, n, k)},
                        cold=("g",),
                        dtypes=types,
                        given=given,
                    )
                    continue
                reads = {"x": (m, k), "w": (e, rows, width), **more}
                attrs = {"layout": layout, "weight_dtype": "fp32"}
                yield make_case(
                    "grouped_matmul",
                    dims,
                    reads,
                    ("y",),
                    attrs=attrs,
                    cold=("w",),
                    dtypes=types,
                    given=given,
                )


def codec_cases() -> Iterator[Case]:
    """Values coded, with and without what was lost before, and decoded, joined or summed."""
    codec = "int8"
    for pieces, n in CODED:
        size, dims = coded_bytes(n), {"t": pieces, "n": n}
        values, code = {"x": (pieces * n,)}, {"c": (pieces * size,)}
        attrs = {"codec": codec, "coded": size, "flops": CODECS[codec].vector_flops}
        yield make_case("encode", dims, values, ("y",), attrs=attrs)
        kept = {"e": (pieces * n,)}
        yield make_case("encode", dims, {**values, **kept}, ("y", "e"), inplace=kept, attrs=attrs)
        for summed in (False, True):
            shape = (n,) if summed else (pieces * n,)
            more = {**attrs, "summed": summed, "shape": shape}
            yield make_case("decode", dims, code, ("y",), attrs=more, dtypes={"c": "uint8"})
