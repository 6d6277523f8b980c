"""Steps over sequences of different lengths: classes, assignments, and their simulation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from meshwise.prediction import predict_training
from meshwise.setting import resolve
from simcore.balance import (
    BALANCERS,
    Menu,
    Pieces,
    drawn,
    ends_of,
    flexsp,
    make_menu,
    one_degree,
    piece_ends,
)
from simcore.catalogue import load_model
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.lengths import length_classes, lognormal_lengths
from simcore.lower import lower_training
from simcore.metrics import step_flops
from simcore.mixed import Assignment, Piece, Variant, lower_mixed
from simcore.mixed_engine import lane_sets, simulate_mixed
from simcore.models import ModelSpec
from simcore.scenario import load_scenario
from simcore.strategy import ParallelStrategy
from simcore.timeline import Timeline
from simcore.workloads import TrainStep
from validation.plots import lanes_figure

MODEL = ModelSpec("mine", 4, 512, 8, 8, 64, 1024, 1000)
EXAMPLE = Path(__file__).parents[1] / "examples" / "cpu_lengths.toml"
LIMIT_S, LIMIT_BYTES = 60.0, 2e9  # processor time, twice the goal: others share the machine


class Prices:
    """What prices the meshes of one cluster."""

    def __init__(self, world: int) -> None:
        gpus = min(8, world)
        self.cluster = make_cluster("h100-sxm-80gb", gpus, world // gpus, None, None)
        self.known: dict[tuple[tuple[str, int], ...], ClusterCost] = {}

    def __call__(self, mesh: Mapping[str, int]) -> ClusterCost:
        key = tuple(mesh.items())
        if key not in self.known:
            self.known[key] = ClusterCost(self.cluster, mesh)
        return self.known[key]


def pieces_of(
    parallel: ParallelStrategy, lengths: list[int], model: ModelSpec = MODEL, **more: float
) -> Pieces:
    work = TrainStep(len(lengths), max(lengths), lengths=tuple(lengths))
    return Pieces(model, parallel, work, Prices(parallel.world), **more)  # type: ignore[arg-type]


def timed(parallel: ParallelStrategy, lengths: list[int], balance: str = "drawn") -> Timeline:
    pieces = pieces_of(parallel, lengths)
    assignment = BALANCERS[balance](make_menu(pieces))
    mixed = lower_mixed(MODEL, parallel, pieces.work, assignment)
    return simulate_mixed(mixed, pieces.cost_of)


# ---------------------------------------------------------------- the simulated step


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelStrategy(dp_replicate=2, pp=2, tp=2),
        ParallelStrategy(dp_shard=2, cp=2, zero_stage=1),
        ParallelStrategy(dp_replicate=2, pp=4, schedule="gpipe", microbatch=2, recompute="full"),
    ],
)
def test_equal_lengths_are_the_plain_step(parallel: ParallelStrategy) -> None:
    count, cost = 8 * parallel.dp * parallel.microbatch, Prices(parallel.world)(parallel.mesh)
    program = lower_training(MODEL, parallel, TrainStep(count, 256))
    plain = simulate(program, cost, cost, detail=False)
    for balance in ("drawn", "static"):
        found = timed(parallel, [256] * count, balance)
        assert found.step_s == pytest.approx(plain.step_s, rel=1e-9)
        assert found.bubble_fraction == pytest.approx(plain.bubble_fraction, abs=1e-9)
    assert len(found.times) == parallel.world // parallel.tp


def test_the_step_is_that_of_the_slowest_replica() -> None:
    parallel = ParallelStrategy(dp_replicate=4, pp=2)
    random = np.random.default_rng(0)
    lengths = random.choice([128, 512, 2048], size=(6, 4))  # a replica's in a column
    found = timed(parallel, lengths.ravel().tolist())
    alone = [timed(parallel, np.repeat(column, 4).tolist()).step_s for column in lengths.T]
    assert found.step_s == max(alone)
    busy = [found.step_s - times.idle_s for times in found.times.values()]
    assert max(busy) > 1.05 * min(busy)


@settings(max_examples=6)
@given(st.lists(st.sampled_from([64, 128, 256, 512]), min_size=8, max_size=8), st.integers(0, 7))
def test_a_longer_sequence_never_helps(lengths: list[int], which: int) -> None:
    longer = [n * 2 if i == which else n for i, n in enumerate(lengths)]
    parallel = ParallelStrategy(dp_replicate=2, pp=2)
    one, two = (timed(parallel, each).step_s for each in (lengths, longer))
    assert one <= two * (1 + 1e-9)


LONG_TAIL = [int(n) for n in lognormal_lengths(64, 2000, 1.5, 60000, seed=4)]


@pytest.mark.parametrize("balance", BALANCERS)
def test_a_balanced_step_takes_what_its_lanes_say(balance: str) -> None:
    """Simulated: at least the busiest lane's pieces, and little but the optimizer beyond."""
    parallel = ParallelStrategy(dp_replicate=2, cp=4, zero_stage=1)
    pieces = pieces_of(parallel, LONG_TAIL)
    menu = make_menu(pieces, classes=6)
    assignment = BALANCERS[balance](menu)
    ends = ends_of(menu, assignment)
    assert ends.max() >= menu.bound_s * (1 - 1e-9)
    mixed = lower_mixed(MODEL, parallel, pieces.work, assignment)
    found = simulate_mixed(mixed, pieces.cost_of).step_s
    closing = timed(parallel, [64] * 8, "drawn").step_s  # reductions and optimizer of hardly any
    assert ends.max() * 0.99 <= found <= ends.max() * 1.01 + closing


