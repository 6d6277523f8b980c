"""Recurrent mixers: gated networks, serial, scanned, solved by Newton rounds or fused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from simcore.mixers.mixer import (
    BATCH,
    Array,
    Dims,
    Form,
    Mixer,
    MixerCost,
    doubling_combines,
    doubling_levels,
    tree_combines,
    tree_levels,
)

# Kernels of a step written as separate array operations, as frameworks run it eagerly: products,
# additions, gates, updates. A test counts them in an executed layer.
EAGER_LAUNCHES = {"gru": 13.0, "lstm": 12.0, "diagonal_gru": 13.0}
_NETWORK = {**BATCH, "inputs": "width of the input", "hidden": "width of the state"}
_HEADED = {**_NETWORK, "heads": "blocks of the recurrent matrix; divides hidden"}


def _rows(s: Dims) -> Array:
    return np.asarray(s["batch"] * s["seq_len"])


def _projection(s: Dims, gates: float) -> Array:
    """Return FLOPs of the input's products, one for all tokens."""
    return np.asarray(2 * _rows(s) * s["inputs"] * gates * s["hidden"])


def _io(s: Dims, gates: float) -> Array:
    """Return bytes: input, its products written and read, output, input weights."""
    tokens = _rows(s) * (s["inputs"] + (2 * gates + 1) * s["hidden"])
    return np.asarray((tokens + gates * s["inputs"] * s["hidden"]) * s["element_bytes"])


def _state(s: Dims, vectors: float) -> Array:
    return np.asarray(s["batch"] * vectors * s["hidden"] * s["element_bytes"])


def _step_products(s: Dims, gates: float, diagonal: bool) -> Array:
    """Return FLOPs of one token's recurrent products; the matrix is block-diagonal over heads."""
    if diagonal:
        return np.zeros_like(s["hidden"])
    return np.asarray(2 * gates * s["hidden"] ** 2 / s.get("heads", np.asarray(1.0)))


def recurrent_weight_bytes(s: Dims, gates: float, diagonal: bool = False) -> Array:
    """Return bytes of the recurrent weights of all heads."""
    per_unit = np.asarray(1.0) if diagonal else s["hidden"] / s.get("heads", np.asarray(1.0))
    return np.asarray(gates * s["hidden"] * per_unit * s["element_bytes"])


def _serial(name: str, gates: float, vectors: float, diagonal: bool = False) -> Form:
    """Return token after token, each a chain of kernels that reload the recurrent weights."""

    def form(s: Dims) -> MixerCost:
        weights = recurrent_weight_bytes(s, gates, diagonal)
        return MixerCost(
            matrix_flops=_projection(s, gates) + _rows(s) * _step_products(s, gates, diagonal),
            vector_flops=_rows(s) * s["hidden"] * EAGER_LAUNCHES[name],
            hbm_bytes=_io(s, gates) + s["seq_len"] * (weights + 2 * _state(s, vectors)),
            serial_depth=s["seq_len"],
            launches=1 + EAGER_LAUNCHES[name] * s["seq_len"],
            state_bytes=_state(s, vectors),
            on_chip_bytes=np.zeros_like(weights),
            pieces=s["batch"] * s.get("heads", np.asarray(1.0)),
            step="launch",
        )

    return form


def _fused(name: str, gates: float, vectors: float) -> Form:
    """Return one kernel that keeps the recurrent weights on the chip (FlashRNN 2024).

    The blocks of a head meet after every token.
    """

    def form(s: Dims) -> MixerCost:
        weights = recurrent_weight_bytes(s, gates)
        blocks = s["heads"] * np.ceil(s["hidden"] / s["heads"] / 16)
        return MixerCost(
            matrix_flops=_projection(s, gates) + _rows(s) * _step_products(s, gates, False),
            vector_flops=_rows(s) * s["hidden"] * EAGER_LAUNCHES[name],
            hbm_bytes=_io(s, gates) + weights,
            serial_depth=s["seq_len"],
            launches=2 + 0 * weights,
            state_bytes=_state(s, vectors),
            on_chip_bytes=weights / blocks,
            pieces=blocks,
            step="grid",
        )

    return form


