"""The report of a comparison: one self-contained HTML page, and a PNG of each picture.

The page needs no other file and no network: pictures are embedded, styles are inline.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from validation.compare import BOUNDS, Compared, Comparison
from validation.plots import (
    error_bars,
    png_bytes,
    ranking_figure,
    scatter_figure,
    timeline_figure,
    write_bytes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hwmodels.profile import Profile

PAGE = "report.html"
OPEN_TIMELINES = 4  # the others are folded
NOISY = 0.15  # median spread of repeats from which the report says so
RANKED = 3  # cases of one model and batch from which a ranking is worth a picture


# ---------------------------------------------------------------- pieces of HTML


def seconds_text(seconds: float) -> str:
    """Return seconds in the unit that reads best."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def error_class(error: float) -> str:
    """Return the style of an error: within 15 %, within 40 %, or beyond."""
    return "good" if abs(error) <= 0.15 else "fair" if abs(error) <= 0.40 else "poor"


def _cell(text: object, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f"<td{style}>{escape(str(text))}</td>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table of ready-made cells that scrolls sideways on a narrow screen."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    head = f"<thead><tr>{head}</tr></thead>\n" if heads else ""
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def facts(pairs: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    return table((), ([_cell(name), _cell(_short(value))] for name, value in pairs.items()))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def picture(data: bytes, about: str) -> str:
    """Return an embedded PNG."""
    code = b64encode(data).decode("ascii")
    return f'<img alt="{escape(about)}" loading="lazy" src="data:image/png;base64,{code}">'


def slug(name: str) -> str:
    """Return a name as it may stand in a file name or an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "case"


def slugs(names: Iterable[str]) -> list[str]:
    """Return different slugs for names."""
    found: list[str] = []
    for name in names:
        base = mark = slug(name)[:80]
        count = 1
        while mark in found:
            count += 1
            mark = f"{base}-{count}"
        found.append(mark)
    return found


# ---------------------------------------------------------------- sections


def summary_html(comparison: Comparison) -> str:
    """Return the figures that a reader looks for first, the baseline's beside ours."""
    found = comparison.summary()
    share = found["ordered_right_fraction"]
    ordered = "no pairs" if share is None else f"{share:.0%} of {found['ordered_pairs']}"
    tiles = (
        (
            f"{found['median_abs_error']:.1%}",
            "median absolute error",
            error_class(found["median_abs_error"]),
        ),
        (f"{found['p90_abs_error']:.1%}", "90th percentile", error_class(found["p90_abs_error"])),
        (
            f"{found['max_abs_error']:.1%}",
            f"worst: {found['worst_case']}",
            error_class(found["max_abs_error"]),
        ),
        (ordered, "pairs of one model and batch ordered right", ""),
        (
            f"{found['baseline_median_abs_error']:.1%}",
            "median error of the baseline, FLOPs over peak",
            "",
        ),
    )
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
            for value, what, kind in tiles
        )
        + "</div>"
    )


def verdict(comparison: Comparison) -> str:
    """Return the summary in a sentence or two."""
    found = comparison.summary()
    within = sum(abs(case.error) <= 0.15 for case in comparison.cases)
    lean = "too fast" if found["mean_error"] < 0 else "too slow"
    bounds = ", ".join(f"{count} by {name}" for name, count in found["bounds"].items() if count)
    noise = (
        f" The machine was not quiet: repeats of a case spread by {found['median_spread']:.0%}. "
        f"Against the quietest repeat of each case the median error is "
        f"{found['quietest_median_abs_error']:.1%}{_processor(found)}."
        if found["median_spread"] > NOISY
        else ""
    )
    return (
        f"{found['cases']} cases were predicted, then really run. {within} lie within 15 %; on "
        f"average the prediction is {abs(found['mean_error']):.1%} {lean}. By the prediction, "
        f"cases are bound: {bounds}.{noise}"
    )


def _processor(found: Mapping[str, Any]) -> str:
    """Return the error of the processor time, which no other work disturbs, in words."""
    error = found["processor_median_abs_error"]
    return "" if error is None else f", that of the ranks' processor time {error:.1%}"


def case_rows(cases: Sequence[Compared], marks: Sequence[str]) -> Iterator[list[str]]:
    """Yield the error table's rows."""
    for case, mark in zip(cases, marks, strict=True):
        shares = sum(case.bound_s.values()) or 1.0
        bound = ", ".join(f"{name} {case.bound_s.get(name, 0.0) / shares:.0%}" for name in BOUNDS)
        yield [
            f'<td><a href="#{mark}">{escape(case.name)}</a></td>',
            _cell(case.group),
            _cell(case.strategy),
            _cell(seconds_text(case.predicted_s), "number"),
            _cell(seconds_text(case.measured_s), "number"),
            _cell(f"{case.error:+.1%}", f"number {error_class(case.error)}"),
            _cell(f"{case.measurement.spread:.0%}", "number"),
            _cell(f"{case.baseline_error:+.0%}", "number"),
            f'<td title="{escape(bound)}">{escape(case.bound)}</td>',
        ]


