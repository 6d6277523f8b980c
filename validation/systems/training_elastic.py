"""Checks of tables shared out, coded sums, backup workers and stale weights, on real ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from simcore.accounting import step_totals
from simcore.liveness import activation_peaks, residents
from simcore.lower import lower_training
from simcore.pipelines.orders import Order
from simcore.pipelines.unit import UNIT_S, run_units
from simcore.program import Action, Program, Versions
from simcore.recommendation import Recommender, lower_recommender
from simcore.schedules import SCHEDULES
from simcore.stragglers import best_backups, exponential_kth_s
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from validation.systems.frame import Finding, check, need_torch
from validation.systems.training_machine import SMALL, gpt
from validation.systems.training_pipelines import cut, cut_by_hand

if TYPE_CHECKING:
    from backends.launch import RunResult

SEED, RANKS = 5, 4
EXACT = "executed in float64 on four gloo ranks"
CLOSE = 1e-9  # float64 sums in another order
CODED_ERROR = 0.02  # of a gradient's norm, fixed beforehand: twice 1/254 of a block's largest value
PLANS: dict[str, tuple[ParallelStrategy, TrainStep]] = {
    "plain": (ParallelStrategy(dp_replicate=RANKS), TrainStep(RANKS, 8)),
    "coded": (ParallelStrategy(dp_replicate=RANKS, grad_codec="int8"), TrainStep(RANKS, 8)),
    "backup": (ParallelStrategy(dp_replicate=RANKS, backup_workers=1), TrainStep(RANKS, 8)),
    "pipedream": (ParallelStrategy(pp=RANKS, schedule="pipedream"), TrainStep(8, 8)),
    "flush-free": (ParallelStrategy(pp=RANKS, schedule="pipelined_backprop"), TrainStep(8, 8)),
}
LATE_S = {"3": 0.3}  # the last rank is held up so long


TABLES = "tables"
RECOMMENDER = Recommender("small", 8, 11, 6, 5, (7,), (9,))


def program_of(name: str) -> Program:
    """Return the program of a plan on a small network, or that of the recommendation model."""
    if name == TABLES:
        return lower_recommender(RECOMMENDER, RANKS, 16)
    return lower_training(SMALL, *PLANS[name])


@cache
def on_ranks() -> dict[tuple[str, bool], RunResult]:
    """Run every plan on four gloo ranks, in float64 and again, counted, in its own formats."""
    need_torch()
    from backends.launch import Job, RunOptions, run_many

    exact = RunOptions(
        SEED, 1, 1, dtype="fp64", dump=("losses", "gradients"), delay_s=LATE_S, timeout_s=120
    )
    counted = RunOptions(SEED, 1, 0, track_memory=True, timeout_s=120)
    jobs = {
        (name, each is exact): Job(program_of(name), each)
        for name in (*PLANS, TABLES)
        for each in (exact, counted)
    }
    return dict(zip(jobs, run_many(list(jobs.values())), strict=True))


def difference(found: Mapping[str, np.ndarray], wanted: Mapping[str, object]) -> float:
    """Return the norm of the difference of two sets of gradients, over the wanted ones' norm."""
    pairs = [(np.asarray(found[key]), np.asarray(wanted[key])) for key in found]
    off = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    return float(np.sqrt(off / sum(float((b**2).sum()) for _, b in pairs)))


# ------------------------------------------------------------------ G1.8


