"""Checks of pipeline schedules: waves, both ways, breadth-first, asynchronous, flush-free."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np

from validation.systems.frame import Finding, check, need_torch
from validation.systems.unit_pipelines import (
    Home,
    Played,
    Shape,
    both_ways,
    greedy,
    interleaved,
    looped,
    straight,
    timed,
    wave,
)

SLOW_HOP = 0.02  # a message in forward times of a whole rank, where it is not hidden
UNITS = "backward takes twice the forward; messages are hidden; as many microbatches as ranks"
EXACT = "executed in float64 on the CPU, stage by stage in the played order"


def same_as_undivided(played: Played, shape: Shape, home: Home) -> bool:
    """Execute the tasks in the played order: gradients and loss equal the undivided network's."""
    from backends.references import pipelines

    tasks = itertools.product(range(shape.stages), range(shape.microbatches))
    place = {(s, m): home(s, m) for s, m in tasks}
    return pipelines.same_as_undivided(shape.stages, shape.microbatches, played.tasks, place)


@cache
def unit(kind: str, ranks: int, chunks: int = 1, hop: float = 0.0) -> Played:
    """Return a schedule's unit: as many microbatches as ranks, all in flight as in 1F1B."""
    shape = Shape(ranks, ranks, chunks, hop=hop)
    if kind == "interleaved":
        return timed(shape, interleaved(shape), straight(shape))
    home = {"wave": wave, "straight": straight}[kind.removeprefix("both-")](shape)
    if kind.startswith("both-"):
        home = both_ways(shape, home)
    return greedy(shape, home, ranks)


@check("G2.1", mutant={"waves": (1, 1, 1)})
def hanayo(*, waves: tuple[int, ...] = (1, 2, 4), published: float = 1.304) -> Finding:
    """More waves mean smaller bubbles; against Chimera with two weight replicas."""
    need_torch()
    falls, gains, slow = True, {}, {}
    for p in (4, 8, 16):
        runs = [unit("wave", p, 2 * w) for w in waves]
        falls &= all(a.bubble > b.bubble for a, b in itertools.pairwise(runs))
        gains[p] = unit("both-straight", p).makespan / min(run.makespan for run in runs)
        late = min(unit("wave", p, 2 * w, SLOW_HOP).makespan for w in waves)
        slow[p] = unit("both-straight", p, 1, SLOW_HOP).makespan / late
    shape = Shape(4, 4, 4)
    exact = same_as_undivided(unit("wave", 4, 4), shape, wave(shape))
    return Finding(
        exact and falls and min(gains.values()) > 1 and max(gains.values()) >= published,
        ", ".join(f"{g:.2f}x at {p} ranks" for p, g in gains.items())
        + " over Chimera, with one replica of the weights against two; with messages of 2 % of a "
        f"forward at most {max(slow.values()):.2f}x",
        "a turn of the wave stays on its rank, and chunks fill the bubble"
        if falls
        else "the bubble does not fall with the waves",
        (UNITS, "up to 4 waves", EXACT),
        "cpu",
    )


@check("G2.2", mutant={"chunks": 1})
def bitpipe(*, chunks: int = 2) -> Finding:
    """Two opposite V-shaped pipelines against 1F1B, interleaving and one-chunk Chimera."""
    need_torch()
    kind = "both-wave" if chunks > 1 else "both-straight"
    gains, peaks, slow = [], [], []
    for p in (4, 8, 16, 32):
        rivals = (("interleaved", 1), ("interleaved", 2), ("both-straight", 1))
        mine = unit(kind, p, chunks)
        gains.append(min(unit(k, p, v).makespan for k, v in rivals) / mine.makespan)
        peaks.append(max(mine.peaks) / p)
        if p <= 16:
            late = min(unit(k, p, v, SLOW_HOP).makespan for k, v in rivals)
            slow.append(late / unit(kind, p, chunks, SLOW_HOP).makespan)
    shape = Shape(4, 4, 2)
    exact = same_as_undivided(unit("both-wave", 4, 2), shape, both_ways(shape, wave(shape)))
    return Finding(
        exact and min(gains) >= 1.05 and max(gains) <= 1.28,
        f"{', '.join(f'{g:.2f}x' for g in gains)} at 4, 8, 16, 32 ranks over the best of three; "
        f"two weight replicas, {max(peaks):.2f} of 1F1B's activations; with messages of 2 % "
        f"{min(slow):.2f}x to {max(slow):.2f}x",
        "both directions fill one another's bubbles, chunks shorten them",
        (UNITS, "the second replica's gradient sum is hidden", EXACT),
        "cpu",
    )


def gathers(order: list[tuple[int, str, int]]) -> int:
    """Return how often a rank that keeps one chunk's weights at a time has to gather."""
    return sum(
        1 for a, b in itertools.pairwise([(-1, "", 0), *order]) if (a[0], a[1]) != (b[0], b[1])
    )


