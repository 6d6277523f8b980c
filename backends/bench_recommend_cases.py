"""What the microbenchmarks measure of recommendation models, over ranges of sizes."""

from __future__ import annotations

from collections.abc import Iterator

from backends.bench_cases import Case, make_case

ROWS = 2048  # of a table
LOOKUPS = [  # samples, tables, width of a row
    (8, 1, 64),
    (64, 4, 64),
    (512, 4, 64),
    (1024, 8, 64),
    (4096, 8, 96),
]
PAIRS = [  # samples, rows of each, width of a row
    (8, 5, 16),
    (64, 9, 32),
    (256, 9, 64),
    (256, 27, 64),
    (1024, 17, 32),
    (2048, 9, 64),
    (512, 27, 128),
]


def recommend_cases() -> Iterator[Case]:
    """Rows of cold tables, read and changed; dot products of all pairs, forward and backward."""
    dtypes = {"i": "int64"}
    for samples, tables, n in LOOKUPS:
        t, table, index = samples * tables, (tables, ROWS, n), (samples, tables)
        dims = {"t": t, "n": n}
        yield make_case(
            "lookup", dims, {"w": table, "i": index}, ("y",), dtypes=dtypes, cold=("w",)
        )
        yield make_case(
            "descend_rows",
            dims,
            {"d": (t, n), "i": index, "w": table},
            ("w",),
            dtypes=dtypes,
            cold=("w",),
        )
    for t, rows, n in PAIRS:
        dims = {"t": t, "rows": rows, "n": n}
        reads: dict[str, tuple[int, ...]] = {"z": (t, n), "e": (t * (rows - 1), n)}
        yield make_case("pairs", dims, reads, ("y",))
        joined = {"d": (t, n + rows * (rows - 1) // 2), **reads}
        yield make_case("pairs_backward", dims, joined, ("z'", "e'"))