def test_equal_sets_of_lanes_are_simulated_once() -> None:
    parallel = ParallelStrategy(dp_replicate=8)
    pieces = pieces_of(parallel, [64, 512] * 8)
    mixed = lower_mixed(MODEL, parallel, pieces.work, drawn(make_menu(pieces)))
    sets = lane_sets(mixed)
    assert [each.lanes for each in sets] == [(lane,) for lane in range(8)]
    assert len({each.shape(mixed) for each in sets}) == 2


def test_the_picture_of_lanes_has_every_piece_where_it_runs() -> None:
    pieces = pieces_of(ParallelStrategy(dp_replicate=4), [64, 512, 2048, 64])
    found = Assignment(
        4, (Piece((2,), 2048, 0, 4), Piece((1,), 512, 0, 2), Piece((0, 3), 64, 2, 1))
    )
    (axes,) = lanes_figure(found, lambda piece: pieces.seconds(piece.variant)).axes
    drawn = [box.get_paths()[0].get_extents() for box in axes.collections]
    assert [(box.y0 + 0.5, box.height) for box in drawn] == [(0, 4), (0, 2), (2, 1)]
    assert drawn[1].x0 == drawn[2].x0 == pytest.approx(drawn[0].x1)
    assert max(box.x1 for box in drawn) == pytest.approx(1e3 * piece_ends(pieces, found).max())


# ---------------------------------------------------------------- strategies


def test_pieces_are_priced_as_the_whole_network_is() -> None:
    """Seconds and bytes that are carried over from one and two layers are those of all."""
    for parallel in (
        ParallelStrategy(dp_replicate=8, zero_stage=1),
        ParallelStrategy(dp_replicate=2, pp=4, recompute="full"),
    ):
        model = ModelSpec("deep", 16, 512, 8, 8, 64, 1024, 1000)
        few = pieces_of(parallel, LONG_TAIL, model, memory_bytes=80e9)
        for variant in (Variant(4096, 1, 1), Variant(8192, 1, 2), Variant(512, 3, 1)):
            program, laid = few.laid(variant)
            exact = few.measured(program, laid)
            assert few.quick(variant) == pytest.approx(exact, rel=2e-3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.sampled_from([4, 8]),
    st.floats(0.6, 1.0),
    st.sampled_from([1, 4, 16]),
)
def test_assignments_are_whole_and_flexsp_is_never_slower(
    kind: list[int], lanes: int, gain: float, room: int
) -> None:
    """Every strategy runs each sequence once; mixed groups are at least as fast as one degree."""
    menu = made_up(kind, lanes, gain, room)
    lengths = [menu.classes[k] for k in kind]
    for balancer in BALANCERS.values():
        assignment = balancer(menu)
        assignment.check(lengths)
        assert ends_of(menu, assignment).max() >= menu.bound_s * (1 - 1e-9)
    mixed = ends_of(menu, flexsp(menu)).max()
    single = [one_degree(menu, degree) for degree in menu.degrees]
    assert mixed <= min(ends_of(menu, each).max() for each in single if each is not None)


def made_up(kind: list[int], lanes: int, gain: float, room: int, degree: int = 4) -> Menu:
    """Return a menu on which twice the lanes take ``gain`` / 2 of the time, at least."""
    classes, degrees = (64, 256, 1024, 4096), tuple(2**i for i in range(lanes.bit_length()))
    seconds = np.array([[n**1.3 * (gain / 2) ** i * 2 ** (i * (1 - gain)) for i in range(
        len(degrees))] for n in classes])  # fmt: skip
    for row, n in enumerate(classes):
        for column, each in enumerate(degrees):
            if n > 256 * room * each and each < lanes:
                seconds[row, column] = np.inf
    wide = degree if np.isfinite(seconds[-1, degrees.index(degree)]) else lanes
    units = tuple(2 * d if d > 1 else 1 for d in degrees)
    return Menu(lanes, degrees, classes, seconds, np.array(kind), units, wide)


