"""One rank of a real run: `python -m backends.worker jobs.json --out DIR`.

Runs under torch's launcher (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) or alone. Needs the
standard library, numpy, torch 2.6 or newer, and the folders ``simcore`` and ``backends``.

The file holds one job, or ``{"jobs": [...]}``, each with a ``run`` table (see `RUN`) and
``program``, ``mixed`` (a step over unequal lengths), or ``generation`` with the programs
``prefill`` and ``decode``, a ``method`` of `simcore.decode` and a ``workload``. Every rank writes
``DIR/job<j>.rank<r>.json`` when a job is done, and ``job<j>.rank<r>.npz`` with the gradients or
logits where they were asked for.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import faulthandler
import gc
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from backends.data import pass_data, piece_data, prompts, training_data
from backends.interpreter import Interpreter
from backends.torch_ops import TORCH_DTYPES
from backends.transport import Distributed, Local, Transport, group_names
from backends.watchers import Gradients, LiveBytes, Logits, counted_flops
from simcore.decode import DECODING, Outcome
from simcore.errors import RunError, unknown
from simcore.mixed import MixedProgram, Variant, lane_of
from simcore.program import Program
from simcore.program_json import mixed_from_json, program_from_json
from simcore.workloads import Generation

RUN: dict[str, Any] = {
    "seed": 0,
    "repeats": 5,
    "warmup": 2,
    "threads": 1,
    "device": "cpu",  # or cuda
    "backend": "gloo",  # or nccl: one rank per device
    "alone_rank": None,  # run this rank of a larger mesh alone, traffic replaced by local copies
    "record_spans": False,
    "dtype": None,  # overrides every float dtype: fp64 for exact comparisons
    "fused": True,  # torch's fused attention
    "dump": [],  # losses, tokens, and of the first warm-up: gradients or logits
    "track_memory": False,
    "count_flops": False,
    "timeout_s": 300.0,
    "delay_s": {},  # rank (as text) -> seconds that it is held up in every training step
    "fault": None,  # for tests: {"rank": r, "kind": "exit" | "hang" | "raise"}
}


class Runner(Protocol):
    """A workload that can be run again and again."""

    interpreters: list[Interpreter]

    def once(self) -> dict[str, Any]:
        """Run it once; return what it found: losses, tokens, seconds of its passes."""


@dataclass(slots=True)
class Training:
    """One training step."""

    interpreters: list[Interpreter]
    data: Mapping[tuple[str, int], Tensor]
    delay_s: float = 0.0  # of every step

    @classmethod
    def of(cls, interpreter: Interpreter, delay_s: float) -> Training:
        """Prepare a rank for its steps."""
        interpreter.prepare()
        data = training_data(
            interpreter.program, interpreter.rank, interpreter.seed, interpreter.device
        )
        return cls([interpreter], data, delay_s)

    def once(self) -> dict[str, Any]:
        """Run one step; the loss is this replica's share of the mean."""
        runner = self.interpreters[0]
        time.sleep(self.delay_s)
        runner.run_step(self.data)
        losses = runner.results.get("loss", [])
        updates = runner.program.info.get("updates", 1)  # each with the mean over its own batch
        return {"loss": torch.stack(losses).double().sum() / updates if losses else None}


@dataclass(slots=True)
class MixedTraining:
    """One training step over sequences of unequal length: an interpreter per kind of piece."""

    interpreters: list[Interpreter]
    by_variant: Mapping[Variant, Interpreter]
    mixed: MixedProgram
    data: Mapping[tuple[str, int], Tensor]

    @classmethod
    def of(cls, interpreters: list[Interpreter], mixed: MixedProgram) -> MixedTraining:
        """Prepare a rank: its programs share weights, gradients and states."""
        by_variant = dict(zip(mixed.variants, interpreters, strict=True))
        some = interpreters[0]
        data: dict[tuple[str, int], Tensor] = {}
        for number in mixed.lanes[lane_of(mixed.mesh, some.rank)]:
            data |= piece_data(mixed, number, some.rank, some.seed, some.device)
        for interpreter in interpreters:
            interpreter.tensors = some.tensors
            interpreter.prepare()
        return cls(interpreters, by_variant, mixed, data)

    def once(self) -> dict[str, Any]:
        """Run one step; the loss is this rank's share of the mean over all real tokens."""
        losses: list[Tensor] = []
        for interpreter in self.interpreters:
            interpreter.begin()
        self.interpreters[0].give(self.data)
        for variant, action in self.mixed.actions(self.interpreters[0].rank):
            self.by_variant[variant].run_action(action)
        for interpreter in self.interpreters:
            interpreter.drain()
            losses += interpreter.results.get("loss", [])
        return {"loss": torch.stack(losses).double().sum() if losses else None}


