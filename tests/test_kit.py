"""The calibration kit: its plans, kernels, clock and record. It stands alone, as on a GPU host."""

from __future__ import annotations

import ast
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from backends import kit  # noqa: E402
from hwmodels.families import FAMILIES  # noqa: E402
from simcore.measurement import Measurement  # noqa: E402
from validation import importers  # noqa: E402

CPU = torch.device("cpu")
GPU_LIKE = kit.Machine("cuda", 132, 141e9, 2e13)
CPU_LIKE = kit.Machine("cpu", 2, 8e9, 2e9)


def case(family: str, implementation: str, dtype: str, **shape: Any) -> kit.Case:
    return kit.Case(family, implementation, dtype, shape)


# ---------------------------------------------------------------- plans


@given(st.integers(0, 8), st.integers(0, 8))
def test_any_first_part_of_a_plan_covers_all_of_it(exponent: int, part: int) -> None:
    rows = list(range(2**exponent))
    order: list[int] = kit.spread(rows)  # type: ignore[arg-type,assignment]
    assert sorted(order) == rows
    first = sorted(order[: 2 ** min(part, exponent)])
    gaps = [b - a for a, b in zip(first, [*first[1:], len(rows)], strict=True)]
    assert max(gaps) == len(rows) // len(first)


@given(st.integers(0, 300))
def test_a_plan_of_any_length_loses_no_case(count: int) -> None:
    rows = list(range(count))
    assert sorted(kit.spread(rows)) == rows  # type: ignore[arg-type,type-var]


@given(st.integers(1, 400))
def test_wave_probes_fill_the_units(units: int) -> None:
    def tiles(m: int, n: int) -> int:
        return math.ceil(m / kit.TILE) * math.ceil(n / kit.TILE)

    shapes = {(m, n) for m, n, _ in kit.wave_shapes(units)}
    whole = {(m, n) for m, n in shapes if m % kit.TILE == 0}
    for waves in (1, 2, 4):
        assert any(tiles(m, n) == waves * units for m, n in whole)
    for m, n in shapes - whole:  # a row more than whole waves begins another wave
        assert tiles(m - 1, n) % units == 0
        assert tiles(m, n) % units != 0 or tiles(m, n) == tiles(m - 1, n) + units


@pytest.mark.parametrize("machine", [GPU_LIKE, CPU_LIKE], ids=["gpu", "cpu"])
@pytest.mark.parametrize("name", kit.FAMILIES)
def test_a_plan_holds_distinct_cases_with_the_columns_of_their_family(
    name: str, machine: kit.Machine
) -> None:
    cases = list(kit.FAMILIES[name].cases(machine))
    assert bool(cases) == (machine.gpu or name != "host_copy")
    texts = {json.dumps(kit._name(each), sort_keys=True) for each in cases}
    assert len(texts) == len(cases)
    for each in cases:
        if each.family in FAMILIES:
            assert FAMILIES[each.family].columns.keys() <= each.shape.keys()


def test_the_plan_of_a_gpu_spans_formats_and_shapes() -> None:
    cases = list(kit.matmul_cases(GPU_LIKE))
    assert {each.dtype for each in cases} == {"bf16", "fp8", "fp16", "tf32", "fp32", "int8"}
    rows = {each.shape["m"] for each in cases if each.dtype == "bf16"}
    assert {1, 16, 256, 4096, 16384} <= rows
    assert {each.shape["op"] for each in kit.memory_cases(GPU_LIKE)} == set(kit.MOVED)


@given(
    st.integers(1, 300),
    st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.sampled_from([0.0, 0.5, 1.2, 3.0]),
)
def test_expert_rows_are_all_dealt(tokens: int, sizes: tuple[int, int], alpha: float) -> None:
    experts, top = sizes
    rows = kit.expert_rows(tokens, experts, top, alpha)
    assert len(rows) == experts
    assert sum(rows) == tokens * top
    assert max(rows) <= tokens
    assert rows == sorted(rows, reverse=True)
    if alpha == 0:
        assert max(rows) - min(rows) <= 1


# ---------------------------------------------------------------- kernels


def test_products_are_those_of_their_shape_and_format() -> None:
    for dtype in ("fp32", "bf16", "int8"):
        made = case("matmul", "torch", dtype, m=17, n=32, k=48)
        call = kit.build_matmul(made, CPU)
        assert call().shape == (17, 32)
    x, w = call.args  # type: ignore[attr-defined]
    assert torch.equal(call().long(), x.long() @ w.long())


