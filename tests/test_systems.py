"""Published systems: every row is listed, every check can fail, verdicts have one shape."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter

import pytest

from meshwise import cli
from simcore.errors import InputError
from validation import systems
from validation.systems import CHECKS, Check, Finding, NotCoveredError, frame, judge, rows, select
from validation.systems.training_parallel import weak_scaling

pytest.importorskip("torch")

KEYS = {"id", "verdict", "published", "predicted", "executed", "reason", "assumptions"}
MINE = [f"G6.{i}" for i in range(1, 18)] + ["D6", "D7", "D27", "D29", "O5", "P12"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def verdicts() -> dict[str, systems.Verdict]:
    return {row: judge(rows()[row]) for row in CHECKS}


# ------------------------------------------------------------------ rows


def test_every_published_row_is_listed() -> None:
    letters = Counter(re.match("[A-Z]", row)[0] for row in rows())  # type: ignore[index]
    assert letters == {"G": 207, "D": 42, "O": 37, "P": 17, "B": 20}
    sizes = Counter(row.group for row in rows().values())
    assert [sizes[f"G{i}"] for i in range(1, 15)] == [
        16, 5, 12, 3, 2, 17, 31, 12, 30, 25, 5, 13, 26, 10,
    ]  # fmt: skip
    assert set(sizes) == set(systems.groups())
    for group, size in sizes.items():
        dot = "." if group.startswith("G") else ""
        wanted = [f"{group}{dot}{i}" for i in range(1, size + 1)]
        assert [row.id for row in rows().values() if row.group == group] == wanted


def test_rows_say_what_they_are() -> None:
    kinds = {"closed-form", "ratio-at-setting", "ratio-band", "capacity", "invariant", "order"}
    for row in rows().values():
        assert row.name
        assert row.published
        assert row.check
        assert row.check_kind in kinds
        assert row.priority in (1, 2, 3)
        assert row.runs_on in ("1 device", "n ranks", "1 device, n ranks", "sim only")


def test_a_group_is_its_rows_and_repeats_count_once() -> None:
    assert [row.id for row in select(["G6"])] == MINE[:17]
    assert [row.id for row in select(["g6.2", "G6.2", "d6"])] == ["G6.2", "D6"]


@pytest.mark.parametrize(("name", "near"), [("G6.99", "G6.9"), ("D99", "D9"), ("P122", "P12")])
def test_unknown_rows_name_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{near}'"):
        select([name])


# ------------------------------------------------------------------ checks


def test_checks_are_of_listed_rows() -> None:
    assert set(CHECKS) <= set(rows())
    assert set(MINE) <= set(CHECKS)


@pytest.mark.parametrize("row", CHECKS)
def test_a_mutant_is_another_input(row: str) -> None:
    entry = CHECKS[row]
    inputs = inspect.signature(entry.run).parameters
    assert entry.mutant
    for name, value in entry.mutant.items():
        assert inputs[name].default != value
    assert entry.run.__doc__


@pytest.mark.parametrize("row", CHECKS)
def test_the_mutant_fails(row: str) -> None:
    found = judge(rows()[row], mutant=True)
    assert found.verdict == "fail"
    assert "the check broke" not in found.reason


def test_a_failing_rows_mutant_moves_its_figure(verdicts: dict[str, systems.Verdict]) -> None:
    """A mutant cannot turn a fail into one, so what it predicts has to change."""
    failing = [row for row, found in verdicts.items() if found.verdict == "fail"]
    for row in failing:
        assert judge(rows()[row], mutant=True).predicted != verdicts[row].predicted


def test_a_batch_that_does_not_grow_scales_worse_on_frontier() -> None:
    grows, stays = weak_scaling(True), weak_scaling(False)
    assert all(few < 0.95 <= many for few, many in zip(stays, grows, strict=True))


@pytest.mark.parametrize("row", CHECKS)
def test_a_check_gives_a_whole_verdict(row: str, verdicts: dict[str, systems.Verdict]) -> None:
    found = verdicts[row]
    assert found.verdict in ("pass", "fail")
    assert found.published == rows()[row].published
    assert found.predicted
    assert found.reason
    assert found.executed in ("cpu", "gpu", "no")
    assert set(found.to_dict()) == KEYS
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_operators_hold_what_was_published(verdicts: dict[str, systems.Verdict]) -> None:
    group = [verdicts[row] for row in MINE[:17]]
    assert sum(found.verdict == "pass" for found in group) >= 14
    assert all(found.executed == "cpu" for found in group)


def test_training_holds_what_was_published(verdicts: dict[str, systems.Verdict]) -> None:
    group = [verdicts[row.id] for row in select(["G1", "G2", "G3", "G4", "G5"])]
    assert len(group) == 38
    assert sum(found.verdict == "pass" for found in group) >= 30
    assert sum(found.executed == "cpu" for found in group) >= 30


# ------------------------------------------------------------------ what is not a pass


def test_a_row_without_a_check_is_not_covered() -> None:
    bare = [row for row in rows().values() if row.id not in CHECKS]
    assert len(bare) == len(rows()) - len(CHECKS)
    found = judge(bare[0])
    assert (found.verdict, found.executed) == ("not covered", "no")
    assert found.reason == frame.NO_CHECK


def test_a_broken_check_is_a_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise ZeroDivisionError("no bandwidth")

    monkeypatch.setitem(CHECKS, "G1.1", Check(broken, {}))
    found = judge(rows()["G1.1"])
    assert found.verdict == "fail"
    assert found.reason == "the check broke: ZeroDivisionError: no bandwidth"


def test_a_check_that_cannot_be_made_is_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Finding:
        raise NotCoveredError("needs two GPUs")

    monkeypatch.setitem(CHECKS, "G1.1", Check(missing, {}))
    found = judge(rows()["G1.1"])
    assert (found.verdict, found.reason) == ("not covered", "needs two GPUs")


def test_without_torch_nothing_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {row: judge(rows()[row]) for row in ("G6.1", "G6.2", "G6.4", "D6")}
    assert all(verdict.executed == "no" for verdict in found.values())
    assert found["G6.1"].verdict == "pass"
    assert found["G6.4"].verdict == "not covered"
    assert "install torch" in found["G6.4"].reason


# ------------------------------------------------------------------ commands


def call(capture: Capture, *arguments: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of a command."""
    code = cli.main(list(arguments))
    out, err = capture.readouterr()
    return code, out, err


