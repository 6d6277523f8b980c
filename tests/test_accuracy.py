"""The accuracy report and the roofline picture, on a small folder of made-up measurements."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import meshwise as mw
from hwmodels.catalogue import load_chip
from hwmodels.families import FAMILIES
from meshwise import api
from meshwise.cli import main
from simcore.errors import InputError
from validation.accuracy import kernels, report
from validation.accuracy.report import to_markdown
from validation.accuracy.table import Table, percent
from validation.datasets import kernel_samples

CHIPS = {"a100_sxm": "a100-sxm-80gb", "h100_sxm": "h100-sxm-80gb"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with products of two chips that take what their family says, plus noise."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "kernels").mkdir()
    draw = np.random.default_rng(0)
    names = [
        "hardware",
        "framework",
        "kernel_source",
        "gemm_dtype",
        "m",
        "n",
        "k",
        "latency",
        "unit",
        "source",
    ]
    for chip, name in CHIPS.items():
        with (folder / "kernels" / f"gemm_{chip}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(names)
            sizes = itertools.product(
                (1, 16, 128, 1024, 8192), (512, 1024, 2048, 4096, 8192), (512, 2048, 4096, 8192)
            )
            for m, n, k in sizes:
                shape = {"m": float(m), "n": float(n), "k": float(k)}
                family = FAMILIES["matmul"]
                seconds = float(family.seconds(shape, load_chip(name), "bf16", family.start()))
                took = seconds * 1e3 * np.exp(0.05 * draw.standard_normal(4))
                for repeat in took:  # four rows of each shape
                    rows.writerow(
                        [chip, "made 1.0", "made", "bfloat16", m, n, k, repeat, "ms", "here"]
                    )
    return folder


def test_tables_score_what_was_held_out(data: Path) -> None:
    samples = kernel_samples(data, "matmul")
    table = kernels.shapes_table("matmul", samples)
    assert len(table.rows) == 2
    for row in table.rows:
        found = dict(zip(table.columns, row, strict=True))
        assert found["rows"] == 400
        assert float(str(found["median"]).rstrip(" %")) < 6
        assert float(str(found["roofline"]).rstrip(" %")) > 10
        assert 65 <= float(str(found["in 80 % interval"]).rstrip(" %")) <= 95
    carried = kernels.generations_table("matmul", samples)
    assert {(row[0], row[1]) for row in carried.rows} == {
        ("a100-sxm-80gb", "h100-sxm-80gb"),
        ("h100-sxm-80gb", "a100-sxm-80gb"),
    }
    assert table.missed == carried.missed == ()


def test_a_missed_target_is_listed_with_its_cause(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernels.TARGETS, "matmul", (0.001, 0.001))
    table = kernels.shapes_table("matmul", kernel_samples(data, "matmul"))
    assert len(table.missed) == 2
    assert all("Cause:" in line for line in table.missed)
    text = to_markdown({"kernels": [table]})
    assert all(f"- {line}" in text for line in table.missed)


def test_the_baselines_know_nothing_of_the_model(data: Path) -> None:
    for sample in kernel_samples(data, "matmul"):
        chip = load_chip(sample.chip)
        flops = 2 * sample.shape["m"] * sample.shape["n"] * sample.shape["k"]
        assert np.all(kernels.roofline_seconds(sample) >= flops / chip.peak_flops_per_s["bf16"])
        near = kernels.neighbour_seconds(sample)
        assert np.all(near > 0)
        assert not np.array_equal(near, sample.seconds)


def test_a_table_is_markdown() -> None:
    text = Table("T", ("a", "b"), ((1, 0.12345),), ("said",)).to_markdown()
    assert text.splitlines()[0] == "### T"
    assert "| 1 | 0.123 |" in text
    assert (percent(0.051), percent(0.51)) == ("5.1 %", "51 %")


def test_sections_without_measurements_are_left_out_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(folder: Path) -> list[Table]:
        raise InputError(f"{folder} holds nothing")

    table = Table("T", ("a",), ((1,),))
    monkeypatch.setattr(report, "SECTIONS", {"here": lambda _: [table], "gone": lacking})
    assert report.tables(tmp_path) == {"here": [table]}
    with pytest.raises(InputError, match="holds nothing"):
        report.tables(tmp_path, ["here", "gone"])


def test_the_command_refuses_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["accuracy", "--data", str(tmp_path)]) == 2
    assert "holds no kernels/" in capsys.readouterr().err
    assert main(["accuracy", "--data", str(tmp_path), "--section", "kernel"]) == 2
    assert "did you mean 'kernels'" in capsys.readouterr().err


def test_a_roofline_has_the_measured_points(data: Path, tmp_path: Path) -> None:
    for folder in (None, data):
        path = tmp_path / f"{folder is None}.png"
        api.roofline_picture("A100", path, folder)
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no measurements of l40s"):
        api.roofline_picture("l40s", tmp_path / "none.png", data)


def test_hardware_show_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "roof.png"
    assert main(["hardware", "show", "H200", "--picture", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "h200-sxm-141gb"
    assert target.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("section", report.SECTIONS)
def test_the_published_report_is_what_the_command_gives(data_dir: Path, section: str) -> None:
    found = report.tables(data_dir, [section])
    published = (Path(mw.__file__).parents[1] / "docs" / "accuracy.md").read_text()
    assert published.startswith(report.INTRODUCTION)
    assert report.section_text(section, found[section]) in published
    assert all(f"- {line}" in published for table in found[section] for line in table.missed)
