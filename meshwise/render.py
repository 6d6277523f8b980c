"""Results for people: tables with human units, in a terminal or a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwise.result import Result

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
# Ends of names, longest first, with what is written behind the number.
UNITS = (
    ("_bytes_per_s", "B/s"),
    ("_flops_per_s", "FLOP/s"),
    ("flops_per_s", "FLOP/s"),
    ("bytes_per_s", "B/s"),
    ("samples_per_s_per_gpu", "sample/s"),
    ("samples_per_s", "sample/s"),
    ("tokens_per_s_per_gpu", "token/s"),
    ("tokens_per_s", "token/s"),
    ("model_flops", "FLOP"),
    ("_bytes", "B"),
    ("bytes_per_token", "B"),
    ("_s", "s"),
    ("seconds", "s"),
    ("_w", "W"),
    ("_hz", "Hz"),
    ("energy_j", "J"),
    ("_usd", "$"),
    ("price_per_hour", "$"),
    ("parameters", ""),
)
SHARES = ("mfu", "hfu", "mfu_causal", "gap", "blocking", "spread", "median_residuals")
SHARE_ENDS = ("_spread", "fraction", "error")
PLAN_COLUMNS = (
    "step_s",
    "seconds",
    "tokens_per_s",
    "mfu",
    "tpot_s",
    "peak_memory_bytes",
    "bubble_fraction",
    "exposed_communication_fraction",
)


def scaled(value: float, unit: str) -> str:
    """Return a number with a metric prefix and its unit."""
    size = abs(value)
    table = SMALL if unit == "s" and size < 1 else PREFIXES
    factor, prefix = next(((f, p) for f, p in table if size >= f), table[-1])
    if unit == "s" and size >= 1:
        factor, prefix = 1.0, ""
    return f"{value / factor:.4g} {prefix}{unit}".rstrip()


def human(name: str, value: Any) -> str:
    """Return a metric's value as a person reads it; its name decides the unit."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {human(name, each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(human(name, each) for each in value[:8]) + (
            " ..." if len(value) > 8 else ""
        )
    if name in SHARES or name.endswith(SHARE_ENDS):
        return f"{value:+.2%}" if name == "error" else f"{value:.2%}"
    for end, unit in UNITS:
        if name.endswith(end):
            return scaled(float(value), unit) if value else f"0 {unit}".rstrip()
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def label(name: str) -> str:
    """Return a metric's name as words, its unit left out."""
    for end in ("_bytes_per_s", "_bytes", "_s", "_j", "_usd"):
        if name.endswith(end) and not name.endswith("per_s"):
            name = name.removesuffix(end)
    return name.replace("_", " ")


def _console() -> Any:
    import shutil
    import sys

    from rich.console import Console

    class Plain(Console):
        """A console that leaves a closed pipe to the command line."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    width = shutil.get_terminal_size((160, 40)).columns if sys.stdout.isatty() else 160
    return Plain(width=width, highlight=False, soft_wrap=True)


def _grid(title: str, columns: Sequence[str], right: Iterable[int] = ()) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    numbers = set(right)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    return table


def print_table(table: Mapping[str, Any], title: str = "") -> None:
    """Print names and values below one another."""
    grid = _grid(title, ("", ""))
    grid.show_header = False
    for name, value in table.items():
        grid.add_row(label(name), _safe(human(name, value)))
    _console().print(grid)


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def print_rows(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Print rows of the same names as a table."""
    if not rows:
        return
    names = list(rows[0])
    numbers = [
        i
        for i, name in enumerate(names)
        if any(isinstance(row.get(name), int | float) for row in rows)
    ]
    grid = _grid(title, [label(name) for name in names], numbers)
    for row in rows:
        grid.add_row(*(_safe(human(name, row.get(name))) for name in names))
    _console().print(grid)