@check("G1.8", mutant={"ranks_off": 1})
def dlrm(*, ranks_off: int = 0) -> Finding:
    """Bytes of the program's exchanges against B T dim e (P-1)/P^2, and a step on ranks.

    ``ranks_off``: ranks too many in the law.
    """
    ran = on_ranks()
    from backends.references.replay import run_here

    batch, size, law, rest = 2048, 4, True, set()
    for ranks, tables in ((2, 4), (4, 8), (4, 16), (8, 16)):
        model = Recommender("one", tables, 100_000, 64, 13, (512, 256), (512, 256))
        payload = step_totals(lower_recommender(model, ranks, batch), 0).payload_bytes
        p = ranks + ranks_off
        # Out and back; of a buffer, in nccl-tests' convention, a rank keeps its own part.
        sent = payload["all_to_all", "dp_replicate"] / 2 * (ranks - 1) / ranks
        wanted_bytes = batch * tables * 64 * size * (p - 1) / p**2
        law &= abs(sent / wanted_bytes - 1) < CLOSE
        pairs = model.pairs * 512 * size  # weights of the pairs' products
        rest.add(payload["all_reduce", "dp_replicate"] - pairs)
    told = dict(step_totals(program_of(TABLES), 0).payload_bytes)
    counted = all(rank.payload_bytes == told for rank in ran[TABLES, False].ranks)
    wanted = run_here(lower_recommender(RECOMMENDER, 1, 16), SEED)
    error = max(difference(rank.arrays, wanted.gradients) for rank in ran[TABLES, True].ranks)
    error = max(error, abs(ran[TABLES, True].losses[0] / wanted.loss - 1))
    return Finding(
        law and len(rest) == 1 and counted and error < CLOSE,
        f"exchanges {'are' if law else 'are not'} B T dim e (P-1)/P^2 for 2 to 8 ranks and 4 to 16 "
        f"tables; dense gradients {rest.pop() / 1e6:.2f} MB whatever the tables; {error:.1e} off "
        "one rank with all tables",
        "a rank sends its tables' rows for the others' samples; the networks see the tables only "
        "in the weights of the pairs' products, which are left out here"
        if law
        else "the bytes are those of another number of ranks",
        ("2048 samples, rows of 64 in fp32, layers of 512 and 256", EXACT),
        "cpu",
    )


# ------------------------------------------------------------------ G1.12


def coded_share(codec: str, gpus: int) -> tuple[float, float]:
    """Return what coding takes, and the whole coded sum, over the seconds of the plain sum.

    Of a network of 0.3 B parameters, layer by layer, on ``gpus`` P100 nodes with 100 Gb/s each: the
    oldest chip of the catalogue, since the paper's are older still.
    """
    model, work = gpt("0.3b", 24, 1024, 16), TrainStep(gpus, 512)
    coding, moving = ("encode", "decode"), ("all_reduce", "all_to_all", "all_gather")
    seconds = {}
    for name in ("none", codec):
        plan = ParallelStrategy(dp_replicate=gpus, grad_codec=name)
        program = lower_training(replace(model, weights_dtype="fp32"), plan, work)
        cost = ClusterCost(make_cluster("p100", 1, gpus), program.mesh)
        ops = [op for action in program.order[0] for _, _, op in program.ops(action.body)]
        seconds[name] = [
            sum(float(cost.seconds(op)) for op in ops if op.kind in kinds)
            for kinds in (coding, moving)
        ]
    plain = seconds["none"][1]
    return seconds[codec][0] / plain, sum(seconds[codec]) / plain


@check("G1.12", mutant={"codec": "none"})
def eight_bit(*, gpus: int = 96, codec: str = "int8") -> Finding:
    """The 96-GPU speedup between halved and quartered transfers; a coded sum executed.

    The closed form's transfer is its bytes, here those of the program; coding comes on top.
    """
    ran = on_ranks()
    group = "dp_replicate"
    plain = step_totals(program_of("plain"), 0).payload_bytes["all_reduce", group]
    counted = step_totals(program_of("plain" if codec == "none" else "coded"), 0).payload_bytes
    # A plain sum goes out and in like a coded one: twice its buffer, in nccl-tests' convention.
    moved = sum(s * (2 if kind == "all_reduce" else 1) for (kind, _), s in counted.items())
    share = moved / (2 * plain)
    as_told = all(
        rank.payload_bytes == dict(step_totals(program_of("coded"), 0).payload_bytes)
        for rank in ran["coded", False].ranks
    )
    error = difference(ran["coded", True].ranks[0].arrays, ran["plain", True].ranks[0].arrays)
    ratio = gpus / 23 - 1
    half, quarter = gpus / (1 + ratio / 2), gpus / (1 + ratio / 4)
    coding, whole = coded_share(codec, gpus)
    mine = gpus / (1 + ratio * (share + coding))
    return Finding(
        as_told and 0 < error < CODED_ERROR and half < mine <= quarter and half < 50 < quarter,
        f"{half:.1f}x and {quarter:.1f}x bound the published 50x, {mine:.1f}x with {share:.3f} of "
        f"the bytes and {coding:.1%} of the sum's seconds for coding; gradients on ranks "
        f"{error:.2%} off",
        "no overlap, fitted to the 32-bit speedup alone; coding is cheap beside slow links"
        if mine > half
        else "the transfer does not halve",
        (f"latency left out, as in the closed form: with it, and a direct exchange for each layer, "
         f"the coded sum takes {whole:.2f} of the plain one's seconds on these links (50 us a "
         "message); fewer, larger sums would be needed",
         "0.3B parameters on 96 P100 with 100 Gb/s each; the paper's are older", EXACT),
        "cpu",
    )  # fmt: skip


