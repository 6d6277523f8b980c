"""Which lanes run which sequences: strategies for steps over sequences of unequal length.

A strategy is a function of a `Menu`: the sequences of the step, padded to a few classes of length,
and the seconds of each class on groups of each degree. It returns an `Assignment`. To add one is
to add a function to `BALANCERS`.

- ``drawn``: one degree, that of the strategy; groups take the sequences in turn, as a loader
  deals them out.
- ``static``: one degree for all, that of the strategy; each sequence to the group that is free
  first, longest sequences first (Graham 1969).
- ``flexsp``: groups of different degree side by side for the whole step (FlexSP, Wang et al. 2025).
  Groups are filled for a guessed length of the step, and the guess is searched (Hochbaum and
  Shmoys 1987); the single degrees are among what it chooses from, so it is never slower.
- ``hdp``: ranks per sequence vary, the fewest whose memory holds it (ByteScale, Ge et al. 2025);
  groups form anew for every sequence.
- ``zeppelin``: a sequence is split until no part exceeds an even share of the work, within a node
  if that is enough, else over whole nodes, and short ones stay local (Zeppelin, Chen et al. 2025).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from simcore.costs import CostOf
from simcore.errors import InputError
from simcore.lengths import length_classes
from simcore.metrics import TRAIN_PARTS, memory_metrics
from simcore.mixed import (
    Assignment,
    Piece,
    Variant,
    check_mixed,
    for_variant,
    lanes_of,
    lower_variant,
    unit_of,
)
from simcore.models import ModelSpec, is_moe_layer
from simcore.program import Program
from simcore.strategy import ParallelStrategy, check_split
from simcore.templates import Template, templates
from simcore.workloads import TrainStep

Laying = Mapping[str, Template]
CLASSES = 32  # log-normal lengths of sigma 1 are padded by 7 % (by 14 % with 16 classes)
GUESSES = 12  # lengths of the step that a search tries
LEAST_ROWS = 1024  # of a lane: shorter blocks of a ring are not tried, but where memory asks


@dataclass(slots=True)
class Pieces:
    """The programs of pieces, lowered, laid and priced once each."""

    model: ModelSpec
    parallel: ParallelStrategy
    work: TrainStep
    cost_of: CostOf
    memory_bytes: float = math.inf
    reserve_bytes: float = 0.0
    known: dict[Variant, tuple[Program, Laying]] = field(default_factory=dict)
    priced: dict[Variant, tuple[float, float]] = field(default_factory=dict)

    def laid(self, variant: Variant) -> tuple[Program, Laying]:
        """Return a variant's program and templates."""
        if variant not in self.known:
            program = lower_variant(self.model, self.parallel, variant, self.work)
            self.known[variant] = program, templates(program, self.cost_of(program.mesh))
        return self.known[variant]

    def seconds(self, variant: Variant) -> float:
        """Return the seconds of a piece, forward and backward, on its busiest pipeline rank."""
        return self.quick(variant)[0]

    def fits(self, variant: Variant) -> bool:
        """Whether a lane's memory holds a piece beside weights and optimizer states."""
        if self.memory_bytes == math.inf:
            return True
        return self.reserve_bytes + self.quick(variant)[1] <= self.memory_bytes

    def quick(self, variant: Variant) -> tuple[float, float]:
        """Return the seconds of a piece and the peak bytes of its ranks.

        Both grow evenly with the layers of a stage: they are carried over from stages of one layer
        and of two, unless layers or stages differ.
        """
        stages = self.parallel.pp * self.parallel.virtual_stages
        each = -(-self.model.layers // stages)
        if variant not in self.priced:
            if each < 3 or not self._uniform:
                self.priced[variant] = self.measured(*self.laid(variant))
            else:
                one, two = (self.measured(*self._few(variant, n * stages)) for n in (1, 2))
                seconds, peak = (a + (each - 1) * (b - a) for a, b in zip(one, two, strict=True))
                self.priced[variant] = seconds, peak
        return self.priced[variant]

    def measured(self, program: Program, laid: Laying) -> tuple[float, float]:
        """Return the seconds of forward and backward, and the peak bytes, of a variant's program.

        The bytes are 0 where memory is not bounded.
        """
        spent, peak = [0.0] * len(program.order), 0.0
        for stage, rank in enumerate(program.stage_rank):
            for kind in ("F", "B", "I", "W"):
                if f"{stage}{kind}" in laid:
                    spent[rank] += float(laid[f"{stage}{kind}"].elapsed_s)
        if self.memory_bytes < math.inf:
            memory = memory_metrics(program, TRAIN_PARTS, self.memory_bytes, self.reserve_bytes)
            peak = float(memory["peak_memory_bytes"])
        return max(spent), peak

    @property
    def _uniform(self) -> bool:
        """Whether all layers, and all stages but for their ends, are alike."""
        model, parallel = self.model, self.parallel
        mixed = model.experts and len({is_moe_layer(model, n) for n in range(model.layers)}) > 1
        return not (mixed or parallel.layers_per_stage or parallel.recompute_layers)

    def _few(self, variant: Variant, layers: int) -> tuple[Program, Laying]:
        """Return the program and templates of a network of a few of the layers."""
        model = replace(self.model, layers=layers)
        program = lower_variant(model, self.parallel, variant, self.work)
        return program, templates(program, self.cost_of(program.mesh))


@dataclass(frozen=True, slots=True)
class Menu:
    """What a strategy chooses from.

    ``classes``: padded lengths, ascending; ``seconds``: of one sequence in a full piece, (classes,
    degrees), inf where memory does not hold it or heads do not divide; ``kind``: class of every
    sequence.
    """

    lanes: int
    degrees: tuple[int, ...]
    classes: tuple[int, ...]
    seconds: NDArray[np.float64]
    kind: NDArray[np.int64]
    units: tuple[int, ...]  # what tokens must be a multiple of, per degree
    degree: int = 1  # that of the strategy, for all sequences alike
    microbatch: int = 1  # sequences of a piece at most
    rooms: tuple[float, ...] = ()  # tokens of a piece that memory holds, per degree; (): any

    @property
    def least(self) -> NDArray[np.float64]:
        """Fewest lane-seconds of a sequence of each class."""
        found: NDArray[np.float64] = (self.seconds * self.degrees).min(1)
        return found

    @property
    def bound_s(self) -> float:
        """Seconds that no assignment beats: the even share of all work, and the longest alone."""
        share = float(self.least[self.kind].sum()) / self.lanes
        return max(share, float(self.seconds.min(1)[self.kind].max()))

    def column(self, degree: int) -> int:
        """Return the column of a degree."""
        return self.degrees.index(degree)

    def tokens(self, kind: int, degree: int) -> int:
        """Return the padded tokens of a class on a group."""
        unit = self.units[self.column(degree)]
        return -(-self.classes[kind] // unit) * unit

    def bundles(self, numbers: Sequence[int], kind: int, degree: int) -> Iterator[tuple[int, ...]]:
        """Yield sequences of one class, as many as a piece may hold.

        That is what [parallel].microbatch says, or what fits into memory.
        """
        room = self.rooms[self.column(degree)] if self.rooms else math.inf
        count = _together(self.microbatch, room, self.tokens(kind, degree))
        for first in range(0, len(numbers), count):
            yield tuple(numbers[first : first + count])


def _together(microbatch: int, room: float, tokens: int) -> int:
    """Return how many sequences of so many tokens a piece holds, up to ``microbatch``."""
    return int(max(1, min(microbatch, room // tokens)))


def degrees_of(model: ModelSpec, parallel: ParallelStrategy) -> list[int]:
    """Return the sizes of groups to choose from: powers of two that divide the lanes."""
    lanes, found = lanes_of(parallel), []
    for degree in sorted({*(2**i for i in range(lanes.bit_length())), parallel.cp}):
        if lanes % degree:
            continue
        strategy = for_variant(parallel, Variant(1, 1, degree))
        try:
            check_split(model, strategy, strategy.split.unit)
        except InputError:
            continue
        found.append(degree)
    return found


def make_menu(
    pieces: Pieces, *, classes: int = CLASSES, degrees: Sequence[int] | None = None
) -> Menu:
    """Return the menu of a step, over all ``degrees`` of groups or some of them.

    Raises `InputError` where memory holds the longest sequence in no group.
    """
    model, parallel, work = pieces.model, pieces.parallel, pieces.work
    check_mixed(model, parallel)
    lengths = np.asarray(work.lengths, dtype=np.int64)
    padded = length_classes(lengths, classes)
    known, kind = np.unique(padded, return_inverse=True)
    degrees = [d for d in degrees_of(model, parallel) if degrees is None or d in degrees]
    units = [unit_of(parallel, degree) for degree in degrees]
    seconds = np.full((known.size, len(degrees)), np.inf)
    rooms = [_room(pieces, int(known[0]), *each) for each in zip(degrees, units, strict=True)]
    single = parallel.cp  # a degree for all sequences is priced for short ones too
    for column, (degree, unit) in enumerate(zip(degrees, units, strict=True)):
        variants = [Variant(-(-int(n) // unit) * unit, 1, degree) for n in known]
        room = _holding(pieces, variants)
        if room == known.size and not np.isfinite(seconds[-1]).any():
            single = degree
        for row, variant in enumerate(variants[:room]):
            long = variant.tokens >= LEAST_ROWS * degree or not np.isfinite(seconds[row]).any()
            if long or degree in (single, parallel.cp) or variant.tokens < LEAST_ROWS:
                alike = 1 << (int((kind == row).sum()) - 1).bit_length()
                most = min(parallel.microbatch, alike)
                count = _together(most, rooms[column], variant.tokens)
                seconds[row, column] = pieces.seconds(variant._replace(batch=count)) / count
    if not np.isfinite(seconds[-1]).any():
        raise InputError(
            f"a sequence of {known[-1]} tokens fits no group of up to {degrees[-1]} lanes: use "
            "more ranks, recompute = 'full', or shorter [workload].lengths."
        )
    return Menu(
        lanes_of(parallel),
        tuple(degrees),
        tuple(known.tolist()),
        seconds,
        kind.ravel(),
        tuple(units),
        parallel.cp,
        parallel.microbatch,
        tuple(rooms),
    )


def _room(pieces: Pieces, length: int, degree: int, unit: int) -> float:
    """Return the tokens that a group's memory holds, whose bytes grow evenly with them.

    Any number where memory is not bounded, or pieces have one sequence anyway.
    """
    if pieces.parallel.microbatch == 1 or pieces.memory_bytes == math.inf:
        return math.inf
    one = Variant(-(-length // unit) * unit, 1, degree)
    low, high = (pieces.quick(one._replace(batch=count))[1] for count in (1, 2))
    left = pieces.memory_bytes - pieces.reserve_bytes - low
    return one.tokens + left / ((high - low) / one.tokens)


def _holding(pieces: Pieces, variants: Sequence[Variant]) -> int:
    """Return how many of the variants, in order of length, fit; memory grows with the length."""
    low, high = 0, len(variants)
    if pieces.fits(variants[-1]):
        return high
    while low < high:
        middle = (low + high) // 2
        if pieces.fits(variants[middle]):
            low = middle + 1
        else:
            high = middle
    return low


# ---------------------------------------------------------------- placing sequences


def _by_class(menu: Menu) -> list[tuple[int, list[int]]]:
    """Return (class, sequences), longest first."""
    order = np.argsort(menu.kind, kind="stable")
    cuts = np.searchsorted(menu.kind[order], np.arange(len(menu.classes) + 1))
    return [
        (kind, order[cuts[kind] : cuts[kind + 1]].tolist())
        for kind in reversed(range(len(menu.classes)))
    ]


def placed(menu: Menu, columns: Sequence[int]) -> Assignment:
    """Return each class on groups of its degree (column of the menu), formed where lanes are free.

    Wide groups come first, then long sequences; each goes to the neighbouring lanes that are all
    free first.
    """
    ends, pieces = np.zeros(menu.lanes), []
    todo = [(kind, menu.degrees[columns[kind]], numbers) for kind, numbers in _by_class(menu)]
    for kind, degree, numbers in sorted(todo, key=lambda each: -each[1]):
        seconds, tokens = menu.seconds[kind, menu.column(degree)], menu.tokens(kind, degree)
        blocks = ends.reshape(-1, degree).max(1)
        heap = [(float(end), block) for block, end in enumerate(blocks)]
        heapq.heapify(heap)
        for several in menu.bundles(numbers, kind, degree):
            end, block = heap[0]
            heapq.heapreplace(heap, (end + seconds * len(several), block))
            pieces.append(Piece(several, tokens, block * degree, degree))
        for end, block in heap:
            ends[block * degree : (block + 1) * degree] = end
    return Assignment(menu.lanes, tuple(pieces))


def grouped(menu: Menu, degrees: Sequence[int]) -> Assignment | None:
    """Return the sequences on fixed groups, each where it ends first; None where one fits nowhere.

    ``degrees``: of the groups, in order of their lanes.
    """
    heaps: dict[int, list[tuple[float, int]]] = {}
    first = 0
    for degree in degrees:
        heaps.setdefault(degree, []).append((0.0, first))
        first += degree
    pieces = []
    for kind, numbers in _by_class(menu):
        able = {
            degree: float(menu.seconds[kind, menu.column(degree)])
            for degree in heaps
            if math.isfinite(menu.seconds[kind, menu.column(degree)])
        }
        if numbers and not able:
            return None
        left = numbers
        while left:
            degree = min(able, key=lambda d: heaps[d][0][0] + able[d])
            several = next(menu.bundles(left, kind, degree))
            end, lane = heaps[degree][0]
            heapq.heapreplace(heaps[degree], (end + able[degree] * len(several), lane))
            pieces.append(Piece(several, menu.tokens(kind, degree), lane, degree))
            left = left[len(several) :]
    return Assignment(menu.lanes, tuple(pieces))


def ends_of(menu: Menu, assignment: Assignment) -> NDArray[np.float64]:
    """Return when each lane is done with its pieces, reductions apart; shape (lanes,), seconds."""
    ends = np.zeros(menu.lanes)
    for piece in assignment.pieces:
        kind, mine = menu.kind[piece.sequences[0]], slice(piece.first, piece.first + piece.degree)
        seconds = menu.seconds[kind, menu.column(piece.degree)] * len(piece.sequences)
        ends[mine] = ends[mine].max() + seconds
    return ends


def piece_ends(pieces: Pieces, assignment: Assignment) -> NDArray[np.float64]:
    """Return `ends_of` with every piece priced as the batch that it is, not as its sequences."""
    ends = np.zeros(assignment.lanes)
    for piece in assignment.pieces:
        mine = slice(piece.first, piece.first + piece.degree)
        ends[mine] = ends[mine].max() + pieces.seconds(piece.variant)
    return ends


def _shortest(menu: Menu, found: Sequence[Assignment | None]) -> Assignment:
    """Return the assignment that ends first, the earlier one of equals."""
    able = [each for each in found if each is not None]
    return min(able, key=lambda each: float(ends_of(menu, each).max()))


# ---------------------------------------------------------------- strategies


def drawn(menu: Menu) -> Assignment:
    """One degree, that of the strategy; groups take sequences in turn, their longest first."""
    _check_degree(menu)
    degree, pieces = menu.degree, []
    groups, unsorted = menu.lanes // degree, list[tuple[int, list[int], int]]()
    for first in range(groups):
        mine = np.arange(first, menu.kind.size, groups)
        for kind in np.unique(menu.kind[mine]):
            unsorted.append((int(kind), mine[menu.kind[mine] == kind].tolist(), first * degree))
    for kind, numbers, lane in sorted(unsorted, key=lambda each: -each[0]):
        tokens = menu.tokens(kind, degree)
        bundles = menu.bundles(numbers, kind, degree)
        pieces += [Piece(each, tokens, lane, degree) for each in bundles]
    return Assignment(menu.lanes, tuple(pieces))


def _check_degree(menu: Menu) -> None:
    """Raise where groups of the strategy's degree do not hold the longest sequence."""
    if not math.isfinite(menu.seconds[-1, menu.column(menu.degree)]):
        able = [d for d in menu.degrees if math.isfinite(menu.seconds[-1, menu.column(d)])]
        raise InputError(
            f"[parallel].cp {menu.degree} does not hold sequences of {menu.classes[-1]} tokens: "
            f"cp = {able[0]} does."
        )


def one_degree(menu: Menu, degree: int) -> Assignment | None:
    """Return the step with one degree for all; None where it does not hold the longest."""
    return grouped(menu, [degree] * (menu.lanes // degree))


def static(menu: Menu) -> Assignment:
    """One degree for all, that of the strategy."""
    _check_degree(menu)
    found = one_degree(menu, menu.degree)
    assert found is not None
    return found


def flexsp(menu: Menu) -> Assignment:
    """Groups of different degree for the whole step."""
    found = [each for d in menu.degrees if (each := one_degree(menu, d)) is not None]
    most = min((float(ends_of(menu, each).max()) for each in found), default=math.inf)
    if not found:
        most = float(menu.seconds.min(1)[menu.kind].sum())
    for guess in np.geomspace(menu.bound_s, most, GUESSES):
        groups = _groups_for(menu, float(guess))
        if groups is not None and (each := grouped(menu, groups)) is not None:
            found.append(each)
    return _shortest(menu, found)


def _groups_for(menu: Menu, step_s: float) -> list[int] | None:
    """Return degrees of groups that run all sequences in ``step_s``, cheapest degrees first.

    None where the lanes do not suffice. Lanes that are left form groups of the commonest degree.
    """
    left, groups = menu.lanes, list[list[float]]()  # groups: [degree, seconds left]
    for kind, numbers in _by_class(menu):
        todo, cheapest = len(numbers), np.argsort(menu.seconds[kind] * menu.degrees)
        for column in cheapest:
            degree, seconds = menu.degrees[column], float(menu.seconds[kind, column])
            if not seconds <= step_s:
                continue
            for group in groups:
                if group[0] == degree:
                    taken = min(todo, int(group[1] / seconds))
                    group[1] -= taken * seconds
                    todo -= taken
            while todo and left >= degree:
                taken = min(todo, int(step_s / seconds))
                groups.append([degree, step_s - taken * seconds])
                left, todo = left - degree, todo - taken
        if todo:
            return None
    sizes = [int(degree) for degree, _ in groups]
    common = max(set(sizes), key=sizes.count)
    sizes += [common] * (left // common) + [1] * (left % common)
    return sorted(sizes, reverse=True)


def hdp(menu: Menu) -> Assignment:
    """As few lanes for a sequence as its memory needs."""
    return placed(menu, np.isfinite(menu.seconds).argmax(1).tolist())


def zeppelin(menu: Menu) -> Assignment:
    """A sequence is split until its part is within a share of the step that is searched."""
    found = []
    for guess in np.geomspace(menu.bound_s / 16, menu.bound_s * 2, GUESSES):
        columns = []
        for row in menu.seconds:
            within = np.flatnonzero(row <= guess)
            columns.append(int(within[0] if within.size else row.argmin()))
        found.append(placed(menu, columns))
    return _shortest(menu, found)


BALANCERS: dict[str, Callable[[Menu], Assignment]] = {
    "drawn": drawn,
    "static": static,
    "flexsp": flexsp,
    "hdp": hdp,
    "zeppelin": zeppelin,
}
