"""Memory tiers, copies between them, and the room that is left for tensors.

A chip's tiers are on-chip memory, HBM, the host's memory and disks. Copies between HBM and host
run on copy engines, one per direction: one copy at a time each way, both ways at once (CUDA C++
programming guide, concurrent data transfers: asyncEngineCount = 2).

The room for tensors is what the driver's context, the communication library and the allocator
leave. torch's caching allocator serves requests from segments that it never gives back unless
memory runs out (c10/cuda/CUDACachingAllocator.cpp; torch documentation, "Memory management").
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.hardware import Link, MemoryTier
from simcore.errors import InputError, unknown

Array = NDArray[np.float64]

MIB = 2.0**20
# One core's memcpy, both of its streams included; assumption, an order of magnitude.
STAGING_BYTES_PER_S = 1e10
# What a process holds before its first tensor, and NCCL's buffers by ranks of the largest group
# (aiconfigurator, systems/*.yaml: other_mem before its safety margin, nccl_mem; observed).
CONTEXT_BYTES = 551 * MIB
COMMUNICATION_BYTES = {1: 0.0, 2: 342 * MIB, 4: 392 * MIB}

# c10/cuda/CUDACachingAllocator.cpp: kMinBlockSize, kSmallSize, kSmallBuffer, kLargeBuffer,
# kMinLargeAlloc, kRoundLarge.
BLOCK_BYTES = 512
SMALL_BYTES = 2**20  # requests up to here share small segments
SMALL_SEGMENT_BYTES = 2 * 2**20
LARGE_SEGMENT_BYTES = 20 * 2**20
OWN_SEGMENT_BYTES = 10 * 2**20  # requests from here on have a segment of their own size
ROUND_BYTES = 2 * 2**20

DIRECTIONS = ("to_device", "to_host")


# -- copies --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy between HBM and host: bytes, direction, when it may start, and whether pinned."""

    size_bytes: float
    direction: str  # a name of `DIRECTIONS`
    ready_s: float = 0.0
    pinned: bool = True


def copy_seconds(
    size_bytes: ArrayLike,
    link: Link,
    pinned: bool = True,
    staging_bytes_per_s: float = STAGING_BYTES_PER_S,
) -> Array:
    """Return the seconds of a copy over a host link that is otherwise idle.

    Pinned: latency + S / B. Pageable memory is first copied into a pinned buffer by the processor
    (CUDA driver API, API synchronization behavior): latency + S / B + S / B_staging. Nothing takes
    no time.
    """
    size = np.asarray(size_bytes, dtype=np.float64)
    if size.size and size.min() < 0:
        raise InputError("size_bytes of a copy must be 0 or above.")
    per_byte = 1 / (link.bytes_per_s * link.efficiency)
    per_byte += 0.0 if pinned else 1 / staging_bytes_per_s
    return np.where(size > 0, link.latency_s + size * per_byte, 0.0)


def copy_finishes(copies: Sequence[Copy], link: Link, engines: int = 2) -> Array:
    """Return when each copy has ended, in seconds.

    A direction's copies run in the order given, each once it is ready. With two ``engines`` over a
    duplex link the directions do not see one another, else all copies are one queue.
    """
    if engines not in (1, 2):
        raise InputError(f"{engines} copy engines: use 1 or 2.")
    free = dict.fromkeys(DIRECTIONS, 0.0)
    finishes = []
    for copy in copies:
        if copy.direction not in free:
            raise unknown("direction of a copy", copy.direction, DIRECTIONS)
        queue = copy.direction if engines == 2 and link.duplex else DIRECTIONS[0]
        free[queue] = max(free[queue], copy.ready_s) + float(
            copy_seconds(copy.size_bytes, link, copy.pinned)
        )
        finishes.append(free[queue])
    return np.array(finishes)


def move_seconds(
    size_bytes: ArrayLike, tiers: Sequence[MemoryTier], links: Sequence[Link]
) -> Array:
    """Return the seconds of a move through ``tiers``, ``links`` joining each to the next.

    Chunks follow one another, so the slowest tier or link sets the pace: sum of latencies +
    S / min(B).
    """
    if len(links) != len(tiers) - 1:
        raise InputError(f"{len(tiers)} tiers need {len(tiers) - 1} links, not {len(links)}.")
    size = np.asarray(size_bytes, dtype=np.float64)
    rates = [tier.bytes_per_s for tier in tiers]
    rates += [link.bytes_per_s * link.efficiency for link in links]
    delay = sum(link.latency_s for link in links)
    return np.where(size > 0, delay + size / min(rates), 0.0)


def swapped_share(
    token_bytes: float,
    whole_bytes: float,
    window_s: float,
    link: Link,
    host_bytes: float = np.inf,
) -> float:
    """Return the largest share of a layer's ``token_bytes`` whose copy to the host costs no time.

    (min(window x B, host) - whole) / token, within 0 and 1 (MEMO, Zhao et al. 2025). ``window_s``:
    a layer's compute, behind which the copy hides; ``whole_bytes``: copied in any case;
    ``host_bytes``: what the host has for this layer.
    """
    able = min(window_s * link.bytes_per_s * link.efficiency, host_bytes)
    return float(min(max(0.0, able - whole_bytes) / token_bytes, 1.0))


# -- capacity ------------------------------------------------------------------------------------


def communication_bytes(ranks: int) -> float:
    """Return what NCCL holds on a rank whose largest group has ``ranks`` members."""
    if ranks < 1:
        raise InputError(f"a group of {ranks} ranks: use 1 or more.")
    return COMMUNICATION_BYTES[max(count for count in COMMUNICATION_BYTES if count <= ranks)]


