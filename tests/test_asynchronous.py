"""Pipelines without flushes: what they keep, what they take, and what ranks compute with it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from machines import GPT2, LLAMA, Constant, Wires, cluster_cost, strategy

from simcore.accounting import step_totals
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.estimate import estimate
from simcore.liveness import activation_peaks, residents
from simcore.lower import lower_training
from simcore.models import ModelSpec
from simcore.pipelines.asynchronous import ASYNCHRONOUS, staleness
from simcore.pipelines.unit import run_units
from simcore.program import Program, coordinates
from simcore.program_json import program_from_json, program_to_json
from simcore.schedules import SCHEDULES
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

EIGHT = replace(LLAMA, layers=8)


def group_of(name: str, ranks: int) -> int:
    return ranks if ASYNCHRONOUS[name].grouped else 1


# ------------------------------------------------------------------------------- what they keep


@pytest.mark.parametrize("p", [2, 4, 8])
def test_stale_weights_are_the_published_ones(p: int) -> None:
    """PipeDream keeps p versions on the first stage and one on the last; 2BW two everywhere."""
    order = SCHEDULES["pipedream"](p, 8 * p)
    found = staleness("pipedream", order)
    assert [s.versions for s in found] == list(range(p, 0, -1))
    assert [s.delay for s in found] == list(range(p - 1, -1, -1))
    assert {s.mismatch for s in found} == {0}
    for group in (p, 2 * p):
        two = staleness("pipedream_2bw", order, group)
        assert {(s.versions, s.delay) for s in two} == {(2, 1)}
    none = staleness("pipelined_backprop", order)
    assert {s.versions for s in none} == {1}
    assert [s.mismatch for s in none] == list(range(p - 1, -1, -1))


def test_groups_shorter_than_the_pipeline_are_refused() -> None:
    with pytest.raises(InputError, match="at least as long"):
        staleness("pipedream_2bw", SCHEDULES["pipedream_2bw"](4, 16), 2)
    with pytest.raises(InputError, match="pipedream"):
        staleness("pipedreem", [])


@pytest.mark.parametrize("name", sorted(ASYNCHRONOUS))
@pytest.mark.parametrize("p", [1, 2, 4])
def test_places_hold_what_is_still_to_be_used(name: str, p: int) -> None:
    """Written places are free, every action finds its version, the last one lies where the first
    did; and there are no more places than versions."""
    group = group_of(name, p)
    program = lower_training(EIGHT, strategy("one", pp=p, schedule=name), TrainStep(6 * p, 64))
    assert program_from_json(program_to_json(program)) == program
    order = SCHEDULES[name](p, 6 * p)
    wanted = staleness(name, order, group)
    for stage, actions in enumerate(program.order):
        assert program.versions[stage].kept == wanted[stage].versions
        content, made, forward = {0: 0}, 0, {}
        for action in actions:
            read, written = program.places(action)
            if action.kind == "F":
                forward[action.microbatch] = content[read]
                number = action.microbatch // group
                delayed = name == "pipedream_2bw"
                assert content[read] == (max(0, number - 1) if delayed else made)
            elif action.kind in ("B", "BR"):
                version = forward.pop(action.microbatch)
                assert content[read] == (version if ASYNCHRONOUS[name].stash else made)
            elif action.kind == "O":
                assert (action.microbatch, content[read]) == (made, made)
                made += 1
                content[written] = made
        assert made == 6 * p // group
        assert content[0] == made


# ------------------------------------------------------------------------------- what they take


def test_a_stream_without_flushes_idles_ever_less() -> None:
    fractions = [
        run_units(SCHEDULES["pipedream"](4, count)).bubble_fraction for count in (8, 64, 512)
    ]
    assert fractions == [pytest.approx(3 / (count + 3)) for count in (8, 64, 512)]


@pytest.mark.parametrize("name", sorted(ASYNCHRONOUS))
def test_a_longer_stream_takes_the_slowest_stage_longer(name: str) -> None:
    """So no fill and no drain is left in the steady state, updates included."""
    seconds = {"attention": 0.7, "attention_backward": 1.9, "adam": 0.05}
    programs = [
        lower_training(EIGHT, strategy("pp4", schedule=name), TrainStep(count, 64))
        for count in (16, 32)
    ]
    cost = Constant(seconds)
    times = [estimate(program, cost, Wires()).step_s for program in programs]
    adams = 2 * 0.05 + 0.05  # of two layers, and of the head or the embedding
    each = 2 * (0.7 + 1.9) + adams / group_of(name, 4)
    assert times[1] - times[0] == pytest.approx(16 * each, rel=1e-9)
    for detail in (False, True):
        found = [simulate(p, cost, Wires(), detail=detail).step_s for p in programs]
        assert found == pytest.approx(times, rel=1e-9)


@pytest.mark.parametrize("name", sorted(ASYNCHRONOUS))
def test_replicas_reduce_every_update_and_machines_agree(name: str) -> None:
    parallel = ParallelStrategy(pp=4, dp_replicate=2, schedule=name)
    program = lower_training(EIGHT, parallel, TrainStep(16, 64))
    once = lower_training(EIGHT, replace(parallel, schedule="1f1b"), TrainStep(16, 64))
    updates = 8 // group_of(name, 4)
    for rank in range(4):
        totals = [step_totals(p, rank).payload_bytes for p in (program, once)]
        key = ("all_reduce", "dp_replicate")
        assert totals[0][key] == updates * totals[1][key]
    cost = cluster_cost(program)
    found = estimate(program, cost, cost).step_s
    for detail in (False, True):
        assert simulate(program, cost, cost, detail=detail).step_s == pytest.approx(found, rel=0.02)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (LLAMA, {"schedule": "1f1b", "update_every": 2}, "updates once"),
        (LLAMA, {"schedule": "pipedream", "update_every": 2}, "after every microbatch"),
        (LLAMA, {"schedule": "pipedream_2bw", "update_every": 4}, "6 microbatches do not divide"),
        (LLAMA, {"schedule": "pipedream_2bw", "update_every": 1, "pp": 4}, "at least as long"),
        (LLAMA, {"schedule": "pipedream", "dp_shard": 2}, "zero_stage = 0"),
        (GPT2, {"schedule": "pipedream"}, "tied embeddings"),
    ],
)
def test_refusals_say_what_to_do(model: ModelSpec, options: dict[str, object], words: str) -> None:
    parallel = strategy("pp", **options)
    with pytest.raises(InputError, match=words):
        lower_training(model, parallel, TrainStep(6 * parallel.dp, 64))


# ------------------------------------------------------------------------------- on real ranks

torch = pytest.importorskip("torch")

from dense import Dense  # noqa: E402

from backends.data import sequence  # noqa: E402
from backends.launch import Job, RunOptions, RunResult, run_many  # noqa: E402
from backends.weights import dense_weight, shard_weight  # noqa: E402

SEED, STEPS, WORK = 5, 2, TrainStep(8, 8)
SMALL = ModelSpec(
    "small", 4, 16, 4, 2, 4, 24, 29, weights_dtype="fp32", compute_dtype="fp32", kv_dtype="fp32"
)
RUNS = {
    "pipedream": ParallelStrategy(pp=4, schedule="pipedream"),
    "pipedream_2bw": ParallelStrategy(pp=4, schedule="pipedream_2bw"),
    "pipelined_backprop": ParallelStrategy(pp=4, schedule="pipelined_backprop"),
    "pipedream with replicas": ParallelStrategy(pp=2, dp_replicate=2, schedule="pipedream"),
    "2bw split in two": ParallelStrategy(pp=2, tp=2, schedule="pipedream_2bw", update_every=4),
}
EXACT = RunOptions(SEED, 1, 1, dtype="fp64", dump=("losses", "gradients"), timeout_s=60)
COUNTED = RunOptions(SEED, 1, 0, track_memory=True, count_flops=True, timeout_s=60)


def program_of(name: str) -> Program:
    return lower_training(SMALL, RUNS[name], WORK)


@cache
def results() -> dict[tuple[str, str], RunResult]:
    jobs = {
        (name, kind): Job(program_of(name), options)
        for name in RUNS
        for kind, options in (("exact", EXACT), ("counted", COUNTED))
    }
    return dict(zip(jobs, run_many(list(jobs.values())), strict=True))


def stale(
    parallel: ParallelStrategy, flushed: bool = False
) -> tuple[list[float], dict[tuple[str, int], torch.Tensor]]:
    """Return the losses of each stream, and the gradients of the first one's last update.

    Microbatches run one after the other on a dense network; which version of its weights a stage
    uses comes from the published formulas. ``flushed``: always the newest, as without staleness.
    """
    p, dp, name = parallel.pp, parallel.dp, parallel.schedule
    start = lower_training(SMALL, ParallelStrategy(), WORK)
    dense = Dense(SMALL).double()
    stages: dict[tuple[str, int], int] = {}
    for (weight, layer), parameter in dense.named().items():
        with torch.no_grad():
            whole = dense_weight(weight, layer, start.buffers[weight], 1, SEED, torch.float64)
            parameter.copy_(whole)
        unit = weight.split(".")[0]
        stages[weight, layer] = {"embed": 0, "head": p - 1}.get(unit, layer * p // SMALL.layers)
    count = WORK.global_batch // dp
    group = parallel.update_every or (p if name == "pipedream_2bw" else 1)
    rows = torch.stack([sequence(SEED, i, WORK.seq_len, SMALL.vocab) for i in range(count * dp)])
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    named = dense.named()

    def load(version: dict[tuple[str, int], int]) -> None:
        for key, number in version.items():
            named[key].data.copy_(history[number][key])

    losses, gradients = [], {}
    for _ in range(STEPS):
        history = [{key: value.detach().clone() for key, value in named.items()}]
        loss_sum = 0.0
        for m in range(count):
            newest = dict.fromkeys(named, len(history) - 1)
            if flushed:
                load(newest)
            elif group > 1:
                load(dict.fromkeys(named, max(0, m // group - 1)))
            else:
                load({key: max(0, m - (p - 1 - stage)) for key, stage in stages.items()})
            part = rows[m * dp : (m + 1) * dp]
            loss = dense.loss(part[:, :-1], part[:, 1:])
            if name == "pipelined_backprop":
                load(newest)  # autograd's saved weights are the parameters themselves
            (loss / group).backward()
            loss_sum += float(loss.detach())
            if (m + 1) % group == 0:
                load(newest)
                last = {key: value.grad.clone() for key, value in named.items()}
                optimizer.step()
                optimizer.zero_grad()
                history.append({key: value.detach().clone() for key, value in named.items()})
        gradients = gradients or last
        losses.append(loss_sum / count)
    return losses, gradients


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_ranks_equal_a_sequential_run_with_the_same_staleness(name: str) -> None:
    losses, gradients = stale(RUNS[name])
    found = results()[name, "exact"]
    assert found.losses == pytest.approx(losses, rel=1e-10)
    assert stale(RUNS[name], flushed=True)[0] != pytest.approx(losses, rel=1e-7)
    program, seen = program_of(name), set()
    for rank in found.ranks:
        place = coordinates(program.mesh, rank.rank)
        for key, array in rank.arrays.items():
            buffer, layer = key.rsplit("/", 1)
            unit = buffer.split(".")[0]
            for weight, held in program.buffers.items():
                if held.base == f"{unit}.w":
                    where = int(layer) if held.layered else -1
                    whole = gradients[weight, where]
                    seen.add((weight, where))
                    part = array[held.offset : held.offset + held.elements]
                    mine = shard_weight(whole, held, place["tp"], program.mesh["tp"])
                    np.testing.assert_allclose(part, mine.numpy().ravel(), rtol=1e-9, atol=1e-13)
    assert seen == set(gradients)


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_ranks_move_hold_and_do_what_the_program_says(name: str) -> None:
    program = program_of(name)
    for rank in results()[name, "counted"].ranks:
        stage = coordinates(program.mesh, rank.rank)["pp"]
        totals = step_totals(program, stage, rank.rank)
        assert rank.payload_bytes == dict(totals.payload_bytes)
        assert rank.flops == totals.flops
        held = residents(program, stage).total + activation_peaks(program, stage)[0]
        assert rank.peak_live_bytes == held
