"""Chips, links and clusters: every file loads, states its sources and agrees with known facts."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from hwmodels import catalogue
from hwmodels.catalogue import (
    DATA,
    chip_names,
    cluster_names,
    default_scale_out,
    link_names,
    load_chip,
    load_cluster,
    load_link,
    make_cluster,
)
from simcore.errors import InputError

NUMERIC = ("peak_flops_per_s", "vector_flops_per_s", "units", "clock_hz", "launch_s", "power_w")


@pytest.fixture(autouse=True)
def _no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own calibration must not decide a test."""
    monkeypatch.setattr(catalogue, "PROFILE_PATHS", ())


@pytest.mark.parametrize("name", chip_names())
def test_chip_file_is_whole(name: str) -> None:
    chip = load_chip(name)
    assert chip.name == name
    for key in NUMERIC:
        assert key in chip.sources, f"{name}: no source for {key}"
    for tier in chip.tiers:
        assert f"tiers.{tier.name}" in chip.sources
    for link in (chip.scale_up, chip.host_link):
        assert not link or load_link(link).bytes_per_s > 0
    assert (chip.price_per_hour is None) or re.search(
        r"20\d\d-\d\d", chip.sources["price_per_hour"]
    )
    assert load_link(default_scale_out(chip)).bytes_per_s > 0


@pytest.mark.parametrize("name", chip_names())
def test_memory_is_faster_the_nearer(name: str) -> None:
    tiers = load_chip(name).tiers
    assert [t.bytes_per_s for t in tiers] == sorted((t.bytes_per_s for t in tiers), reverse=True)
    assert [t.size_bytes for t in tiers] == sorted(t.size_bytes for t in tiers)


@pytest.mark.parametrize("name", link_names())
def test_link_file_is_whole(name: str) -> None:
    link = load_link(name)
    table = tomllib.loads((DATA / "links" / f"{name}.toml").read_text())
    assert link.name == name
    for key in set(table) - {"name", "aliases", "kind", "sources"}:
        assert key in link.sources, f"{name}: no source for {key}"
    assert link.peer_rate_bytes_per_s <= link.bytes_per_s


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("nvlink3", 300e9),
        ("nvlink4", 450e9),
        ("nvlink5", 900e9),
        ("pcie3x16", 15.754e9),
        ("pcie5x16", 63.0e9),
        ("ib-hdr-200x8", 25e9),
        ("ib-ndr-400x8", 50e9),
        ("ib-ndr-400x1", 50e9),
        ("ethernet-100g", 12.5e9),
        ("slingshot11", 25e9),
    ],
)
def test_link_rates(name: str, rate: float) -> None:
    assert load_link(name).bytes_per_s == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("name", cluster_names())
def test_cluster_file_is_whole(name: str) -> None:
    cluster = load_cluster(name, nodes=3)
    assert (cluster.name, cluster.world) == (name, 3 * cluster.gpus_per_node)
    sources = tomllib.loads((DATA / "clusters" / f"{name}.toml").read_text())["sources"]
    assert {"gpus_per_node", "scale_up", "scale_out"} <= set(sources)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("H100", "h100-sxm-80gb"),
        ("h100_sxm", "h100-sxm-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb"),
        ("A100-SXM4-40GB", "a100-sxm-40gb"),
        ("GB200", "gb200"),
    ],
)
def test_common_spellings(spelling: str, name: str) -> None:
    assert load_chip(spelling).name == name


@pytest.mark.parametrize("load", [load_chip, load_link, load_cluster])
def test_unknown_name(load: object) -> None:
    with pytest.raises(InputError, match="unknown"):
        load("no-such-thing")  # type: ignore[operator]


def test_unknown_name_suggests() -> None:
    with pytest.raises(InputError, match="h100-sxm-80gb"):
        load_chip("h100-sxm-81gb")


def test_nics_are_shared_by_a_node() -> None:
    eight = make_cluster("h100", 8, 2, scale_out="ib-ndr-400x8")
    one = make_cluster("h100", 8, 2, scale_out="ib-ndr-400x1")
    four = make_cluster("h100", 4, 2, scale_out="ib-ndr-400x8")
    plain = make_cluster("h100", 4, 2, scale_out="ib-ndr-400")
    rates = [c.scale_out.bytes_per_s for c in (eight, one, four, plain)]
    assert rates == [50e9, 6.25e9, 100e9, 50e9]


def test_only_nics_take_a_count() -> None:
    with pytest.raises(InputError, match="only NICs"):
        load_link("nvlink4x8")


@pytest.mark.parametrize(("gpus", "nodes"), [(0, 1), (8, 0), (True, 1), (2.5, 1)])
def test_bad_cluster_sizes(gpus: int, nodes: int) -> None:
    with pytest.raises(InputError, match="whole number"):
        make_cluster("h100", gpus, nodes)


def test_own_file(tmp_path: Path) -> None:
    """A new chip is one file, found by its path."""
    text = (DATA / "chips" / "t4.toml").read_text().replace('"t4"', '"my-chip"', 1)
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert load_chip(str(path)).name == "my-chip"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("units = 40", "", "missing key 'units'"),
        ("units = 40", "units = 40.5", "units = 40.5 must be"),
        ("units = 40", "units = 40\nclock = 3", "did you mean 'clock_hz'"),
        ("units = 40", "units = ", "not a TOML file"),
        ('name = "hbm"', 'name = "ram"', 'no "hbm"'),
        ("fp16 = ", "fp17 = ", "dtype"),
        ("size_bytes", "size", "tiers\\[0\\]"),
        ("power_w = 70", "power_w = -70", "above 0"),
    ],
)
def test_bad_files_name_file_key_and_remedy(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = (DATA / "chips" / "t4.toml").read_text()
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=says) as error:
        load_chip(str(path))
    assert "bad.toml" in str(error.value)


def test_missing_file() -> None:
    with pytest.raises(InputError, match="check the path"):
        load_chip("nowhere/none.toml")


def test_this_cpu_without_profile_says_so() -> None:
    chip = load_chip("this-cpu")
    assert (chip.name, chip.calibrated) == ("this-cpu", False)
    assert "not calibrated" in chip.sources["profile"]


def test_this_cpu_reads_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DATA / "chips" / "generic-cpu.toml").read_text()
    text = text.replace('"generic-cpu"', '"this-cpu"', 1).replace("units = 1", "units = 2")
    path = tmp_path / "this-cpu.toml"
    path.write_text("calibrated = true\n" + text + '\n[profile]\ndate = "2026-01-01"\n')
    assert load_chip("this-cpu", profile=path).calibrated
    monkeypatch.setattr(catalogue, "PROFILE_PATHS", (tmp_path / "none.toml", path))
    assert load_chip("this-cpu").units == 2


def test_looking_up_a_name_reads_one_file() -> None:
    catalogue._read.cache_clear()
    load_chip("h100-sxm-80gb")
    assert catalogue._read.cache_info().currsize == 1
