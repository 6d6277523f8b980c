"""The public functions: what the command line does, from Python.

Each takes a scenario as a path, a dict of tables or a `Scenario`, and raises `InputError` where it
is wrong. A plan that does not fit is a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwise.result import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from hwmodels.profile import Profile
    from meshwise.prediction import Progress
    from simcore.scenario import Scenario

    Source = str | Path | Mapping[str, Any] | Scenario


def load(scenario: Source) -> Scenario:
    """Return the checked scenario of a path, of ``-`` (standard input), a dict or a `Scenario`."""
    from simcore.scenario import Scenario, load_scenario

    return scenario if isinstance(scenario, Scenario) else load_scenario(scenario)


def predict(
    scenario: Source, engine: str | None = None, *, profile: str | Path | None = None
) -> Result:
    """Return the metrics of a scenario, by ``engine`` "estimate" (default) or "simulate".

    ``profile`` names the measured profile of ``this-cpu``; by default the one that `calibrate`
    wrote. Without a strategy the planner chooses one.
    """
    from meshwise.prediction import predict_scenario

    return predict_scenario(load(scenario), engine, profile)


def simulate(
    scenario: Source, trace: str | Path | None = None, *, profile: str | Path | None = None
) -> Result:
    """Return the metrics by event simulation; write a Chrome trace to ``trace`` if given."""
    result = predict(scenario, "simulate", profile=profile)
    if trace is not None:
        write_trace(result, Path(trace))
    return result


def write_trace(result: Result, path: Path) -> None:
    """Write the result's timeline as a trace that ui.perfetto.dev opens."""
    from simcore.errors import InputError

    if result.timeline is None:
        raise InputError(
            "--trace needs a training step or a generation: this kind of workload has no timeline."
        )
    write_text(path, result.timeline.to_chrome_text())


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises `InputError` where that is impossible."""
    from hwmodels.profile import write_atomically
    from simcore.errors import InputError

    try:
        write_atomically(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.") from None


def plan(
    scenario: Source,
    top: int = 10,
    *,
    profile: str | Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Return the ``top`` best strategies with all their metrics, and why others are out.

    The scenario's strategy, if it names one, is ignored. Ranked by [goal], by default the
    shortest step or generation.
    """
    from meshwise.prediction import plan_scenario

    return plan_scenario(load(scenario), top, profile, progress)


def largest(scenario: Source, what: str, *, profile: str | Path | None = None) -> Result:
    """Return the largest ``what`` of a training step that fits into memory.

    ``what``: "global_batch", "microbatch", "seq_len" or "layers". The result names the next
    larger value and the bytes that it lacks.
    """
    from meshwise.sizes import largest_scenario

    return largest_scenario(load(scenario), what, profile)


def run(
    scenario: Source,
    rank: int | None = None,
    *,
    repeats: int | None = None,
    timeout_s: float | None = None,
    trace: str | Path | None = None,
    profile: str | Path | None = None,
) -> Result:
    """Really run a scenario on ranks of this machine and return what was measured.

    With ``rank`` that rank runs alone at its real shapes, its collectives replaced by their local
    traffic. Raises `RunError` where a rank dies or hangs.
    """
    from meshwise.execution import run_scenario

    result = run_scenario(load(scenario), rank, repeats, timeout_s, profile)
    if trace is not None:
        write_trace(result, Path(trace))
    return result


