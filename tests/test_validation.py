"""Grids, comparisons and their figures, against runs that the simulator stands in for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from comparisons import GRID, PROFILE, SLOWER, comparison, fake_run_many, write_grid

from simcore.errors import InputError
from simcore.measurement import Measurement
from simcore.ops import COMPUTE, Op
from simcore.timeline import Span, met, timeline
from validation.compare import (
    Compared,
    Comparison,
    baseline_seconds,
    bound_seconds,
    limited_by,
    lower_case,
    ordered_pairs,
    percentile,
    rounds_of,
    validate_grid,
)
from validation.grid import read_grid

__all__ = ["comparison"]  # a fixture
ROOT = Path(__file__).resolve().parents[1]
EMPTY = timeline((), 1.0)


def case(name: str, predicted: float, measured: float, group: str = "g") -> Compared:
    return Compared(
        name,
        "m",
        group,
        "dp 2",
        "step_s",
        predicted,
        measured / 2,
        Measurement(name, {}, (measured,)),
        {"compute": 1.0},
        EMPTY,
        EMPTY,
    )


# ---------------------------------------------------------------- measurements


def test_a_measurement_is_the_median_and_its_spread_the_middle_half() -> None:
    found = Measurement("op", {"n": 4}, (1.0, 9.0, 2.0, 3.0, 4.0), source="test")
    assert found.median_s == 3.0
    assert found.quietest_s == 1.0
    assert found.spread == pytest.approx((6.5 - 1.5) / 3.0)
    assert Measurement("op", {}, (1.0, 2.0)).spread == pytest.approx(1 / 1.5)
    assert json.loads(json.dumps(found.to_dict()))["samples_s"] == [1.0, 9.0, 2.0, 3.0, 4.0]


# ---------------------------------------------------------------- grids


def test_a_case_is_laid_over_the_defaults(tmp_path: Path) -> None:
    text = GRID + "[case.run]\nrepeats = 9\n"
    grid = read_grid(write_grid(tmp_path, text))
    first, last = grid.cases[0], grid.cases[-1]
    assert grid.title == "Made-up"
    assert (first.model, first.group) == ("tiny", "tiny, 4 x 32 tokens")
    assert (first.scenario.run.repeats, last.scenario.run.repeats) == (4, 9)
    assert last.scenario.run.warmup == first.scenario.run.warmup == 1
    assert last.group == "tiny, 2 x (8 + 3) tokens"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"tiny tp <b>"', '"tiny dp"', "two cases are called 'tiny dp'"),
        ('model = "tiny"', 'model = "tinny"', "did you mean 'tiny'"),
        ("[defaults.run]", "[defaults.runs]", "did you mean 'run'"),
        ("hidden = 64", "hiden = 64", "did you mean hidden"),
        ("dp_replicate = 2", "dp_replicate = 4", "tiny dp"),
        ("[[case]]", "[[cases]]", "did you mean 'case'"),
        ("parallel = { tp = 2 }", "", "give [parallel]"),
        ('name = "tiny pp"', "", "needs a name"),
        ("title =", "title", "not a TOML file"),
        ("vocab = 128", "vocab = 1979-05-27", "must be text, numbers, lists or tables"),
    ],
)
def test_a_wrong_grid_is_one_sentence(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GRID
    with pytest.raises(InputError) as error:
        read_grid(write_grid(tmp_path, GRID.replace(old, new)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_grid_is_a_file_with_cases(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the grid"):
        read_grid(tmp_path / "none.toml")
    with pytest.raises(InputError, match="give 1 to 500"):
        read_grid(write_grid(tmp_path, "title = 'empty'"))


def test_a_grid_runs_on_this_machine_only(tmp_path: Path) -> None:
    text = GRID.replace('gpu = "this-cpu"', 'gpu = "h100-sxm-80gb"')
    with pytest.raises(InputError, match="this-cpu"):
        validate_grid(write_grid(tmp_path, text), PROFILE)


def test_the_example_grid_spans_strategies_sizes_and_bounds() -> None:
    grid = read_grid(ROOT / "examples" / "cpu_grid.toml")
    strategies = [case.scenario.strategy() for case in grid.cases]
    trained = [
        s
        for s, c in zip(strategies, grid.cases, strict=True)
        if s and c.scenario.workload.kind == "train"
    ]
    assert len(grid.cases) >= 24
    assert all(s is not None and s.world == 2 for s in strategies)
    assert {s.zero for s in trained} == {0, 1, 2, 3}
    assert {s.schedule for s in trained if s.pp > 1} == {"gpipe", "1f1b"}
    assert {s.sequence_parallel for s in trained if s.tp > 1} == {True, False}
    assert len({case.model for case in grid.cases}) >= 4
    batches = {
        c.scenario.workload.batch for c in grid.cases if c.scenario.workload.kind == "generate"
    }
    assert {1, 4, 16, 32} <= batches


def test_the_grid_of_training_strategies_spans_ranks_and_kinds() -> None:
    grid = read_grid(ROOT / "examples" / "training_grid.toml")
    found = [strategy for case in grid.cases if (strategy := case.scenario.strategy())]
    assert len(found) == len(grid.cases) >= 40
    assert {s.world for s in found} == {1, 2, 4}
    assert {s.cp_kind for s in found if s.cp > 1} >= {"ring", "token_ring", "ulysses"}
    assert len({s.schedule for s in found if s.pp > 1}) >= 8
    assert {s.ep for s in found} == {1, 2}
    assert {s.zero for s in found if s.dp > 1} == {0, 1, 2, 3}
    assert sum(len([a for a in (s.dp, s.tp, s.pp, s.cp) if a > 1]) > 1 for s in found) >= 8


# ---------------------------------------------------------------- comparison


def test_a_slower_machine_shows_as_one_error_everywhere(comparison: Comparison) -> None:
    assert [c.metric for c in comparison.cases] == ["step_s"] * 3 + ["seconds"]
    for each in comparison.cases:
        assert each.error == pytest.approx(1 / SLOWER - 1, abs=0.03)
        assert len(each.measurement.samples_s) == 4
        assert each.predicted_s >= 0.9 * each.baseline_s
    found = comparison.summary()
    assert found["median_abs_error"] == pytest.approx(1 - 1 / SLOWER, abs=0.03)
    assert found["ordered_right_fraction"] in (None, 1.0)
    assert sum(found["bounds"].values()) == found["cases"] == 4
    assert found["baseline_median_abs_error"] > found["median_abs_error"]


def test_a_comparison_is_plain_json(comparison: Comparison) -> None:
    table = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    rows = table["metrics"]["rows"]
    assert {"predicted_step_s", "measured_step_s", "error"} <= rows[0].keys()
    assert {"predicted_seconds", "measured_seconds", "error"} <= rows[3].keys()
    assert table["fingerprint"] == {"device": "simulated"}
    assert table["profile"]["date"] == "2026-01-01"
    assert all(sentence.endswith(".") for sentence in table["assumptions"])


def test_a_case_has_both_timelines_of_every_rank(comparison: Comparison) -> None:
    for each in comparison.cases:
        assert each.predicted.step_s == pytest.approx(each.predicted_s, rel=0.02)
        assert each.measured.step_s == pytest.approx(each.measured_s)
        for line in (each.predicted, each.measured):
            assert {span.rank for span in line.spans} == {0, 1}
            assert max(span.end_s for span in line.spans) <= line.step_s * 1.001


def test_rounds_of_all_cases_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("validation.compare.run_many", fake_run_many)
    heard: list[str] = []
    validate_grid(write_grid(tmp_path), PROFILE, heard.append)
    names = [line.partition(": ")[2] for line in heard]
    assert names == ["tiny dp", "tiny tp <b>", "tiny pp", "tiny generation"] * 4
    assert heard[-1].startswith("measured 16 of 16")


def test_rounds_make_at_least_the_repeats() -> None:
    assert [rounds_of(n) for n in (1, 4, 5, 6, 11)] == [(1, 1), (4, 1), (5, 1), (5, 2), (5, 3)]


def test_pairs_are_counted_within_a_group_and_beyond_ties() -> None:
    cases = [
        case("a", 1.0, 1.0),
        case("b", 1.3, 1.2),
        case("c", 1.1, 1.05),
        case("d", 9.0, 5.0),
        case("e", 0.1, 50.0, group="other"),
    ]
    assert ordered_pairs(cases) == (5, 5)  # a-c is a tie, and e stands alone
    assert ordered_pairs([case("a", 2.0, 1.0), case("b", 1.0, 2.0)]) == (0, 1)


def test_the_summary_states_the_worst() -> None:
    cases = tuple(case(str(n), 1.0 + n / 10, 1.0) for n in range(10))
    found = Comparison("t", cases, PROFILE).summary()
    assert found["median_abs_error"] == pytest.approx(0.45)
    assert found["p90_abs_error"] == pytest.approx(0.8)
    assert (found["max_abs_error"], found["worst_case"]) == (pytest.approx(0.9), "9")
    assert found["ordered_right_fraction"] is None
    assert found["baseline_median_abs_error"] == pytest.approx(0.5)
    assert (found["median_spread"], found["quietest_median_abs_error"]) == (
        0.0,
        pytest.approx(0.45),
    )
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


# ---------------------------------------------------------------- bounds and baseline


def product(rows: int) -> Op:
    dims = {"m": rows, "n": 512, "k": 512}
    return Op("matmul", dims, "fp32", ("x", "w"), ("y",), attrs={"layout": "nt"})


def test_a_product_is_bound_by_memory_until_it_has_rows_enough() -> None:
    assert limited_by(product(1), PROFILE.peaks) == "memory"
    assert limited_by(product(512), PROFILE.peaks) == "compute"
    add = Op("add", {"t": 9, "n": 9}, "fp32", ("a", "b"), ("c",))
    assert limited_by(add, PROFILE.peaks) == "memory"
    reduce = Op("all_reduce", {"n": 9}, "fp32", ("a",), ("a",), "dp", "dp_replicate")
    assert limited_by(reduce, PROFILE.peaks) == "communication"


def test_bounds_add_up_to_no_more_than_the_serial_time(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path))
    for each in grid.cases:
        lowered = lower_case(each.scenario)
        spent = bound_seconds(lowered, PROFILE)
        assert set(spent) == {"compute", "memory", "communication"}
        assert spent["communication"] > 0
        assert 0 < baseline_seconds(lowered, PROFILE) < 10 * sum(spent.values())


def test_the_baseline_is_the_dense_products_over_the_peak(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path))
    lowered = lower_case(grid.cases[0].scenario)
    tokens, hidden = 4 * 32 / 2, 64
    weights = 2 * (4 * hidden * hidden + 3 * hidden * 128) + 128 * hidden
    attention = 2 * (4 + 10) * tokens * 32 * hidden  # forward 2 products, backward 5
    flops = 6 * weights * tokens + attention
    assert baseline_seconds(lowered, PROFILE) == pytest.approx(flops / 8e10, rel=1e-6)


# ---------------------------------------------------------------- measured timelines


def test_communication_begins_when_both_ranks_have_come() -> None:
    spans = (
        Span(0, COMPUTE, "matmul", 0.0, 2.0, "0F0"),
        Span(0, "send_f", "send", 2.0, 9.0, "0SEND_F0"),
        Span(1, "recv_f", "recv", 0.0, 3.0, "1RECV_F0"),
        Span(1, COMPUTE, "matmul", 3.0, 5.0, "1F0"),
        Span(0, "dp", "all_reduce", 4.0, 7.0, "0O0"),
        Span(1, "dp", "all_reduce", 6.0, 7.0, "1O0"),
    )
    line = met(timeline(spans, 9.0))
    talk = [(s.rank, s.start_s, s.end_s) for s in line.spans if s.stream != COMPUTE]
    assert talk == [(0, 2.0, 3.0), (1, 2.0, 3.0), (0, 6.0, 7.0), (1, 6.0, 7.0)]
    assert line.times[1].idle_s == pytest.approx(9.0 - 2.0 - 2.0)
    alone = timeline(spans[:2], 9.0)
    assert met(alone) is alone


# ---------------------------------------------------------------- one real run


@pytest.mark.distributed
@pytest.mark.slow
def test_two_cases_really_run(tmp_path: Path) -> None:
    whole = GRID.split("[[case]]")
    text = "[[case]]".join([whole[0].replace("repeats = 4", "repeats = 2"), whole[1], whole[4]])
    found = validate_grid(write_grid(tmp_path, text), PROFILE)
    assert [c.name for c in found.cases] == ["tiny dp", "tiny generation"]
    for each in found.cases:
        assert len(each.measurement.samples_s) == 2
        assert 0 < each.measured_s < 10
        assert {span.rank for span in each.measured.spans} == {0, 1}
        assert "torch" in each.measurement.fingerprint
    passes = found.cases[1].measured.spans
    picked = [span for span in passes if span.name == "sample" and span.rank == 0]
    assert len(picked) == 3  # spans of every pass, not of the last one alone
    json.dumps(replace(found).to_json(), allow_nan=False)
