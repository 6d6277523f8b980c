"""The pictures and the page, of a comparison that was played by the simulator."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparisons import PROFILE, comparison

from simcore.ops import COMPUTE
from simcore.timeline import Span, timeline
from validation.compare import Comparison
from validation.plots import (
    COLOURS,
    boxes,
    category,
    error_bars,
    error_colour,
    parts_figure,
    png_bytes,
    ranking_figure,
    save_png,
    scatter_figure,
    schedule_figure,
    timeline_figure,
)
from validation.report import seconds_text, slugs, verdict, write_report

__all__ = ["comparison"]  # a fixture
pytestmark = pytest.mark.filterwarnings("error")
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """What a browser would read: tags that match, references, anchors and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        table = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [table[key] or "" for key in ("src", "srcset") if key in table]
        self.links += [table["href"] or ""] if "href" in table else []
        self.ids += [table["id"] or ""] if "id" in table else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


# ---------------------------------------------------------------- pictures


def test_every_picture_is_drawn(comparison: Comparison, tmp_path: Path) -> None:
    case = comparison.cases[2]
    figures = [
        scatter_figure(comparison),
        error_bars(comparison),
        ranking_figure(comparison.cases[:3], "three"),
        timeline_figure(case.predicted, case.measured, "title"),
        schedule_figure(case.predicted),
        parts_figure({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}}, title="parts", limit=4.0),
    ]
    for number, figure in enumerate(figures):
        path = save_png(figure, tmp_path / "new" / f"{number}.png")
        width, height = size_of(path.read_bytes())
        assert 800 < width < 1300
        assert 200 < height < 1300
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [f"{n}.png" for n in range(6)]


def test_parts_stand_side_by_side() -> None:
    rows = {"a": {"x": 1.0, "none": 0.0, "y": 2.0}, "b": {"x": 3.0}}
    axes = parts_figure(rows).axes[0]
    bars = {(b.get_x(), b.get_width()) for group in axes.containers for b in group}
    assert bars == {(0.0, 1.0), (1.0, 2.0), (0.0, 3.0), (3.0, 0.0)}
    assert [group.get_label() for group in axes.containers] == ["x", "y"]


def test_a_picture_is_the_same_each_time(comparison: Comparison) -> None:
    assert png_bytes(scatter_figure(comparison)) == png_bytes(scatter_figure(comparison))


def test_the_timelines_share_one_axis(comparison: Comparison) -> None:
    case = comparison.cases[0]
    above, below = timeline_figure(case.predicted, case.measured).axes
    assert above.get_xlim() == below.get_xlim()
    assert above.get_xlim()[1] >= 1e3 * max(case.predicted.step_s, case.measured.step_s)
    assert above.get_title(loc="left").startswith("predicted: ")
    assert [tick.get_text() for tick in below.get_yticklabels()] == ["rank 0", "rank 1"]


def test_a_schedule_shows_every_microbatch(comparison: Comparison) -> None:
    (axes,) = schedule_figure(comparison.cases[2].predicted).axes
    shown = sorted(text.get_text() for text in axes.texts)
    assert shown == sorted(str(m) for m in range(4) for _ in range(4))  # F and B on two ranks


def test_a_span_has_the_colour_of_its_action() -> None:
    def span(stream: str, action: str) -> Span:
        return Span(0, stream, "op", 0.0, 1.0, action)

    actions = {"0F1": "forward", "12BR3": "backward", "1O0": "optimizer", "": "forward"}
    actions |= {"0I2": "input gradient", "3W1": "weight gradient"}
    assert {a: category(span(COMPUTE, a)) for a in actions} == actions
    assert category(span("dp", "0F1")) == "communication"
    assert set(actions.values()) | {"communication"} == set(COLOURS)


def test_small_gaps_are_closed_and_large_ones_kept() -> None:
    spans = [
        Span(0, COMPUTE, "op", s, e, "0F0") for s, e in ((0, 1), (1.05, 2), (1.2, 1.5), (3, 4))
    ]
    assert boxes(spans, 0.1) == {(0, "forward"): [(0, 2), (3, 1)]}


def test_errors_have_three_colours() -> None:
    assert len({error_colour(e) for e in (0.0, -0.15, 0.3, -0.4, 0.41, -9.0)}) == 3
    assert error_colour(0.15) == error_colour(-0.1)


def test_plots_are_made_without_a_display_or_global_state() -> None:
    code = (
        "import sys; import validation.plots, validation.report, validation.compare\n"
        "heavy = {'matplotlib', 'scipy', 'torch', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from simcore.timeline import timeline\n"
        "validation.plots.png_bytes(validation.plots.timeline_figure(timeline((), 1.0), "
        "timeline((), 1.0)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- the page


def test_the_page_stands_alone(comparison: Comparison, tmp_path: Path) -> None:
    path = write_report(comparison, tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == tmp_path / "out" / "report.html"
    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    assert "$" not in text
    assert "viewport" in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_tells_what_was_found(comparison: Comparison, tmp_path: Path) -> None:
    words = " ".join(Page(write_report(comparison, tmp_path, "My <title>").read_text()).words)
    assert "My <title>" in words
    for each in comparison.cases:
        assert each.name in words
        assert f"{each.error:+.1%}" in words
    for sentence in comparison.assumptions:
        assert sentence in words
    assert f"{comparison.summary()['baseline_median_abs_error']:.1%}" in words
    assert "simulated" in words  # the fingerprint's device
    assert "2026-01-01" in words  # the profile's date


def test_the_page_says_when_the_machine_was_not_quiet(comparison: Comparison) -> None:
    assert "not quiet" not in verdict(comparison)
    loud = [
        replace(case, measurement=replace(case.measurement, samples_s=(1.0, 1.0, 3.0, 3.0)))
        for case in comparison.cases
    ]
    assert "repeats of a case spread by 100%" in verdict(replace(comparison, cases=tuple(loud)))


def test_every_picture_has_a_file(comparison: Comparison, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    page = Page(write_report(comparison, folder).read_text())
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "comparison.json",
        "errors.png",
        "ranking-tiny-4-x-32-tokens.png",
        "report.html",
        "scatter.png",
        *(f"timeline-tiny-{name}.png" for name in ("dp", "tp-b", "pp", "generation")),
    }
    assert len(page.sources) == len([name for name in files if name.endswith(".png")])
    found = json.loads((folder / "comparison.json").read_text())
    assert found == json.loads(json.dumps(comparison.to_json()))


def test_a_report_replaces_the_one_before(comparison: Comparison, tmp_path: Path) -> None:
    first = write_report(comparison, tmp_path).read_text()
    assert write_report(comparison, tmp_path).read_text() == first


def test_a_report_needs_a_case(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one case"):
        write_report(Comparison("empty", (), PROFILE), tmp_path)


def test_a_timeline_without_spans_can_be_reported(comparison: Comparison, tmp_path: Path) -> None:
    bare = replace(comparison.cases[0], measured=timeline((), 1e-3))
    write_report(replace(comparison, cases=(bare,)), tmp_path)


def test_names_become_different_file_names() -> None:
    assert slugs(["a b", "A  B!", "ü", "a-b-2"]) == ["a-b", "a-b-2", "case", "a-b-2-2"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs")]
)
def test_seconds_read_well(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
