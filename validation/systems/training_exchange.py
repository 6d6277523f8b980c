"""Checks of training systems outside one mesh: experts, embeddings, codecs, churn, stragglers."""

from __future__ import annotations

import itertools
import math

import numpy as np

from hwmodels.catalogue import load_chip, make_cluster
from simcore.catalogue import load_model
from simcore.models import ModelSpec, active_parameter_count, parameter_count
from validation.systems.frame import Finding, check, need_torch
from validation.systems.training_closed_forms import exponential_wait
from validation.systems.training_machine import exchange_seconds

ON_CPU = "executed in float64 on the CPU; ranks in one process exchange their parts"


# ------------------------------------------------------------------ G1.5


def folded_seconds(
    model: ModelSpec, tokens: int, world: int, grid: tuple[int, int], batch: int, pp: int
) -> float:
    """Return a step's seconds for ``grid`` = (tensor ranks of attention, expert ranks).

    Kernels at 0.6 of the peak, grouped products of few rows by a half-saturation of 256 rows;
    exchanges are exposed, gradients hide. A rank that cannot hold its states takes for ever.
    """
    tp, ep = grid
    cluster = make_cluster("h100-sxm-80gb", 8, world // 8)
    peak, layers = 989e12 * 0.6, model.layers
    total, active = parameter_count(model), active_parameter_count(model)
    expert = 3 * model.hidden * (model.moe_ffn or model.ffn)
    routed = expert * model.experts * layers
    if 6 * (total - routed) / tp / pp + 6 * routed / ep / pp + 12 * total / world > 70e9:
        return math.inf
    microbatches = max(1, batch // (world // pp // tp))
    local = tokens / tp  # tokens per rank and microbatch
    dense = active - expert * model.experts_per_token * layers
    rows = tokens * model.experts_per_token * ep / tp / model.experts
    sat = rows / (rows + 256)
    compute = 6 * local * (dense + expert * model.experts_per_token * layers / sat) / pp / peak
    score = 6 * layers * model.heads * model.head_dim * tokens * local / pp / peak
    gather = 6 * exchange_seconds("all_gather", tokens * model.hidden * 2, tp, cluster)
    send = local * model.experts_per_token * model.hidden * 2
    spread = 4 * exchange_seconds("all_to_all", send, ep, cluster)
    each = compute + score + (gather + spread) * layers / pp
    return each * (microbatches + pp - 1)


@check("G1.5", mutant={"single_only": True})
def folding(*, world: int = 128, batch: int = 256, single_only: bool = False) -> Finding:
    """The best pair of grids against one grid for both kinds of layer, and expert outputs.

    One grid ties the expert ranks to the tensor ranks or a multiple along data ranks only.
    """
    need_torch()
    from backends.references.exchange import experts_dense, experts_folded
    from backends.references.library import torch
    from backends.references.wire import Wire

    random = torch.Generator().manual_seed(5)
    x, gate, experts = (
        torch.randn(s, generator=random, dtype=torch.float64) for s in ((24, 6), (8, 6), (8, 6, 6))
    )
    same = torch.allclose(
        experts_dense(x, gate, experts, 2), experts_folded(x, gate, experts, 2, Wire(4)), atol=1e-10
    )
    mfu, gains = {}, {}
    for name in ("mixtral-8x22b", "qwen2-57b-a14b"):
        model = load_model(name)
        folded, tied = math.inf, math.inf
        for pp, tp, ep in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16)):
            if model.experts % ep or ep > world // pp:
                continue
            seconds = folded_seconds(model, 4096, world, (tp, ep), batch, pp)
            if ep == 1 or (ep % tp == 0 and tp == 1):
                tied = min(tied, seconds)
            if not single_only or tp == 1:
                folded = min(folded, seconds)
        flops = (
            batch
            * 4096
            * (
                6 * active_parameter_count(model)
                + 12 * model.layers * model.heads * model.head_dim * 4096
            )
        )
        mfu[name], gains[name] = flops / folded / world / 989e12, tied / folded
    order = mfu["mixtral-8x22b"] > mfu["qwen2-57b-a14b"]
    gained = max(gains.values()) > 1
    return Finding(
        same and order and gained and min(gains.values()) >= 1,
        ", ".join(f"{name} {m:.1%}" for name, m in mfu.items())
        + f"; folded {', '.join(f'{g:.2f}x' for g in gains.values())} of the single grid",
        "every single grid is one of the pairs; many small experts leave few rows to each product"
        if order and gained
        else "one grid alone gains nothing"
        if not gained
        else "the order does not follow: permutation, uneven routing and the kernels of many "
        "narrow experts are not modelled",
        ("128 H100, 256 sequences of 4096 tokens, kernels at 0.6 of the peak", ON_CPU),
        "cpu",
    )


