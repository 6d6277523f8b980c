"""Payloads that are not one even buffer: experts, engines, codecs, unequal members, neighbours."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.catalogue import load_chip, load_link
from hwmodels.collectives import (
    Codec,
    GroupLayout,
    Routing,
    busiest_bytes,
    coded_seconds,
    collective_seconds,
    distinct_groups,
    engine_all_reduce,
    engines,
    expert_copies,
    expert_seconds,
    footprint,
    gather_matrix,
    matrix_seconds,
    scatter_matrix,
)
from hwmodels.collectives.codecs import CODER_PASSES
from hwmodels.collectives.experts import phases
from hwmodels.hardware import Link
from simcore.errors import InputError
from validation.accuracy import engines as accuracy
from validation.accuracy.engines_fit import (
    fit_engine,
    fit_phase,
    predict_engine,
    predict_experts,
    read_engine_calls,
    read_expert_calls,
)

UP, NIC = load_link("nvlink4"), load_link("ib-ndr-400")
H100 = load_chip("h100-sxm-80gb")
NODE = GroupLayout(8, 8, UP, NIC)
DEEPSEEK = Routing(7168, 8, 256)


# -- experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "topk", "groups"), [(8, 2, 4), (8, 3, 2), (6, 6, 3), (9, 1, 3)]
)
def test_distinct_groups_by_counting_every_draw(experts: int, topk: int, groups: int) -> None:
    draws = list(itertools.combinations(range(experts), topk))
    touched = [len({expert * groups // experts for expert in draw}) for draw in draws]
    assert float(distinct_groups(experts, topk, groups)) == pytest.approx(np.mean(touched))


def test_copies_by_moving_tokens() -> None:
    """16 ranks on 4 nodes, 32 experts: every draw of 2, every source rank, copies counted."""
    routing, n, m = Routing(1, 2, 32), 16, 4
    counts = Counter[str]()
    for source in range(n):
        for draw in itertools.combinations(range(32), 2):
            ranks = {expert // 2 for expert in draw}
            for node in {rank // m for rank in ranks}:
                landing = node * m + source % m  # the same place on the other node
                counts["out"] += node != source // m
                counts["up"] += len({r for r in ranks if r // m == node} - {landing})
            counts["tokens"] += 1
            for expert in draw:
                rank = expert // 2
                counts["each up"] += rank != source and rank // m == source // m
                counts["each out"] += rank // m != source // m
    up, out = expert_copies("normal", routing, n, m)
    assert float(up) == pytest.approx(counts["up"] / counts["tokens"])
    assert float(out) == pytest.approx(counts["out"] / counts["tokens"])
    up, out = expert_copies("low-latency", routing, n, m)
    assert float(up) == pytest.approx(counts["each up"] / counts["tokens"])
    assert float(out) == pytest.approx(counts["each out"] / counts["tokens"])


@pytest.mark.parametrize("name", phases())
def test_expert_seconds_laws(name: str) -> None:
    mode, phase = name.split("/")
    tokens = np.geomspace(1, 1e5, 20)
    seconds = expert_seconds(mode, phase, tokens, DEEPSEEK, NODE)
    assert np.all(np.diff(seconds) > 0)
    wide = expert_seconds(mode, phase, tokens, DEEPSEEK, GroupLayout(16, 8, UP, NIC))
    assert np.all(wide > 0)
    assert np.all(expert_seconds(mode, phase, tokens, DEEPSEEK, NODE, imbalance=1.5) >= seconds)
    assert expert_seconds(mode, phase, 100, DEEPSEEK, GroupLayout(1, 1, UP, NIC)) == 0.0
    if mode == "normal":
        many = expert_seconds(mode, phase, tokens, DEEPSEEK, NODE, sms=24)
        few = expert_seconds(mode, phase, tokens, DEEPSEEK, NODE, sms=4)
        assert np.all(many < few)


def test_expert_misuse() -> None:
    with pytest.raises(InputError, match="a token takes 1 to 8 experts"):
        distinct_groups(8, 9, 4)
    with pytest.raises(InputError, match="normal/dispatch"):
        expert_seconds("normal", "dispach", 1, DEEPSEEK, NODE)


# -- engines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", engines())
def test_engines(name: str) -> None:
    sizes = np.geomspace(256, 2**30, 60)
    seconds, ran = engine_all_reduce(name, sizes, NODE, H100)
    assert np.all(np.diff(seconds) > 0)
    assert list(dict.fromkeys(ran)) == ["one-shot", "two-shot", "nccl"]
    limit = engines()[name].limit_bytes
    assert set(ran[sizes > limit]) == {"nccl"}
    beyond = collective_seconds("all_reduce", sizes, NODE, "nccl")
    assert np.array_equal(seconds[ran == "nccl"], beyond[ran == "nccl"])
    assert np.all(engine_all_reduce(name, sizes, GroupLayout(16, 8, UP, NIC), H100)[1] == "nccl")


def test_eager_waits_for_the_host_and_copies() -> None:
    sizes = np.geomspace(256, 2**30, 30)
    graph, eager = (engine_all_reduce("vllm", sizes, NODE, H100, eager)[0] for eager in (0, 1))
    engine = engines()["vllm"]
    assert np.all(eager > graph)
    assert eager[0] == engine.host_s[H100.name]
    copied = 2 * sizes[-1] / (engine.copy_share * H100.hbm.bytes_per_s)
    assert eager[-1] == pytest.approx(graph[-1] + copied + engine.copy_s)
    with pytest.raises(InputError, match="not measured launched eagerly"):
        engine_all_reduce("trtllm", 1, NODE, H100, eager=True)
    with pytest.raises(InputError, match="did you mean 'vllm'"):
        engine_all_reduce("vlm", 1, NODE, H100)


# -- unequal members -------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=12))
def test_busiest_port_of_unequal_parts(parts: list[float]) -> None:
    """Whoever has the most sends it n - 1 times; whoever has the least receives all the rest."""
    n, total = len(parts), sum(parts)
    expected = max((n - 1) * max(parts), total - min(parts))
    assert busiest_bytes(gather_matrix(parts)) == pytest.approx(expected)
    assert busiest_bytes(scatter_matrix(parts)) == pytest.approx(expected)
    half = max(((n - 1) * p + total - p) / 2 for p in parts)
    assert busiest_bytes(gather_matrix(parts), duplex=False) == pytest.approx(half)


@pytest.mark.parametrize("link", [UP, Link("plain", 1e11, 1e-6)])
@pytest.mark.parametrize(("n", "m"), [(8, 8), (16, 8), (4, 1)])
def test_an_even_matrix_is_all_to_all(link: Link, n: int, m: int) -> None:
    size = 2.0**26
    group = GroupLayout(n, m, link, NIC)
    algorithm = "auto" if link is UP else "direct"
    even = collective_seconds("all_to_all", size, group, algorithm)
    found = matrix_seconds(np.full((n, n), size / n), group, algorithm)
    assert found == pytest.approx(float(even), rel=1e-9)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_matrix_laws(seed: int) -> None:
    """More bytes never take less; a skewed matrix never less than the even one of its total."""
    draw = np.random.default_rng(seed)
    matrix = draw.exponential(1e7, (8, 8))
    np.fill_diagonal(matrix, 0.0)
    seconds = matrix_seconds(matrix, NODE)
    assert matrix_seconds(matrix + 1e5 * draw.random((8, 8)), NODE) >= seconds
    mean = matrix.sum() / 56
    even = np.full((8, 8), mean) - mean * np.eye(8)
    assert matrix_seconds(even, NODE) <= seconds
    busy = busiest_bytes(matrix)
    assert busy <= seconds * UP.bytes_per_s


def test_matrix_misuse() -> None:
    with pytest.raises(InputError, match="meets a group of 8"):
        matrix_seconds(np.ones((4, 4)), NODE)
    with pytest.raises(InputError, match="is square"):
        matrix_seconds(np.ones((8, 4)), NODE)
    with pytest.raises(InputError, match="takes no traffic matrix"):
        matrix_seconds(np.ones((8, 8)), NODE, "pairwise")
    assert matrix_seconds(np.zeros((8, 8)), NODE) == 0.0
    assert matrix_seconds(5e9 * np.eye(8), NODE) == 0.0


# -- codecs ----------------------------------------------------------------------------------------


def test_codec_passes_by_coding_shards() -> None:
    """Two-stage all_reduce of 4 ranks: each codes its 4 shards, decodes 4 parts, codes the sum."""
    n, coded, decoded = 4, Counter[int](), Counter[int]()
    for owner in range(n):
        for rank in range(n):
            coded[rank] += 1  # its part of the owner's shard
            decoded[owner] += 1
        coded[owner] += 1  # the sum
        for rank in range(n):
            decoded[rank] += 1
    passes = CODER_PASSES["all_reduce"](np.asarray(float(n)))
    assert [float(x) for x in passes] == [max(coded.values()) / n, max(decoded.values()) / n]


def test_coded_seconds() -> None:
    free = Codec(0.5, 0.0, 0.0)
    size = 2.0**28
    half = coded_seconds("all_gather", size, NODE, free)
    assert half == collective_seconds("all_gather", size / 2, NODE, dtype="int8")
    priced = coded_seconds("all_gather", size, NODE, Codec(0.5, 8e-3, 1e-3))
    assert float(priced) == pytest.approx(float(half) + 8e-3 / 8 + 1e-3)
    assert coded_seconds("all_reduce", size, GroupLayout(1, 1, UP, NIC), free) == 0.0
    with pytest.raises(InputError, match="ratio"):
        coded_seconds("all_gather", size, NODE, Codec(0.0, 0, 0))


# -- beside kernels --------------------------------------------------------------------------------


def test_footprint() -> None:
    sizes = np.array([1e3, 1e6, 1e9])
    found = footprint("all_reduce", sizes, NODE, H100)
    assert np.all(np.diff(found.units) >= 0)
    assert found.units[-1] == pytest.approx(24 / 132)
    assert np.all((found.memory >= 0) & (found.memory < 0.5))
    assert found.slowdown(0.0)[-1] == pytest.approx(132 / 108)
    assert found.slowdown(1.0)[-1] >= found.slowdown(0.0)[-1]
    nothing = footprint("all_reduce", 1e9, GroupLayout(1, 1, UP, NIC), H100)
    assert nothing.slowdown(1.0) == 1.0


# -- measurements ----------------------------------------------------------------------------------


def test_engines_on_sizes_and_chips_held_out(data_dir: Path) -> None:
    calls = read_engine_calls(data_dir / "collectives" / "custom_allreduce.csv")["trtllm"]
    measured = accuracy.seconds_of(calls)
    for part in (accuracy.odd_size, accuracy.chip_of):
        found = accuracy.held_out(
            calls, part, lambda known: fit_engine("trtllm", known), predict_engine
        )
        assert np.median(np.abs(found / measured - 1)) < 0.10


@pytest.mark.parametrize("name", phases())
def test_experts_on_token_counts_and_chips_held_out(name: str, data_dir: Path) -> None:
    calls = read_expert_calls(data_dir / "collectives" / "moe_all_to_all.csv")[name]
    measured = accuracy.seconds_of(calls)
    for part in (accuracy.odd_size, accuracy.chip_of):
        found = accuracy.held_out(
            calls,
            part,
            lambda known: fit_phase(name, known),
            lambda phase, held: predict_experts(name, phase, held),
        )
        assert np.median(np.abs(found / measured - 1)) < 0.12
