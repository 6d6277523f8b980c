"""Starts the ranks of a run with torch's launcher and gathers what they measured.

Nothing here imports torch: the processes that are started do. Starting them takes seconds, so
`run_many` runs any number of jobs of one world size in one launch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simcore.errors import RunError
from simcore.mixed import MixedProgram
from simcore.program import Program
from simcore.program_json import mixed_to_json, program_to_json
from simcore.timeline import Span, Timeline, met, timeline
from simcore.workloads import Generation

START_S = 120.0  # allowance for interpreters to start and torch to be imported
POLL_S = 0.05
LAST_WORDS = 400  # characters of a rank's last line that an error quotes
ROOT = Path(__file__).resolve().parents[1]

# Large tensors come from the heap and stay there: otherwise glibc maps and unmaps each of them,
# and its page faults, not the arithmetic, decide how long an op takes (64 MB: 9 times as long).
STEADY_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a program is run; the fields of `backends.worker.RUN`."""

    seed: int = 0
    repeats: int = 5
    warmup: int = 2
    threads: int = 1
    device: str = "cpu"
    backend: str = "gloo"
    alone_rank: int | None = None
    record_spans: bool = False
    dtype: str | None = None
    fused: bool = True
    dump: tuple[str, ...] = ()
    track_memory: bool = False
    count_flops: bool = False
    timeout_s: float = 300.0  # for one job
    delay_s: Mapping[str, float] = field(default_factory=dict)  # by rank, in every training step
    fault: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """The programs of a generation's passes, and the plan that asks for them."""

    prefill: Program
    decode: Program
    workload: Generation
    method: str = "autoregressive"


@dataclass(frozen=True, slots=True)
class Job:
    """One program, one generation or one step over unequal lengths, and how it is run."""

    work: Program | GenerationJob | MixedProgram
    options: RunOptions = RunOptions()

    @property
    def mesh(self) -> Mapping[str, int]:
        """The mesh of its ranks, of one of them where a step has several."""
        work = self.work
        return work.prefill.mesh if isinstance(work, GenerationJob) else work.mesh

    @property
    def processes(self) -> int:
        """How many ranks have to be started."""
        work = self.work.prefill if isinstance(self.work, GenerationJob) else self.work
        return 1 if self.options.alone_rank is not None else work.world

    def to_json(self) -> dict[str, Any]:
        """Return the job as the worker reads it."""
        run = {"run": asdict(self.options)}
        work = self.work
        if isinstance(work, Program):
            return {"program": program_to_json(work), **run}
        if isinstance(work, MixedProgram):
            return {"mixed": mixed_to_json(work), **run}
        generation = {
            "prefill": program_to_json(work.prefill),
            "decode": program_to_json(work.decode),
            "method": work.method,
            "workload": asdict(work.workload),
        }
        return {"generation": generation, **run}


@dataclass(frozen=True, slots=True)
class RankResult:
    """What one rank measured. ``losses``: its share of the mean, for every step from the first."""

    rank: int
    seconds: tuple[float, ...]
    payload_bytes: Mapping[tuple[str, str], float]  # per step, by (kind, group)
    fingerprint: Mapping[str, Any]
    flops: float | None = None
    peak_live_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    losses: tuple[float, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()  # per sequence
    pass_seconds: tuple[float, ...] = ()
    processor_seconds: tuple[float, ...] = ()  # of the rank's own thread, per repeat
    spans: tuple[Span, ...] = ()
    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)  # what was dumped


@dataclass(frozen=True, slots=True)
class RunResult:
    """What all ranks of a run measured, in order of rank."""

    mesh: Mapping[str, int]
    ranks: tuple[RankResult, ...]

    @property
    def seconds(self) -> tuple[float, ...]:
        """Seconds of every repeat: until the last rank is done."""
        return tuple(map(max, zip(*(rank.seconds for rank in self.ranks), strict=True)))

    @property
    def step_s(self) -> float:
        """Median seconds of a repeat."""
        return statistics.median(self.seconds)

    @property
    def losses(self) -> tuple[float, ...]:
        """The mean loss over the global batch, for every step from the first (warm-up included)."""
        copies = self.mesh["tp"]  # every other rank has tokens of its own
        shares = [rank.losses for rank in self.ranks if rank.losses]
        return tuple(sum(step) / copies for step in zip(*shares, strict=True))

    @property
    def pass_seconds(self) -> tuple[float, ...]:
        """Median seconds of every pass of a generation, on the slowest rank."""
        return tuple(map(max, zip(*(rank.pass_seconds for rank in self.ranks), strict=True)))

    def timeline(self) -> Timeline:
        """Return the measured timeline; needs ``record_spans``."""
        return met(timeline((span for rank in self.ranks for span in rank.spans), self.step_s))


