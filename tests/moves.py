"""Collectives played out step by step, with blocks that really move.

Each returns (rounds, bytes of the busiest rank in its busier direction) for a buffer of 1.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction


def ring_all_reduce(n: int) -> tuple[int, Fraction]:
    """Blocks are sets of contributions; every rank must end with all of every block."""
    held = [[{rank} for _ in range(n)] for rank in range(n)]
    sent, rounds = Counter[int](), 0
    for phase in range(2):
        for step in range(n - 1):
            moves = []
            for rank in range(n):
                block = (rank - step + phase) % n
                moves.append(((rank + 1) % n, block, set(held[rank][block])))
                sent[rank] += 1
            for to, block, content in moves:
                held[to][block] |= content
            rounds += 1
    assert all(block == set(range(n)) for rank in held for block in rank)
    return rounds, Fraction(max(sent.values(), default=0), n)


def ring_all_gather(n: int) -> tuple[int, Fraction]:
    held = [{rank} for rank in range(n)]
    sent = Counter[int]()
    for step in range(n - 1):
        moves = [((rank + 1) % n, (rank - step) % n) for rank in range(n)]
        for rank, (to, block) in enumerate(moves):
            assert block in held[rank]
            held[to].add(block)
            sent[rank] += 1
    assert all(len(blocks) == n for blocks in held)
    return n - 1, Fraction(max(sent.values(), default=0), n)


def doubling_all_gather(n: int) -> tuple[int, Fraction]:
    """Farthest partner first, so that the largest part goes to the nearest one."""
    held = [{rank} for rank in range(n)]
    sent, rounds, distance = Counter[int](), 0, n // 2
    while distance:
        before = [set(blocks) for blocks in held]
        for rank in range(n):
            held[rank ^ distance] |= before[rank]
            sent[rank] += len(before[rank])
        rounds, distance = rounds + 1, distance // 2
    assert all(len(blocks) == n for blocks in held)
    return rounds, Fraction(max(sent.values(), default=0), n)


def direct_exchange(n: int) -> tuple[int, Fraction]:
    """All-to-all of one block to each peer in one round."""
    sent = Counter(rank for rank in range(n) for peer in range(n) if peer != rank)
    return int(n > 1), Fraction(max(sent.values(), default=0), n)


def pairwise_exchange(n: int) -> tuple[int, Fraction]:
    got = [{rank} for rank in range(n)]
    for step in range(1, n):
        for rank in range(n):
            got[(rank + step) % n].add(rank)
    assert all(len(blocks) == n for blocks in got)
    return n - 1, Fraction(n - 1, n)


def bruck_all_to_all(n: int) -> tuple[int, Fraction]:
    """Blocks (source, destination); in round j those whose way has bit j set move on by 2^j."""
    held = [{(rank, to) for to in range(n)} for rank in range(n)]
    sent, rounds, bit = Counter[int](), 0, 1
    while bit < n:
        moves = []
        for rank in range(n):
            moving = {b for b in held[rank] if ((b[1] - b[0]) % n) & bit}
            moves.append(((rank + bit) % n, moving))
            sent[rank] += len(moving)
            held[rank] = held[rank] - moving
        for to, moving in moves:
            held[to] |= moving
        rounds, bit = rounds + 1, bit * 2
    assert all({b[1] for b in held[rank]} == {rank} for rank in range(n))
    return rounds, Fraction(max(sent.values(), default=0), n)


def chain_broadcast(n: int) -> tuple[int, Fraction]:
    """Blocks flow down the chain, one hop a round; counted until the last rank has its first."""
    held = [set(range(n)) if rank == 0 else set[int]() for rank in range(n)]
    sent, first = Counter[int](), 0
    for step in range(2 * n):
        wanted = [held[rank] - held[rank + 1] for rank in range(n - 1)]
        for rank, blocks in enumerate(wanted):
            if blocks:
                held[rank + 1].add(min(blocks))
                sent[rank] += 1
        first = first or (step + 1) * bool(held[-1])
    assert all(blocks == set(range(n)) for blocks in held)
    return (first if n > 1 else 0), Fraction(max(sent.values(), default=0), n)


def chain_scan(n: int) -> tuple[int, Fraction]:
    """Sliced exclusive scan: a rank adds its part to every slice of the sum that it passes on."""
    prefix = [[0] * 4 for _ in range(n)]
    sent = Counter[int]()
    for rank in range(n - 1):
        for piece in range(4):
            prefix[rank + 1][piece] = prefix[rank][piece] + (rank + 1) * 10**piece
            sent[rank] += 1
    wanted = [[sum(range(1, rank + 1)) * 10**piece for piece in range(4)] for rank in range(n)]
    assert prefix == wanted
    return n - 1, Fraction(max(sent.values(), default=0), 4)


def doubling_scan(n: int) -> tuple[int, Fraction]:
    """Round j sends the sum of the last 2^j parts to the rank 2^j on."""
    window = [{rank} for rank in range(n)]
    before = [set[int]() for _ in range(n)]
    sent, rounds, distance = Counter[int](), 0, 1
    while distance < n:
        moves = [(rank + distance, set(window[rank])) for rank in range(n - distance)]
        for rank in range(n - distance):
            sent[rank] += 1
        for to, parts in moves:
            before[to] |= parts
            window[to] |= parts
        rounds, distance = rounds + 1, distance * 2
    assert all(before[rank] == set(range(rank)) for rank in range(n))
    return rounds, Fraction(max(sent.values(), default=0))


def binomial_gather(n: int) -> tuple[int, Fraction]:
    """Round j: ranks with bit j set pass all that they hold to the rank without it."""
    held = [{rank} for rank in range(n)]
    received, rounds, bit = Counter[int](), 0, 1
    while bit < n:
        for rank in range(n):
            if rank % (2 * bit) == bit:
                held[rank - bit] |= held[rank]
                received[rank - bit] += len(held[rank])
        rounds, bit = rounds + 1, bit * 2
    assert held[0] == set(range(n))
    return rounds, Fraction(max(received.values(), default=0), n)


def hub_all_reduce(n: int) -> tuple[int, Fraction]:
    """Every rank gives its buffer to rank 0, which gives the sum to every rank."""
    total, moved = {0}, 0
    for rank in range(1, n):
        total.add(rank)
        moved += 1
    held = [total] + [set(total) for _ in range(1, n)]
    assert all(each == set(range(n)) for each in held)
    return 2 * int(n > 1), Fraction(moved + n - 1)


def switch_all_reduce(n: int) -> tuple[int, Fraction]:
    """The switch adds up the shard that each rank asks for, then copies what each rank sends.

    Counted at rank 0's port: what it supplies to all n requests, then its own sum.
    """
    sums = [{(rank, block) for rank in range(n)} for block in range(n)]
    supplied = sum((0, block) in sums[block] for block in range(n))
    held = [dict(enumerate(sums)) for _ in range(n)]
    assert all(len(each) == n for each in held)
    return 2 * int(n > 1), Fraction(supplied + 1, n) if n > 1 else Fraction(0)


SIMULATIONS = {
    ("all_reduce", "ring"): ring_all_reduce,
    ("all_gather", "ring"): ring_all_gather,
    ("reduce_scatter", "ring"): ring_all_gather,  # the reverse, same counts
    ("all_gather", "halving-doubling"): doubling_all_gather,
    ("reduce_scatter", "halving-doubling"): doubling_all_gather,
    ("all_to_all", "direct"): direct_exchange,
    ("all_to_all", "pairwise"): pairwise_exchange,
    ("all_to_all", "halving-doubling"): bruck_all_to_all,
    ("broadcast", "ring"): chain_broadcast,
    ("reduce", "ring"): chain_broadcast,  # the reverse, same counts
    ("exclusive_scan", "ring"): chain_scan,
    ("exclusive_scan", "halving-doubling"): doubling_scan,
    ("gather", "tree"): binomial_gather,
    ("scatter", "tree"): binomial_gather,  # the reverse, same counts
    ("all_reduce", "star"): hub_all_reduce,
    ("all_reduce", "in-switch"): switch_all_reduce,
}