# ------------------------------------------------------------------ G1.6, G1.7, G1.8


@check("G1.6", mutant={"boundary_power": 2})
def swarm(*, boundary_power: int = 1, link_bytes_per_s: float = 25e6) -> Finding:
    """Stage compute over transfer as the width grows at 200 Mb/s, and work done under churn.

    ``boundary_power``: of the width, in the bytes of a boundary.
    """
    need_torch()
    from backends.references.exchange import live_paths
    from backends.references.library import torch
    from backends.references.pipelines import batches

    rate = 0.3 * load_chip("t4").peak_flops_per_s["fp16"]
    ratios, busy = [], []
    for width in (768, 1536, 3072, 6144):
        compute = 3 * 3 * 24 * width**2 / rate  # three layers, forward and backward, per token
        moved = 2 * 1 * 768 * (width / 768) ** boundary_power / link_bytes_per_s  # int8, both ways
        ratios.append(compute / moved)
        busy.append(1 / (1 + moved / compute))
    linear = all(math.isclose(b / a, 2) for a, b in itertools.pairwise(ratios))
    inputs = batches(12, 3, 4)
    still, done, _ = live_paths(inputs, 3, 0.0, 0)
    lost, finished, repeated = live_paths(inputs, 3, 0.3, 0)
    exact = torch.allclose(still, lost, atol=1e-12) and done == finished == 12 and repeated > 0
    return Finding(
        linear and exact and all(a < b for a, b in itertools.pairwise(busy)),
        f"compute over transfer {', '.join(f'{r:.2f}' for r in ratios)}, busy "
        f"{', '.join(f'{b:.0%}' for b in busy)} at widths 768 to 6144; 12 of 12 microbatches done "
        f"with {repeated} repeated passes",
        "work grows with the width's square, a boundary with the width"
        if linear
        else "boundaries that grow as fast as the work gain nothing",
        ("T4 at 0.3 of its peak, 25 MB/s, 8-bit boundaries, three layers per stage", ON_CPU),
        "cpu",
    )


@check("G1.7", mutant={"planned": False})
def c4(*, planned: bool = True, links: int = 8) -> Finding:
    """Planned routes against hashed ones on equal flows, the exposed share, and goodput.

    ``planned``: whether flows are spread evenly over the links; the mutant puts all on one.
    """
    random = np.random.default_rng(11)
    worse, gains = True, []
    for flows in (8, 16, 32, 64):
        best = math.ceil(flows / links) if planned else flows
        for _ in range(50):
            hashed = np.bincount(random.integers(0, links, flows), minlength=links).max()
            worse &= best <= hashed
            gains.append(hashed / best)
    share = 1 - 1 / 1.15
    mean = float(np.mean(gains))
    exposed = share / (1 - 1 / mean) if mean > 1 else math.inf
    day, faults = 86400.0, 3.0

    def goodput(detect: float, restart: float, checkpoint: float) -> float:
        """Return the share of a day that faults leave, detection and lost work included."""
        clock = random.uniform(0, day, (2000, int(faults)))
        wasted = detect + restart + np.mod(clock, checkpoint)
        return 1 - float(wasted.sum(1).mean()) / day

    slow, fast = goodput(1800, 900, 3600), goodput(30, 300, 600)
    return Finding(
        worse and round(share, 2) == 0.13 and exposed <= 1 and fast - slow > 0,
        f"hashed routes load a link {mean:.2f}x as much; 15 % needs {share:.1%} of the step "
        f"exposed, so communication of {exposed:.0%} of it; goodput {slow:.1%} to {fast:.1%}",
        "equal flows spread evenly load no link more than any other choice"
        if worse
        else "flows on one link are slower than hashed ones",
        ("8 links, 8 to 64 equal flows", "three faults a day; detection 30 min to 30 s, restart 15 "
         "to 5 min, checkpoints hourly or every 10 min"),
    )  # fmt: skip


