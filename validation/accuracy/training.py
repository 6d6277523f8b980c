"""Accuracy of training steps: kernels, links and a framework's host against measured sweeps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf, log
from pathlib import Path
from statistics import median

import numpy as np

from hwmodels.frameworks import Framework, load_framework
from simcore.errors import InputError
from simcore.metrics import model_flops_per_token
from validation.accuracy.scores import Array, score
from validation.accuracy.table import Table, percent
from validation.accuracy.training_steps import Laid, fitted, predictions, step_seconds
from validation.importers.training import (
    CONTENDED_JOB,
    Run,
    fsdp_runs,
    megatron_runs,
    nanotron_runs,
    without_outliers,
)

# -- scores ----------------------------------------------------------------------------------------

TIED = 1e-9  # log ratio of predictions that are equal but for rounding
WORTH = 0.1  # pairs of runs that differ by less are not asked about
Group = Callable[[Run], Hashable]


def baseline(seen: Sequence[Run], unseen: Sequence[Run]) -> Array:
    """Return the dumbest prediction: model FLOPs at the median utilisation of the runs seen."""

    def work(run: Run) -> float:
        tokens = run.step.global_batch * run.step.seq_len
        return tokens * model_flops_per_token(run.model, run.step.seq_len) / run.world

    rate = median(run.seconds / work(run) for run in seen)
    return np.array([rate * work(run) for run in unseen])


def _grouped(runs: Sequence[Run], group: Group) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for index, run in enumerate(runs):
        found.setdefault(group(run), []).append(index)
    return list(found.values())


def kendall_tau(runs: Sequence[Run], predicted: Array, group: Group) -> float:
    """Return Kendall's tau over pairs of one group whose times per sequence differ by over 10 %.

    A pair that is predicted equal counts half, so that a prediction without an order has tau 0.
    """
    agree, total = 0.0, 0
    for members in _grouped(runs, group):
        for a, b in combinations(members, 2):
            measured = log(_per_sequence(runs[a]) / _per_sequence(runs[b]))
            if abs(measured) > log(1 + WORTH):
                total += 1
                ratio = predicted[a] / runs[a].step.global_batch
                ratio /= predicted[b] / runs[b].step.global_batch
                tied = abs(log(ratio)) < TIED
                agree += 0.5 if tied else float((ratio > 1) == (measured > 0))
    return 2 * agree / total - 1 if total else float("nan")


def regrets(runs: Sequence[Run], predicted: Array, group: Group, best_of: int = 1) -> list[float]:
    """Return per group how much longer the run that is predicted best took than the best.

    The best is the median of the ``best_of`` fastest.
    """
    found = []
    for members in _grouped(runs, group):
        times = sorted(_per_sequence(runs[i]) for i in members)
        chosen = min(members, key=lambda i: predicted[i] / runs[i].step.global_batch)
        fastest = median(times[: min(best_of, len(times))])
        found.append(max(0.0, _per_sequence(runs[chosen]) / fastest - 1))
    return found


def _per_sequence(run: Run) -> float:
    return run.seconds / run.step.global_batch


@dataclass(frozen=True, slots=True)
class Split:
    """A fit on some runs and its score on others, with a name for each side."""

    fitted_on: str
    scored_on: str
    seen: Sequence[Run]
    unseen: Sequence[Run]

    @classmethod
    def of(
        cls, fitted_on: str, scored_on: str, runs: Sequence[Run], chosen: Callable[[Run], bool]
    ) -> Split:
        """Return the split into the runs that are ``chosen`` for the fit and the others."""
        parts: dict[bool, list[Run]] = {True: [], False: []}
        for run in runs:
            parts[bool(chosen(run))].append(run)
        return cls(fitted_on, scored_on, parts[True], parts[False])

    @property
    def whole(self) -> bool:
        """Whether there is anything to fit and to score."""
        return bool(self.seen and self.unseen)


Fit = Callable[[Sequence[Run]], Framework]
Predict = Callable[[Sequence[Run], Framework], Array]


def unfitted(runs: Sequence[Run], framework: Framework) -> tuple[Split, Fit]:
    """Return what scores a framework as it is on all runs."""
    return Split("nothing", "all", runs, runs), _already(framework)


def _already(framework: Framework) -> Fit:
    """Return a fit that is known."""
    return lambda _: framework


_COLUMNS = (
    "fitted on", "scored on", "runs", "median", "p90", "baseline median",
    "tau", "baseline tau", "median regret", "constants",
)  # fmt: skip
SHIPPED_NOTE = (
    "Fitted on nothing: the constants of hwmodels/data/frameworks.toml as they are shipped, which "
    "are those of the second row's fit, and a baseline that has seen all runs."
)


def _row(
    split: Split, fit: Fit, group: Group, predict: Predict = predictions, best_of: int = 1
) -> tuple[tuple[object, ...], tuple[float, float, float, float]]:
    """Return a table's row, and its median, p90, tau and median regret."""
    framework = fit(split.seen)
    measured = np.array([run.seconds for run in split.unseen])
    predicted = predict(split.unseen, framework)
    dumb, own = baseline(split.seen, split.unseen), score(predicted, measured)
    tau = kendall_tau(split.unseen, predicted, group)
    regret = float(np.median(regrets(split.unseen, predicted, group, best_of)))
    row = (
        split.fitted_on, split.scored_on, own.rows, percent(own.median), percent(own.p90),
        percent(score(dumb, measured).median),
        tau, kendall_tau(split.unseen, dumb, group), percent(regret),
        constants_text(framework),
    )  # fmt: skip
    return row, (own.median, own.p90, tau, regret)


