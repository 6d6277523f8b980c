"""The command line. Results go to standard output, messages to standard error.

Exit codes: 0 a result (one that does not fit included), 1 a real run failed, 2 bad input or usage,
130 interrupted. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwise.systems import systems_app
from simcore.errors import InputError, MeshwiseError

if TYPE_CHECKING:
    from meshwise.result import Result

INTERRUPTED = 130  # 128 + SIGINT

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Plan, simulate, really run and validate parallel training and decoding.",
)
models_app = typer.Typer(help="The catalogue of models.", rich_markup_mode=None)
hardware_app = typer.Typer(
    help="The catalogue of chips, links and clusters.", rich_markup_mode=None
)
app.add_typer(models_app, name="models")
app.add_typer(hardware_app, name="hardware")
app.add_typer(systems_app, name="systems")

Scenario = Annotated[
    str,
    typer.Argument(
        metavar="SCENARIO",
        help="A .toml or .json scenario; - reads standard input.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Engine = Annotated[
    str | None,
    typer.Option(help="estimate (closed forms, the default) or simulate (discrete events)."),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Measured profile of this-cpu; by default calibrate's.",
        show_default=False,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write a Chrome trace, for ui.perfetto.dev.", show_default=False
    ),
]


def show(result: Result, as_json: bool) -> None:
    """Print a result as JSON or as tables."""
    if as_json:
        print(result.to_json(indent=2))
        return
    from meshwise.render import print_result

    print_result(result)


def show_rows(rows: Sequence[dict[str, Any]], as_json: bool, title: str) -> None:
    """Print a list as JSON or as a table."""
    if as_json:
        import json

        print(json.dumps(list(rows), indent=2))
        return
    from meshwise.render import print_rows

    print_rows(rows, title)


def show_table(table: dict[str, Any], as_json: bool, title: str) -> None:
    """Print one thing's facts as JSON or as a table."""
    if as_json:
        import json

        print(json.dumps(table, indent=2))
        return
    from meshwise.render import print_table

    print_table(table, title)


# ---------------------------------------------------------------- predictions


@app.command()
def predict(
    scenario: Scenario,
    engine: Engine = None,
    profile: Profile = None,
    json: Json = False,
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl", help="Read one JSON scenario a line; print one JSON result a line."
        ),
    ] = False,
) -> None:
    """Predict the metrics of a scenario."""
    if jsonl:
        for text in predict_lines(read_lines(scenario), engine, profile):
            print(text, flush=True)
        return
    from meshwise import api

    show(api.predict(scenario, engine, profile=profile), json)


def read_lines(source: str) -> Iterable[str]:
    """Yield the lines of a file, or of standard input for ``-``, that are not blank."""
    if source == "-":
        yield from (line for line in sys.stdin if line.strip())
        return
    try:
        with Path(source).open(encoding="utf-8", errors="replace") as file:
            yield from (line for line in file if line.strip())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise InputError(f"{source[:60]}: cannot be read: {reason}.") from None


def predict_lines(lines: Iterable[str], engine: str | None, profile: Path | None) -> Iterable[str]:
    """Yield one JSON line per line: the result, or ``{"error": ...}`` where there is none."""
    import json

    from meshwise import api
    from simcore.scenario import parse_scenario

    for line in lines:
        try:
            yield api.predict(parse_scenario(line), engine, profile=profile).to_json()
        except MeshwiseError as error:
            yield json.dumps({"error": str(error)})
        except Exception as error:  # one line must not end the others
            yield json.dumps({"error": f"internal error: {type(error).__name__}: {error}"})


@app.command()
def simulate(
    scenario: Scenario, trace: Trace = None, profile: Profile = None, json: Json = False
) -> None:
    """Simulate a scenario by discrete events."""
    from meshwise import api

    show(api.simulate(scenario, trace, profile=profile), json)
    if trace is not None:
        print(f"trace written to {trace}: open it in ui.perfetto.dev", file=sys.stderr)


@app.command()
def plan(
    scenario: Scenario,
    top: Annotated[int, typer.Option(min=1, help="How many strategies to keep.")] = 10,
    profile: Profile = None,
    json: Json = False,
) -> None:
    """Rank the parallel strategies that fit."""
    from meshwise import api
    from meshwise.progress import Bar

    with Bar("pricing strategies") as bar:
        result = api.plan(scenario, top, profile=profile, progress=bar.step)
    show(result, json)


@app.command()
def largest(
    scenario: Scenario,
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="global_batch, microbatch, seq_len or layers.",
            show_default=False,
        ),
    ],
    profile: Profile = None,
    json: Json = False,
) -> None:
    """Find the largest batch, length or model that fits into memory."""
    from meshwise import api

    show(api.largest(scenario, what, profile=profile), json)


# ---------------------------------------------------------------- real runs


@app.command()
def run(
    scenario: Scenario,
    rank: Annotated[
        int | None,
        typer.Option(min=0, help="Run this rank alone, at its real shapes.", show_default=False),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1, help="Measured repeats; by default the scenario's.", show_default=False
        ),
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=0.001,
            metavar="SECONDS",
            help="Give up after so long.",
            show_default=False,
        ),
    ] = None,
    trace: Trace = None,
    profile: Profile = None,
    json: Json = False,
) -> None:
    """Really run a scenario on ranks of this machine."""
    from meshwise import api
    from meshwise.progress import Status

    with Status("running on real ranks"):
        result = api.run(
            scenario, rank, repeats=repeats, timeout_s=timeout_s, trace=trace, profile=profile
        )
    show(result, json)


