"""The demo, the grid and the calibration behind the command line, without their long runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hwmodels.collectives import CollectiveFit
from hwmodels.kernels import KernelFit
from hwmodels.profile import Profile, read_profile
from meshwise import api, cli, demo, execution
from meshwise.execution import is_grid, load_warning
from simcore.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PROFILE = Profile(
    "this-cpu",
    {"matmul.nt": KernelFit(coefficients={"one": 1e-6, "flops": 1e-11}, residual=0.05)},
    CollectiveFit(),
    1e-5,
    0.5,
    (1e-4, 1e-9),
    {"flops_per_s": 8e10, "bytes_per_s": 2e10},
    provenance={"date": "2026-01-01", "measurements": 7},
)


@dataclass(frozen=True)
class FakeCase:
    """What the demo reads of a compared case."""

    name: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def profile_file(folder: Path) -> Path:
    """Return a profile's file."""
    table = {**asdict(PROFILE), "collectives": []}
    path = folder / "profile.json"
    path.write_text(json.dumps(table))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Replace calibration and real runs; return the names of the plans that were run."""
    names: list[str] = []
    path = profile_file(tmp_path)

    def validate(title: str, cases: Sequence[Any], profile: Profile, say: Any) -> SimpleNamespace:
        names.extend(case.name for case in cases)
        fakes = [FakeCase(each.name, 1.0 + i, 2.0 - 0.1 * i) for i, each in enumerate(cases)]
        return SimpleNamespace(
            cases=fakes, summary=lambda: {"median_abs_error": 0.5}, assumptions=()
        )

    monkeypatch.setattr(demo, "validate_cases", validate)
    monkeypatch.setattr(demo, "write_report", lambda comparison, out: out / "report.html")
    for module in ("meshwise.demo", "meshwise.setting"):
        monkeypatch.setattr(f"{module}.default_path", lambda: path)
    return names


def test_demo_runs_the_best_of_each_layout(
    quick: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = cli.main(["demo", "--top", "4", "--out", str(tmp_path), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert len(quick) == len(set(quick)) == 4
    assert [row["strategy"] for row in metrics["plans"]] == quick
    assert [row["measured_place"] for row in metrics["plans"]] == [4, 3, 2, 1]
    assert metrics["verdict"].startswith(f"really fastest was {quick[3]}, predicted number 4")
    assert metrics["report"] == str(tmp_path / "report.html")
    assert metrics["calibrated_now"] is False


def test_demo_prints_its_plans(quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--top", "2"]) == 0
    out, _ = capsys.readouterr()
    assert all(name in out for name in quick)
    assert "predicted step" in out


def test_a_profile_of_an_older_version_asks_for_a_new_calibration(tmp_path: Path) -> None:
    path = profile_file(tmp_path)
    table = json.loads(path.read_text())
    del table["cores"], table["crowds"]
    path.write_text(json.dumps(table))
    with pytest.raises(InputError, match=r"another version.*'cores'.*run 'meshwise calibrate'"):
        read_profile(path)


def test_demo_calibrates_first_where_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[object] = []
    monkeypatch.setattr(demo, "calibrate_machine", lambda *a, **k: done.append(a))
    monkeypatch.setattr(demo, "default_path", lambda: Path("/nowhere/profile.json"))
    assert demo.prepare(False, lambda text: None) is True
    assert len(done) == 1
    monkeypatch.setattr(demo, "default_path", lambda: ROOT / "README.md")
    assert demo.prepare(False, lambda text: None) is True
    path = profile_file(tmp_path)
    monkeypatch.setattr(demo, "default_path", lambda: path)
    assert demo.prepare(False, lambda text: None) is False
    assert demo.prepare(True, lambda text: None) is True


def test_verdict_of_a_right_prediction() -> None:
    rows = [
        {"strategy": "tp 2", "measured_step_s": 1.0, "predicted_place": 1},
        {"strategy": "pp 2", "measured_step_s": 2.0, "predicted_place": 2},
    ]
    assert demo.verdict(rows) == "the plan predicted to be fastest really was: tp 2."


def test_demo_outside_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SCENARIO", Path("examples") / "none.toml")
    with pytest.raises(InputError, match="repository"):
        demo.find_scenario()


def test_grids_are_told_from_scenarios(tmp_path: Path) -> None:
    assert is_grid(ROOT / "examples" / "cpu_grid.toml")
    assert not is_grid(ROOT / "examples" / "cpu_train.toml")
    assert not is_grid(tmp_path / "none.toml")
    assert not is_grid(tmp_path)
    (tmp_path / "junk.toml").write_bytes(b"\xff\x00")
    assert not is_grid(tmp_path / "junk.toml")


def test_a_grid_s_comparison_becomes_a_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"name": "a", "predicted_step_s": 1.0, "measured_step_s": 2.0, "error": -0.5}
    found = SimpleNamespace(
        metrics=lambda: {"cases": 1, "rows": [row]}, assumptions=("x",), fingerprint={"cpu": "y"}
    )
    monkeypatch.setattr("validation.compare.validate_grid", lambda *a: found)
    monkeypatch.setattr("validation.report.write_report", lambda c, out: out / "report.html")
    grid = str(ROOT / "examples" / "cpu_grid.toml")
    options = ["--profile", str(profile_file(tmp_path)), "--out", str(tmp_path)]
    assert cli.main(["validate", grid, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["rows"] == [row]
    assert result["metrics"]["report"] == str(tmp_path / "report.html")
    assert result["provenance"]["profile"]["measurements"] == 7
    assert cli.main(["validate", grid, *options]) == 0
    assert "-50.00%" in capsys.readouterr().out


def test_a_grid_needs_a_calibrated_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "default_path", lambda: Path("/nowhere/profile.json"))
    with pytest.raises(InputError, match="meshwise calibrate"):
        api.validate(ROOT / "examples" / "cpu_grid.toml")


def test_calibrate_prints_rates_and_residuals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("validation.calibrate.calibrate", lambda path, **options: PROFILE)
    target = tmp_path / "p.json"
    assert cli.main(["calibrate", "--out", str(target), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["profile"] == str(target)
    assert metrics["measured_flops_per_s"] == 8e10
    assert metrics["median_residuals"] == {"matmul.nt": 0.05}
    assert cli.main(["calibrate"]) == 0
    assert "80 GFLOP/s" in capsys.readouterr().out


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (4.0, 0.0, 0.0))
    assert "busy" in load_warning(2)[0]
    monkeypatch.setattr("os.getloadavg", lambda: (0.2, 0.0, 0.0))
    assert load_warning(2) == ()