def constants_text(framework: Framework) -> str:
    """Return a framework's constants in a few words."""
    words = [
        f"{name.removesuffix('_s')} {getattr(framework, name) * 1e6:.3g} us"
        for name in ("issue_s", "call_s", "call_rank_s", "skew_s", "hop_s")
        if getattr(framework, name)
    ]
    shares = ("matmul_share", "attention_share", "memory_share")
    words += [
        f"{name.replace('_', ' ')} {getattr(framework, name):.2f}"
        for name in shares
        if getattr(framework, name) < 1
    ]
    return ", ".join(words)


def _missed(
    what: str, found: tuple[float, ...], target: tuple[float, ...], cause: str
) -> list[str]:
    """Return a sentence where median, p90 (at most) or tau (at least) miss their targets."""
    lines = []
    for name, value, wanted in zip(("median", "p90"), found, target[:2], strict=False):
        if value > wanted:
            lines.append(f"{what}: {name} {percent(value)}, not {percent(wanted)}. Cause: {cause}")
    if len(target) > 2 and not found[2] >= target[2]:
        lines.append(f"{what}: tau {found[2]:.2f}, not {target[2]:.2f}. Cause: {cause}")
    return lines


def _ungrouped(run: Run) -> Hashable:
    return run.model.name, run.world, run.step.global_batch


MEGATRON_TARGET = (0.09, 0.22, 0.85)
MEGATRON_CAUSE = (
    "times of one layer change unevenly with tp and the microbatch (at hidden 2048 and tp 4, "
    "microbatches of 1 and 2 take less than a host-bound layer of half the width; tp 8 takes a "
    "third more than tp 4), which no constant here gives."
)


def megatron_splits(runs: Sequence[Run]) -> list[Split]:
    """Return the splits by hidden size, which have targets, and two more that have none."""
    return [
        Split.of("hidden 1024", "hidden 2048", runs, lambda run: run.model.hidden == 1024),
        Split.of("hidden 2048", "hidden 1024", runs, lambda run: run.model.hidden == 2048),
        Split.of("tp 1 and 4", "tp 2 and 8", runs, lambda run: run.parallel.tp in (1, 4)),
        Split.of("up to 4 GPUs", "8 GPUs", runs, lambda run: run.world < 8),
    ]


