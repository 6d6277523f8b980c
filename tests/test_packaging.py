"""The project as installed: start-up, what each layer may load, what is shipped."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

HEAVY = {"torch", "scipy", "pandas", "pyomo", "matplotlib", "simpy", "numpy"}
HELP_LIMIT_S = 1.0  # on a busy machine; 0.3 s on a quiet one

needs_face = pytest.mark.skipif(
    not (ROOT / "meshwise" / "cli.py").exists(), reason="the command line is not there yet"
)


def python(*arguments: str, timeout_s: float = 120.0) -> str:
    """Standard output of a fresh interpreter that is given ``arguments``."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the command line starts fast ---------------------------------------------------------------


@needs_face
def test_help_is_quick() -> None:
    walls_s = []
    for _ in range(3):
        start = time.perf_counter()
        assert "Usage" in python("-m", "meshwise", "--help")
        walls_s.append(time.perf_counter() - start)
    assert min(walls_s) < HELP_LIMIT_S


@needs_face
def test_importing_the_command_line_loads_nothing_heavy() -> None:
    loaded = python("-c", "import meshwise.cli, sys; print(*sys.modules)").split()
    assert "meshwise.cli" in loaded
    assert HEAVY.intersection(loaded) == set()


# --- simcore and the worker need only numpy and torch -------------------------------------------

# Run as `python -I -c ALONE folder blocked,names module...`: imports each module from the copies in
# `folder`, as if nothing of the blocked names were installed.
ALONE = """
import importlib, importlib.abc, pathlib, sys

folder, blocked = pathlib.Path(sys.argv[1]), frozenset(sys.argv[2].split(","))

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (the test hides it)", name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, str(folder))
for name in sys.argv[3:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(folder), module.__file__
print("imported", len(sys.argv) - 3)
"""
WITH_LIBRARIES = ("simcore.engine", "simcore.scenario")  # simpy and pydantic enter here alone


def absent_on_a_gpu_host() -> set[str]:
    """Import names of the core dependencies but numpy, of the other packages and of test tools."""
    core = {re.split(r"[<>=!\[ ]", line)[0] for line in PYPROJECT["project"]["dependencies"]}
    others = set(PACKAGES) - {"simcore", "backends"}
    return (core - {"numpy"}) | others | {"pandas", "transformers", "hypothesis", "pytest"}


def module_names(package: Path) -> list[str]:
    """Dotted names of all modules under a top-level package."""
    parts = (file.relative_to(package.parent).with_suffix("") for file in package.rglob("*.py"))
    return sorted(".".join(part.parts).removesuffix(".__init__") for part in parts)


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A folder that holds copies of `simcore` and `backends` and nothing else."""
    for package in ("simcore", "backends"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def import_alone(copies: Path, modules: list[str]) -> None:
    blocked = ",".join(sorted(absent_on_a_gpu_host()))
    printed = python("-I", "-c", ALONE, str(copies), blocked, *modules)
    assert printed.split()[-2:] == ["imported", str(len(modules))]


def test_simcore_needs_only_numpy(copies: Path) -> None:
    modules = [
        name for name in module_names(copies / "simcore") if not name.startswith(WITH_LIBRARIES)
    ]
    assert "simcore.program" in modules
    import_alone(copies, modules)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_worker_needs_only_numpy_and_torch(copies: Path) -> None:
    modules = [
        name
        for name in module_names(copies / "backends")
        if name.split(".")[1:2] in (["worker"], ["interpreter"])
    ]
    if not modules:
        pytest.skip("the worker is not there yet")
    import_alone(copies, modules)


def test_a_forbidden_import_is_noticed(copies: Path) -> None:
    (copies / "simcore" / "stray.py").write_text("import simpy\n")
    with pytest.raises(AssertionError, match="No module named 'simpy'"):
        import_alone(copies, ["simcore.stray"])


# --- the interpreter knows no strategy ----------------------------------------------------------

STRATEGY_NAME = re.compile(
    r"(?<![a-z])ddp|fsdp|hsdp"
    r"|(?<![a-z])zero(?:[ _-]?[0-3](?![0-9])|[ _-]?stage|[ _-]?bubble)"
    r"|(?:data|tensor|pipeline|sequence|context|expert|model)[ _-]?parallel"
    r"|(?<![a-z])dp_(?:shard|replicate)"
    r"|1f1b|one_f_one_b|gpipe|interleaved|dualpipe|(?<![a-z])zbv?(?![a-z])|megatron|ulysses"
    r"|ring[ _-]?attention|deepspeed|speculative|autoregressive",
    re.IGNORECASE,
)


def test_interpreter_names_no_strategy() -> None:
    backends = ROOT / "backends"
    files = [*backends.glob("interpreter*.py"), *backends.glob("interpreter/**/*.py")]
    if not files:
        pytest.skip("the interpreter is not there yet")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match.group()}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        for match in STRATEGY_NAME.finditer(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["fully_shard  # FSDP2", "zero_stage", "ZeRO-3", "Schedule1F1B", "ScheduleGPipe", "dp_shard",
     "TensorParallel", "use_ddp", "Megatron-LM", "zero bubble"],
)  # fmt: skip
def test_strategy_names_are_recognised(text: str) -> None:
    assert STRATEGY_NAME.search(text)


@pytest.mark.parametrize(
    "text", ["torch.zeros(3)", "zero_grad", "from zero to 9", "zero, 1 or 2", "in parallel"]
)
def test_common_words_are_no_strategy_names(text: str) -> None:
    assert STRATEGY_NAME.search(text) is None


# --- what is shipped ----------------------------------------------------------------------------


def test_every_package_is_typed() -> None:
    present = [name for name in PACKAGES if (ROOT / name / "__init__.py").exists()]
    assert [name for name in present if not (ROOT / name / "py.typed").exists()] == []


def test_constraints_pin_every_direct_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    groups = [
        PYPROJECT["project"]["dependencies"],
        *PYPROJECT["project"]["optional-dependencies"].values(),
        *PYPROJECT["dependency-groups"].values(),
    ]
    needs = [need for group in groups for need in group if isinstance(need, str)]
    wanted = {re.split(r"[<>=!\[ ]", need)[0] for need in needs}
    assert wanted <= pins.keys()
    assert pins["torch"] == "2.13.0"


def test_ci_run_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