@dataclass(slots=True)
class Generating:
    """A prefill and its decode passes, driven by a decode plan."""

    interpreters: list[Interpreter]
    method: str
    workload: Generation
    prompt: Tensor

    @classmethod
    def of(cls, prefill: Interpreter, decode: Interpreter, job: Mapping[str, Any]) -> Generating:
        """Prepare a rank: both programs share weights and caches."""
        workload = Generation(**job["workload"])
        if job["method"] not in DECODING:
            raise unknown("decoding method", job["method"], DECODING)
        rows = workload.input_tokens + workload.output_tokens
        prefill.prepare(rows)
        decode.tensors = prefill.tensors
        prompt = prompts(
            prefill.program, prefill.rank, prefill.seed, workload.input_tokens, prefill.device
        )
        return cls([prefill, decode], job["method"], workload, prompt)

    def once(self) -> dict[str, Any]:
        """Run one generation; seconds run from pass to pass."""
        clock = self.interpreters[0].clock
        plan = DECODING[self.method](self.workload)
        wanted, tokens = next(plan), self.prompt
        found: dict[str, Any] = {"tokens": [], "pass_s": []}
        before = time.perf_counter()
        while True:
            runner = self._runner(wanted.new_rows)
            runner.run_step(
                pass_data(tokens, wanted.cached_rows),
                cached=wanted.cached_rows,
                rows=wanted.cached_rows + wanted.new_rows,
            )
            if runner.results["next"]:
                tokens = runner.results["next"][0][:, None]
                found["tokens"].append(tokens[:, 0])
            else:
                tokens = self.prompt[:, :1]  # a middle stage embeds nothing
            clock.settle()
            now = time.perf_counter()
            found["pass_s"].append(now - before)
            before = now
            try:
                wanted = plan.send(Outcome(1.0))
            except StopIteration:
                return found

    def _runner(self, new_rows: int) -> Interpreter:
        for runner in self.interpreters:
            if runner.program.info["new_rows"] == new_rows:
                return runner
        raise RunError(f"the plan asks for a pass of {new_rows} rows, which no program lowers")