# ------------------------------------------------------------------ G1.14


@check("G1.14", mutant={"off": 1})
def backup_workers(*, workers: int = 16, off: int = 0) -> Finding:
    """Waits against (H_n - H_b) / mu, dynamic b against static ones, and a late rank dropped.

    ``off``: extra backups in the law. Dynamic b takes the best of all b for each iteration.
    """
    ran = on_ranks()["backup", True]
    from backends.references.replay import run_here

    random = np.random.default_rng(2)
    draws = np.sort(random.exponential(size=(20_000, workers)), axis=1)
    waits = {b: float(draws[:, workers - 1 - b].mean()) for b in range(workers)}
    law = max(abs(waits[b] / exponential_kth_s(workers, b + off, 1.0) - 1) for b in (0, 2, 8))
    best = best_backups(workers, lambda b: waits[b], lambda b: workers - b)
    static = (workers - best) / waits[best]
    worth, rate = np.arange(1, workers + 1), static
    for _ in range(30):  # Dinkelbach: the best rate makes the best of k - rate x wait nought
        taken = (worth - rate * draws).argmax(1)
        rate = float((taken + 1).sum() / draws[np.arange(len(draws)), taken].sum())
    alone = run_here(lower_training(SMALL, ParallelStrategy(), TrainStep(RANKS - 1, 8)), SEED)
    error = max(difference(rank.arrays, alone.gradients) for rank in ran.ranks)
    waited = [rank.rank for rank in ran.ranks if rank.seconds[0] > LATE_S["3"]]
    return Finding(
        law < 0.02 and rate >= static and error < CLOSE and waited == [3],
        f"waits within {law:.1%}; updates per second {rate:.2f} dynamic, {static:.2f} best static "
        f"(b = {best}), {workers / waits[0]:.2f} without backups; on ranks {error:.1e} off the "
        "three in time, nobody waits for the fourth",
        "known times let every iteration take its own best b, which the static one only averages",
        ("16 exponential workers of rate 1; an update's worth is the gradients in it", EXACT),
        "cpu",
    )


# ------------------------------------------------------------------ G2.4, G2.5


def on_one_rank(name: str, actions: tuple[Action, ...], versions: dict[int, Versions]) -> Program:
    """Return a plan's actions, without messages, as the program of a rank that has every stage."""
    program = program_of(name)
    return replace(
        program,
        mesh={**program.mesh, "pp": 1},
        order=(actions,),
        stage_rank=(0,) * RANKS,
        versions=versions,
    )


def stale_by_formula(count: int) -> Program:
    """Return PipeDream one microbatch after the other: stage s uses weights p - 1 - s updates old.

    Every version has a place of its own.
    """
    actions = [
        Action(stage, kind, m)
        for m in range(count)
        for kind, stages in (("F", range(RANKS)), ("BR", range(RANKS)[::-1]), ("O", range(RANKS)))
        for stage in stages
    ]
    every = tuple((m, m + 1) for m in range(count))
    versions = {
        s: Versions(count + 1, tuple(max(0, m - (RANKS - 1 - s)) for m in range(count)), every)
        for s in range(RANKS)
    }
    return on_one_rank("pipedream", tuple(actions), versions)


