"""The worker and its launcher: what a run leaves, where it runs, and how it ends when it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from simcore.accounting import step_totals
from simcore.errors import RunError
from simcore.liveness import activation_peaks, residents
from simcore.lower import lower_pass, lower_training
from simcore.models import ModelSpec
from simcore.program import Program
from simcore.program_json import program_from_json, program_to_json
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

pytest.importorskip("torch")

from backends.launch import Job, RunOptions, run_many, run_program
from backends.worker import RUN

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelSpec(
    "small", 4, 32, 4, 2, 8, 48, 61, weights_dtype="fp32", compute_dtype="fp32", kv_dtype="fp32"
)
TRAIN = TrainStep(global_batch=4, seq_len=16)


def program(**parallel: object) -> Program:
    return lower_training(MODEL, ParallelStrategy(**parallel), TRAIN)  # type: ignore[arg-type]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have runs keep their files in a folder of this test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def nothing_left(scratch: Path) -> bool:
    """Whether no process of a run and no file of it is left."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(scratch) in line:
            return False
    return not list(scratch.iterdir())


# ---------------------------------------------------------------- plain data


@pytest.mark.parametrize(
    "parallel", [{}, {"dp_shard": 2, "tp": 2}, {"pp": 2, "tp": 2, "sequence_parallel": True}]
)
def test_programs_survive_json(parallel: dict[str, object]) -> None:
    for found in (program(**parallel), lower_pass(MODEL, ParallelStrategy(**parallel), 4, 1, 16)):  # type: ignore[arg-type]
        text = json.dumps(program_to_json(found), allow_nan=False)
        assert program_from_json(json.loads(text)) == found


def test_a_lattice_is_no_program_to_run() -> None:
    lattice = lower_pass(MODEL, ParallelStrategy(), 2, np.array([1, 2]), 4)
    with pytest.raises(TypeError, match="lattice"):
        program_to_json(lattice)


def test_the_launcher_offers_every_option_of_the_worker() -> None:
    options = asdict(RunOptions())
    assert list(options) == list(RUN)
    assert options | {"dump": []} == RUN


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("exit", r"^rank 1 of 2 died \(exit code 3\): this rank leaves on purpose$"),
        ("raise", r"^rank 1 of 2 died \(exit code 1\): this rank fails on purpose\.$"),
        ("hang", r"^job 1 of 1 was not done within its 2 s: rank 1 was in worker.py, .*_fault;"),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_run(kind: str, sentence: str, scratch: Path) -> None:
    start = time.monotonic()
    limit = 2 if kind == "hang" else 50  # what dies is seen at once, whatever the limit
    options = RunOptions(repeats=1, warmup=0, timeout_s=limit, fault={"rank": 1, "kind": kind})
    with pytest.raises(RunError, match=sentence):
        run_program(program(dp_replicate=2), options)
    assert time.monotonic() - start < 45
    assert nothing_left(scratch)


def test_wrong_number_of_ranks_is_one_sentence() -> None:
    with pytest.raises(RunError, match="cannot share a launch"):
        run_many([Job(program()), Job(program(tp=2))])


# ---------------------------------------------------------------- results


def test_spans_and_seconds_of_two_ranks(scratch: Path) -> None:
    options = RunOptions(repeats=3, warmup=1, record_spans=True)
    seen: list[int] = []
    dp, pp = run_many(
        [Job(program(dp_replicate=2), options), Job(program(pp=2), options)], seen.append
    )
    assert seen == [1, 2]
    assert nothing_left(scratch)
    for result in (dp, pp):
        assert len(result.seconds) == 3
        assert 0 < min(result.seconds) <= result.step_s <= max(result.seconds)
        found = result.timeline()
        assert all(0 <= s.start_s <= s.end_s for s in found.spans)
        assert max(s.end_s for s in found.spans) < 3 * max(result.seconds)
        assert set(found.times) == {0, 1}
        assert result.ranks[0].fingerprint["threads"] == 1
    assert {s.name for s in pp.timeline().spans if s.stream != "compute"} == {"send", "recv"}
    assert {s.name for s in dp.timeline().spans if s.stream != "compute"} == {"all_reduce"}


def test_one_rank_runs_alone_at_its_real_shapes() -> None:
    """No peers: local traffic in place of collectives, the same bytes, FLOPs and memory."""
    found = program(tp=2, pp=2)
    options = RunOptions(repeats=2, warmup=1, track_memory=True, count_flops=True)
    jobs = [Job(found, replace(options, alone_rank=rank)) for rank in range(4)]
    for rank, result in enumerate(run_many(jobs)):
        (only,) = result.ranks
        assert only.rank == rank
        totals = step_totals(found, rank // 2)
        assert result.step_s > 0
        assert only.payload_bytes == dict(totals.payload_bytes)
        assert only.flops == totals.flops
        peak = activation_peaks(found, rank // 2)[0] + residents(found, rank // 2).total
        assert only.peak_live_bytes == peak


def test_copies_of_two_folders_are_enough(tmp_path: Path) -> None:
    """simcore and backends with numpy and torch, and nothing else of the project or its needs."""
    for name in ("simcore", "backends"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    job = {"program": program_to_json(program()), "run": {"repeats": 1, "warmup": 0}}
    (tmp_path / "program.json").write_text(json.dumps(job))
    blocked = (
        "scipy",
        "pydantic",
        "simpy",
        "pyomo",
        "highspy",
        "typer",
        "rich",
        "matplotlib",
        "joblib",
        "pandas",
        "hwmodels",
        "solvers",
        "validation",
        "meshwise",
    )
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"  # None: importing it raises
        "sys.argv = ['worker', 'program.json', '--out', 'out']\n"
        "runpy.run_module('backends.worker', run_name='__main__')\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "job0.rank0.json").read_text())
    assert record["median_s"] > 0
    assert record["fingerprint"]["torch"]
