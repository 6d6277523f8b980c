"""Chips against what silicon allows: rates per clock, orders of formats, memory, names, sources."""

from __future__ import annotations

import csv
import re
import tomllib
from pathlib import Path

import pytest

from hwmodels.catalogue import (
    DATA,
    chip_names,
    cluster_names,
    default_scale_out,
    link_names,
    load_chip,
    load_cluster,
    load_link,
)
from hwmodels.hardware import Chip

FILES = tuple(name for name in chip_names() if name != "this-cpu")
ACCELERATORS = tuple(name for name in FILES if load_chip(name).kind != "cpu")
WANTED = (
    "p100",
    "v100-sxm-16gb",
    "v100-sxm-32gb",
    "t4",
    "a10",
    "a30",
    "a40",
    "a100-pcie-40gb",
    "a100-pcie-80gb",
    "a100-sxm-40gb",
    "a100-sxm-80gb",
    "a800-sxm-80gb",
    "l4",
    "l40s",
    "rtx-3090",
    "rtx-4090",
    "rtx-5090",
    "rtx-6000-ada",
    "rtx-pro-6000",
    "h20",
    "h100-pcie-80gb",
    "h100-sxm-80gb",
    "h100-nvl-94gb",
    "h800-sxm-80gb",
    "h200-sxm-141gb",
    "h200-nvl-141gb",
    "gh200",
    "b200-sxm-180gb",
    "b300-sxm-288gb",
    "gb200",
    "gb300",
    "mi210",
    "mi250x",
    "mi300x",
    "mi325x",
    "mi355x",
    "tpu-v3",
    "tpu-v4",
    "tpu-v5e",
    "tpu-v5p",
    "tpu-v6e",
    "trainium2",
    "gaudi2",
    "gaudi3",
    "ascend-910",
    "ascend-910b",
    "m2-ultra",
    "epyc-9654",
    "xeon-8480",
)

# Dense 16-bit FLOPs of one unit per clock, from the architecture white papers (SM, CU, TensorCore).
PER_CLOCK = {
    "pascal": 256,
    "volta": 1024,
    "turing": 1024,
    "ampere": 2048,
    "ampere-ga102": 1024,
    "ada": 1024,
    "hopper": 4096,
    "blackwell": 8192,
    "blackwell-gb202": 1024,
    "cdna2": 1024,
    "cdna3": 2048,
    "cdna4": 4096,
    "tpu-v3": 2 * 2 * 128**2,
    "tpu-v4": 2 * 4 * 128**2,
    "tpu-v5e": 2 * 4 * 128**2,
    "tpu-v5p": 2 * 4 * 128**2,
    "tpu-v6e": 2 * 4 * 256**2,
}
# GeForce cards halve the rate of fp32 accumulation; the H20's matrix units run at a quarter.
CUT = {"rtx-3090": 2, "rtx-4090": 2, "rtx-5090": 2, "h20": 4}


def _half(chip: Chip) -> float:
    """Return the 16-bit matrix rate."""
    peaks = chip.peak_flops_per_s
    return peaks.get("bf16") or peaks["fp16"]


@pytest.mark.parametrize("name", WANTED)
def test_wanted_chip_is_there(name: str) -> None:
    chip = load_chip(name)
    assert chip.name == name
    assert chip.architecture
    assert chip.on_chip_bytes > 0 or chip.kind == "cpu"


@pytest.mark.parametrize("name", FILES)
def test_every_number_has_a_source(name: str) -> None:
    table = tomllib.loads((DATA / "chips" / f"{name}.toml").read_text(encoding="utf-8"))
    plain = {"name", "vendor", "aliases", "kind", "tiers", "sources"}
    keys = (set(table) - plain) | {f"tiers.{tier['name']}" for tier in table["tiers"]}
    assert keys == set(table["sources"])
    for key in {"price_per_hour", "price_usd"} & keys:
        assert re.search(r"20\d\d-[01]\d", table["sources"][key]), f"{name}: {key} has no date"