def megatron_table(path: Path) -> Table:
    """Return the scores on one node of A100, fitted on one hidden size and read on the other."""
    start, runs = load_framework("megatron-2022"), megatron_runs(path)

    def fit(runs: Sequence[Run]) -> Framework:
        return fitted(start, runs, ("issue_s", "skew_s"))

    rows, missed = [_row(*unfitted(runs, start), _ungrouped)[0]], []
    for split in filter(lambda split: split.whole, megatron_splits(runs)):
        row, found = _row(split, fit, _ungrouped)
        rows.append(row)
        if split.scored_on.startswith("hidden"):
            what = f"Megatron-LM, {split.scored_on}"
            missed += _missed(what, found, MEGATRON_TARGET, MEGATRON_CAUSE)
    return Table(
        "training steps, Megatron-LM on 1 to 8 A100 (target 9 %, p90 22 %, tau 0.85)",
        _COLUMNS,
        tuple(rows),
        (
            "Full recomputation, unfused attention, gradients reduced after the backward pass, "
            "hosts that wait for messages and batches. Two constants are fitted: host seconds per "
            "kernel, and the delay of ranks at a collective. Kernels keep their benchmarked speed. "
            "The file's times are sums of terms that repeat from row to row to many digits, so its "
            "rows are fewer measurements than they seem. tau and regret: within one model, GPU "
            "count and global batch. Baseline: model FLOPs at the median utilisation of the seen.",
            SHIPPED_NOTE,
        ),
        tuple(missed),
    )


FSDP_TARGET = (0.10,)


def fsdp_table(path: Path) -> Table:
    """Return the scores of fully sharded runs, fitted on two model sizes and read on five."""
    start, runs = load_framework("llm-foundry-2023"), fsdp_runs(path)

    def fit(runs: Sequence[Run]) -> Framework:
        return fitted(start, runs, ("matmul_share", "attention_share"))

    def group(run: Run) -> Hashable:
        return run.model.name, run.world

    rows, missed = [_row(*unfitted(runs, start), group)[0]], []
    splits = [
        Split.of("MPT-350m, 3b", "others", runs, lambda run: run.model.name[4:] in ("350m", "3b")),
        Split.of("MPT-1b, 7b", "others", runs, lambda run: run.model.name[4:] in ("1b", "7b")),
        Split.of("up to 16 GPUs", "more", runs, lambda run: run.world <= 16),
    ]
    for split in filter(lambda split: split.whole, splits):
        row, found = _row(split, fit, group)
        rows.append(row)
        missed += _missed(f"FSDP, fitted on {split.fitted_on}", found, FSDP_TARGET, "not known.")
    return Table(
        "training steps, FSDP on 8 to 128 A100 (target 10 %)",
        _COLUMNS,
        tuple(rows),
        (
            "Two constants are fitted, the shares of their benchmarked speed that matrix products "
            "and attention keep: attention ran Triton's kernel of the first generation, the curves "
            "are of the second. tau: per sequence, within one "
            "model and GPU count.",
            SHIPPED_NOTE,
        ),
        tuple(missed),
    )


NANOTRON_TARGET = (0.18, inf)
NANOTRON_REGRET = 0.08
SMALL_NODES = 8
# Seconds per rank of a collective on contended hosts: what the fit on up to 8 nodes finds. No
# property of the framework: those of a user are at rest.
CONTENDED_S = 2.7e-4


def _framework_of(run: Run, framework: Framework) -> Framework:
    """Return the framework on a run's hosts; at rest they pay nothing per rank of a collective."""
    return framework if run.state else replace(framework, call_rank_s=0.0)


def nanotron_fit(start: Framework, seen: Sequence[Run]) -> Framework:
    """Return the framework fitted on hosts at rest, then its contended calls on the others."""
    rest, busy = ([run for run in seen if bool(run.state) == it] for it in (False, True))
    found = fitted(
        replace(start, call_rank_s=0.0), rest, ("issue_s", "hop_s", "matmul_share", "memory_share")
    )
    return fitted(replace(found, call_rank_s=CONTENDED_S), busy, ("call_rank_s",))


def nanotron_predictions(runs: Sequence[Run], framework: Framework) -> Array:
    """Return predictions, each with the state of its hosts."""
    laid: Laid = {}
    return np.array([step_seconds(run, _framework_of(run, framework), laid) for run in runs])


def _by_nodes(run: Run) -> Hashable:
    return run.nodes