@app.command()
def validate(
    scenario: Scenario,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where a grid's report and pictures go.")
    ] = Path("report"),
    profile: Profile = None,
    json: Json = False,
) -> None:
    """Predict, really run, and compare."""
    from meshwise import api
    from meshwise.progress import Status

    with Status("running on real ranks") as status:
        result = api.validate(scenario, profile=profile, out=out, progress=status.say)
    show(result, json)


@app.command()
def calibrate(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="More files for --from.", show_default=False),
    ] = None,
    source: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Fit kernels to measurements in files instead of measuring this machine.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what the files of --from hold.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write the profile.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Measure this machine and write its profile, or fit curves to measurements in files."""
    from meshwise.progress import Status

    if source:
        from meshwise.calibration import imported_result

        with Status("reading measurements") as status:
            result = imported_result([*source, *(files or ())], out, dry_run, status.say)
    elif files or dry_run:
        raise InputError("files and --dry-run belong to --from: meshwise calibrate --from FILE...")
    else:
        from meshwise.execution import calibration_result

        with Status("measuring this machine") as status:
            result = calibration_result(out, status.say)
    show(result, json)


@app.command()
def accuracy(
    data: Annotated[
        Path,
        typer.Option("--data", metavar="DIR", help="Folder of the calibration data."),
    ],
    section: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this section; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the report there, as Markdown."),
    ] = None,
    json: Json = False,
) -> None:
    """Fit the cost models on part of the measurements and score them on the rest."""
    from meshwise import api

    report, tables = api.accuracy(data, section or ())
    if out is not None:
        api.write_text(out, report)
    if json:
        show_rows(tables, True, "accuracy")
    elif out is None:
        print(report)


@app.command()
def demo(
    fresh: Annotated[bool, typer.Option("--fresh", help="Calibrate this machine anew.")] = False,
    top: Annotated[int, typer.Option(min=2, help="How many plans to run.")] = 5,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report goes.")] = Path(
        "report"
    ),
    json: Json = False,
) -> None:
    """The main job, end to end, on this machine."""
    from meshwise.demo import run_demo
    from meshwise.progress import Status

    with Status("preparing") as status:
        result = run_demo(fresh=fresh, top=top, out=out, say=status.say)
    show(result, json)


# ---------------------------------------------------------------- catalogues


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, json: Json = False) -> None:
    """List the catalogue's models."""
    if context.invoked_subcommand is None:
        from meshwise import api

        show_rows(api.model_rows(), json, "models")


@models_app.command("list")
def models_list(json: Json = False) -> None:
    """List the catalogue's models."""
    from meshwise import api

    show_rows(api.model_rows(), json, "models")


@models_app.command("show")
def models_show(name: str, json: Json = False) -> None:
    """Show all numbers of one model."""
    from meshwise import api

    table = dict(api.model(name))
    show_table(table if json else {k: v for k, v in table.items() if v}, json, name)


@hardware_app.callback(invoke_without_command=True)
def hardware(context: typer.Context, json: Json = False) -> None:
    """List the catalogue's chips, links and clusters."""
    if context.invoked_subcommand is None:
        _list_hardware(json)


@hardware_app.command("list")
def hardware_list(json: Json = False) -> None:
    """List the catalogue's chips, links and clusters."""
    _list_hardware(json)


@hardware_app.command("show")
def hardware_show(
    name: str,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a chip's roofline there, as a PNG.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Calibration data whose points the picture shows."),
    ] = None,
    json: Json = False,
) -> None:
    """Show one chip, link or cluster with the sources of its numbers."""
    from meshwise import api

    if picture is not None:
        api.roofline_picture(name, picture, data)
    show_table(dict(api.hardware_item(name)), json, name)


def _list_hardware(as_json: bool) -> None:
    from meshwise import api

    rows = api.hardware_rows()
    if as_json:
        show_rows(rows, True, "hardware")
        return
    for kind in ("chip", "link", "cluster"):
        mine = [
            {key: value for key, value in row.items() if key != "kind"}
            for row in rows
            if row["kind"] == kind
        ]
        show_rows(mine, False, f"{kind}s")


@app.command()
def schema(json: Json = True) -> None:
    """Print the JSON Schema of a scenario."""
    from json import dumps

    from meshwise import api

    print(dumps(api.schema(), indent=2))


# ---------------------------------------------------------------- entry


def _version(wanted: bool) -> None:
    if wanted:
        from meshwise import __version__

        print(f"meshwise {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Plan, simulate, really run and validate parallel training and decoding."""


# The base of typer's own complaints; typer ships click inside since 0.27, and needed it before.
UsageFault: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; bad input gives one sentence, no traceback."""
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `meshwise models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _main(arguments: list[str]) -> int:
    try:
        code = app(args=arguments, prog_name="meshwise", standalone_mode=False)
    except MeshwiseError as error:
        return _complain(str(error), 2 if isinstance(error, InputError) else 1)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted.", INTERRUPTED)
    except SystemExit as leave:  # typer's own way out of a closed pipe
        if isinstance(leave.__context__, BrokenPipeError):
            raise leave.__context__ from None
        return leave.code if isinstance(leave.code, int) else 1
    except UsageFault as error:
        said = error.format_message() if hasattr(error, "format_message") else str(error)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(said, file=sys.stderr)
            return 2
        return _complain(f"{said} Try 'meshwise --help'.", 2)
    if code == INTERRUPTED:
        return _complain("interrupted.", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _complain(text: str, code: int) -> int:
    print(f"meshwise: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
