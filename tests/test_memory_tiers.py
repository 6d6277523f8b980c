"""Copies, capacity, and torch's caching allocator replayed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.catalogue import load_chip, load_link
from hwmodels.hardware import Link, MemoryTier
from hwmodels.memory import (
    CONTEXT_BYTES,
    MIB,
    Copy,
    block_bytes,
    communication_bytes,
    copy_finishes,
    copy_seconds,
    move_seconds,
    packed,
    replay,
    room_bytes,
    segment_bytes,
)
from simcore.errors import InputError

LINK = Link("test", 1e10, 1e-6)
M = 2**20

# -- copies ----------------------------------------------------------------------------------------


def test_copies_by_hand() -> None:
    """1e10 bytes at 1e10 bytes/s; pageable ones wait for the processor's copy as well."""
    assert copy_seconds(1e10, LINK) == pytest.approx(1.000001)
    assert copy_seconds(1e10, LINK, pinned=False, staging_bytes_per_s=2e10) == pytest.approx(
        1.500001
    )
    assert copy_seconds([0.0, 1e4], LINK) == pytest.approx([0.0, 2e-6])


def test_pinned_copies_of_a_pcie3_titan() -> None:
    """11 GB/s, host to device, pinned: a Titan X on PCIe 3 x16, reported under NVIDIA's article
    on data transfers. Not what the link's efficiency was set by (NCCL's 12 GB/s)."""
    size = 1e9
    rate = size / float(copy_seconds(size, load_link("pcie3x16")))
    assert rate == pytest.approx(11e9, rel=0.1)


def test_engines_work_both_ways_at_once() -> None:
    """One copy at a time each way; a lone engine, or a shared link, makes one queue."""
    copies = [Copy(1e10, "to_device"), Copy(1e10, "to_host"), Copy(1e10, "to_device", ready_s=5.0)]
    assert copy_finishes(copies, LINK) == pytest.approx([1, 1, 6], rel=1e-5)
    assert copy_finishes(copies, LINK, engines=1) == pytest.approx([1, 2, 6], rel=1e-5)
    shared = Link("shared", 1e10, 0.0, duplex=False)
    assert copy_finishes(copies[:2], shared) == pytest.approx([1, 2])