@check("G1.8", mutant={"ranks_off": 1})
def dlrm(*, ranks_off: int = 0) -> Finding:
    """Bytes counted in the all-to-all against B T dim e (P-1)/P^2, and looked-up rows."""
    need_torch()
    from backends.references.exchange import sharded_embeddings
    from backends.references.library import torch
    from backends.references.wire import Wire

    random, holds, sizes = torch.Generator().manual_seed(1), True, []
    for ranks, count in ((2, 4), (4, 8), (4, 16)):
        batch, dim = 16, 6
        tables = torch.randn(count, 32, dim, generator=random, dtype=torch.float64)
        index = torch.randint(0, 32, (batch, count), generator=random)
        wire = Wire(ranks)
        found = sharded_embeddings(tables, index, wire)
        exact = torch.stack([tables[t, index[:, t]] for t in range(count)], 1)
        p = ranks + ranks_off
        law = batch * count * dim * 8 * (p - 1) / p**2
        holds &= torch.equal(found, exact) and set(wire.sent_bytes) == {law}
        sizes.append(wire.sent_bytes[0])
    dense = [2 * 4 * (512 * 256 + 256 * dim * 1) for dim in (64, 64)]
    return Finding(
        holds and sizes[2] == 2 * sizes[1] and dense[0] == dense[1],
        f"{sizes} bytes per rank for (2 ranks, 4 tables), (4, 8), (4, 16)",
        "a rank sends its tables' rows for the others' samples; dense gradients do not see tables"
        if holds
        else "the bytes are those of another number of ranks",
        ("16 samples, rows of 6 float64", ON_CPU),
        "cpu",
    )


# ------------------------------------------------------------------ G1.11, G1.12


@check("G1.11", mutant={"chunk_share": 0.3})
def patrickstar(*, chunk_share: float = 0.8) -> Finding:
    """Largest model of chunks over both memories against a static split, on two nodes.

    Chunks: 14 bytes per parameter (gradients reuse weights) over GPU and CPU; static: 16 on the
    CPU, weights replicated on every GPU. ``chunk_share``: of GPU memory that chunks may fill.
    """
    ratios = {}
    for name, gpus, gpu_bytes, cpu_bytes in (
        ("8 V100 32GB, 240 GB", 8, 34.4e9, 240e9), ("8 A100 40GB, 1 TB", 8, 42.9e9, 1e12),
    ):  # fmt: skip
        chunks = (gpus * gpu_bytes * chunk_share + 0.9 * cpu_bytes) / 14
        static = min(0.9 * cpu_bytes / 16, 0.7 * gpu_bytes / 2)
        ratios[name] = chunks / static
    need = 175e9 * 16 / 32
    infeasible = need > load_chip("a100-sxm-80gb").hbm.size_bytes
    host = 175e9 * 14 <= 32 * 0.8 * 42.9e9 + 4 * 0.9 * 1e12
    return Finding(
        infeasible and host and min(ratios.values()) >= 2.27,
        f"175B needs {need / 1e9:.1f} GB per GPU; "
        + ", ".join(f"{r:.2f}x on {n}" for n, r in ratios.items()),
        "chunks fill whichever memory is free"
        if min(ratios.values()) >= 2.27
        else "the static baseline's pinned buffers and fragmentation are missing",
        ("ZeRO-Offload keeps half-precision weights on every GPU and 16 bytes per parameter on the "
         "CPU", "a tenth of each memory in reserve"),
    )  # fmt: skip


@check("G1.12", mutant={"codec_share": 3.0})
def eight_bit(*, gpus: int = 96, codec_share: float = 0.05) -> Finding:
    """The 96-GPU speedup between halved and quartered transfers, and a coded exchange executed.

    ``codec_share``: time of coding over that of the 32-bit exchange.
    """
    need_torch()
    from backends.references.exchange import coded_mean
    from backends.references.library import torch
    from backends.references.wire import Wire

    random = torch.Generator().manual_seed(4)
    gradients = [torch.randn(256, generator=random) for _ in range(4)]
    plain, coded = Wire(4), Wire(4)
    exact = coded_mean(gradients, plain, coded=False)
    found = coded_mean(gradients, coded, coded=True)
    error = float((found - exact).norm() / exact.norm())
    bound = max(float(g.abs().max()) for g in gradients) / 254 * 1.0001
    small = float((found - exact).abs().max()) <= bound
    ratio = gpus / 23 - 1
    half, quarter = gpus / (1 + ratio / 2), gpus / (1 + ratio / 4)
    mine = gpus / (1 + ratio * (1 / 4 + codec_share))
    fourth = sum(plain.sent_bytes) == 4 * sum(coded.sent_bytes)
    return Finding(
        small and fourth and half < mine <= quarter and half < 50 < quarter,
        f"{half:.1f}x and {quarter:.1f}x bound the published 50x, {mine:.1f}x with "
        f"{codec_share:.0%} of coding; bytes / 4, error of the mean {error:.2%}",
        "no overlap, fitted to the 32-bit speedup alone"
        if mine > half
        else "coding costs more than it saves",
        ("one scale per tensor, its largest magnitude to 127", ON_CPU),
        "cpu",
    )


