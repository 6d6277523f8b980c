"""What one rank does in a collective: hops in a row and bytes sent, per algorithm and op.

With n ranks on k nodes, m = n / k of them in each, a `Shape` gives the `Traffic` of a call.
Sources: alpha-beta model (Hockney 1994); rings, halving and doubling, Bruck (Thakur, Rabenseifner
and Gropp 2005; Bruck et al. 1997); double tree (Sanders, Speck and Traeff 2009); in-switch
reduction (Graham et al. 2016, SHARP; Klenk et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = Array | float


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one call does, as arrays over groups: messages in a row, and bytes per byte of size.

    ``up`` is inside a node, ``out`` between nodes; the bytes are those of the busiest rank in its
    busier direction.
    """

    up_hops: Number
    out_hops: Number
    up_share: Number
    out_share: Number
    local_share: Number = 0.0  # handled by a step that sends nothing (a ring's last one)
    chunk_share: Number = 0.0  # what moves as a unit: one shard, or the buffer along a chain
    pieces: Number = 0.0  # pieces of a chunk that pass before the last link is busy


# (n ranks, m of them per node, k nodes) -> traffic
Shape = Callable[[Array, Array, Array], Traffic]
# (n ranks, count of peers) -> bytes to that many peers over S
Peers = Callable[[Array, Array], Array]


def log2(n: Array) -> Array:
    """Return ceil(log2 n), exact for whole n."""
    return np.ceil(np.log2(n) - 1e-12)


def _some(n: Array, share: Number = 1.0) -> Array:
    """Return ``share`` where the group has more than one rank, else 0."""
    return np.where(n > 1, share, 0.0)


# -- rings and chains ----------------------------------------------------------------------------


def ring(laps: float) -> Shape:
    """Return the traffic of ``laps`` passes round the ring of n - 1 steps with S / n bytes each.

    m rings run at once, each leaving a node at another rank (NCCL's channels, one per adapter): a
    rank sends S laps (n-1)/n in all, 1/m of it between nodes. A chunk crosses nodes on k of a
    ring's n edges, hence on at most ceil(steps k / n) of its steps. The last step only receives:
    S / n that the links do not hide. A chunk travels in halves (NCCL's slices), so that half a
    chunk is what the last rank waits for.
    """

    def shape(n: Array, m: Array, k: Array) -> Traffic:
        steps, share = laps * (n - 1), laps * (n - 1) / n
        spans = k > 1
        out_hops = np.where(spans, np.minimum(steps, np.ceil(steps * k / n - 1e-9)), 0.0)
        out = np.where(spans, share / m, 0.0)
        shard = _some(n, 1 / n)
        return Traffic(steps - out_hops, out_hops, share - out, out, shard, shard, 0.5)

    return shape


def chain(n: Array, m: Array, k: Array) -> Traffic:
    """A pipelined chain: n - 1 hops until the last rank has its first bytes, S sent per rank.

    A broadcast, its reverse (reduce), or a sliced exclusive scan, in which every rank adds its own
    part to each slice before it passes it on.
    """
    out = np.where(k > 1, 1 / m, 0.0)
    waits = np.maximum(n - 2, 0.0) * 0.5
    return Traffic(n - k, k - 1, _some(n, 1 - out), out, chunk_share=_some(n), pieces=waits)


# -- trees ---------------------------------------------------------------------------------------


def double_tree_share(n: Array) -> Array:
    """Return the bytes that the busiest rank of a double binary tree sends, all_reduce, over S.

    A rank inside one tree and a leaf of the other sends S/2 (1 + 2) + S/2 = 2 S; two and three
    ranks have shorter trees: 1 and 1.5.
    """
    return np.select([n <= 1, n == 2, n == 3], [0.0, 1.0, 1.5], default=2.0)


def tree_all_reduce(n: Array, m: Array, k: Array) -> Traffic:
    """Up and down two binary trees, each with half of the bytes, pipelined.

    Over several nodes the trees join one rank per node, another one in each of m channels, and a
    chain joins the ranks of a node (NCCL's tree).
    """
    spans = k > 1
    return Traffic(
        np.where(spans, 2 * (m - 1), 2 * log2(n)),
        2 * log2(k),
        np.where(spans, 2 * (m - 1) / m, double_tree_share(n)),
        np.where(spans, double_tree_share(k) / m, 0.0),
    )


def tree_rooted(n: Array, m: Array, k: Array) -> Traffic:
    """A broadcast down, or a reduce up, two binary trees with half of the bytes each."""
    spans = k > 1
    return Traffic(
        np.where(spans, log2(m), log2(n)),
        log2(k),
        np.where(spans, _some(m), _some(n)),
        np.where(spans, 1 / m, 0.0),
    )


def binomial(n: Array, m: Array, k: Array) -> Traffic:
    """A gather or scatter along a binomial tree: the root moves S (n-1)/n in log2 n rounds."""
    return Traffic(log2(m), log2(k), (m - 1) / n, (n - m) / n)


# -- recursive halving and doubling --------------------------------------------------------------


def halving(passes: int) -> Shape:
    """Return the traffic of recursive halving (or doubling), nearest ranks taking the largest part.

    log2 n exchanges per pass; inside a node S (m-1)/m, between nodes (S/m)(k-1)/k = S (k-1)/n.
    """

    def shape(n: Array, m: Array, k: Array) -> Traffic:
        return Traffic(
            passes * log2(m), passes * log2(k), passes * (m - 1) / m, passes * (k - 1) / n
        )

    return shape