CASE_HEADS = (
    "case",
    "model, batch",
    "strategy",
    "predicted",
    "measured",
    "error",
    "spread",
    "baseline",
    "bound by",
)


def timelines_html(
    cases: Sequence[Compared], marks: Sequence[str], images: Mapping[str, bytes]
) -> str:
    """Return each case's timelines, the first few unfolded."""
    parts = []
    for place, (case, mark) in enumerate(zip(cases, marks, strict=True)):
        unfolded = " open" if place < OPEN_TIMELINES else ""
        about = f"predicted and measured timelines of {case.name}"
        idle = (
            f"idle {case.predicted.bubble_fraction:.1%} predicted, "
            f"{case.measured.bubble_fraction:.1%} measured; communication that nothing hides "
            f"{case.predicted.exposed_communication_fraction:.1%} and "
            f"{case.measured.exposed_communication_fraction:.1%}"
        )
        parts.append(
            f'<details id="{mark}"{unfolded}><summary>{escape(case.name)} '
            f'<span class="{error_class(case.error)}">{case.error:+.1%}</span></summary>'
            f"{picture(images[f'timeline-{mark}'], about)}<p>{escape(case.strategy)}: {idle}.</p>"
            "</details>"
        )
    return "\n".join(parts)


def profile_html(profile: Profile) -> str:
    """Return how well each family of ops was fitted, and the rates that were measured."""
    rows = [
        [
            _cell(name),
            _cell(f"{len(fit.points)} measured points" if fit.points else "coefficients"),
            _cell("interpolated" if fit.points else f"{fit.residual:.1%}", "number"),
        ]
        for name, fit in sorted(profile.kernels.items())
    ]
    rates = {
        "peak": f"{profile.peaks['flops_per_s'] / 1e9:.4g} GFLOP/s per rank",
        "memory bandwidth": f"{profile.peaks['bytes_per_s'] / 1e9:.4g} GB/s per rank",
        "message latency": seconds_text(profile.messages[0]),
        "seconds per GB of a message": f"{profile.messages[1] * 1e9:.4g}",
        "host time to start a message": seconds_text(profile.issue_s),
        "share of communication that stops compute": f"{profile.blocking:.0%}",
    }
    return facts(rates) + table(("op family", "fit", "median residual"), rows)


def _listed(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(each)}</li>" for each in sentences) + "</ul>"


def page(
    comparison: Comparison, title: str, marks: Sequence[str], images: Mapping[str, bytes]
) -> str:
    """Return the whole page."""
    text = resources.files("validation").joinpath("data/report.html").read_text(encoding="utf-8")
    rankings = [picture(data, name) for name, data in images.items() if name.startswith("ranking-")]
    return Template(text).substitute(
        title=escape(title),
        verdict=escape(verdict(comparison)),
        summary=summary_html(comparison),
        scatter=picture(images["scatter"], "predicted over measured seconds"),
        errors=picture(images["errors"], "error of every case"),
        rankings="\n".join(rankings),
        cases=table(CASE_HEADS, case_rows(comparison.cases, marks)),
        timelines=timelines_html(comparison.cases, marks, images),
        assumptions=_listed(comparison.assumptions),
        machine=facts(comparison.fingerprint),
        profile=profile_html(comparison.profile),
        provenance=facts(comparison.profile.provenance),
    )


# ---------------------------------------------------------------- pictures and files


def figures(comparison: Comparison, marks: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    """Yield the name and figure of every picture."""
    yield "scatter", scatter_figure(comparison)
    yield "errors", error_bars(comparison)
    groups = list(dict.fromkeys(case.group for case in comparison.cases))
    for group, name in zip(groups, slugs(groups), strict=True):
        cases = [case for case in comparison.cases if case.group == group]
        if len(cases) >= RANKED:
            yield f"ranking-{name}", ranking_figure(cases, group)
    for case, mark in zip(comparison.cases, marks, strict=True):
        yield f"timeline-{mark}", timeline_figure(case.predicted, case.measured)


def write_report(comparison: Comparison, out_dir: Path | str, title: str | None = None) -> Path:
    """Write the page, a PNG of each picture and ``comparison.json``; return the page's path.

    Raises ValueError for a comparison without cases.
    """
    if not comparison.cases:
        raise ValueError("a report needs at least one case")
    folder = Path(out_dir)
    marks = slugs(case.name for case in comparison.cases)
    images = {}
    for name, figure in figures(comparison, marks):
        images[name] = png_bytes(figure)
        write_bytes(folder / f"{name}.png", images[name])
    plain = json.dumps(comparison.to_json(), indent=1, allow_nan=False)
    write_bytes(folder / "comparison.json", plain.encode())
    text = page(comparison, title or f"Predicted and measured: {comparison.title}", marks, images)
    return write_bytes(folder / PAGE, text.encode())