def room_bytes(
    memory_bytes: ArrayLike,
    ranks: int = 1,
    context_bytes: float = CONTEXT_BYTES,
    waste_share: float = 0.0,
) -> Array:
    """Return the bytes that tensors can have: (memory - context - communication) (1 - waste), >= 0.

    ``waste_share``: part of the segments that tensors do not fill, `Usage.waste_share` of a replay.
    """
    if not 0 <= waste_share < 1:
        raise InputError(f"waste_share {waste_share} must be 0 or above and below 1.")
    left = np.asarray(memory_bytes, dtype=np.float64) - context_bytes - communication_bytes(ranks)
    return np.maximum(left, 0.0) * (1 - waste_share)


# -- the caching allocator -----------------------------------------------------------------------


def block_bytes(size_bytes: ArrayLike) -> NDArray[np.int64]:
    """Return the bytes that a request takes of its segment: whole blocks of 512, one at least."""
    size = np.asarray(size_bytes, dtype=np.int64)
    return np.asarray(np.maximum(-(-size // BLOCK_BYTES), 1) * BLOCK_BYTES)


def segment_bytes(size_bytes: ArrayLike) -> NDArray[np.int64]:
    """Return the segment that is taken from the driver for a request that no free block holds.

    2 MiB up to 1 MiB, 20 MiB below 10 MiB, else the request in whole 2 MiB.
    """
    block = block_bytes(size_bytes)
    own = -(-block // ROUND_BYTES) * ROUND_BYTES
    large = np.where(block < OWN_SEGMENT_BYTES, LARGE_SEGMENT_BYTES, own)
    return np.asarray(np.where(block <= SMALL_BYTES, SMALL_SEGMENT_BYTES, large))


@dataclass(frozen=True, slots=True)
class Usage:
    """A replay's peaks in bytes: asked for, in blocks, in segments; and whether it ever failed."""

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    fits: bool

    @property
    def waste_share(self) -> float:
        """Part of the segments that requests did not fill at their peak."""
        return 1 - self.requested_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


@dataclass(slots=True)
class _Block:
    segment: int
    start: int
    size: int


@dataclass(slots=True)
class _Heap:
    """The allocator's state: free blocks, segments by number, blocks in use by name; totals."""

    free: list[_Block] = field(default_factory=list)
    segments: dict[int, int] = field(default_factory=dict)  # number -> size
    used: dict[Hashable, tuple[_Block, int]] = field(default_factory=dict)  # block, bytes asked
    opened: int = 0
    requested: int = 0
    allocated: int = 0
    reserved: int = 0

    def ask(self, name: Hashable, size: int, capacity: float) -> bool:
        """Give ``name`` a block; return whether there was room."""
        block = self._take(int(block_bytes(size)), capacity)
        if block is None:
            return False
        self.used[name] = block, size
        self.requested += size
        self.allocated += block.size
        return True

    def _take(self, size: int, capacity: float) -> _Block | None:
        """Return a block of ``size``: the smallest free one that holds it, else a new segment."""
        small = size <= SMALL_BYTES
        fitting = [b for b in self.free if b.size >= size and self._is_small(b) == small]
        if fitting:
            best = min(fitting, key=lambda b: (b.size, b.segment, b.start))
            self.free.remove(best)
        else:
            new = self._open(int(segment_bytes(size)), capacity)
            if new is None:
                return None
            best = new
        rest = best.size - size
        if rest >= BLOCK_BYTES if small else rest > SMALL_BYTES:
            self.free.append(_Block(best.segment, best.start + size, rest))
            best.size = size
        return best

    def _is_small(self, block: _Block) -> bool:
        return self.segments[block.segment] == SMALL_SEGMENT_BYTES

    def _open(self, size: int, capacity: float) -> _Block | None:
        """Take a segment from the driver, giving back empty ones first where room is short."""
        if self.reserved + size > capacity:
            for block in [b for b in self.free if b.size == self.segments[b.segment]]:
                self.free.remove(block)
                self.reserved -= self.segments.pop(block.segment)
        if self.reserved + size > capacity:
            return None
        self.opened += 1
        self.segments[self.opened] = size
        self.reserved += size
        return _Block(self.opened, 0, size)

    def give(self, name: Hashable) -> None:
        """Free the block of ``name`` and join it with free neighbours."""
        block, size = self.used.pop(name)
        self.requested -= size
        self.allocated -= block.size
        for near in [b for b in self.free if b.segment == block.segment]:
            if near.start + near.size == block.start or block.start + block.size == near.start:
                self.free.remove(near)
                block = _Block(block.segment, min(near.start, block.start), near.size + block.size)
        self.free.append(block)


def replay(events: Iterable[tuple[Hashable, int]], capacity_bytes: float = np.inf) -> Usage:
    """Return what torch's caching allocator uses for ``events``, in order, on one stream.

    An event (name, bytes) asks for memory; (name, 0) frees it. ``capacity_bytes`` bounds the
    segments; a request that finds no room after empty segments were given back is left out and
    ``fits`` is False.
    """
    heap, fits = _Heap(), True
    requested = allocated = reserved = 0
    for name, size in events:
        if size == 0:
            if name in heap.used:
                heap.give(name)
            elif fits:
                raise InputError(f"{name!r} is freed but was never asked for.")
            continue
        if name in heap.used or size < 0:
            raise InputError(f"{name!r} is asked for twice, or for fewer than 0 bytes.")
        fits &= heap.ask(name, size, capacity_bytes)
        requested = max(requested, heap.requested)
        allocated = max(allocated, heap.allocated)
        reserved = max(reserved, heap.reserved)
    return Usage(requested, allocated, reserved, fits)


def packed(sizes_bytes: ArrayLike) -> Usage:
    """Return what tensors of these sizes use when all live at once, asked for in order."""
    return replay(enumerate(np.asarray(sizes_bytes, dtype=np.int64).ravel().tolist()))