def bruck(n: Array, m: Array, k: Array) -> Traffic:
    """log2 n exchanges of half of the buffer each (Bruck et al. 1997, powers of two)."""
    return Traffic(log2(m), log2(k), log2(m) / 2, log2(k) / 2)


def doubling_scan(n: Array, m: Array, k: Array) -> Traffic:
    """log2 n rounds, the j-th sending the whole buffer to the rank 2^j further on."""
    return Traffic(log2(m), log2(k), log2(m), log2(k))


# -- direct exchanges ----------------------------------------------------------------------------


def shard(n: Array, count: Array) -> Array:
    """Return ``count`` shards of S / n over S."""
    return count / n


def whole(n: Array, count: Array) -> Array:
    """Return ``count`` whole buffers over S."""
    return count


def direct(peers: Peers, rounds: int = 1) -> Shape:
    """Return the traffic of ``rounds`` in which every rank sends to all n - 1 others at once.

    Also a gather, a scatter or a broadcast, whose root is the busiest rank.
    """

    def shape(n: Array, m: Array, k: Array) -> Traffic:
        spans = k > 1
        return Traffic(
            np.where(~spans & (n > 1), float(rounds), 0.0),
            np.where(spans, float(rounds), 0.0),
            rounds * peers(n, m - 1),
            rounds * peers(n, n - m),
        )

    return shape


def star(
    inward: Callable[[Array, Array], Array], outward: Callable[[Array, Array], Array]
) -> Shape:
    """Return the traffic of a hub: it takes ``inward`` from every rank, then gives ``outward``."""

    def shape(n: Array, m: Array, k: Array) -> Traffic:
        hops = _some(n, 2.0)
        out = np.where(k > 1, hops, 0.0)
        near, far = m - 1, n - m
        return Traffic(
            hops - out, out, inward(n, near) + outward(n, near), inward(n, far) + outward(n, far)
        )

    return shape


def pairwise(n: Array, m: Array, k: Array) -> Traffic:
    """n - 1 rounds, in each of which every rank exchanges S / n with another one."""
    return Traffic(m - 1, n - m, (m - 1) / n, (n - m) / n)


def grouped_sends(n: Array, m: Array, k: Array) -> Traffic:
    """All n - 1 messages of S / n posted at once; starting each one takes a hop's time."""
    part = _some(n, 1 / n)
    return Traffic(m - 1, n - m, (m - 1) / n, (n - m) / n, part, part, 1.0)


def one_send(n: Array, m: Array, k: Array) -> Traffic:
    """One message of S bytes to one peer, between nodes where the group spans them."""
    pair = _some(n)
    out = np.where(k > 1, pair, 0.0)
    return Traffic(pair - out, out, pair - out, out, chunk_share=pair, pieces=1.0)


# -- inside the switches -------------------------------------------------------------------------


def switch_share(m: Array) -> Array:
    """Return the bytes through a port, over S, of an all_reduce inside a switch: 1 + 1/m.

    Each of m ranks asks the switch for the sum of its S / m: it receives S / m and supplies the
    S bytes of all m requests; then it sends its sum, S / m, and the switch copies all S to it.
    """
    return _some(m, 1 + 1 / m)


def switch_all_reduce(between: Callable[[Array], tuple[Array, Array]]) -> Shape:
    """Return the traffic of an all_reduce inside the node's switch, then ``between(k)`` nodes.

    ``between`` gives hops and bytes over S / m.
    """

    def shape(n: Array, m: Array, k: Array) -> Traffic:
        hops, share = between(k)
        part = _some(m, 1 / m)
        return Traffic(
            _some(m, 2.0), hops, switch_share(m), share / m, chunk_share=part, pieces=1.0
        )

    return shape


def tree_between(k: Array) -> tuple[Array, Array]:
    """Return hops and share of a double tree between nodes."""
    return 2 * log2(k), double_tree_share(k)


def switch_between(k: Array) -> tuple[Array, Array]:
    """Return hops and share of a reduction in the network's switches: up once, down once."""
    return np.where(k > 1, 2.0, 0.0), np.where(k > 1, 1.0, 0.0)


# -- hierarchical --------------------------------------------------------------------------------


def hierarchical_all_reduce(tree: bool) -> Shape:
    """Return: reduce_scatter in the node, all_reduce of S/m between nodes, all_gather in the node.

    Between nodes a ring, 2 (k-1)/k S/m, or a double tree.
    """

    def shape(n: Array, m: Array, k: Array) -> Traffic:
        out = double_tree_share(k) if tree else 2 * (k - 1) / k
        return Traffic(2 * (m - 1), 2 * (log2(k) if tree else k - 1), 2 * (m - 1) / m, out / m)

    return shape


def hierarchical_gather(n: Array, m: Array, k: Array) -> Traffic:
    """S/n shards round the k nodes, then S/m bundles round the node (or the reverse)."""
    return Traffic(m - 1, k - 1, (m - 1) / m, (k - 1) / n)


def hierarchical_all_to_all(n: Array, m: Array, k: Array) -> Traffic:
    """Exchange inside the node by destination's local index, then between equal local indices."""
    return Traffic(_some(m), _some(k), (m - 1) / m, (k - 1) / k)


def hierarchical_broadcast(n: Array, m: Array, k: Array) -> Traffic:
    """Scatter in the root's node, m chains between nodes, all_gather in every node."""
    return Traffic(2 * (m - 1), k - 1, 2 * (m - 1) / m, np.where(k > 1, 1 / m, 0.0))
