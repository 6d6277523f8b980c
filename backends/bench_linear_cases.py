"""What the microbenchmarks measure of linear attention, over ranges of sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from backends.bench_cases import Case, make_case
from simcore.linear import Linear
from simcore.sequence import WHOLE

LAYERS = [  # batch, rows, heads, KV heads, head dim
    (1, 32, 4, 4, 32),
    (1, 128, 4, 2, 64),
    (2, 256, 4, 4, 32),
    (1, 512, 8, 2, 64),
    (4, 64, 4, 4, 64),
    (1, 1024, 4, 4, 64),
]


def linear_cases() -> Iterator[Case]:
    """Chunks, states and what a state adds to rows, forward and backward; sums of states."""
    for sizes in LAYERS:
        b, rows, _, hkv, d = sizes
        layer = Linear(WHOLE, sizes, "retnet", "fp32")
        how: dict[str, Any] = {"attrs": dict(layer.attrs)}
        tokens, (queries, pairs) = b * rows, layer.widths
        packed, out, state = (tokens, queries + pairs), (tokens, queries), (b, hkv, d, d)
        reads: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...]]] = {
            "linear_attention": ({"x": packed}, ("o",)),
            "linear_attention_backward": ({"g": out, "x": packed}, ("d",)),
            "linear_state": ({"x": packed}, ("m", "f")),
            "linear_state_backward": ({"x": packed, "m": state}, ("d",)),
            "linear_carry": ({"o": out, "x": packed, "m": state}, ("y",)),
            "linear_carry_backward": ({"g": out, "x": packed, "m": state}, ("m'", "d")),
        }
        for kind, (operands, written) in reads.items():
            yield make_case(kind, dict(layer.dims), operands, written, **how)
        for parts in (2, 4):
            dims = {"t": b * hkv * d * d, "n": 1, "parts": parts}
            every: dict[str, tuple[int, ...]] = {"e": (parts * b, hkv, d, d), "f": (hkv,)}
            attrs = {"reverse": True, "axis": "cp"}
            yield make_case("state_prefix", dims, every, ("m",), attrs=attrs)