copies_of = st.lists(
    st.builds(
        Copy,
        st.floats(0, 1e9),
        st.sampled_from(["to_device", "to_host"]),
        st.floats(0, 1),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(copies_of)
def test_engines_keep_order_and_lose_no_work(copies: list[Copy]) -> None:
    """Two engines are never slower than one; no copy ends before its own time; queues are kept."""
    both, one = copy_finishes(copies, LINK), copy_finishes(copies, LINK, engines=1)
    assert (both <= one + 1e-12).all()
    for way in ("to_device", "to_host"):
        mine = [i for i, copy in enumerate(copies) if copy.direction == way]
        assert (np.diff(both[mine]) >= -1e-12).all()
    for copy, end in zip(copies, both, strict=True):
        alone = float(copy_seconds(copy.size_bytes, LINK, copy.pinned))
        assert end >= copy.ready_s + alone - 1e-12


def test_moves_go_at_the_slowest_part() -> None:
    """Disk to host to HBM in chunks: the disk's 5 GB/s, both latencies once."""
    tiers = [
        MemoryTier("disk", 4e12, 5e9),
        MemoryTier("host", 1e12, 2e11),
        load_chip("h100").hbm,
    ]
    links = [Link("nvme", 7e9, 1e-4), load_link("pcie5x16")]
    found = float(move_seconds(1e10, tiers, links))
    assert found == pytest.approx(2.0 + 1e-4 + links[1].latency_s)
    assert float(move_seconds(0, tiers, links)) == 0.0


# -- capacity --------------------------------------------------------------------------------------


def test_room_by_hand() -> None:
    """80 GiB less 551 MiB of context and, in groups of four and more, 392 MiB of NCCL."""
    memory = load_chip("h100").hbm.size_bytes
    assert room_bytes(memory) == memory - CONTEXT_BYTES
    assert room_bytes(memory, ranks=8) == memory - (551 + 392) * MIB
    assert room_bytes(memory, 8, 0.0, 0.5) == (memory - 392 * MIB) / 2
    assert room_bytes(1e6) == 0.0


@given(st.integers(1, 512))
def test_communication_grows_with_the_group(ranks: int) -> None:
    assert communication_bytes(ranks) <= communication_bytes(ranks + 1)


# -- the caching allocator -------------------------------------------------------------------------


def test_rounding_is_torchs() -> None:
    """c10's get_allocation_size and round_size at their corners."""
    assert block_bytes([1, 512, 513, 0]).tolist() == [512, 512, 1024, 512]
    sizes = [1, M, M + 1, 10 * M - 512, 10 * M, 10 * M + 1, 30 * M]
    assert segment_bytes(sizes).tolist() == [
        2 * M, 2 * M, 20 * M, 20 * M, 10 * M, 12 * M, 30 * M
    ]  # fmt: skip


def test_small_tensors_share_a_segment() -> None:
    """4096 of 512 bytes fill 2 MiB; one more opens another."""
    assert packed([512] * 4096).reserved_bytes == 2 * M
    assert packed([512] * 4097).reserved_bytes == 4 * M
    assert packed([1] * 4096).waste_share == pytest.approx(1 - 1 / 512)


def test_middling_tensors_share_twenty() -> None:
    """Six of 3 MiB leave 2 MiB, of which 2 MiB may be cut off but 1 MiB may not."""
    assert packed([3 * M] * 6).reserved_bytes == 20 * M
    assert packed([3 * M] * 6 + [2 * M]).reserved_bytes == 20 * M
    assert packed([3 * M] * 7).reserved_bytes == 40 * M
    close = packed([5 * M + M // 2] * 3 + [3 * M])  # 3.5 MiB left: a tail of 0.5 MiB goes with it
    assert close.reserved_bytes == 20 * M
    assert close.allocated_bytes == 20 * M


def test_freed_neighbours_join() -> None:
    """Two freed blocks of 4 MiB serve 8 MiB; with one in use between them they do not."""
    asked = [("a", 4 * M), ("b", 4 * M), ("c", 4 * M), ("d", 8 * M)]
    joined = [*asked[:4], ("a", 0), ("b", 0), ("e", 8 * M)]
    assert replay(joined).reserved_bytes == 20 * M
    apart = [*asked[:4], ("a", 0), ("c", 0), ("e", 8 * M)]
    assert replay(apart).reserved_bytes == 40 * M


def test_fragmentation_can_fail_where_bytes_would_fit() -> None:
    """20 MiB free in two halves cannot serve 12 MiB; empty segments are given back first."""
    halves = [("a", 10 * M), ("b", 10 * M), ("c", 20 * M), ("a", 0), ("b", 0)]
    assert replay([*halves, ("d", 12 * M)], 40 * M).fits
    pinned = [("a", 8 * M), ("b", 8 * M), ("b2", 4 * M), ("a", 0), ("b2", 0), ("d", 12 * M)]
    assert not replay(pinned, 20 * M).fits
    assert replay(pinned, 32 * M).fits


@st.composite
def traces(draw: st.DrawFn) -> list[tuple[int, int]]:
    sizes = st.sampled_from([1, 600, 300_000, M, 2 * M, 7 * M, 9 * M, 15 * M])
    events: list[tuple[int, int]] = []
    alive: list[int] = []
    for name in range(draw(st.integers(1, 25))):
        events.append((name, draw(sizes)))
        alive.append(name)
        if draw(st.booleans()):
            events.append((alive.pop(draw(st.integers(0, len(alive) - 1))), 0))
    return events


@given(traces())
def test_replay_laws(events: list[tuple[int, int]]) -> None:
    """requested <= allocated <= reserved; segments are whole 2 MiB; enough room always fits, and a
    bound is kept."""
    usage = replay(events)
    assert usage.requested_bytes <= usage.allocated_bytes <= usage.reserved_bytes
    assert usage.reserved_bytes % (2 * M) == 0
    assert usage.fits
    assert 0 <= usage.waste_share < 1
    assert replay(events, usage.reserved_bytes) == usage
    assert replay(events, usage.reserved_bytes - 1).reserved_bytes < usage.reserved_bytes


@given(st.lists(st.integers(1, 40 * M), min_size=1, max_size=12))
def test_packing_is_between_the_blocks_and_a_segment_each(sizes: list[int]) -> None:
    usage = packed(sizes)
    assert block_bytes(sizes).sum() <= usage.reserved_bytes <= segment_bytes(sizes).sum()
    assert usage.requested_bytes == sum(sizes)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="0 or above"):
        copy_seconds(-1, LINK)
    with pytest.raises(InputError, match="did you mean 'to_host'"):
        copy_finishes([Copy(1, "to_hosts")], LINK)
    with pytest.raises(InputError, match="1 or 2"):
        copy_finishes([], LINK, engines=3)
    with pytest.raises(InputError, match="need 1 links"):
        move_seconds(1, [MemoryTier("a", 1, 1), MemoryTier("b", 1, 1)], [])
    with pytest.raises(InputError, match="1 or more"):
        communication_bytes(0)
    with pytest.raises(InputError, match="below 1"):
        room_bytes(1, waste_share=1.0)
    with pytest.raises(InputError, match="never asked"):
        replay([("a", 0)])
    with pytest.raises(InputError, match="twice"):
        replay([("a", 1), ("a", 2)])