def test_equal_lengths_gain_nothing() -> None:
    menu = made_up([2] * 32, 8, 0.8, 16)
    best = min(ends_of(menu, one_degree(menu, d)).max() for d in menu.degrees)  # type: ignore[arg-type]
    assert ends_of(menu, flexsp(menu)).max() == pytest.approx(best)


def test_memory_decides_how_many_lanes_a_sequence_needs() -> None:
    parallel = ParallelStrategy(dp_replicate=8)
    lengths = [512] * 30 + [16384]
    tight = pieces_of(parallel, lengths, memory_bytes=80e9)
    room = tight.measured(*tight.laid(Variant(16384, 1, 4)))[1] * 1.01
    pieces = pieces_of(parallel, lengths, memory_bytes=room)
    assignment = BALANCERS["hdp"](make_menu(pieces))
    degrees = {piece.tokens: piece.degree for piece in assignment.pieces}
    assert degrees == {512: 1, 16384: 4}
    with pytest.raises(InputError, match="cp 1 does not hold sequences of 16384 tokens: cp = 4"):
        BALANCERS["static"](make_menu(pieces))
    with pytest.raises(InputError, match="fits no group of up to 8 lanes"):
        make_menu(pieces_of(parallel, lengths, memory_bytes=room / 4))


def test_a_scenario_with_lengths_is_predicted() -> None:
    scenario = load_scenario(EXAMPLE)
    setting = resolve(scenario)
    work, model, parallel = scenario.work(), scenario.model_spec(), scenario.strategy()
    assert isinstance(work, TrainStep)
    assert parallel is not None
    found = predict_training(model, work, parallel, setting, "estimate").metrics
    assert sum(found["groups"].values()) == work.global_batch == 10
    assert found["pieces_bound_s"] <= found["pieces_s"] * (1 + 1e-9) < found["step_s"]
    assert found["padding_fraction"] == 0.0
    assert found["tokens_per_s"] == pytest.approx(sum(work.lengths) / found["step_s"])
    alone = [TrainStep(1, n) for n in work.lengths]
    assert found["model_flops"] == pytest.approx(sum(step_flops(model, one) for one in alone))
    assert found["fits"]


# ---------------------------------------------------------------- lengths


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=200),
    st.integers(1, 20),
    st.sampled_from([1, 8]),
)
def test_classes_hold_their_lengths(lengths: list[int], classes: int, unit: int) -> None:
    found = length_classes(np.array(lengths), classes, unit)
    assert np.all(found >= lengths)
    assert np.all(found % unit == 0)
    assert np.unique(found).size <= classes
    assert found.max() == -(-max(lengths) // unit) * unit
    if unit == 1 and np.unique(lengths).size <= classes:
        assert np.array_equal(found, lengths)


@given(st.lists(st.integers(1, 50), min_size=4, max_size=9), st.integers(2, 3))
def test_classes_pad_least(lengths: list[int], classes: int) -> None:
    """Against every choice of classes."""
    from itertools import combinations

    distinct = sorted(set(lengths))
    choices = combinations(distinct, min(classes, len(distinct)))
    fewest = min(
        sum(min(edge for edge in edges if edge >= n) for n in lengths)
        for edges in choices
        if edges[-1] == distinct[-1]
    )
    assert length_classes(np.array(lengths), classes).sum() == fewest


def test_more_classes_pad_less() -> None:
    lengths = lognormal_lengths(2000, 1000, 1.0, 32768, seed=3)
    padded = [length_classes(lengths, n).sum() for n in (1, 2, 4, 8, 16, 32, 64)]
    assert padded == sorted(padded, reverse=True)
    assert padded[5] < 1.08 * lengths.sum()
    assert lengths.min() >= 1
    assert lengths.max() <= 32768
    assert np.median(lengths) == pytest.approx(1000, rel=0.1)


def test_bad_laws_are_refused() -> None:
    with pytest.raises(InputError, match="above 0"):
        lognormal_lengths(0, 1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("balance", "pp"), [("drawn", 8), ("flexsp", 8), ("zeppelin", 1)])
def test_twelve_thousand_ranks_with_lengths_of_their_own(balance: str, pp: int) -> None:
    import resource

    parallel = ParallelStrategy(
        tp=8, pp=pp, dp_replicate=1536 // pp, zero_stage=1, sequence_parallel=True,
        recompute="full",
    )  # fmt: skip
    model = load_model("llama-3.1-70b")
    assert parallel.world == 12_288
    lengths = lognormal_lengths(32 * parallel.dp, 4000, 1.0, 65536, seed=1).tolist()
    start = time.process_time()
    pieces = pieces_of(parallel, lengths, model)
    assignment = BALANCERS[balance](make_menu(pieces, classes=12))
    mixed = lower_mixed(model, parallel, pieces.work, assignment)
    found = simulate_mixed(mixed, pieces.cost_of)
    assert time.process_time() - start < LIMIT_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < LIMIT_BYTES
    assert len(found.times) == parallel.dp * pp
    assert found.step_s > 1.0
