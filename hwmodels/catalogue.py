"""Look-up of chips, links and clusters by name, alias or path of a .toml file.

A new chip, link or cluster is one file in ``hwmodels/data``: nothing is registered. A file whose
stem is the name asked for is read alone; the others are read only to look for an alias.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from hwmodels.hardware import Chip, Cluster, Link, MemoryTier
from simcore.dtypes import DTYPE_BYTES
from simcore.errors import InputError, nearest, unknown

DATA = Path(__file__).parent / "data"
THIS_CPU = "this-cpu"
# Where a calibration of the machine at hand is looked for, first hit wins.
PROFILE_PATHS = (Path.home() / ".meshwise" / "this-cpu.toml", DATA / "profiles" / "this-cpu.toml")
LINK_KINDS = ("switch", "mesh", "bus", "nic")

Table = Mapping[str, Any]
T = TypeVar("T")

# key -> (check, what a good value looks like); True in third place: required.
_POSITIVE = (lambda v: _number(v) and v > 0, "a number above 0")
_NOT_NEGATIVE = (lambda v: _number(v) and v >= 0, "a number, 0 or above")
_COUNT = (lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0, "a whole number >= 1")
_TEXT = (lambda v: isinstance(v, str) and bool(v), "a non-empty string")
_FLAG = (lambda v: isinstance(v, bool), "true or false")
_NAMES = (
    lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
    "a list of strings",
)
_TABLE = (lambda v: isinstance(v, dict), "a table")
_SOURCES = (
    lambda v: isinstance(v, dict) and all(isinstance(x, str) and x for x in v.values()),
    'a table of key = "source"',
)
_RATES = (
    lambda v: isinstance(v, dict) and bool(v) and all(_number(x) and x > 0 for x in v.values()),
    "a table of dtype = FLOP/s, each above 0",
)
_TIERS = (lambda v: isinstance(v, list) and bool(v), "a list of [[tiers]] tables")
_CHIP_KIND = (lambda v: v in ("accelerator", "cpu"), "accelerator or cpu")
_KIND = (lambda v: v in LINK_KINDS, f"one of {', '.join(LINK_KINDS)}")
_SHARE = (lambda v: _number(v) and 0 < v <= 1, "a number above 0, at most 1")

Rule = tuple[tuple[Callable[[Any], bool], str], bool]
_CHIP_KEYS: dict[str, Rule] = {
    "name": (_TEXT, True),
    "vendor": (_TEXT, True),
    "aliases": (_NAMES, False),
    "peak_flops_per_s": (_RATES, True),
    "vector_flops_per_s": (_POSITIVE, True),
    "tiers": (_TIERS, True),
    "units": (_COUNT, True),
    "clock_hz": (_POSITIVE, True),
    "launch_s": (_NOT_NEGATIVE, True),
    "power_w": (_POSITIVE, True),
    "scale_up": (_TEXT, False),
    "host_link": (_TEXT, False),
    "price_per_hour": (_NOT_NEGATIVE, False),
    "price_usd": (_POSITIVE, False),
    "calibrated": (_FLAG, False),
    "kind": (_CHIP_KIND, False),
    "architecture": (_TEXT, False),
    "on_chip_bytes": (_POSITIVE, False),
    "process_nm": (_POSITIVE, False),
    "sources": (_SOURCES, True),
    "profile": (_TABLE, False),
}
_TIER_KEYS: dict[str, Rule] = {
    "name": (_TEXT, True),
    "size_bytes": (_POSITIVE, True),
    "bytes_per_s": (_POSITIVE, True),
}
_LINK_KEYS: dict[str, Rule] = {
    "name": (_TEXT, True),
    "aliases": (_NAMES, False),
    "bytes_per_s": (_POSITIVE, True),
    "latency_s": (_NOT_NEGATIVE, True),
    "duplex": (_FLAG, False),
    "kind": (_KIND, False),
    "peer_bytes_per_s": (_POSITIVE, False),
    "nics_per_node": (_COUNT, False),
    "efficiency": (_SHARE, False),
    "base_s": (_NOT_NEGATIVE, False),
    "sources": (_SOURCES, True),
}
_CLUSTER_KEYS: dict[str, Rule] = {
    "name": (_TEXT, True),
    "aliases": (_NAMES, False),
    "gpu": (_TEXT, True),
    "gpus_per_node": (_COUNT, True),
    "scale_up": (_TEXT, False),
    "scale_out": (_TEXT, False),
    "sources": (_SOURCES, True),
}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")


def _key(name: str) -> str:
    """Return the spelling that names are compared by: lower case, dashes."""
    return re.sub(r"[\s_/]+", "-", str(name).strip().lower())


def _check(table: Table, keys: Mapping[str, Rule], where: str) -> None:
    """Raise `InputError` for an unknown, missing or ill-typed key, naming file, key and remedy."""
    for key, value in table.items():
        if key not in keys:
            near = nearest(key, keys)
            remedy = f"did you mean {near!r}?" if near else f"known keys: {', '.join(keys)}."
            raise InputError(f"{where}: unknown key {key!r}: {remedy}")
        (good, expected), _ = keys[key]
        if not good(value):
            raise InputError(f"{where}: {key} = {value!r:.60} must be {expected}.")
    for key, ((_, expected), required) in keys.items():
        if required and key not in table:
            raise InputError(f"{where}: missing key {key!r}: add it, {expected}.")


@lru_cache(maxsize=256)
def _read(path: Path) -> Table:
    """Return the parsed TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file ({error}): mend that line.") from None


