"""The README's and the guides' Python examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    (page, number, code)
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    )
]


@pytest.mark.parametrize(("page", "number", "code"), EXAMPLES, ids=lambda v: str(v)[:24])
def test_examples_run(page: str, number: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from simcore.schedules import SCHEDULES

    monkeypatch.chdir(ROOT)
    before = dict(SCHEDULES)
    try:
        exec(compile(code, f"{page}[{number}]", "exec"), {})
    finally:
        SCHEDULES.clear()
        SCHEDULES.update(before)


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
