"""Sequence parallelism: layouts and tiles by brute force, balance, volumes, times, refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import GPT2, LLAMA, Wires, cluster_cost

from hwmodels.cost import ClusterCost
from simcore.accounting import block_totals, step_totals
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.estimate import estimate, lower_bound, serial_sum
from simcore.lightseq import lightseq_bytes
from simcore.lower import lower_pass, lower_training
from simcore.metrics import executed_flops
from simcore.models import ModelSpec
from simcore.ops import work
from simcore.program import Program
from simcore.sequence import (
    LAYOUTS,
    NO_TILE,
    SequenceSplit,
    helpers,
    positions,
    rank_positions,
    ring_backward_bytes,
    ring_bytes,
    tiles,
    ulysses_bytes,
    visible,
)
from simcore.strategy import ParallelStrategy
from simcore.token_ring import query_ring_bytes
from simcore.workloads import TrainStep

SEQ = 128
FAR = 65536  # long enough for the blocks of attention to fill every unit of a chip
STRATEGIES = {
    **{f"ring-{layout}": {"cp": 4, "cp_layout": layout} for layout in LAYOUTS},
    "token-ring": {"cp": 4, "cp_kind": "token_ring"},
    "token-ring-striped": {"cp": 4, "cp_kind": "token_ring", "cp_layout": "striped"},
    "double-ring": {"cp": 4, "cp_window": 2},
    "lightseq": {"cp": 4, "cp_kind": "lightseq"},
    "ulysses": {"cp": 2, "cp_kind": "ulysses"},
    "usp": {"cp": 4, "cp_kind": "usp", "cp_ring": 2, "cp_ulysses": 2},
    "ring-tp-pp": {"cp": 2, "tp": 2, "pp": 2, "sequence_parallel": True},
    "ring-zero3": {"cp": 2, "dp_shard": 2, "dp_replicate": 2},
}
SPLITS = st.builds(
    SequenceSplit,
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(["keys", "queries"]),
)


def lowered(length: int = SEQ, model: ModelSpec = LLAMA, **parallel: object) -> Program:
    strategy = ParallelStrategy(**parallel)  # type: ignore[arg-type]
    return lower_training(model, strategy, TrainStep(2 * strategy.dp, length))


def holdings(split: SequenceSplit, length: int) -> list[np.ndarray]:
    """Return the positions of every place on the ring, one Ulysses rank after another."""
    return [
        np.concatenate([positions(split, length, place, part) for part in range(split.ulysses)])
        for place in range(split.ring)
    ]


# ---------------------------------------------------------------- layouts


@given(SPLITS, st.integers(1, 3))
def test_every_token_has_one_holder(split: SequenceSplit, times: int) -> None:
    length = times * split.unit
    held = np.concatenate(holdings(split, length))
    assert sorted(held) == list(range(length))


@given(SPLITS, st.integers(1, 3), st.booleans())
def test_tiles_are_what_the_mask_leaves(split: SequenceSplit, times: int, causal: bool) -> None:
    """Of every block, the tile holds each pair that attention needs, and no other."""
    length = times * split.unit
    held = holdings(split, length)
    for step in range(split.ring):
        found = tiles(split, length // split.ring, step, causal)
        for place, (q0, q1, k0, k1, masked) in enumerate(found):
            queries, keys = held[place], held[(place - step) % split.ring]
            if split.travels == "queries":
                queries, keys = keys, queries
            needed = (
                queries[:, None] >= keys[None] if causal else np.ones((len(queries),) * 2, bool)
            )
            tile = np.zeros_like(needed)
            tile[q0:q1, k0:k1] = np.tri(q1 - q0, k1 - k0, dtype=bool) if masked else True
            assert np.array_equal(tile, needed)
            assert visible(found[place]) == needed.sum()


@given(st.integers(2, 9))
def test_idle_places_do_what_is_left_of_a_causal_mask(places: int) -> None:
    """Every pair of a place and an earlier one is done once, in half as many steps as in a ring."""
    split = SequenceSplit(places, layout="contiguous", travels="both")
    done = Counter[tuple[int, int]]()
    for step in range(places // 2 + 1):
        helping = helpers(places, step)
        for place, tile in enumerate(tiles(split, 4, step, True)):
            if tile != NO_TILE:
                distance = places - step if helping[place] else -step
                queries, keys = (place + distance, place) if helping[place] else (
                    place, place + distance
                )  # fmt: skip
                done[queries, keys] += 1
                assert visible(tile) == (10 if not step else 16)
    assert done == {(i, j): 1 for i in range(places) for j in range(i + 1)}


@pytest.mark.parametrize(("ranks", "kv_heads"), [(2, 1), (4, 4), (5, 2), (8, 1)])
def test_balanced_attention_moves_its_closed_form(ranks: int, kv_heads: int) -> None:
    model = replace(LLAMA, kv_heads=kv_heads)
    length = SEQ // ranks * ranks
    program = lowered(length, model, cp=ranks, cp_kind="lightseq")
    widths = model.heads * model.head_dim, kv_heads * model.head_dim
    wanted = lightseq_bytes(SequenceSplit(ranks), length, widths, model.heads, 2)
    for block, expected in zip(("layer.F", "layer.B"), wanted, strict=True):
        sent = [block_totals(program, rank)[block].payload_bytes for rank in range(ranks)]
        mean = sum(found["ring_shift", "cp"] for found in sent) / ranks
        assert mean == pytest.approx(expected, rel=1e-12)


def test_balanced_attention_is_quicker_than_a_contiguous_ring() -> None:
    """Its n / 2 + 1 steps take as long as n of a ring would on the last place, nearly halved."""
    times = {}
    for kind in ("ring", "lightseq"):
        program = lowered(FAR, cp=8, cp_kind=kind, cp_layout="contiguous")
        cost = cluster_cost(program, bandwidth=100.0, per_node=8)
        line = simulate(program, cost, cost, every_rank=True)
        spans = [s for s in line.spans if s.rank == 7 and "attention_block" in s.name]
        times[kind] = line.step_s, sum(s.end_s - s.start_s for s in spans)
    assert times["lightseq"][0] < times["ring"][0]
    assert times["lightseq"][1] / times["ring"][1] == pytest.approx(4.5 / 7.5, rel=0.02)


@given(SPLITS, st.integers(1, 3))
def test_pairs_add_up_and_zigzag_is_even(split: SequenceSplit, times: int) -> None:
    length = times * split.unit
    rows = length // split.ring
    loads = np.zeros(split.ring)
    for step in range(split.ring):
        loads += [visible(tile) for tile in tiles(split, rows, step, True)]
    assert loads.sum() == length * (length + 1) / 2
    if split.layout == "contiguous":
        steps = np.arange(split.ring)
        if split.travels == "queries":
            steps = steps[::-1]
        assert np.array_equal(loads, rows * (rows + 1) / 2 + steps * rows * rows)
    if split.pairs or split.ring == 1:
        assert np.ptp(loads) == 0
    if split.layout == "striped":
        assert np.ptp(loads) <= rows * (split.ring - 1)


# ---------------------------------------------------------------- programs


@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_share_the_tokens_of_each_sequence(name: str) -> None:
    program = lowered(**STRATEGIES[name])
    degree = ParallelStrategy(**STRATEGIES[name]).cp
    found = Counter(int(p) for rank in range(program.world) for p in rank_positions(program, rank))
    assert found == dict.fromkeys(range(SEQ), program.world // degree)


@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_products_add_up(name: str) -> None:
    """The mean that a run's utilisation counts is that of the ranks' own work."""
    program = lowered(**STRATEGIES[name])
    stages = len(program.order)
    each = [
        step_totals(program, rank * stages // program.world, rank).flops
        for rank in range(program.world)
    ]
    assert executed_flops(program) == pytest.approx(sum(each), rel=1e-12)
    most = [step_totals(program, stage).flops for stage in range(stages)]
    assert max(each) == max(most)
    if "contiguous" in name:
        assert each == sorted(each)
        assert each[0] < each[-1]
    elif stages == 1 and "striped" not in name and name != "lightseq":  # half rest at its end
        assert len(set(each)) == 1


def payload(program: Program, kind: str, block: str) -> float:
    """Return the bytes of a kind of communication in one run of a block."""
    ops = program.blocks[block].ops
    return sum(float(work(op).payload_bytes) for op in ops if op.kind == kind)


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=lambda m: m.name)
@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (4, 2)])
def test_bytes_follow_the_closed_forms(model: ModelSpec, ring: int, ulysses: int) -> None:
    model = replace(model, heads=8, kv_heads=4)
    program = lowered(
        model=model, cp=ring * ulysses, cp_kind="usp", cp_ring=ring, cp_ulysses=ulysses
    )
    split, size = SequenceSplit(ring, ulysses), 2
    width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    forward, backward = (payload(program, "ring_shift", f"layer.{k}") for k in "FB")
    assert forward == ring_bytes(split, SEQ, kv_width, size)
    assert forward == (ring - 1) / ring * SEQ * 2 * kv_width / ulysses * size
    assert backward == ring_backward_bytes(split, SEQ, kv_width, size)
    for block in ("layer.F", "layer.B"):
        moved = payload(program, "all_to_all", block)
        assert moved == ulysses_bytes(split, SEQ, width, kv_width, size)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_ring_of_queries_sends_queries_away_and_outputs_home(kv_heads: int) -> None:
    model = replace(LLAMA, kv_heads=kv_heads)
    program = lowered(model=model, cp=4, cp_kind="token_ring")
    width, size = model.heads * model.head_dim, 2
    away, home = query_ring_bytes(SequenceSplit(4), SEQ, width, model.heads, size)
    found: Counter[str] = Counter()
    for op in program.blocks["layer.F"].ops:
        if op.kind == "ring_shift":
            found[op.stream] += float(work(op).payload_bytes)
    assert found == {"cp": away, "cp.home": home}
    keys = ring_bytes(SequenceSplit(4), SEQ, kv_heads * model.head_dim, size)
    assert (away < keys) == (kv_heads == model.heads)  # one way carries half of K and V, or more


@pytest.mark.parametrize(("ring", "window"), [(4, 2), (8, 2), (8, 4)])
def test_a_double_ring_moves_most_blocks_inside(ring: int, window: int) -> None:
    program, outer = lowered(cp=ring, cp_window=window), ring // window
    steps = {"F": (outer * (window - 1), outer - 1), "B": (outer * (2 * window - 1), 2 * outer - 1)}
    for block, (inside, between) in steps.items():
        ops = program.blocks[f"layer.{block}"].ops
        found = Counter(op.group for op in ops if op.kind == "ring_shift")
        assert found == {"cp_inner": inside, "cp_outer": between}
    kv_width = LLAMA.kv_heads * LLAMA.head_dim
    moved = payload(program, "ring_shift", "layer.F")
    assert moved == ring_bytes(SequenceSplit(ring), SEQ, kv_width, 2)


def test_two_ways_help_where_links_have_two() -> None:
    """Over a mesh of links each way has wires of its own; through a switch both share a port."""
    model = replace(LLAMA, kv_heads=LLAMA.heads)
    steps = {}
    for kind in ("ring", "token_ring"):
        program = lowered(FAR, model, cp=4, cp_kind=kind)
        for links in ("switch", "mesh"):
            cost = cluster_cost(program, bandwidth=0.02)
            up = replace(cost.cluster.scale_up, kind=links)
            cost = ClusterCost(replace(cost.cluster, scale_up=up), program.mesh)
            steps[kind, links] = estimate(program, cost, cost).step_s
    assert steps["token_ring", "mesh"] < steps["ring", "mesh"]
    assert steps["token_ring", "mesh"] < steps["token_ring", "switch"]


def test_ulysses_moves_as_much_when_length_and_ranks_double_together() -> None:
    found = [ulysses_bytes(SequenceSplit(1, n), 1024 * n, 64, 64, 2) for n in (2, 4, 8)]
    assert len(set(found)) == 1
    assert found[0] > 0
    rings = [ring_bytes(SequenceSplit(n), 1024 * n, 64, 2) for n in (2, 4, 8)]
    assert rings[0] < rings[1] < rings[2]


def test_replicas_of_weights_include_the_ranks_of_a_sequence() -> None:
    plain = lowered(cp=2, dp_replicate=2)
    assert {op.group for op in plain.blocks["layer.reduce"].ops} == {"dp_replicate*cp"}
    sharded = lowered(cp=4, dp_replicate=2, zero_stage=3, cp_kind="usp", cp_ring=2, cp_ulysses=2)
    groups = [(op.kind, op.group) for op in sharded.blocks["layer.reduce"].ops]
    assert groups == [("reduce_scatter", "cp_ring*cp_ulysses"), ("all_reduce", "dp_replicate")]
    whole = lowered().buffers["layer.w"].elements
    assert sharded.buffers["layer.ws"].elements == whole // 4


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("name", STRATEGIES)
def test_machines_agree(name: str) -> None:
    program = lowered(FAR, **STRATEGIES[name])
    cost, wires = cluster_cost(program), Wires(2e-6, 20e9)
    whole = estimate(program, cost, wires)
    detail = simulate(program, cost, wires, detail=True)
    assert whole.step_s == pytest.approx(detail.step_s, rel=1e-9)
    every = simulate(program, cost, wires, every_rank=True)
    assert every.step_s == pytest.approx(detail.step_s, rel=0.02)
    assert lower_bound(program, cost) <= detail.step_s * (1 + 1e-9)
    assert detail.step_s <= serial_sum(program, cost, wires) * (1 + 1e-9)


def test_where_units_idle_a_ring_takes_longer_than_its_folded_price() -> None:
    """Half of the queries on all keys keep fewer units busy than all queries on half of the keys.

    Ranks then differ although their pairs are equal, and one rank for all is too quick.
    """
    program = lowered(4096, cp=4, cp_layout="zigzag")
    cost, wires = cluster_cost(program), Wires(2e-6, 20e9)
    folded = simulate(program, cost, wires, detail=True).step_s
    every = simulate(program, cost, wires, every_rank=True).step_s
    assert folded < every < 1.5 * folded


def test_a_contiguous_ring_waits_for_its_last_rank() -> None:
    steps = {}
    for layout in LAYOUTS:
        program = lowered(FAR, cp=4, cp_layout=layout)
        cost = cluster_cost(program)
        line = simulate(program, cost, cost, every_rank=True)
        steps[layout] = line.step_s
        busy = [
            sum(s.end_s - s.start_s for s in line.spans if s.rank == rank and "block" in s.name)
            for rank in range(4)
        ]
        if layout == "contiguous":
            assert busy == sorted(busy)
            assert busy[0] < busy[3] / 2
        else:
            assert min(busy) > 0.9 * max(busy)
    assert steps["zigzag"] < steps["contiguous"]
    assert steps["striped"] < steps["contiguous"]


def test_blocks_arrive_while_others_are_attended_to() -> None:
    """With attention long enough, a ring's shifts cost nothing but what stands at its ends."""
    program = lowered(FAR, cp=4)
    cost = cluster_cost(program, bandwidth=100.0)
    line = simulate(program, cost, cost, detail=True)
    shifts = [s for s in line.spans if s.name == "ring_shift"]
    blocks = [s for s in line.spans if s.name.startswith("attention_block")]
    inside = sum(any(b.start_s < s.end_s and s.start_s < b.end_s for b in blocks) for s in shifts)
    assert len(shifts) * 3 / 4 < inside


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("length", "parallel", "words"),
    [
        (100, {"cp": 8}, ("multiple of 16", "96")),
        (100, {"cp": 8, "cp_layout": "striped"}, ("multiple of 8",)),
        (SEQ, {"cp": 8, "cp_kind": "ulysses"}, ("heads", "use a ring")),
        (SEQ, {"cp": 4, "cp_kind": "usp", "cp_ring": 2}, ("cp_ring 2 x cp_ulysses 1",)),
        (SEQ, {"cp": 4, "cp_ring": 2}, ("cp_kind", "usp")),
        (SEQ, {"cp": 4, "cp_window": 3}, ("cp_window 3", "divides")),
        (SEQ, {"cp": 2, "cp_kind": "lightsec"}, ("cp_kind", "'lightseq'")),
        (SEQ, {"cp": 2, "cp_kind": "rings"}, ("cp_kind", "'ring'")),
        (SEQ, {"cp": 2, "cp_layout": "zigzags"}, ("cp_layout", "'zigzag'")),
    ],
)
def test_splits_that_do_not_fit_are_refused(
    length: int, parallel: dict[str, object], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        lowered(length, **parallel)
    assert all(word in str(caught.value) for word in words)


def test_balancing_needs_a_causal_mask() -> None:
    with pytest.raises(InputError, match="choose 'ring'"):
        lowered(model=replace(LLAMA, causal=False), cp=2, cp_kind="lightseq")


def test_generation_does_not_split_sequences() -> None:
    with pytest.raises(InputError, match="cp to 1"):
        lower_pass(LLAMA, ParallelStrategy(cp=2), 2, 8, 0)