@lru_cache(maxsize=8)
def _names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (DATA / folder).glob("*.toml")))


def _find(folder: str, what: str, name: str) -> Path:
    """Return the file of ``name``: a path, else the file so called, else one with that alias."""
    if str(name).endswith(".toml"):
        return Path(name)
    key = _key(name)
    stems = _names(folder)
    if key in stems:
        return DATA / folder / f"{key}.toml"
    aliases: dict[str, str] = {}
    for stem in stems:
        for alias in _read(DATA / folder / f"{stem}.toml").get("aliases", ()):
            aliases[_key(alias)] = stem
    if key in aliases:
        return DATA / folder / f"{aliases[key]}.toml"
    raise unknown(what, name, stems)


def _chip(path: Path) -> Chip:
    """Return the chip of a file (units: FLOP/s, bytes, bytes/s, Hz, s, W, US dollars per hour)."""
    table = dict(_read(path))
    _check(table, _CHIP_KEYS, str(path))
    for dtype in table["peak_flops_per_s"]:
        if dtype not in DTYPE_BYTES:
            error = unknown("dtype", dtype, DTYPE_BYTES)
            raise InputError(f"{path}: peak_flops_per_s: {error}")
    table["tiers"] = _tiers(table["tiers"], path)
    table["aliases"] = tuple(table.get("aliases", ()))
    table.pop("profile", None)
    return Chip(**table)


def _tiers(rows: list[Table], path: Path) -> tuple[MemoryTier, ...]:
    for number, row in enumerate(rows):
        _check(row, _TIER_KEYS, f"{path}: tiers[{number}]")
    if not any(row["name"] == "hbm" for row in rows):
        raise InputError(f'{path}: tiers has no "hbm": add the main memory under that name.')
    return tuple(
        MemoryTier(r["name"], float(r["size_bytes"]), float(r["bytes_per_s"])) for r in rows
    )


def _link(path: Path) -> Link:
    """Return the link of a file (units: bytes/s each direction, s)."""
    table = dict(_read(path))
    _check(table, _LINK_KEYS, str(path))
    table["aliases"] = tuple(table.get("aliases", ()))
    return Link(**table)


def load_chip(name: str, profile: Path | str | None = None) -> Chip:
    """Return the chip called ``name``: a catalogue name, an alias or the path of a .toml file.

    ``this-cpu`` is read from ``profile``, else from the first of `PROFILE_PATHS` that exists, else
    it is the generic x86 core under the name "this-cpu", with ``calibrated`` False.
    """
    if _key(name) == THIS_CPU:
        return _this_cpu(profile)
    return _chip(_find("chips", "chip", name))


def _this_cpu(profile: Path | str | None) -> Chip:
    if profile is not None:
        return _chip(Path(profile))
    found = next((path for path in PROFILE_PATHS if path.is_file()), None)
    if found is not None:
        return _chip(found)
    generic = _chip(DATA / "chips" / "generic-cpu.toml")
    label = "not calibrated: a generic x86 core stands in for this machine"
    return replace(generic, name=THIS_CPU, sources={**generic.sources, "profile": label})