@dataclass(slots=True)
class Rank:
    """This process among the others of the run."""

    number: int
    world: int
    out: Path
    spent: dict[str, Any] = field(default_factory=dict)

    def join(self, run: Mapping[str, Any]) -> None:
        """Enter the process group, once."""
        if self.world > 1 and not dist.is_initialized():
            limit = datetime.timedelta(seconds=float(run["timeout_s"]) + 60)
            dist.init_process_group(run["backend"], timeout=limit)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world > 1:
            dist.barrier()

    def write(self, job: int, record: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        """Write a job's result, whole or not at all."""
        stem = self.out / f"job{job}.rank{self.number}"
        if arrays:
            np.savez(f"{stem}.npz", **arrays)
        part = Path(f"{stem}.part")
        part.write_text(json.dumps(record))
        part.replace(f"{stem}.json")


def device_of(run: Mapping[str, Any]) -> torch.device:
    """Return the device of this rank: with several GPUs, the one of its local number."""
    if run["device"] == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RunError('device = "cuda" but torch finds no GPU here: run with device = "cpu".')
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def transport_of(
    rank: Rank,
    programs: Sequence[Program],
    run: Mapping[str, Any],
    beside: Transport | None = None,
) -> Transport:
    """Return how this rank of the programs' mesh talks to the others, ``beside`` another mesh."""
    program = programs[0]
    if run["alone_rank"] is not None:
        return Local(program.mesh, int(run["alone_rank"]), beside)
    if program.world != rank.world:
        raise RunError(
            f"the program is for {program.world} ranks but {rank.world} were started: start as "
            "many, or run one alone with alone_rank."
        )
    if rank.world == 1:
        return Local(program.mesh, 0, beside)
    assert not isinstance(beside, Local)
    return Distributed(program.mesh, rank.number, group_names(programs), beside)


def _transports(
    programs: Sequence[Program], rank: Rank, run: Mapping[str, Any], *, apart: bool
) -> list[Transport]:
    """Return each program's transport: one for all, unless they are of meshes ``apart``."""
    if not apart:
        return [transport_of(rank, programs, run)] * len(programs)
    found: list[Transport] = []
    for program in programs:
        found.append(transport_of(rank, [program], run, found[0] if found else None))
    return found


def make_runner(
    job: Mapping[str, Any], run: Mapping[str, Any], rank: Rank
) -> tuple[Runner, Transport]:
    """Return the workload of a job, ready to run."""
    device = device_of(run)
    table = job.get("generation")
    mixed = mixed_from_json(job["mixed"]) if "mixed" in job else None
    if mixed is not None:
        programs = list(mixed.variants.values())
    else:
        texts = [job["program"]] if table is None else [table["prefill"], table["decode"]]
        programs = [program_from_json(text) for text in texts]
    transports = _transports(programs, rank, run, apart=mixed is not None)
    transport = transports[0]
    interpreters = [
        Interpreter(
            program,
            way.rank,
            way,
            device,
            run["seed"],
            run["fused"],
            local_weights=run["alone_rank"] is not None,
            record=run["record_spans"],
            dtype=TORCH_DTYPES[run["dtype"]] if run["dtype"] else None,
        )
        for program, way in zip(programs, transports, strict=True)
    ]
    if mixed is not None:
        return MixedTraining.of(interpreters, mixed), transport
    if table is None:
        delay_s = float(run["delay_s"].get(str(transport.rank), 0.0))
        return Training.of(interpreters[0], delay_s), transport
    return Generating.of(interpreters[0], interpreters[1], table), transport


def _plain_spans(runner: Runner, origin: Any) -> list[list[Any]]:
    found: list[list[Any]] = []
    for interpreter in runner.interpreters:
        clock = interpreter.clock
        found += [
            [
                s.stream,
                s.name,
                clock.seconds(origin, s.start),
                clock.seconds(origin, s.end),
                s.action,
            ]
            for s in interpreter.spans
        ]
    return sorted(found, key=lambda span: span[2])


def _timed(runner: Runner, rank: Rank, run: Mapping[str, Any]) -> dict[str, Any]:
    """Run the timed repeats; the spans are those of the median one."""
    clock = runner.interpreters[0].clock
    seconds: list[float] = []
    busy: list[float] = []
    results: list[dict[str, Any]] = []
    spans: list[list[list[Any]]] = []
    for _ in range(int(run["repeats"])):
        for interpreter in runner.interpreters:
            interpreter.spans.clear()
        rank.barrier()
        clock.settle()
        origin, start, before = clock.mark(), time.perf_counter(), time.thread_time()
        results.append(runner.once())
        clock.settle()
        seconds.append(time.perf_counter() - start)
        busy.append(time.thread_time() - before)
        if run["record_spans"]:
            spans.append(_plain_spans(runner, origin))
    return {
        "seconds": seconds,
        "processor_seconds": busy,
        "median_s": statistics.median(seconds) if seconds else None,
        "spans": spans[_middle(seconds, rank, runner)] if spans else [],
        "results": results,
    }


def _middle(seconds: Sequence[float], rank: Rank, runner: Runner) -> int:
    """Return the median repeat: the same on every rank, judged by the slowest."""
    slowest = torch.tensor(seconds, device=runner.interpreters[0].device)
    if rank.world > 1:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return int(slowest.argsort()[len(seconds) // 2])


def measure(
    job: Mapping[str, Any], run: Mapping[str, Any], rank: Rank
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a job; return its record and its arrays."""
    torch.set_num_threads(int(run["threads"]))
    rank.join(run)
    _fault(run, rank)
    if "bench" in job:
        from backends import microbench

        found = microbench.measure(rank.number, rank.world, **job["bench"])
        return {"fingerprint": fingerprint(run), **found}, {}
    runner, transport = make_runner(job, run, rank)
    record: dict[str, Any] = {"rank": transport.rank, "fingerprint": fingerprint(run)}
    cuda = run["device"] == "cuda"
    results, arrays = _warmed_up(runner, run)
    transport.recorded.clear()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    timed = _timed(runner, rank, run)
    results += timed.pop("results")
    record |= timed
    per_step = max(1, len(timed["seconds"]))
    record["payload_bytes"] = [
        [kind, group, size / per_step] for (kind, group), size in sorted(transport.recorded.items())
    ]
    if cuda:
        record["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
    record |= _extra_steps(runner, rank, run) | _results(results, run)
    transport.close()
    return record, arrays


def _warmed_up(
    runner: Runner, run: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the warm-up; return its results, and what the first one was asked to dump."""
    dumps: dict[str, Gradients | Logits] = {"gradients": Gradients(), "logits": Logits()}
    dumped = next((w for name, w in dumps.items() if name in run["dump"]), None)
    results: list[dict[str, Any]] = []
    for number in range(int(run["warmup"])):
        _watch(runner, dumped if number == 0 else None)
        results.append(runner.once())
    _watch(runner, None)
    return results, dumped.found if dumped is not None else {}


def _watch(runner: Runner, watcher: Any) -> None:
    for interpreter in runner.interpreters:
        interpreter.watcher = watcher


def _extra_steps(runner: Runner, rank: Rank, run: Mapping[str, Any]) -> dict[str, Any]:
    """Run an untimed step that counts live bytes, FLOPs, or both."""
    record: dict[str, Any] = {}
    live = LiveBytes() if run["track_memory"] else None
    _watch(runner, live)
    if run["count_flops"]:
        with counted_flops(runner.interpreters) as counter:
            runner.once()
        record["flops"] = counter.get_total_flops()
    elif live is not None:
        runner.once()
    if live is not None:
        record["peak_live_bytes"] = live.peak
    _watch(runner, None)
    rank.barrier()
    return record


def _results(results: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return losses of every step, tokens of the first, and seconds per pass."""
    record: dict[str, Any] = {}
    losses = [r["loss"] for r in results if r.get("loss") is not None]
    if losses and "losses" in run["dump"]:
        record["losses"] = [float(loss) for loss in losses]
    if results and results[0].get("tokens") and "tokens" in run["dump"]:
        record["tokens"] = torch.stack(results[0]["tokens"], 1).tolist()
    timed = [r["pass_s"] for r in results[int(run["warmup"]) :] if "pass_s" in r]
    if timed:
        record["pass_seconds"] = [statistics.median(each) for each in zip(*timed, strict=True)]
    return record


def fingerprint(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what this rank ran on."""
    on_gpu = run["device"] == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _fault(run: Mapping[str, Any], rank: Rank) -> None:
    """Fail on purpose, so that tests can see what the launcher makes of it."""
    fault = run["fault"]
    if not fault or fault["rank"] != rank.number:
        return
    if fault["kind"] == "exit":
        print("this rank leaves on purpose", file=sys.stderr, flush=True)
        os._exit(3)
    if fault["kind"] == "raise":
        raise RunError("this rank fails on purpose.")
    time.sleep(1e6)


def _die_with_launcher() -> None:
    """Ask Linux to kill this process when its parent dies, so that none is left behind."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (OSError, AttributeError):
        return


def _settle_in(rank: Rank) -> None:
    """Let the launcher find this process, its last words and, on request, where it is."""
    _die_with_launcher()
    errors = (rank.out / f"rank{rank.number}.stderr").open("a")
    os.dup2(errors.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=errors, all_threads=False)
    (rank.out / f"rank{rank.number}.pid").write_text(str(os.getpid()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the jobs of a file; return the exit code."""
    parser = argparse.ArgumentParser(prog="backends.worker", description="Run programs on a rank.")
    parser.add_argument("jobs", type=Path, help="JSON file with one job or a list of jobs")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    parser.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    number, world = (int(os.environ.get(*v)) for v in (("RANK", "0"), ("WORLD_SIZE", "1")))
    rank = Rank(number, world, options.out)
    if options.launched:
        _settle_in(rank)
    data = json.loads(options.jobs.read_text())
    gc.disable()  # a collection inside a step would be timed with it
    gc.freeze()
    try:
        for number, job in enumerate(data.get("jobs", [data])):
            gc.collect()
            rank.write(number, *measure(job, RUN | job.get("run", {}), rank))
    except RunError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