def nanotron_splits(runs: Sequence[Run]) -> list[Split]:
    """Return the split by nodes, which has targets, its parts, and one by microbatch."""

    def small(run: Run) -> bool:
        return run.nodes <= SMALL_NODES

    whole = Split.of("up to 8 nodes", "16 to 64 nodes", runs, small)
    parts = [(f"{n} nodes", [r for r in whole.unseen if r.nodes == n]) for n in (16, 32, 64)]
    states = (("16 to 64, hosts at rest", ""), ("16 to 64, hosts contended", "contended"))
    parts += [(name, [r for r in whole.unseen if r.state == state]) for name, state in states]
    return [
        whole,
        *(Split(whole.fitted_on, name, whole.seen, part) for name, part in parts),
        Split.of(
            "mbs 1, 4 and 16", "others", runs, lambda run: run.parallel.microbatch in (1, 4, 16)
        ),
    ]


def nanotron_table(path: Path) -> Table:
    """Return the scores on 16 to 64 nodes of H100, fitted on up to 8."""
    ran = [run for run in nanotron_runs(path) if run.seconds]
    runs = without_outliers(ran)
    start = replace(load_framework("nanotron-2024"), call_rank_s=CONTENDED_S)
    known: dict[str, Framework] = {}

    def scores(split: Split, fit: Fit) -> tuple[tuple[object, ...], tuple[float, ...]]:
        return _row(split, fit, _by_nodes, nanotron_predictions, best_of=3)

    rows, missed = [scores(*unfitted(runs, start))[0]], []
    for split in filter(lambda split: split.whole, nanotron_splits(runs)):
        if split.fitted_on not in known:
            known[split.fitted_on] = nanotron_fit(start, split.seen)
        row, found = scores(split, _already(known[split.fitted_on]))
        rows.append(row)
        if split.scored_on == "16 to 64 nodes":
            what = f"nanotron on {split.scored_on}"
            missed = _missed(what, found, NANOTRON_TARGET, NANOTRON_CAUSE)
            if found[3] > NANOTRON_REGRET:
                missed.append(
                    f"{what}: median regret per node count {percent(found[3])}, not "
                    f"{percent(NANOTRON_REGRET)}. Cause: {NANOTRON_CAUSE}"
                )
    return Table(
        "training steps, nanotron on 128 to 512 H100 (target 18 %, regret 8 %)",
        _COLUMNS,
        tuple(rows),
        (
            f"Of {len(ran)} runs that ended, {len(ran) - len(runs)} are outliers: over three times "
            "as long per layer and pipeline slot as the median run of the same tp, microbatch and "
            "state of the hosts. Five constants, fitted on up to 8 nodes; the one per rank of a "
            f"collective holds for jobs from {CONTENDED_JOB} over several nodes, whose hosts were "
            "contended. Which jobs these are, and that a ring between nodes takes longer with "
            "every rank whatever its bytes, was seen on runs of all sizes. Groups over all nodes "
            "of a job at rest have the bandwidth that its own all-reduce test measured, other "
            "groups and contended jobs, whose test shows the delay, the datasheet's. issue: per op "
            "of the program, for which nanotron launches several kernels. Regret: against the "
            "median of the three fastest of the node count.",
            SHIPPED_NOTE,
        ),
        tuple(missed),
    )


NANOTRON_CAUSE = "runs of single jobs on shared nodes; equal layouts differ by up to a fifth."


SWEEPS: dict[str, Callable[[Path], Table]] = {
    "megatron_a100_single_node.csv": megatron_table,
    "fsdp_a100.csv": fsdp_table,
    "nanotron_h100_3.6b.csv": nanotron_table,
}


def training_tables(data: Path) -> list[Table]:
    """Return a table for every sweep of training steps that ``data`` holds.

    Raises `InputError` where it holds none.
    """
    folder = data / "training"
    there = {name: table for name, table in SWEEPS.items() if (folder / name).is_file()}
    if not there:
        raise InputError(f"{folder} holds none of {', '.join(SWEEPS)}: give --data DIR.")
    return [table(folder / name) for name, table in there.items()]