def validate(
    scenario: Source,
    *,
    profile: str | Path | None = None,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Predict and really run a scenario, or every case of a grid file, and compare.

    A grid's report and pictures are written into ``out``.
    """
    from meshwise.execution import is_grid, validate_grid_file, validate_scenario

    if isinstance(scenario, str | Path) and is_grid(scenario):
        return validate_grid_file(Path(scenario), profile, out, progress)
    return validate_scenario(load(scenario), profile)


def calibrate(
    path: str | Path | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> Profile:
    """Measure this machine and return its profile, written to ``path`` or the default place."""
    from meshwise.execution import calibrate_machine

    return calibrate_machine(None if path is None else Path(path), progress)


def models() -> list[str]:
    """Return the names of the catalogue's models."""
    from simcore.catalogue import model_names

    return list(model_names())


def model(name: str) -> dict[str, Any]:
    """Return all numbers of one model, its size and where they come from."""
    from simcore.catalogue import load_model, model_card
    from simcore.models import (
        active_parameter_count,
        kv_bytes_per_token,
        parameter_count,
        parameter_table,
    )

    spec, card = load_model(name), model_card(name)
    return {
        **dataclasses.asdict(spec),
        "parameters": parameter_count(spec),
        "active_parameters": active_parameter_count(spec),
        "parameter_table": parameter_table(spec),
        "kv_bytes_per_token": kv_bytes_per_token(spec),
        "aliases": list(card.aliases),
        "source": card.source,
    }


def model_rows() -> list[dict[str, Any]]:
    """Return name and size of every model of the catalogue."""
    from simcore.catalogue import load_model, model_names
    from simcore.models import active_parameter_count, parameter_count

    rows = []
    for name in model_names():
        spec = load_model(name)
        rows.append(
            {
                "name": name,
                "parameters": parameter_count(spec),
                "active_parameters": active_parameter_count(spec),
                "layers": spec.layers,
                "hidden": spec.hidden,
                "heads": spec.heads,
                "kv_heads": spec.kv_heads,
                "vocab": spec.vocab,
            }
        )
    return rows


def hardware(name: str | None = None) -> list[str] | dict[str, Any]:
    """Return the names of chips, links and clusters, or all about one of them."""
    return hardware_item(name) if name is not None else [row["name"] for row in hardware_rows()]


def accuracy(data: str | Path, sections: Sequence[str] = ()) -> tuple[str, list[dict[str, Any]]]:
    """Return the accuracy report as Markdown, and its tables as plain data.

    ``data``: folder of the calibration data; ``sections``: some of the report's, by default all.
    """
    from simcore.errors import unknown
    from validation.accuracy import report

    for name in sections:
        if name not in report.SECTIONS:
            raise unknown("section", name, report.SECTIONS)
    found = report.tables(Path(data), sections)
    rows = [
        {"section": name, **dataclasses.asdict(table)}
        for name, tables in found.items()
        for table in tables
    ]
    return report.to_markdown(found), rows


def hardware_item(name: str) -> dict[str, Any]:
    """Return all numbers of a chip, a link or a cluster, with their sources."""
    from hwmodels.catalogue import (
        chip_names,
        cluster_names,
        link_names,
        load_chip,
        load_cluster,
        load_link,
    )
    from simcore.errors import InputError, unknown

    loaders: tuple[tuple[str, Callable[[str], Any]], ...] = (
        ("chip", load_chip),
        ("link", load_link),
        ("cluster", load_cluster),
    )
    for kind, load_one in loaders:
        try:
            return {"catalogue": kind, **dataclasses.asdict(load_one(name))}
        except InputError as error:
            if not str(error).startswith("unknown"):
                raise
    raise unknown("hardware", name, {*chip_names(), *link_names(), *cluster_names()})


def roofline_picture(
    name: str, path: str | Path, data: str | Path | None = None, dtype: str = "bf16"
) -> Path:
    """Write a chip's roofline as a PNG and return its path.

    Points are the measurements of the chip under ``data``, the calibration data's folder; without
    it, what its curves give for products and attention of common shapes.
    """
    from hwmodels.catalogue import load_chip
    from meshwise.rooflines import curve_points, measured_points
    from validation.plots import roofline_figure, save_png

    chip = load_chip(name)
    points = curve_points(chip, dtype) if data is None else measured_points(chip, dtype, Path(data))
    origin = "predicted" if data is None else "measured"
    return save_png(roofline_figure(chip, points, f"{chip.name}, {origin}, {dtype}"), Path(path))


def hardware_rows() -> list[dict[str, Any]]:
    """Return kind, name and main numbers of every chip, link and cluster."""
    from hwmodels.catalogue import (
        chip_names,
        cluster_names,
        link_names,
        load_chip,
        load_cluster,
        load_link,
    )

    rows: list[dict[str, Any]] = []
    for name in chip_names():
        chip = load_chip(name)
        rates = {
            f"{dtype}_flops_per_s": chip.peak_flops_per_s.get(dtype) for dtype in ("bf16", "fp8")
        }
        rows.append(
            {
                "kind": "chip",
                "name": name,
                "vendor": chip.vendor,
                **rates,
                "memory_bytes": chip.hbm.size_bytes,
                "memory_bytes_per_s": chip.hbm.bytes_per_s,
                "power_w": chip.power_w,
            }
        )
    for name in link_names():
        link = load_link(name)
        rows.append(
            {
                "kind": "link",
                "name": name,
                "bytes_per_s": link.bytes_per_s,
                "latency_s": link.latency_s,
                "joins": link.kind,
            }
        )
    for name in cluster_names():
        cluster = load_cluster(name)
        rows.append(
            {
                "kind": "cluster",
                "name": name,
                "gpu": cluster.chip.name,
                "gpus_per_node": cluster.gpus_per_node,
                "scale_up": cluster.scale_up.name,
                "scale_out": cluster.scale_out.name,
            }
        )
    return rows


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a scenario."""
    from simcore.scenario import scenario_schema

    return scenario_schema()