def load_link(name: str) -> Link:
    """Return the link called ``name``: a catalogue name, an alias or the path of a .toml file.

    A NIC's name may end in ``xN``, N adapters per node: ``ib-ndr-400x8``. Without it the file's own
    ``nics_per_node`` holds (0: one per rank). ``bytes_per_s`` is that of one adapter here;
    `make_cluster` turns it into each rank's share.
    """
    base, adapters = _adapters(name)
    link = _link(_find("links", "link", base))
    if adapters is None:
        return link
    if link.kind != "nic":
        raise InputError(f"link {name!r}: only NICs take a count, {link.name!r} is none.")
    return replace(link, name=f"{link.name}x{adapters}", nics_per_node=adapters)


def _adapters(name: str) -> tuple[str, int | None]:
    """Split "ib-ndr-400x8" into its base name and 8; names of files stay whole."""
    match = re.fullmatch(r"(.+?)x([1-9]\d{0,3})", _key(name))
    if match is None or str(name).endswith(".toml") or _key(name) in _names("links"):
        return name, None
    base, count = match.groups()
    try:
        _find("links", "link", base)
    except InputError:
        return name, None
    return base, int(count)


def load_cluster(name: str, nodes: int = 1) -> Cluster:
    """Return ``nodes`` nodes of the cluster called ``name`` (catalogue name, alias or path)."""
    path = _find("clusters", "cluster", name)
    table = _read(path)
    _check(table, _CLUSTER_KEYS, str(path))
    cluster = make_cluster(
        table["gpu"], table["gpus_per_node"], nodes, table.get("scale_up"), table.get("scale_out")
    )
    return replace(cluster, name=table["name"])


def make_cluster(
    gpu: str,
    gpus_per_node: int,
    nodes: int = 1,
    scale_up: str | None = None,
    scale_out: str | None = None,
) -> Cluster:
    """Return a cluster of ``nodes`` nodes with ``gpus_per_node`` chips each.

    ``scale_up`` defaults to the chip's own link, ``scale_out`` to `default_scale_out`. The
    scale-out bandwidth is resolved to one rank's share of its node's adapters.
    """
    for key, value in (("gpus_per_node", gpus_per_node), ("nodes", nodes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"[cluster].{key} = {value!r:.40} must be a whole number >= 1.")
    chip = load_chip(gpu)
    up = load_link(scale_up or chip.scale_up or chip.host_link or "loopback")
    out = load_link(scale_out or default_scale_out(chip))
    name = f"{chip.name} {gpus_per_node}x{nodes}"
    return Cluster(name, chip, gpus_per_node, nodes, up, out.shared(gpus_per_node))


# The adapters of the reference systems of each scale-up generation (DGX A100, DGX H100, DGX B200,
# GB200 NVL72 and MI300X platforms have one per chip, Gaudi boxes three ports of each card, TPU
# hosts share two of 100 Gb/s); anything else gets plain Ethernet.
_SCALE_OUT = {
    "nvlink3": "ib-hdr-200",
    "nvlink3-a800": "ib-hdr-200",
    "nvlink4": "ib-ndr-400",
    "nvlink4-h800": "ib-ndr-400",
    "nvlink5": "ib-ndr-400",
    "infinity-fabric-mi300x": "ib-ndr-400",
    "infinity-fabric-mi355x": "ib-ndr-400",
    "infinity-fabric-mi250x": "slingshot11x4",
    "ici-v3": "tpu-dcn",
    "ici-v4": "tpu-dcn",
    "ici-v5e": "tpu-dcn",
    "ici-v5p": "tpu-dcn",
    "ici-v6e": "tpu-dcn",
    "neuronlink3": "efa-200",
    "gaudi2-roce": "gaudi2-scale-out",
    "gaudi3-roce": "gaudi3-scale-out",
    "hccs-910b": "roce-200",
    "loopback": "loopback",
}


def default_scale_out(chip: Chip) -> str:
    """Return the name of the link between nodes that the chip's reference system has."""
    return _SCALE_OUT.get(chip.scale_up, "ethernet-100g")


def chip_names() -> tuple[str, ...]:
    """Return the catalogue names of chips, ``this-cpu`` included."""
    return tuple(sorted({*_names("chips"), THIS_CPU}))


def link_names() -> tuple[str, ...]:
    """Return the catalogue names of links; a NIC's takes a count per node behind an x."""
    return _names("links")


def cluster_names() -> tuple[str, ...]:
    """Return the catalogue names of clusters."""
    return _names("clusters")