@pytest.mark.parametrize("name", FILES)
def test_narrower_formats_are_no_slower(name: str) -> None:
    chip = load_chip(name)
    peaks = chip.peak_flops_per_s
    for chain in (("fp32", "tf32", "bf16", "fp8", "nvfp4"), ("fp32", "fp16", "int8", "int4")):
        rates = [peaks[dtype] for dtype in chain if dtype in peaks]
        if chain[-1] == "int4" and name in ("b300-sxm-288gb", "gb300"):
            rates = rates[:2]  # Blackwell Ultra gave up integer products for narrow floats
        assert rates == sorted(rates)
    assert chip.vector_flops_per_s <= _half(chip)
    if chip.vendor in ("nvidia", "amd") and chip.kind != "cpu" and "bf16" in peaks:
        assert peaks["bf16"] == peaks["fp16"]
    if "fp8" in peaks:
        assert peaks["fp8"] / peaks["bf16"] == pytest.approx(
            round(peaks["fp8"] / peaks["bf16"]), 0.03
        )


@pytest.mark.parametrize("name", FILES)
def test_peak_is_units_times_clock(name: str) -> None:
    """A wrong count or clock, or a sparse figure taken for a dense one, would show here."""
    chip = load_chip(name)
    if chip.architecture not in PER_CLOCK:
        assert chip.vendor not in ("nvidia", "google"), "say what one unit does per clock"
        return
    per_clock = PER_CLOCK[chip.architecture] / CUT.get(name, 1)
    assert _half(chip) / (chip.units * chip.clock_hz) == pytest.approx(per_clock, rel=0.02)


@pytest.mark.parametrize("name", ACCELERATORS)
def test_main_memory_is_physical(name: str) -> None:
    """One sweep over the memory takes 15 to 300 ms on every accelerator built so far."""
    memory = load_chip(name).hbm
    assert 0.015 < memory.size_bytes / memory.bytes_per_s < 0.3
    assert 10e9 < memory.size_bytes < 400e9


@pytest.mark.parametrize("name", ACCELERATORS)
def test_balance_is_plausible(name: str) -> None:
    """FLOPs per byte: from the first half-precision GPUs to the matrix-heavy chips of 2025."""
    chip = load_chip(name)
    assert 20 < _half(chip) / chip.hbm.bytes_per_s < 700


@pytest.mark.parametrize("name", ACCELERATORS)
def test_cache_feeds_no_unit_beyond_its_port(name: str) -> None:
    """An SM or CU takes at most 64 bytes a clock from the last-level cache."""
    chip, cache = load_chip(name), load_chip(name).tier("l2")
    if chip.vendor in ("nvidia", "amd"):
        assert cache is not None, f"{name}: no l2"
        assert 8 < cache.bytes_per_s / (chip.units * chip.clock_hz) < 70
        assert cache.size_bytes < 0.01 * chip.hbm.size_bytes


@pytest.mark.parametrize("name", FILES)
def test_links_of_a_chip_exist(name: str) -> None:
    chip = load_chip(name)
    for link in (chip.scale_up, chip.host_link):
        assert not link or load_link(link).kind != "nic"
    assert load_link(default_scale_out(chip)).kind in ("nic", "bus")


@pytest.mark.parametrize("name", link_names())
def test_a_mesh_is_a_whole_number_of_wires(name: str) -> None:
    """A rank's rate is that of its wires together."""
    link = load_link(name)
    if link.kind == "mesh":
        assert link.peer_bytes_per_s is not None
        wires = link.bytes_per_s / link.peer_bytes_per_s
        assert wires == pytest.approx(round(wires), rel=1e-6)


def test_names_and_aliases_are_unique_over_the_files_of_a_kind() -> None:
    for folder in ("chips", "links", "clusters"):
        owner: dict[str, str] = {}
        for path in (DATA / folder).glob("*.toml"):
            table = tomllib.loads(path.read_text(encoding="utf-8"))
            for spelling in (path.stem, *table.get("aliases", ())):
                key = re.sub(r"[\s_/]+", "-", spelling.strip().lower())
                assert owner.setdefault(key, path.stem) == path.stem, spelling
            assert table["name"] == path.stem