@check("G2.4", mutant={"stages_off": 1})
def pipedream(*, stages_off: int = 0) -> Finding:
    """Cuts by dynamic programming; traffic, versions and gradients as executed.

    ``stages_off``: extra stages that the dynamic programme cuts.
    """
    ran, program = on_ranks(), program_of("pipedream")
    from backends.references.replay import run_here

    random, worst = np.random.default_rng(4), 0.0
    for layers, stages in ((5, 2), (8, 3), (10, 4), (12, 5)):
        costs = random.lognormal(size=layers)
        worst = max(worst, abs(cut(costs, stages + stages_off) - cut_by_hand(costs, stages)))
    count = int(program.info["microbatches"])
    sent = sum(rank.payload_bytes["send", "pp"] for rank in ran["pipedream", False].ranks)
    boundary = 2 * (RANKS - 1) * count * 8 * SMALL.hidden * 4  # 8 tokens in fp32
    versions = [program.versions[s].kept for s in range(RANKS)]
    held = all(
        rank.peak_live_bytes == residents(program, s).total + activation_peaks(program, s)[0]
        for s, rank in enumerate(ran["pipedream", False].ranks)
    )
    wanted = run_here(stale_by_formula(count), SEED)
    error = max(difference(r.arrays, wanted.gradients) for r in ran["pipedream", True].ranks)
    error = max(error, abs(ran["pipedream", True].losses[0] / wanted.loss - 1))
    vgg = 1 - 2 * 64 * 25088 / (2 * 138e6 * 7 / 8)
    exact = worst < CLOSE and error < CLOSE and sent == boundary and held
    return Finding(
        exact and versions == [RANKS - s for s in range(RANKS)],
        f"cuts equal brute force to {worst:.1g}; {sent:.0f} of {boundary} boundary bytes; versions "
        f"{versions}, counted in the ranks' memory; {error:.1e} off a run by the formula; VGG-16 "
        f"cut before its dense layers sends {vgg:.0%} less",
        "only activations and gradients at the cuts travel; a stage keeps a version per microbatch",
        ("up to 12 layers of random cost", "VGG-16: 138M parameters, 25088 features at the cut, 64 "
         "images per GPU, 8 GPUs", EXACT),
        "cpu",
    )  # fmt: skip


def in_turn(order: Order) -> Iterator[Action]:
    """Yield the actions of all ranks as they start on unit costs, with an update after each B."""
    left = [iter(actions) for actions in order]
    for span in sorted(run_units(order).line.spans, key=lambda span: (span.start_s, span.rank)):
        action = next(left[span.rank])
        yield action._replace(kind="BR") if action.kind == "B" else action
        if action.kind == "B":
            yield action._replace(kind="O")


@check("G2.5", mutant={"lag": 1})
def pipelined_backprop(*, lag: int = 0) -> Finding:
    """Ticks between a sample's forward and its backward, utilisation, and gradients on ranks.

    A tick is one action, forward or backward. ``lag``: stages too many behind the last one.
    """
    ran, p = on_ranks()["flush-free", True], RANKS
    from backends.references.replay import run_here

    even = {"F": UNIT_S, "B": UNIT_S}
    used, steps, right = [], [], True
    for samples in (16, 64, 256):
        order = SCHEDULES["pipelined_backprop"](p + lag, samples)
        found = run_units(order, seconds=even)
        start = {span.action: span.start_s for span in found.line.spans}
        for s in range(p):
            waits = {
                round((start[f"{s}B{m}"] - start[f"{s}F{m}"]) / UNIT_S) - 1
                for m in range(2 * (p + lag), samples)
            }
            right &= waits == {2 * (p - 1 - s)}
        used.append(1 - found.bubble_fraction)
        steps.append(found.line.step_s)
    steady = 2 * UNIT_S * (256 - 64) / (steps[2] - steps[1])
    fill = [1 / (1 + (p - 1) / n) for n in (16, 64, 256)]
    actions = tuple(in_turn(SCHEDULES["pipelined_backprop"](p, 8)))
    one_place = program_of("flush-free").versions
    wanted = run_here(on_one_rank("flush-free", actions, dict(one_place)), SEED)
    error = max(difference(rank.arrays, wanted.gradients) for rank in ran.ranks)
    error = max(error, abs(ran.losses[0] / wanted.loss - 1))
    return Finding(
        right and error < CLOSE and abs(steady - 1) < CLOSE and np.allclose(used, fill),
        f"delays {[2 * (p - 1 - s) for s in range(p)] if right else 'differ'} ticks; busy "
        f"{', '.join(f'{u:.3f}' for u in used)} over 16, 64, 256 samples, steadily {steady:.3f}; "
        f"on ranks {error:.1e} off the same actions in turn",
        "no flush: only the first fill and the last drain are idle",
        ("a tick is one action, forward or backward", EXACT),
        "cpu",
    )