@check("G2.3", mutant={"breadth_first": False})
def breadth_first(
    *,
    breadth_first: bool = True,
    params: float = 52e9,
    nic_bytes_per_s: float = 25e9,  # one adapter of 200 Gb/s per GPU
    flops_per_s: float = 0.5 * 312e12,
) -> Finding:
    """Gathers per step of FSDP inside a pipeline, and the gain as the batch per GPU shrinks.

    Depth-first: gradients are summed after the last microbatch; breadth-first: a chunk's sum
    passes while later chunks compute.
    """
    need_torch()
    p, v, tokens = 8, 8, 2048
    ratios, gains, exact = [], [], True
    for m in (8, 16, 32, 64):
        shape = Shape(p, m, v)
        orders = looped(shape) if breadth_first else interleaved(shape)
        down = [(c, "F") for c in range(v)]
        up = [(c, "B") for c in reversed(range(v))]
        deep = [(c, kind, i) for i in range(m) for c, kind in (*down, *up)]
        ratios.append(gathers(deep) / gathers(orders[0]) / m)
        mine = timed(shape, orders, straight(shape))
        theirs = timed(shape, interleaved(shape), straight(shape))
        unit_s = 8 * params / p / 8 * tokens / flops_per_s / 3  # tensor parallel over 8
        exchange = 2 * 2 * params / p / 8 / nic_bytes_per_s
        hidden = mine.makespan * unit_s * (v - 1) / v if breadth_first else 3 * unit_s / v
        early = theirs.makespan * unit_s + max(0.0, exchange - 3 * unit_s / v)
        gains.append(early / (mine.makespan * unit_s + max(0.0, exchange - hidden)))
        if m == 8:
            small = Shape(p, m, 2)
            exact = same_as_undivided(timed(small, looped(small), straight(small)), small,
                                      straight(small))  # fmt: skip
    grows = all(a > b for a, b in itertools.pairwise(gains)) and gains[0] > 1
    return Finding(
        exact and all(abs(r - 1) < 0.2 for r in ratios) and grows,
        f"gathers shrink by {', '.join(f'{r:.2f} m' for r in ratios)}; gain "
        f"{', '.join(f'{g:.3f}' for g in gains)} at 8, 16, 32, 64 microbatches",
        "one gather per chunk and direction serves all microbatches; the gradient sum is hidden",
        ("52B over 8 stages x 8 tensor ranks, 8 loops, microbatches of one 2048-token sequence",
         "A100 at half of its peak, 25 GB/s per GPU", EXACT),
        "cpu",
    )  # fmt: skip


def cut(costs: np.ndarray, stages: int) -> float:
    """Return the smallest bottleneck of a cut into consecutive stages, by dynamic programming."""
    sums = np.concatenate(([0.0], np.cumsum(costs)))
    layers = len(costs)
    table = sums.copy()
    for _ in range(stages - 1):
        table = np.array(
            [
                min((max(table[j], sums[i] - sums[j]) for j in range(i)), default=0.0)
                for i in range(layers + 1)
            ]
        )
    return float(table[layers])


def cut_by_hand(costs: np.ndarray, stages: int) -> float:
    """Return the same from every cut there is."""
    places = itertools.combinations(range(1, len(costs)), stages - 1)
    return min(
        max(float(costs[a:b].sum()) for a, b in itertools.pairwise((0, *inner, len(costs))))
        for inner in places
    )


@check("G2.4", mutant={"stages_off": 1})
def pipedream(*, stages_off: int = 0) -> Finding:
    """Cuts by dynamic programming, boundary traffic as executed, and versions kept.

    ``stages_off``: extra stages that the dynamic programme cuts.
    """
    need_torch()
    from backends.references.pipelines import batches, network, play

    random, worst = np.random.default_rng(4), 0.0
    for layers, stages in ((5, 2), (8, 3), (10, 4), (12, 5)):
        costs = random.lognormal(size=layers)
        worst = max(worst, abs(cut(costs, stages + stages_off) - cut_by_hand(costs, stages)))
    p, m, rows, width = 4, 8, 3, 4
    shape = Shape(p, m)
    home = straight(shape)
    run = timed(shape, interleaved(shape), home)
    place = {(s, i): home(s, i) for s in range(p) for i in range(m)}
    ran = play(network(p, width), batches(m, rows, width), run.tasks, place)
    boundary = 2 * (p - 1) * m * rows * width * 8
    stash = [int(peak) for peak in run.peaks]
    vgg = 1 - 2 * 64 * 25088 / (2 * 138e6 * 7 / 8)
    return Finding(
        worst < 1e-9 and ran.boundary_bytes == boundary and stash == [p - s for s in range(p)],
        f"cuts equal brute force to {worst:.1g}; {ran.boundary_bytes} of {boundary} boundary bytes;"
        f" versions {stash}; VGG-16 cut before its dense layers sends {vgg:.0%} less",
        "only activations and gradients at the cuts travel; a stage keeps a version per microbatch",
        ("up to 12 layers of random cost", "VGG-16: 138M parameters, 25088 features at the cut, 64 "
         "images per GPU, 8 GPUs", EXACT),
        "cpu",
    )  # fmt: skip


@check("G2.5", mutant={"lag": 1})
def pipelined_backprop(*, lag: int = 0) -> Finding:
    """Weight delay per stage, utilisation, and the gradients of an unhurried run."""
    need_torch()
    from backends.references.pipelines import (
        batches,
        flush_free,
        network,
        unhurried_equals_undivided,
    )

    p, width = 4, 4
    used, right = [], True
    for samples in (16, 64, 256):
        ran = flush_free(network(p, width), batches(samples, 1, width), 1e-3, lag)
        steady = [set(d[2 * p :]) for d in ran.delays]
        right &= steady == [{2 * (p - 1 - s)} for s in range(p)]
        right &= ran.steady_utilisation == 1.0
        used.append(ran.utilisation)
    exact = unhurried_equals_undivided(p, width)
    fill = [1 / (1 + 2 * (p - 1) / n) for n in (16, 64, 256)]
    return Finding(
        right and exact and np.allclose(used, fill),
        f"delays {[2 * (p - 1 - s) for s in range(p)] if right else 'differ'} updates; busy "
        f"{', '.join(f'{u:.3f}' for u in used)} over 16, 64, 256 samples, steadily 1",
        "no flush: only the first fill and the last drain are idle",
        ("a tick is one forward and one backward of different samples", EXACT),
        "cpu",
    )