def test_systems_are_listed(capsys: Capture) -> None:
    code, out, _ = call(capsys, "systems", "--json")
    listed = json.loads(out)
    assert code == 0
    assert [row["id"] for row in listed] == list(rows())
    assert sum(row["has_check"] for row in listed) == len(CHECKS)
    code, out, _ = call(capsys, "systems", "--group", "G6")
    assert code == 0
    assert "FlashRNN" in out
    assert "Megatron" not in out


def test_checks_are_printed(capsys: Capture) -> None:
    code, out, _ = call(capsys, "systems", "check", "D6", "D29")
    assert code == 0
    assert "f = 0.8676" in out
    assert "D6 assumes: both figures come from one setting" in out
    assert out.strip().endswith("2 rows: 2 pass, 0 fail, 0 not covered; 0 executed.")


def test_all_rows_are_checked_as_json(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in set(CHECKS) - {"D6", "D29"}:
        monkeypatch.delitem(CHECKS, row)
    code, out, _ = call(capsys, "systems", "check", "--all", "--json")
    found = json.loads(out)
    assert code == 0
    assert [verdict["id"] for verdict in found] == list(rows())
    assert Counter(v["verdict"] for v in found) == {"pass": 2, "not covered": len(rows()) - 2}
    assert all(set(verdict) == KEYS for verdict in found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("systems", "check", "G6.99"), "did you mean 'G6.9'"),
        (("systems", "check"), "or --all"),
        (("systems", "--group", "GG6"), "did you mean 'G6'"),
    ],
)
def test_bad_names_exit_2(arguments: tuple[str, ...], said: str, capsys: Capture) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
