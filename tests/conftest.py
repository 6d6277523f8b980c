"""Options and fixtures that every test may use."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = ROOT.parent / "shared" / "data"

# Same examples in every run, and no deadline: how busy the machine is says nothing about the code.
settings.register_profile("meshwise", deadline=None, derandomize=True)
settings.load_profile("meshwise")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("meshwise")
    group.addoption(
        "--data",
        type=Path,
        default=MEASUREMENTS,
        metavar="DIR",
        help="folder of outside measurements (default: %(default)s)",
    )
    group.addoption(
        "--update-golden", action="store_true", help="write tests/golden anew instead of comparing"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    if any(item.get_closest_marker("gpu") for item in items):
        _skip(items, "gpu", None if _has_gpu() else "needs a CUDA device")
    if importlib.util.find_spec("torch") is None:
        _skip(items, "distributed", "needs torch")


def _skip(items: list[pytest.Item], marker: str, reason: str | None) -> None:
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def data_dir(pytestconfig: pytest.Config) -> Path:
    """The folder of outside measurements; the test is skipped where there is none."""
    folder: Path = pytestconfig.getoption("--data")
    if not folder.is_dir():
        pytest.skip(f"no outside measurements at {folder}: name their folder with --data DIR")
    return folder


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let no profile of this machine, of this version or an older one, decide what tests see."""
    absent = tmp_path_factory.getbasetemp() / "no-profile.json"
    monkeypatch.setattr("meshwise.setting.default_path", lambda: absent)


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Callable[..., None]:
    """A function ``golden(name, values, rel=1e-9)`` that compares with ``tests/golden/name.json``.

    ``pytest --update-golden`` writes the files anew.
    """

    def compare(name: str, values: Mapping[str, float], rel: float = 1e-9) -> None:
        file = ROOT / "tests" / "golden" / f"{name}.json"
        if pytestconfig.getoption("--update-golden"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(dict(values), indent=2, sort_keys=True) + "\n")
            return
        if not file.exists():
            pytest.fail(f"{file} is missing: run pytest --update-golden and read what it wrote")
        assert dict(values) == pytest.approx(json.loads(file.read_text()), rel=rel, abs=0.0)

    return compare