def _newton(gates: float, diagonal: bool) -> Form:
    """Return ``rounds`` rounds: every step's value and Jacobian at once, then a linear scan.

    h_t = f(h_(t-1), x_t) is one system in all h; its Newton update solves
    d_t = J_t d_(t-1) + r_t (Lim et al. 2023, DEER, eq. 3; Danieli et al. 2025, ParaRNN). The scan
    combines pairs (J, r), n x n matrices unless the Jacobian is diagonal, and goes five times
    over each level: combine, fill and interleave read and write 1.5, 1.5 and 2 of its elements.
    """

    def form(s: Dims) -> MixerCost:
        n, rounds, length = s["hidden"], s["rounds"], s["seq_len"]
        pair = (2 * n) if diagonal else (n * n + n)
        combines = s["batch"] * tree_combines(length)
        product = np.zeros_like(n) if diagonal else 2 * n**3 + 2 * n**2
        elementwise = 3 * n if diagonal else n
        jacobian = np.zeros_like(n) if diagonal else 2 * n**2 + _step_products(s, gates, False)
        scan_bytes = 2 * 5 * _rows(s) * pair * s["element_bytes"]
        eval_bytes = _rows(s) * ((gates + 2) * n + pair) * s["element_bytes"]
        return MixerCost(
            matrix_flops=_projection(s, gates)
            + rounds * (combines * product + _rows(s) * jacobian),
            vector_flops=rounds * (combines * elementwise + _rows(s) * pair * 8),
            hbm_bytes=_io(s, gates) + rounds * (eval_bytes + scan_bytes),
            serial_depth=rounds * (2 + tree_levels(length)),
            launches=1 + rounds * (4 + 2 * tree_levels(length)),
            state_bytes=_state(s, 1),
            on_chip_bytes=pair * s["element_bytes"],
            pieces=_rows(s) / 2,
            step="launch",
            small_products=np.zeros_like(n) if diagonal else rounds * combines,
            small_side=n,
        )

    return form


def _newton_fused(gates: float) -> Form:
    """Return the diagonal rounds in one kernel: the sequence stays on the chip between rounds."""

    def form(s: Dims) -> MixerCost:
        levels = tree_levels(s["seq_len"])
        return replace(
            _newton(gates, diagonal=True)(s),
            hbm_bytes=_io(s, gates),
            serial_depth=s["rounds"] * (2 + levels),
            launches=2 + 0 * levels,
            on_chip_bytes=s["seq_len"] * 4 * s["element_bytes"],
            pieces=s["batch"] * s["hidden"],
            step="unit",
        )

    return form


# ------------------------------------------------------------------ gates free of the state


def _minimal_serial(gates: float) -> Form:
    def form(s: Dims) -> MixerCost:
        cells = _rows(s) * s["hidden"]
        return MixerCost(
            matrix_flops=_projection(s, gates),
            vector_flops=2 * cells,
            hbm_bytes=_io(s, gates) + 2 * s["seq_len"] * _state(s, 1),
            serial_depth=s["seq_len"],
            launches=1 + 2 * s["seq_len"],
            state_bytes=_state(s, 1),
            on_chip_bytes=np.zeros_like(cells),
            pieces=s["batch"] * s["hidden"],
            step="launch",
        )

    return form


def _minimal_scan(gates: float) -> Form:
    """Return the scan of (a, b) pairs, each level three operations on what it combines."""

    def form(s: Dims) -> MixerCost:
        width = s["batch"] * s["hidden"]
        levels = doubling_levels(s["seq_len"])
        return MixerCost(
            matrix_flops=_projection(s, gates),
            vector_flops=3 * width * doubling_combines(s["seq_len"]),
            hbm_bytes=_io(s, gates),
            serial_depth=levels,
            launches=2 + 0 * levels,
            state_bytes=_state(s, 1),
            on_chip_bytes=2 * s["seq_len"] * s["element_bytes"],
            pieces=width,
        )

    return form


def _minimal_parallel(gates: float) -> Form:
    """Return cumulative sums of logarithms (Heinsen 2023), each a pass over all tokens."""

    def form(s: Dims) -> MixerCost:
        cells = _rows(s) * s["hidden"]
        levels = doubling_levels(s["seq_len"])
        return MixerCost(
            matrix_flops=_projection(s, gates),
            vector_flops=8 * cells,
            hbm_bytes=_io(s, gates) + 12 * cells * s["element_bytes"],
            serial_depth=2 * levels,
            launches=8 + 0 * levels,
            state_bytes=_state(s, 1),
            on_chip_bytes=s["seq_len"] * s["element_bytes"],
            pieces=s["batch"] * s["hidden"],
        )

    return form


# ------------------------------------------------------------------ history and grids