@pytest.mark.parametrize("rows", [1, 9])
def test_attention_is_softmax_attention(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    draw = kit.values
    monkeypatch.setattr(kit, "values", lambda *a: made.append(draw(*a)) or made[-1])
    shape = {"batch": 2, "kv_len": 9, "heads": 4, "kv_heads": 2, "head_dim": 8}
    family = "attention_prefill" if rows > 1 else "attention_decode"
    found = kit.build_attention(case(family, "torch", "fp32", seq_len=rows, **shape), CPU)()
    q, k, v = made
    k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(8)
    if rows > 1:
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    assert torch.allclose(found, scores.softmax(-1) @ v, atol=1e-5)


def test_attention_backward_gives_every_gradient() -> None:
    shape = {"batch": 1, "seq_len": 8, "kv_len": 8, "heads": 4, "kv_heads": 2, "head_dim": 8}
    call = kit.build_attention(case("attention_backward", "torch", "fp32", **shape), CPU)
    with torch.no_grad():
        once, again = call(), call()
    assert [tuple(each.shape) for each in once] == [(1, 4, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8)]
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize(("name", "dtype"), [("torch-loop", "fp32"), ("torch-grouped", "bf16")])
@pytest.mark.parametrize("alpha", [0.0, 1.2])
def test_experts_give_what_one_token_after_the_other_gives(
    name: str, dtype: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    draw = kit.values
    monkeypatch.setattr(kit, "values", lambda *a: made.append(draw(*a) / 4) or made[-1])
    sizes = {"tokens": 12, "hidden": 16, "ffn": 32, "experts": 4, "experts_per_token": 2}
    found = kit.build_moe(case("moe", name, dtype, **sizes, alpha=alpha), CPU)()
    x, up, down, scores = (each.float() for each in made)
    wanted, row = torch.zeros(12, 16), 0
    for expert, count in enumerate(kit.expert_rows(12, 4, 2, alpha)):
        for _ in range(count):
            gate, value = (x[row % 12] @ up[expert].T).chunk(2)
            hidden = torch.nn.functional.silu(gate) * value
            wanted[row % 12] += scores[row, 0] * (hidden @ down[expert].T)
            row += 1
    assert torch.allclose(found.float(), wanted, atol=1e-5 if dtype == "fp32" else 0.1)


@pytest.mark.parametrize("op", kit.MOVED)
def test_memory_kernels_run_over_arrays_of_their_size(op: str) -> None:
    tensors = kit.MOVED[op][0]
    made = case("memory", "torch", "fp32", op=op, moved_bytes=tensors * 65536.0)
    found = kit.build_memory(made, CPU)()
    whole = op not in ("read", "cross_entropy", "adam")  # these give one number, or none
    assert not whole or found.numel() * found.itemsize == 65536


def test_launches_are_counted_in_calls() -> None:
    issue = next(iter(kit.launch_cases(CPU_LIKE)))
    call = kit.build_launch(issue, CPU)
    call()
    assert call.__closure__[1].cell_contents.item() == issue.calls == kit.CALLS  # type: ignore[attr-defined]


CUDA_ONLY = {"torch-cudnn", "flex"}


@pytest.mark.parametrize("name", [name for name in kit.FAMILIES if name != "host_copy"])
def test_the_kernels_of_a_gpu_plan_are_made_of_calls_that_torch_has(name: str) -> None:
    smallest: dict[tuple[str, str], kit.Case] = {}
    for each in kit.FAMILIES[name].cases(GPU_LIKE):
        sizes = [value for value in each.shape.values() if not isinstance(value, str)]
        kind = (each.implementation, each.dtype)
        kept = smallest.setdefault(kind, each)
        if sum(sizes) < sum(v for v in kept.shape.values() if not isinstance(v, str)):
            smallest[kind] = each
    for each in smallest.values():
        if each.implementation not in CUDA_ONLY and each.family != "graph_replay":
            kit.FAMILIES[name].build(each, CPU)()


# ---------------------------------------------------------------- clock


def test_a_sleep_takes_its_time() -> None:
    clock = kit.Clock(CPU)
    samples, _ = clock.samples(lambda: time.sleep(0.03), "cold")
    assert kit.REPEATS[0] <= len(samples) <= kit.REPEATS[1]
    assert all(sample >= 0.03 for sample in samples)


def gpu_clock(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> kit.Clock:
    """A clock that believes to be on a GPU, whose device notes what is queued."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 2.0  # torch's events count milliseconds

    clock = kit.Clock(CPU)
    clock.gpu, clock.hertz = True, 1e9
    clock.spin = lambda cycles: said.append("spin")
    clock.wiper = SimpleNamespace(add_=lambda _: said.append("wipe"))  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: said.append("wait"))
    return clock


@pytest.mark.parametrize("timing", ["cold", "warm"])
def test_device_times_lie_between_events_behind_a_spin(
    timing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    clock = gpu_clock(monkeypatch, said)
    samples, _ = clock.samples(lambda: said.append("call"), timing)
    assert samples == [0.002] * kit.REPEATS[1]
    one = [*(["wipe"] if timing == "cold" else []), "spin", "event", "call", "event"]
    assert said[-len(one) * len(samples) - 1 :] == one * len(samples) + ["wait"]


def test_host_times_wait_for_the_device_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = gpu_clock(monkeypatch, said)
    for timing, one in (("wall", ["wait", "call", "wait"]), ("issue", ["wait", "call"])):
        samples, _ = clock.samples(lambda: said.append("call"), timing)
        assert said[-len(one) * len(samples) :] == one * len(samples)


# ---------------------------------------------------------------- record and run


def record_at(folder: Path) -> kit.Record:
    return kit.Record(folder / "record.json", {"kind": "cpu", "device": "test"})


def saved(record: kit.Record) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(record.path.read_text())
    return found


def test_a_record_is_whole_at_every_moment(tmp_path: Path) -> None:
    record = record_at(tmp_path)
    record.add(kit.Case("launch", "issue", "fp32", {"elements": 1}, "issue", calls=4), [2.0, 4.0])
    record.skip(case("matmul", "torch", "bf16", m=1, n=1, k=1), "out of memory")
    record.save(complete=True)
    found = saved(record)
    assert (found["format"], found["version"], found["complete"]) == ("meshwise-kit", 1, True)
    assert found["measurements"][0]["samples_s"] == [0.5, 1.0]
    assert found["skipped"][0]["reason"] == "out of memory"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_write_that_fails_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "record.json"
    kit.write_atomically(target, "old")

    def full(self: Path, *args: Any, **options: Any) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        kit.write_atomically(target, "new")
    assert target.read_text() == "old"


def test_records_are_not_written_more_often_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(kit, "write_atomically", lambda path, text: written.append(text))
    record = record_at(tmp_path)
    for _ in range(50):
        record.skip(case("matmul", "torch", "bf16"), "no")
    assert len(written) == 1


def family_of(*calls: Callable[[], Any], name: str = "made") -> kit.Family:
    """A family whose cases do what is given."""
    cases = [case(name, str(number), "fp32") for number in range(len(calls))]
    return kit.Family(1.0, lambda _: cases, lambda made, _: calls[int(made.implementation)])


def fails(error: BaseException) -> Callable[[], Any]:
    def call() -> None:
        raise error

    return call


def nothing() -> None:
    """A kernel that does nothing."""


def test_a_case_that_fails_is_recorded_and_the_rest_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = (
        fails(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")),
        nothing,
        fails(NotImplementedError("no such kernel\nmore words")),
        nothing,
    )
    monkeypatch.setitem(kit.FAMILIES, "made", family_of(*calls))
    record = record_at(tmp_path)
    kit.run(CPU_LIKE, kit.Clock(CPU), record, ["made"], time.monotonic() + 60)
    assert sorted(row["implementation"] for row in record.measurements) == ["1", "3"]
    reasons = {row["implementation"]: row["reason"] for row in record.skipped}
    assert reasons == {"0": "out of memory", "2": "NotImplementedError: no such kernel"}


def test_without_time_all_is_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kit.FAMILIES, "made", family_of(nothing, nothing))
    record = record_at(tmp_path)
    kit.run(CPU_LIKE, kit.Clock(CPU), record, ["made"], time.monotonic() - 1)
    assert [row["reason"] for row in record.skipped] == ["out of time"] * 2


def test_a_family_takes_its_share_and_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def measure(made: kit.Case, family: kit.Family, clock: kit.Clock, record: kit.Record) -> None:
        now[0] += 1.0
        record.add(made, [1.0])

    clocks = {name: getattr(time, name) for name in ("time", "strftime", "gmtime")}
    monkeypatch.setattr(kit, "time", SimpleNamespace(monotonic=lambda: now[0], **clocks))
    monkeypatch.setattr(kit, "measure", measure)
    for name, count in (("slow", 100), ("quick", 1), ("last", 100)):
        monkeypatch.setitem(kit.FAMILIES, name, family_of(*[nothing] * count, name=name))
    record = record_at(tmp_path)
    names = ["slow", "quick", "last"]
    kit.run(CPU_LIKE, SimpleNamespace(gpu=False), record, names, 30.0)  # type: ignore[arg-type]
    count = Counter(row["family"] for row in record.measurements)
    # A third, and the case under way when it ends; what "quick" leaves over goes to "last".
    assert count == {"slow": 11, "quick": 1, "last": 19}
    assert len(record.skipped) == 201 - 31


def test_a_lost_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = kit.Clock(CPU)
    clock.gpu = True
    lost = fails(RuntimeError("CUDA error: an illegal memory access was encountered"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: lost())
    record = record_at(tmp_path)
    with pytest.raises(kit.DeviceLostError, match="illegal memory access"):
        kit.measure(case("made", "0", "fp32"), family_of(lost), clock, record)
    assert record.skipped[0]["reason"].startswith("RuntimeError: CUDA error")


@pytest.fixture
def _signals() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_signals")
def test_an_interrupted_run_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = (nothing, lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setitem(kit.FAMILIES, "launch", family_of(*calls))
    target = tmp_path / "r.json"
    assert kit.main(["--out", str(target), "--device", "cpu", "--only", "launch"]) == 130
    found = json.loads(target.read_text())
    assert not found["complete"]
    assert len(found["measurements"]) == 1
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "abacus"], "cannot measure 'abacus'"),
        (["--device", "meta"], "only cuda and cpu"),
        (["--out", "/nowhere/r.json"], "no folder /nowhere"),
        (["--only", "poetry"], "invalid choice"),
    ],
)
def test_bad_options_are_said_at_once(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leave:
        kit.main(arguments)
    assert leave.value.code == 2
    assert words in capsys.readouterr().err


# ---------------------------------------------------------------- standing alone


def test_it_needs_the_standard_library_numpy_and_torch_alone() -> None:
    tree = ast.parse(Path(kit.__file__).read_text())
    names = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert names - sys.stdlib_module_names == {"numpy", "torch"}


def run_copy(folder: Path, *arguments: str) -> list[Measurement]:
    """Run a copy of the file, away from the project, and return what the importer reads."""
    copy = folder / "kit.py"
    shutil.copy(kit.__file__, copy)
    command = [sys.executable, "-I", str(copy), "--out", "r.json", "--device", "cpu", *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "kit: matmul:" in done.stderr
    found = importers.read(folder / "r.json")
    assert all(sample > 0 for each in found for sample in each.samples_s)
    assert {each.fingerprint["chip"] for each in found} == {"this-cpu"}
    return found


def test_a_copy_of_the_file_measures_and_its_record_is_imported(tmp_path: Path) -> None:
    found = run_copy(tmp_path, "--budget-s", "2", "--only", "launch", "matmul")
    count = Counter(each.subject for each in found)
    assert count.keys() == {"launch", "matmul"}
    samples = importers.samples(found)
    assert {each.family for each in samples} == {"matmul"}
    assert sum(len(each) for each in samples) == count["matmul"]


@pytest.mark.distributed
def test_collectives_that_fail_are_recorded_too(tmp_path: Path) -> None:
    kit.collective_worker(0, 1, str(tmp_path), 20.0, CPU_LIKE)  # alone: no neighbour to send to
    found = json.loads((tmp_path / "found.json").read_text())
    measured = {row["shape"]["op"] for row in found["measurements"]}
    assert measured == set(kit.COLLECTIVE_OPS) - {"send_recv"}
    assert {row["shape"]["op"] for row in found["skipped"]} == {"send_recv"}


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_kit_in_a_small_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    found = run_copy(tmp_path, "--budget-s", "20")
    assert time.monotonic() - begun < 60
    subjects = {each.subject for each in found}
    assert {name for name in kit.FAMILIES if name != "host_copy"} | {"collective"} == subjects
