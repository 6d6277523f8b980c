"""What a sequence mixer is: named forms that compute one function at different costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simcore.errors import InputError, nearest, unknown

Array = NDArray[np.float64]
Shape = Mapping[str, Any]  # column -> number or array; all broadcast
Dims = dict[str, Array]  # a checked shape


@dataclass(frozen=True, slots=True)
class MixerCost:
    """The work of one form over whole sequences, forward only; numbers or arrays.

    Matrix products count two FLOPs per multiply-add, masked entries included, as a library that
    skips nothing executes them. ``serial_depth`` is the length of the longest chain of steps that
    wait for one another; ``step`` says at what they wait: "unit" (inside one block of a kernel),
    "grid" (all blocks of a kernel) or "launch" (the next kernel). ``pieces`` is how many blocks
    can work at once. ``small_products`` of the matrix products are a batch of square ones, each of
    side ``small_side``.
    """

    matrix_flops: Any
    vector_flops: Any  # one per element and elementwise operation
    hbm_bytes: Any  # inputs, outputs and what does not stay on the chip in between
    serial_depth: Any
    launches: Any  # kernels
    state_bytes: Any  # carried from token to token in the recurrent form
    on_chip_bytes: Any  # that one block needs at hand
    pieces: Any
    step: str = "unit"
    small_products: Any = 0.0
    small_side: Any = 1.0
    l2_bytes: Any = 0.0  # between L2 and the blocks, where they read inputs more than once


Form = Callable[[Dims], MixerCost]


@dataclass(frozen=True, slots=True)
class Mixer:
    """A sequence mixer: its forms by name, and the columns of a shape that they read."""

    name: str
    columns: Mapping[str, str]  # column -> meaning
    forms: Mapping[str, Form]
    source: str

    def cost(self, form: str, shape: Shape) -> MixerCost:
        """Return what ``form`` costs at ``shape``, vectorised over its arrays.

        Raises `InputError` for an unknown form, a column that is missing, unknown or not positive.
        """
        if form not in self.forms:
            raise unknown(f"form of {self.name}", form, self.forms)
        return self.forms[form](self.check(shape))

    def check(self, shape: Shape) -> Dims:
        """Return the shape as arrays, or raise `InputError` with what is wrong with it."""
        for name in shape:
            if name not in self.columns:
                near = nearest(name, self.columns)
                hint = f"did you mean {near!r}?" if near else f"it has {', '.join(self.columns)}."
                raise InputError(f"mixer {self.name} has no column {name!r}: {hint}")
        missing = [name for name in self.columns if name not in shape]
        if missing:
            raise InputError(
                f"mixer {self.name} needs {missing[0]!r} ({self.columns[missing[0]]}): add it."
            )
        arrays = {name: np.asarray(value, dtype=np.float64) for name, value in shape.items()}
        for name, value in arrays.items():
            if not np.all(value > 0):
                raise InputError(f"mixer {self.name}: {name} must be above 0, it is {value}.")
        return arrays


BATCH = {
    "batch": "sequences",
    "seq_len": "tokens of a sequence",
    "element_bytes": "bytes of one element",
}
HEADS = {
    **BATCH,
    "heads": "heads",
    "d_k": "width of a head's queries and keys",
    "d_v": "width of a head's values",
}


def tree_combines(length: Array) -> Array:
    """Return how many times a work-efficient inclusive scan combines two elements.

    The odd-even recursion pairs neighbours, scans the pairs, then fills the other half (Blelloch
    1990): W(n) = floor(n/2) + W(floor(n/2)) + floor((n-1)/2).
    """
    n, total = np.asarray(length, dtype=np.float64).copy(), np.zeros_like(length)
    while np.any(n > 1):
        alive = n > 1
        total = total + np.where(alive, np.floor(n / 2) + np.floor((n - 1) / 2), 0.0)
        n = np.where(alive, np.floor(n / 2), n)
    return np.asarray(total)


def tree_levels(length: Array) -> Array:
    """Return the dependent combines of that scan: one down and one up per halving."""
    n, levels = np.asarray(length, dtype=np.float64).copy(), np.zeros_like(length)
    while np.any(n > 1):
        levels = levels + np.where(n > 1, np.where(n > 2, 2.0, 1.0), 0.0)
        n = np.floor(n / 2)
    return np.asarray(levels)


def doubling_levels(length: Array) -> Array:
    """Return the levels of a scan that doubles its reach (Hillis, Steele 1986): ceil(log2 n)."""
    return np.asarray(np.ceil(np.log2(np.asarray(length, dtype=np.float64))))


def doubling_combines(length: Array) -> Array:
    """Return its combines: n - 2^l at level l, for every l with 2^l < n."""
    n = np.asarray(length, dtype=np.float64)
    levels = doubling_levels(n)
    return np.asarray(n * levels - (2.0**levels - 1))