# ------------------------------------------------------------------ G1.13 to G1.16


@check("G1.13", mutant={"follows": "params"})
def critical_batch(*, follows: str = "tokens") -> Finding:
    """Worthwhile replicas by tokens and by parameters, and steps against batch executed.

    The critical batch grows as the square root of ``follows`` (published: 0.47 of tokens).
    """
    need_torch()
    from backends.references.exchange import steps_to_loss

    ran = [steps_to_loss(b, 4, 4.0, 0) for b in (1, 4, 16, 64, 256)]
    falls = ran[0] > ran[1] > ran[2] and ran[4] >= 0.7 * ran[3]

    def degree(tokens: float, params: float) -> int:
        critical = 22.9 * (tokens if follows == "tokens" else params * 20) ** 0.47
        replicas, before = 1, math.inf
        while True:
            steps = tokens / critical * (1 + critical / (replicas * 4096))
            compute = 6 * params * 4096 / 1.5e14
            exchange = 2 * 4 * params * (replicas - 1) / replicas / 25e9
            seconds = steps * (compute + exchange)
            if seconds > 0.8 * before and replicas > 2:
                return replicas // 2
            replicas, before = 2 * replicas, seconds

    by_tokens = [degree(d, 1e9) for d in (1e9, 1e10, 1e11, 1e12)]
    by_params = [degree(1e11, n) for n in (85e6, 3e8, 1.2e9, 1e10)]
    rises = all(a <= b for a, b in itertools.pairwise(by_tokens)) and by_tokens[0] < by_tokens[-1]
    return Finding(
        falls and rises and len(set(by_params)) == 1,
        f"replicas {by_tokens} for 1e9 to 1e12 tokens, {by_params} for 85M to 10B parameters; "
        f"executed {ran} steps for batches of 1 to 256",
        "both compute and gradient bytes follow the parameters, the critical batch the tokens"
        if len(set(by_params)) == 1
        else "the degree follows the parameters",
        ("steps = S (1 + B_crit / B), B_crit = 22.9 D^0.47 tokens; replicas of 4096 tokens",
         "the last doubling that saves a fifth of the time", "executed: SGD on a noisy quadratic"),
        "cpu",
    )  # fmt: skip