def plan_rows(candidates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a plan's table: the strategy, then the metrics of its kind."""
    rows = []
    for each in candidates:
        strategy = each["strategy"]
        row = {"#": each["rank"], "strategy": short_strategy(strategy)}
        rows.append(row | {name: each[name] for name in PLAN_COLUMNS if name in each})
    return rows


def compared_rows(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a grid's table: what was compared, each kind by its own metric."""
    return [
        {
            "case": each["name"],
            "predicted_s": each[f"predicted_{each['metric']}"],
            "measured_s": each[f"measured_{each['metric']}"],
            "error": each["error"],
            "spread": each["spread"],
            "baseline_error": each["baseline_error"],
            "bound by": each["bound"],
        }
        for each in cases
    ]


def short_strategy(strategy: Mapping[str, Any]) -> str:
    """Return a strategy in a few words."""
    words = [
        f"{axis} {strategy[axis]}"
        for axis in ("tp", "pp", "dp_replicate", "dp_shard")
        if strategy[axis] > 1
    ] or ["one rank"]
    if strategy["zero_stage"]:
        words.append(f"zero {strategy['zero_stage']}")
    words.append(f"microbatch {strategy['microbatch']}")
    if strategy["pp"] > 1:
        words.append(str(strategy["schedule"]))
    if strategy["sequence_parallel"]:
        words.append("sequence")
    if strategy["recompute"] != "none":
        words.append(f"recompute {strategy['recompute']}")
    return ", ".join(words)


def print_result(result: Result) -> None:
    """Print a result: metrics, warnings, assumptions, provenance."""
    metrics = dict(result.metrics)
    if "candidates" in metrics:
        _print_plan(metrics)
    else:
        tables = {
            name: metrics.pop(name)
            for name in list(metrics)
            if isinstance(metrics[name], list)
            and metrics[name]
            and isinstance(metrics[name][0], Mapping)
        }
        if metrics:
            print_table(metrics)
        for name, rows in tables.items():
            grid = name == "rows" and "baseline_error" in rows[0]
            print_rows(compared_rows(rows) if grid else rows, "cases" if grid else label(name))
    _print_notes(result)


def _print_plan(metrics: Mapping[str, Any]) -> None:
    print_rows(plan_rows(metrics["candidates"]), "ranked strategies")
    solver = metrics["solver"]
    reasons = ", ".join(
        f"{count} for {why}" for why, count in metrics["infeasible_reasons"].items()
    )
    print(
        f"{solver['strategies']} strategies, {solver['infeasible']} infeasible"
        f"{f' ({reasons})' if reasons else ''}, {solver['priced']} priced in "
        f"{scaled(solver['wall_s'], 's')}; {solver['status']}, {solver['goal']}."
    )
    for each in metrics["infeasible"][:3]:
        print(f"  out: {short_strategy(each['strategy'])}: {each['reason']}")


def _print_notes(result: Result) -> None:
    console = _console()
    for text in result.warnings:
        console.print(f"[bold yellow]warning:[/] {_safe(text)}")
    if result.assumptions:
        console.print("assumptions:", style="dim")
    for text in result.assumptions:
        console.print(f"  - {_safe(text)}", style="dim")
    origin = result.provenance
    words = [
        f"{key} {origin[key]}" for key in ("meshwise", "engine", "cluster", "seed") if key in origin
    ]
    if result.scenario_hash:
        words.append(f"scenario {result.scenario_hash}")
    console.print(_safe(", ".join(words)), style="dim")


def result_html(result: Result) -> str:
    """Return a result as an HTML table, for notebooks."""
    metrics = result.metrics
    if "candidates" in metrics:
        body = _rows_html(plan_rows(metrics["candidates"]))
    else:
        rows = [
            (label(name), human(name, value))
            for name, value in metrics.items()
            if not (isinstance(value, list) and value and isinstance(value[0], Mapping))
        ]
        body = (
            "<table>"
            + "".join(
                f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
                f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
                for name, value in rows
            )
            + "</table>"
        )
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in result.assumptions)
    warnings = "".join(f"<p><b>warning:</b> {html.escape(text)}</p>" for text in result.warnings)
    return f"{warnings}{body}<details><summary>assumptions</summary><ul>{notes}</ul></details>"


def _rows_html(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>no strategy fits.</p>"
    head = "".join(f"<th>{html.escape(label(name))}</th>" for name in rows[0])
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(human(n, v))}</td>" for n, v in row.items()) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{lines}</table>"