def run_program(program: Program | MixedProgram, options: RunOptions = RunOptions()) -> RunResult:
    """Run a training step on real ranks. Raises `RunError` where a rank dies or hangs."""
    return run_many([Job(program, options)])[0]


def run_generation(job: GenerationJob, options: RunOptions = RunOptions()) -> RunResult:
    """Run a generation on real ranks. Raises `RunError` where a rank dies or hangs."""
    return run_many([Job(job, options)])[0]


def run_many(jobs: Sequence[Job], progress: Callable[[int], None] | None = None) -> list[RunResult]:
    """Run jobs of one world size in one launch; ``progress`` hears how many are done.

    Raises `RunError` where a rank dies or a job outlasts its ``timeout_s``: then nothing is left
    running and nothing is kept.
    """
    if not jobs:
        return []
    worlds = {job.processes for job in jobs}
    if len(worlds) > 1:
        raise RunError(f"jobs of {sorted(worlds)} ranks cannot share a launch: run them apart.")
    folder = Path(tempfile.mkdtemp(prefix="meshwise-run-"))
    try:
        (folder / "jobs.json").write_text(json.dumps({"jobs": [job.to_json() for job in jobs]}))
        launch = _Launch(folder, worlds.pop(), [job.options for job in jobs])
        launch.run(progress or (lambda done: None))
        return [_read(folder, number, job) for number, job in enumerate(jobs)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_benchmarks(
    ranks: int, timeout_s: float = 600.0, *, ops: bool = True
) -> list[dict[str, Any]]:
    """Run the microbenchmarks on ``ranks`` ranks at once; return each one's record.

    Without ``ops`` only those of communication.
    Raises `RunError` where a rank dies or the limit passes.
    """
    options = RunOptions(timeout_s=timeout_s)
    folder = Path(tempfile.mkdtemp(prefix="meshwise-bench-"))
    try:
        job = {"bench": {"ops": ops}, "run": asdict(options)}
        (folder / "jobs.json").write_text(json.dumps({"jobs": [job]}))
        _Launch(folder, ranks, [options]).run(lambda done: None)
        return [json.loads((folder / f"job0.rank{r}.json").read_text()) for r in range(ranks)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment(threads: int) -> dict[str, str]:
    """Return the environment of the ranks."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **STEADY_MALLOC,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def command(folder: Path, world: int) -> list[str]:
    """Return the command that starts the ranks; one rank alone needs no launcher."""
    files = [str(folder / "jobs.json"), "--out", str(folder)]
    worker = ["-m", "backends.worker", *files, "--launched"]
    if world == 1:
        return [sys.executable, *worker]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1",
        "--nproc-per-node",
        str(world),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "--max-restarts",
        "0",
    ]
    return [sys.executable, *launcher, *worker]


class _Launch:
    """One launch of the ranks, watched until every job is done or something fails."""

    def __init__(self, folder: Path, world: int, options: Sequence[RunOptions]) -> None:
        self.folder, self.world, self.options = folder, world, options

    def run(self, progress: Callable[[int], None]) -> None:
        """Return when all results are written. Raises `RunError` otherwise."""
        with (self.folder / "launcher.stderr").open("w") as errors:
            process = subprocess.Popen(
                command(self.folder, self.world),
                env=environment(self.options[0].threads),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
            try:
                self._watch(process, progress)
            finally:
                self._end(process)

    def _watch(self, process: subprocess.Popen[bytes], progress: Callable[[int], None]) -> None:
        done, since, allowance = 0, time.monotonic(), START_S
        while process.poll() is None:
            time.sleep(POLL_S)
            if self._started():
                since, allowance = (time.monotonic(), 0.0) if allowance else (since, 0.0)
            while done < len(self.options) and self._finished(done):
                done, since = done + 1, time.monotonic()
                progress(done)
            if done < len(self.options):
                limit = self.options[done].timeout_s + allowance
                if time.monotonic() - since > limit:
                    raise RunError(self._late(done))
        if process.returncode:
            raise RunError(self._dead(process.returncode))
        while done < len(self.options):
            done += 1
            progress(done)

    def _started(self) -> bool:
        return all((self.folder / f"rank{r}.pid").exists() for r in range(self.world))

    def _missing(self, job: int) -> list[int]:
        files = {r: self.folder / f"job{job}.rank{r}.json" for r in range(self.world)}
        return [rank for rank, file in files.items() if not file.exists()]

    def _finished(self, job: int) -> bool:
        return not self._missing(job)

    def _pids(self) -> dict[int, int]:
        found = {}
        for rank in range(self.world):
            try:
                found[rank] = int((self.folder / f"rank{rank}.pid").read_text())
            except (OSError, ValueError):
                continue
        return found

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Stop launcher and ranks; they are killed where they do not stop at once."""
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self._pids().values():
            _kill(pid, self.folder)

    def _lines(self, rank: int) -> list[str]:
        try:
            text = (self.folder / f"rank{rank}.stderr").read_text(errors="replace")
        except OSError:
            return []
        return [line.strip() for line in text.splitlines() if line.strip()]

    def _dead(self, code: int) -> str:
        """Say which rank died first, and its last words."""
        launcher = (self.folder / "launcher.stderr").read_text(errors="replace")
        blamed = _blamed(launcher) if self.world > 1 else (0, code)
        if blamed is None:
            last = [line for line in launcher.splitlines() if line.strip()][-1:]
            return f"the ranks could not be started: {''.join(last)[:LAST_WORDS]}"
        rank, code = blamed
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        said = self._lines(rank)[-1:]
        words = f": {said[0][:LAST_WORDS]}" if said else "; it said nothing."
        return f"rank {rank} of {self.world} died ({how}){words}"

    def _late(self, job: int) -> str:
        """Say which ranks outlasted the limit, and where they were."""
        missing, pids = self._missing(job), self._pids()
        before = {rank: len(self._lines(rank)) for rank in missing}
        for rank in missing:
            if rank in pids:
                _signal(pids[rank], signal.SIGUSR1)
        time.sleep(0.3)
        places = {rank: self._lines(rank)[before[rank] :] for rank in missing}
        stuck = [r for r, lines in places.items() if not _communicating(lines)] or missing
        where = "; ".join(f"rank {r} was in {_innermost(places[r])}" for r in stuck)
        return (
            f"job {job + 1} of {len(self.options)} was not done within its "
            f"{self.options[job].timeout_s:g} s: {where}; raise timeout_s if it only needs longer."
        )


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _kill(pid: int, folder: Path) -> None:
    """Kill a rank, if the process of that number still is one of ours."""
    try:
        if str(folder) in Path(f"/proc/{pid}/cmdline").read_text():
            _signal(pid, signal.SIGKILL)
    except OSError:
        return


def _blamed(text: str) -> tuple[int, int] | None:
    """Return rank and exit code of the root cause in the launcher's report."""
    after = text.rpartition("Root Cause")[2]
    rank = _number(after, "rank      :") if "Root Cause" in text else None
    code = _number(after, "exitcode  :")
    return None if rank is None or code is None else (rank, code)


def _number(text: str, label: str) -> int | None:
    rest = text.partition(label)[2].split()
    return int(rest[0]) if rest and rest[0].lstrip("-").isdigit() else None


def _communicating(lines: Sequence[str]) -> bool:
    """Whether a stack, innermost call first, waits for other ranks."""
    return any(
        "distributed_c10d" in line or "in wait" in line or "in _wait" in line for line in lines[:6]
    )


def _innermost(lines: Sequence[str]) -> str:
    """Return the innermost call of this project in a stack."""
    calls = [line for line in lines if line.startswith("File") and str(ROOT) in line]
    if not calls:
        return "its start-up"
    file, _, function = calls[0].partition(", line ")
    return f"{Path(file.split(chr(34))[1]).name}, line {function}"


def _read(folder: Path, number: int, job: Job) -> RunResult:
    return RunResult(
        job.mesh,
        tuple(_read_rank(folder / f"job{number}.rank{rank}") for rank in range(job.processes)),
    )


def _read_rank(stem: Path) -> RankResult:
    record = json.loads(Path(f"{stem}.json").read_text())
    arrays = Path(f"{stem}.npz")
    dumped = dict(np.load(arrays)) if arrays.exists() else {}
    rank = record["rank"]
    return RankResult(
        rank,
        tuple(record["seconds"]),
        {(kind, group): size for kind, group, size in record["payload_bytes"]},
        record["fingerprint"],
        record.get("flops"),
        record.get("peak_live_bytes"),
        record.get("peak_allocated_bytes"),
        tuple(record.get("losses", ())),
        tuple(map(tuple, record.get("tokens", ()))),
        tuple(record.get("pass_seconds", ())),
        tuple(record.get("processor_seconds", ())),
        tuple(Span(rank, *span) for span in record["spans"]),
        dumped,
    )
