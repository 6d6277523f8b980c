"""NCCL's protocols: laws over every candidate, and measured calls where there are any."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.catalogue import load_chip, load_link
from hwmodels.collectives import (
    BUS_FACTORS,
    CANDIDATES,
    GroupLayout,
    bus_bytes_per_s,
    choose,
    collective_seconds,
    deviation,
    interval,
    library_call,
    traffic,
)
from hwmodels.collectives.nccl import candidates, on_link
from hwmodels.hardware import Link
from simcore.errors import InputError
from validation.accuracy import collectives as accuracy
from validation.accuracy.nccl_fit import START, Calls, fit, predict, protocols_of, read_calls

NIC = load_link("ib-ndr-400")
LINKS = ("nvlink2", "nvlink3", "nvlink4", "nvlink4-h800", "nvlink5", "pcie4x16")


def node(link: str, n: int = 8) -> GroupLayout:
    return GroupLayout(n, n, load_link(link), NIC)


@pytest.mark.parametrize("op", BUS_FACTORS)
@settings(max_examples=40)
@given(
    name=st.sampled_from(LINKS),
    n=st.integers(2, 64),
    per_node=st.integers(1, 8),
    size=st.floats(1, 1e10),
    more=st.floats(1, 10),
    dtype=st.sampled_from(["bf16", "int8"]),
)
def test_laws(
    op: str, name: str, n: int, per_node: int, size: float, more: float, dtype: str
) -> None:
    """Monotone in bytes; more bandwidth is never slower; no port above its peak."""
    up = load_link(name)
    group = GroupLayout(n, per_node, up, NIC)

    def wider(link: Link) -> Link:
        return Link(
            link.name, link.bytes_per_s * more, link.latency_s, kind=link.kind,
            peer_bytes_per_s=link.peer_rate_bytes_per_s * more, efficiency=link.efficiency,
        )  # fmt: skip

    seconds, chosen = choose(op, size, group, dtype=dtype)
    assert seconds > 0
    assert collective_seconds(op, size * more, group, dtype=dtype) >= seconds * (1 - 1e-12)
    faster = GroupLayout(n, per_node, wider(up), wider(NIC))
    assert collective_seconds(op, size, faster, dtype=dtype) <= seconds * (1 + 1e-12)
    moved = traffic(op, n, CANDIDATES[str(chosen)].algorithm, per_node)
    assert size * moved.up_share <= seconds * up.bytes_per_s * (1 + 1e-9)
    assert size * moved.out_share <= seconds * NIC.bytes_per_s * (1 + 1e-9)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("op", BUS_FACTORS)
def test_the_tuner_takes_the_fastest(op: str, link: str) -> None:
    sizes = np.geomspace(8, 2**33, 40)
    group = node(link)
    best = collective_seconds(op, sizes, group)
    for name in candidates(op):
        try:
            each = collective_seconds(op, sizes, group, name)
        except InputError:
            continue  # this link or group has it not
        assert np.all(best <= each)


def test_protocols_take_turns() -> None:
    """LL while latency rules, LL128 between, then whole chunks or the switch."""
    sizes = np.array([512.0, 2**23, 2**29])
    names = choose("all_reduce", sizes, node("nvlink4"))[1]
    assert list(names) == ["ring-ll", "ring-simple", "nvls"]
    names = choose("all_reduce", sizes, node("nvlink3"))[1]
    assert list(names) == ["ring-ll", "ring-ll128", "ring-simple"]
    assert choose("all_reduce", 2.0**29, node("nvlink4"), dtype="int8")[1] == "ring-simple"
    assert choose("all_reduce", 2.0**29, node("nvlink4", 2))[1] == "ring-simple"


def test_the_switch_saves_bytes_only_in_groups() -> None:
    """1 + 1/n bytes through a port against 2 (n-1)/n: less from three ranks on."""
    for n in (2, 3, 4, 8, 72):
        inside = traffic("all_reduce", n, "in-switch").up_share
        around = traffic("all_reduce", n, "ring").up_share
        assert float(inside) == pytest.approx(1 + 1 / n)
        assert (inside < around) == (n > 3)
        assert (inside <= around) == (n >= 3)


def test_other_links_take_closed_forms() -> None:
    loopback = GroupLayout(4, 4, load_link("loopback"), NIC)
    assert on_link("loopback") is None
    assert str(choose("all_reduce", 1e6, loopback)[1]) not in CANDIDATES
    assert str(choose("all_reduce", 1e6, loopback, "nccl")[1]) in CANDIDATES


@pytest.mark.parametrize("link", LINKS)
def test_protocols_are_ordered(link: str) -> None:
    """Who waits for fewer flags starts sooner, and who sends fewer flags has more bandwidth."""
    library = on_link(link)
    assert library is not None
    names = [name for name in ("ll", "ll128", "simple") if name in library.protocols]
    rows = [library.protocols[name] for name in names]
    for slower, faster in itertools.pairwise(reversed(rows)):
        assert slower.share > faster.share
    for row in rows[1:]:
        assert row.call_cycles > rows[0].call_cycles
        assert row.hop_cycles > rows[0].hop_cycles
    assert rows[0].share <= 0.5
    assert all(0 < p.share <= 1 for p in library.protocols.values())


def test_hand_priced_call() -> None:
    """Simple on 8 A100s: call, hops, bytes, half a chunk's piece, the last step's copy."""
    link, library = load_link("nvlink3"), on_link("nvlink3")
    assert library is not None
    p, size, clock = library.protocols["simple"], 2.0**30, 1.41e9
    port = p.share * link.bytes_per_s * link.efficiency
    by_hand = (
        (p.call_cycles + 14 * p.hop_cycles * link.latency_s / 6e-7) / clock
        + (1.75 * size + 0.5 * min(size / 8, p.piece_bytes)) / port
        + size / 8 / (p.copy_bytes_per_cycle * clock)
    )
    found = collective_seconds("all_reduce", size, node("nvlink3"), "ring-simple")
    assert float(found) == pytest.approx(by_hand, rel=1e-12)


def test_a_million_calls_in_two_seconds() -> None:
    draw = np.random.default_rng(0)
    sizes = np.exp(draw.uniform(0, 22, 1_000_000))
    ranks = 2.0 ** draw.integers(0, 8, len(sizes))
    group = GroupLayout(ranks, np.minimum(ranks, 8), load_link("nvlink4"), NIC)
    start = time.process_time()
    seconds = collective_seconds("all_reduce", sizes, group)
    assert time.process_time() - start < 2 * 2  # shared cores: twice the target
    assert np.isfinite(seconds).all()


def test_intervals_hold_one_and_widen_where_coefficients_are_borrowed() -> None:
    sizes = np.array([1e3, 1e6, 1e9])
    for op in ("all_reduce", "broadcast"):
        for link in ("nvlink4", "nvlink5"):
            low, high = interval(op, sizes, link)
            assert np.all((low < 1.05) & (high > 1) & (low < high))
        assert np.all(deviation(op, sizes, "nvlink5") > deviation(op, sizes, "nvlink4"))


def test_names_and_misuse() -> None:
    with pytest.raises(InputError, match="did you mean 'ring-ll128'"):
        collective_seconds("all_reduce", 1, node("nvlink4"), "ring-ll12")
    with pytest.raises(InputError, match="cannot do all_gather: use one of"):
        collective_seconds("all_gather", 1, node("nvlink4"), "nvls")
    with pytest.raises(InputError, match="cannot run all_reduce of int8"):
        collective_seconds("all_reduce", 1, node("nvlink4"), "nvls", dtype="int8")


def test_library_call_knows_engines_and_algorithms() -> None:
    chip, group = load_chip("h100-sxm-80gb"), node("nvlink4")
    usual, name = library_call("all_reduce", 1e6, group, chip)
    assert str(name) in CANDIDATES
    own, name = library_call("all_reduce", 1e6, group, chip, "vllm")
    assert str(name) in ("one-shot", "two-shot")
    assert own < usual
    assert library_call("all_reduce", 1e6, group, chip, "vllm-eager")[0] > own
    gathered = library_call("all_gather", 1e6, group, chip, "vllm")[0]
    assert gathered == library_call("all_gather", 1e6, group, chip, "nccl")[0]


# -- fits ------------------------------------------------------------------------------------------


def made_up_calls(noise: float) -> Calls:
    """Calls on A100 and H100 priced by known coefficients."""
    draw = np.random.default_rng(1)
    rows = [
        (chip, op, n, 2.0**e)
        for chip in ("a100_sxm", "h100_sxm")
        for op in ("all_reduce", "all_gather", "all_to_all")
        for n in (2, 4, 8)
        for e in range(9, 30)
    ]
    chip, op, ranks, size = (np.array(column) for column in zip(*rows, strict=True))
    same = np.full(len(rows), "1")
    calls = Calls(chip, same, op, ranks.astype(float), np.full(len(rows), "fp16"), size, size)
    truth = protocols_of({key: value * 1.3 if "call" in key else value * 0.9
                          for key, value in START.items()})  # fmt: skip
    seconds = predict(calls, truth) * np.exp(noise * draw.standard_normal(len(rows)))
    return Calls(chip, same, op, calls.ranks, calls.dtype, size, seconds)


def test_fit_recovers_what_made_the_calls() -> None:
    calls = made_up_calls(0.02)
    assert np.median(np.abs(predict(calls, fit(calls)) / calls.seconds - 1)) < 0.03
    one = calls.where(calls.chip == "h100_sxm")
    other = calls.where(calls.chip == "a100_sxm")
    assert np.median(np.abs(predict(other, fit(one)) / other.seconds - 1)) < 0.05


def test_splits_never_show_a_fit_its_own_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = made_up_calls(0.0)
    seen: list[Calls] = []
    monkeypatch.setattr(accuracy, "fit", seen.append)
    held: list[Calls] = []

    def look(part: Calls, _: object) -> np.ndarray:
        held.append(part)
        return part.seconds

    monkeypatch.setattr(accuracy, "predict", look)
    for split in (accuracy.by_sizes, accuracy.by_chips):
        seen.clear()
        held.clear()
        split(calls)
        assert sum(map(len, held)) == len(calls)
        for known, part in zip(seen, held, strict=True):
            keys = [set(zip(c.chip, c.op, c.ranks, c.size, strict=True)) for c in (known, part)]
            assert not keys[0] & keys[1]


@pytest.fixture(scope="module")
def nccl_calls(request: pytest.FixtureRequest) -> Calls:
    data_dir: Path = request.getfixturevalue("data_dir")
    return read_calls(data_dir / "collectives" / "nccl.csv")


def error(predicted: np.ndarray, calls: Calls, rows: np.ndarray) -> float:
    return float(np.median(np.abs(predicted[rows] / calls.seconds[rows] - 1)))


def test_held_out_sizes_and_chips(nccl_calls: Calls) -> None:
    """The targets, and better than a constant bandwidth and another chip's table."""
    calls, every = nccl_calls, np.ones(len(nccl_calls), dtype=np.bool_)
    sizes = accuracy.by_sizes(calls)
    assert error(sizes, calls, every) < 0.10
    assert error(sizes, calls, every) < error(accuracy.neighbour_size(calls), calls, every)
    chips, large = accuracy.by_chips(calls), accuracy.large_all_reduce(calls)
    for chip in np.unique(calls.chip):
        rows = calls.chip == chip
        assert error(chips, calls, rows) < 0.15
        assert error(chips, calls, rows & (calls.size <= 2**17)) < 0.25
        assert error(chips, calls, rows & large) < 0.08
    a100 = calls.chip == "a100_sxm"
    assert error(chips, calls, a100) < error(accuracy.nearest_chip(calls), calls, a100)


def test_shipped_coefficients_are_those_of_the_fit(
    nccl_calls: Calls, golden: Callable[..., None]
) -> None:
    """Bus bandwidths as shipped stay near the measured ones, and where they were."""
    found = {}
    for chip, link in (("a100_sxm", "nvlink3"), ("h100_sxm", "nvlink4")):
        rows = (nccl_calls.chip == chip) & accuracy.large_all_reduce(nccl_calls)
        seconds = collective_seconds("all_reduce", 2.0**29, node(link))
        assert float(seconds) == pytest.approx(float(np.median(nccl_calls.seconds[rows])), rel=0.08)
        found[link] = float(bus_bytes_per_s("all_reduce", 2.0**29, 8, seconds))
    golden("collectives_bus_bytes_per_s", found, rel=1e-3)


@pytest.mark.slow
def test_the_tables_of_the_report(data_dir: Path) -> None:
    """Every table has rows of its columns, and no target is missed."""
    tables = accuracy.collective_tables(data_dir)
    assert len({table.title for table in tables}) == len(tables)
    for table in tables:
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows)
        assert not table.missed