@check("G1.14", mutant={"off": 1})
def backup_workers(*, workers: int = 16, off: int = 0) -> Finding:
    """Iterations of SGD with dropped late updates; waits against (H_n - H_b) / mu.

    ``off``: extra backups in the law. Dynamic b takes the best of all b for each iteration.
    """
    need_torch()
    from backends.references.library import torch

    random = np.random.default_rng(2)
    draws = np.sort(random.exponential(size=(20_000, workers)), axis=1)
    waits = {b: float(draws[:, workers - 1 - b].mean()) for b in range(workers)}
    law = max(abs(waits[b] / exponential_wait(workers, b + off) - 1) for b in (0, 2, 8))
    gains = {b: (workers - b) / waits[b] for b in waits}  # useful updates per second
    static = max(gains.values())
    worth, rate = np.arange(1, workers + 1), static
    for _ in range(30):  # Dinkelbach: the best rate makes the best of k - rate x wait nought
        taken = (worth - rate * draws).argmax(1)
        rate = float((taken + 1).sum() / draws[np.arange(len(draws)), taken].sum())
    torch.manual_seed(0)
    data, goal = torch.randn(256, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    w = torch.zeros(4, dtype=torch.float64)
    for i in range(200):
        shards = data.chunk(workers)
        quick = random.permutation(workers)[: int(taken[i]) + 1]
        grads = [s.T @ (s @ (w - goal)) / len(s) for s in (shards[j] for j in quick)]
        w = w - 0.1 * torch.stack(grads).mean(0)
    learnt = bool(torch.allclose(w, goal, atol=1e-6))
    return Finding(
        law < 0.02 and rate >= static and learnt,
        f"waits within {law:.1%}; updates per second {rate:.2f} dynamic, {static:.2f} best static, "
        f"{gains[0]:.2f} without backups",
        "known times let every iteration take its own best b, which the static one only averages",
        ("16 exponential workers of rate 1; an update's worth is the gradients in it",
         "executed: SGD on least squares with late gradients dropped"),
        "cpu",
    )  # fmt: skip


@check("G1.15", mutant={"skipped": 0.3})
def aquarius(*, skipped: float = 0.6, published: float = 2.35) -> Finding:
    """Utilisation of a 13.4B video network over mixed buckets, and the ceiling of a step cache.

    ``skipped``: share of the denoising steps' work that the cache spares.
    """
    from dataclasses import replace

    from simcore.strategy import ParallelStrategy
    from simcore.workloads import TrainStep
    from validation.systems.training_machine import gpt, step

    model = replace(gpt("dit-13.4b", 42, 5120, 40), causal=False, position="rope", max_positions=0)
    cluster = make_cluster("h800-sxm-80gb", 8, 8)
    mfu = 0.0
    for tp, how in itertools.product((2, 4), ("none", "full")):
        plan = ParallelStrategy(tp=tp, dp_shard=64 // tp, sequence_parallel=tp > 1, recompute=how)
        found = [step(model, cluster, plan, TrainStep(64, t)) for t in (8192, 16384, 32768)]
        if all(one["fits"] for one in found):
            useful = sum(one["mfu"] * one["step_s"] for one in found)
            mfu = max(mfu, useful / sum(one["step_s"] for one in found))
    need_torch()
    ran, exact = cached_denoising(skipped)
    ceiling = 1 / (1 - skipped)
    return Finding(
        mfu >= 0.36 and exact and ran <= ceiling * 1.0001 and ceiling >= published,
        f"MFU {mfu:.1%} over buckets of 8K, 16K and 32K tokens; a cache that spares {skipped:.0%} "
        f"of the work gives at most {ceiling:.2f}x ({ran:.2f}x executed)",
        "spared work bounds the gain"
        if ceiling >= published
        else "2.35x needs 57 % of the work spared",
        ("13.4B as 42 layers of 5120, 64 H800, best of tensor 2 or 4 x ZeRO-3 that "
         "fits", "a skipped block "
         "adds the residual of its last full step"),
        "cpu",
    )  # fmt: skip


def cached_denoising(skipped: float) -> tuple[float, bool]:
    """Run 50 steps, some skipped by the cache; return work saved, and whether 0 is exact."""
    from backends.references.library import torch

    random = torch.Generator().manual_seed(0)
    w = torch.randn(8, 8, generator=random, dtype=torch.float64) / 8
    start = torch.randn(4, 8, generator=random, dtype=torch.float64)

    def run(share: float) -> tuple[torch.Tensor, int]:
        x, kept, full = start, torch.zeros_like(start), 0
        for i in range(50):
            if (
                math.floor((i + 1) * (1 - share) + 1e-9) > math.floor(i * (1 - share) + 1e-9)
                or not i
            ):
                kept, full = torch.tanh(x @ w), full + 1
            x = x + 0.02 * kept
        return x, full

    plain = start
    for _ in range(50):
        plain = plain + 0.02 * torch.tanh(plain @ w)
    exact, all_steps = run(0.0)
    return all_steps / run(skipped)[1], torch.equal(exact, plain)


@check("G1.16", mutant={"hours": 4.0})
def surrogates(*, data_bytes: float = 8e12, hours: float = 2.0, gain: float = 13.0) -> Finding:
    """Rates of the streamed and the offline path, and a reservoir fed by producers executed.

    The slowest of producers, link and consumer sets the rate.
    """
    need_torch()
    from backends.references.library import torch

    rate = data_bytes / (hours * 3600)
    laws = True
    for produce, link, consume in ((3, 8, 8), (8, 3, 8), (8, 8, 3)):
        reservoir, done, made = torch.zeros(0), 0, 0
        for _ in range(50):
            fresh = min(produce, link)
            room = 64 - len(reservoir)
            fresh = min(fresh, room)
            reservoir = torch.cat((reservoir, torch.arange(made, made + fresh).float()))
            made += fresh
            take = min(consume, len(reservoir))
            order = torch.randperm(len(reservoir), generator=torch.Generator().manual_seed(made))
            reservoir, done = reservoir[order[take:]], done + take
        laws &= abs(done / 50 - min(produce, link, consume)) < 0.2
    return Finding(
        laws and round(rate / 1e9, 2) == 1.11 and round(rate / gain / 1e9, 3) == 0.085,
        f"{rate / 1e9:.2f} GB/s sustained, {rate / gain / 1e9:.4f} offline",
        "the reservoir passes on what the slowest part gives",
        ("both paths are bound by input", "executed: 50 draws from a reservoir of 64 samples"),
        "cpu",
    )
