"""Notebooks as they are kept: no outputs, prose, code that parses; `make check-all` runs them."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text(encoding="utf-8"))
    return found


def sources(notebook: dict[str, Any], kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_is_a_notebook() -> None:
    assert [path.name for path in NOTEBOOKS]


def test_outputs_are_stripped(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_every_code_cell_parses_and_follows_prose(notebook: dict[str, Any]) -> None:
    for source in sources(notebook, "code"):
        ast.parse(source)
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= kinds.count("code") // 2


def test_nothing_outside_the_project_is_installed(notebook: dict[str, Any]) -> None:
    code = "\n".join(sources(notebook, "code"))
    roots = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    ours = {"meshwise", "simcore", "hwmodels", "solvers", "backends", "validation"}
    assert roots <= ours | {"pandas", "IPython", "numpy", "pathlib"}
    assert "meshwise" in roots