@pytest.mark.parametrize(
    ("device", "name"),
    [  # as torch.cuda.get_device_name says
        ("Tesla V100-SXM2-16GB", "v100-sxm-16gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb"),
        ("NVIDIA H100 NVL", "h100-nvl-94gb"),
        ("NVIDIA H200", "h200-sxm-141gb"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200-sxm-180gb"),
        ("NVIDIA B300 SXM6 AC", "b300-sxm-288gb"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("TPU v5 lite", "tpu-v5e"),
    ],
)
def test_device_names_resolve(device: str, name: str) -> None:
    assert load_chip(device).name == name


@pytest.mark.parametrize(
    ("name", "chip", "ranks", "out_bytes_per_s"),
    [  # a rank's share of its node's adapters
        ("dgx-h100", "h100-sxm-80gb", 8, 50e9),
        ("hgx-b300", "b300-sxm-288gb", 8, 100e9),
        ("gb300-nvl72", "gb300", 72, 100e9),
        ("p4d.24xlarge", "a100-sxm-40gb", 8, 6.25e9),
        ("p5.48xlarge", "h100-sxm-80gb", 8, 50e9),
        ("trn2.48xlarge", "trainium2", 16, 25e9),
        ("gaudi3-node", "gaudi3", 8, 75e9),
        ("mi300x-platform", "mi300x", 8, 50e9),
        ("tpu-v5e-host", "tpu-v5e", 8, 3.125e9),
        ("l40s-box", "l40s", 8, 12.5e9 / 8),
    ],
)
def test_clusters(name: str, chip: str, ranks: int, out_bytes_per_s: float) -> None:
    cluster = load_cluster(name, nodes=2)
    assert (cluster.chip.name, cluster.gpus_per_node) == (chip, ranks)
    assert cluster.scale_out.bytes_per_s == pytest.approx(out_bytes_per_s)


def test_clusters_use_links_of_their_chips() -> None:
    """A cluster's scale-up link is its chip's own, unless a bridge is added to PCIe cards."""
    for name in cluster_names():
        cluster = load_cluster(name)
        own = cluster.chip.scale_up
        assert cluster.scale_up.name == own or own.startswith("pcie"), name


# Where the outside table and our source differ, and why.
KNOWN_DIFFERENCES = {
    ("gpu.mem_capacity", "l4"),  # nominal there, as reported with ECC here
    ("gpu.mem_bw", "rtx-pro-6000"),  # the workstation edition's there
    ("gpu.fp4_tc_flops", "b300-sxm-288gb"),  # 14 there; the box's 108 PFLOPS over 8 are 13.5
}


def test_agrees_with_an_outside_table(data_dir: Path) -> None:
    """Every system of the table has a chip; figures agree within 1 %."""
    lines = (data_dir / "specs" / "system_specs.csv").read_text(encoding="utf-8").splitlines()
    for row in csv.DictReader(lines):
        chip = load_chip(row["system"])
        peaks = chip.peak_flops_per_s
        ours = {
            "gpu.mem_bw": chip.hbm.bytes_per_s,
            "gpu.mem_capacity": chip.hbm.size_bytes,
            "gpu.bfloat16_tc_flops": peaks.get("bf16"),
            "gpu.int8_tc_flops": peaks.get("int8"),
            "gpu.fp8_tc_flops": peaks.get("fp8"),
            "gpu.fp4_tc_flops": peaks.get("nvfp4"),
            "gpu.float32_tc_flops": peaks.get("fp32"),
            "gpu.power": chip.power_w,
        }
        for key, value in ours.items():
            if row[key] and value is not None:
                agrees = value == pytest.approx(float(row[key]), rel=0.01)
                assert agrees != ((key, chip.name) in KNOWN_DIFFERENCES), f"{chip.name} {key}"