def _pgn(serial: bool) -> Form:
    """Return history gathered over ``window`` tokens, then one gated step (PGN 2024)."""

    def form(s: Dims) -> MixerCost:
        n, gathered = s["hidden"], s["window"] * s["inputs"]
        steps = s["seq_len"] if serial else np.ones_like(n)
        weights = (gathered * n + (s["inputs"] + n) * 2 * n) * s["element_bytes"]
        io = _rows(s) * (s["inputs"] + n) * s["element_bytes"]
        return MixerCost(
            matrix_flops=2 * _rows(s) * n * (gathered + 2 * (s["inputs"] + n)),
            vector_flops=6 * _rows(s) * n,
            hbm_bytes=io + steps * weights,
            serial_depth=steps,
            launches=3 * steps,
            state_bytes=s["batch"] * gathered * s["element_bytes"],
            on_chip_bytes=gathered * s["element_bytes"],
            pieces=(s["batch"] if serial else _rows(s)) * n / 64,
            step="launch" if serial else "unit",
        )

    return form


def _grid_serial(s: Dims) -> MixerCost:
    """Return one anti-diagonal of the grid after another."""
    cells = s["batch"] * s["side"] ** 2 * s["width"]
    front = 2 * s["side"] - 1
    return MixerCost(
        matrix_flops=np.zeros_like(cells),
        vector_flops=4 * cells,
        hbm_bytes=2 * cells * s["element_bytes"]
        + 2 * s["batch"] * s["side"] ** 2 * s["element_bytes"],
        serial_depth=front,
        launches=front,
        state_bytes=s["batch"] * s["side"] * s["width"] * s["element_bytes"],
        on_chip_bytes=s["side"] * s["element_bytes"],
        pieces=s["batch"] * s["width"],
        step="launch",
    )


def _grid_scan(s: Dims) -> MixerCost:
    """Return h = (I - A)^-1 x as the product of (I + A^(2^l)) over levels l.

    A holds the transitions between neighbours; no path is longer than 2 side - 2, so its powers
    end (pLSTM 2025 merges blocks of the grid instead, with as many levels).
    """
    nodes = s["side"] ** 2
    levels = np.maximum(1.0, np.ceil(np.log2(2 * s["side"] - 1)))
    per_level = 2 * nodes**2 * s["width"]
    squares = (levels - 1) * 2 * nodes**3
    return MixerCost(
        matrix_flops=s["batch"] * (levels * per_level + squares),
        vector_flops=s["batch"] * levels * nodes * s["width"],
        hbm_bytes=s["batch"]
        * (2 * nodes * s["width"] + levels * 3 * nodes**2)
        * s["element_bytes"],
        serial_depth=levels,
        launches=3 * levels,
        state_bytes=s["batch"] * s["side"] * s["width"] * s["element_bytes"],
        on_chip_bytes=64 * 64 * s["element_bytes"],
        pieces=s["batch"] * nodes / 64,
        step="launch",
    )


def _minimal(name: str, gates: float) -> Mixer:
    forms = {
        "parallel": _minimal_parallel(gates),
        "scan": _minimal_scan(gates),
        "recurrent": _minimal_serial(gates),
    }
    return Mixer(name, _NETWORK, forms, "Feng et al. 2024: Were RNNs all we needed?")


_ROUNDS = {"rounds": "Newton rounds until the states stand still"}

NONLINEAR_MIXERS = (
    Mixer(
        "gru",
        {**_NETWORK, **_ROUNDS},
        {"recurrent": _serial("gru", 3, 1), "newton": _newton(3, diagonal=False)},
        "Cho et al. 2014; newton: Lim et al. 2023, DEER",
    ),
    Mixer(
        "diagonal_gru",
        {**_NETWORK, **_ROUNDS},
        {
            "recurrent": _serial("diagonal_gru", 3, 1, diagonal=True),
            "newton": _newton(3, diagonal=True),
            "fused": _newton_fused(3),
        },
        "Danieli et al. 2025: ParaRNN",
    ),
    Mixer(
        "lstm",
        _HEADED,
        {"recurrent": _serial("lstm", 4, 2), "fused": _fused("lstm", 4, 2)},
        "Hochreiter and Schmidhuber 1997; fused: Poeppel et al. 2024, FlashRNN",
    ),
    _minimal("min_gru", 2),
    _minimal("min_lstm", 3),
    Mixer(
        "pgn",
        {**_NETWORK, "window": "tokens of history gathered at once"},
        {"parallel": _pgn(serial=False), "recurrent": _pgn(serial=True)},
        "Jia et al. 2024: PGN",
    ),
    Mixer(
        "plstm",
        {
            "batch": "grids",
            "side": "nodes along a side",
            "width": "channels",
            "element_bytes": "bytes of one element",
        },
        {"scan": _grid_scan, "recurrent": _grid_serial},
        "Poeppel et al. 2025: pLSTM",
    ),
)
