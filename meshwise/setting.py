"""Where a scenario runs: its cluster, what is known of its speed, and the memory of a rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hwmodels import curves
from hwmodels.catalogue import THIS_CPU, load_cluster, make_cluster
from hwmodels.cost import ClusterCost
from hwmodels.curves import Curve
from hwmodels.families import FAMILIES
from hwmodels.families.family import matrix_peak
from hwmodels.frameworks import Framework, FrameworkCost, arranged, load_framework
from hwmodels.hardware import Chip, Cluster
from hwmodels.hosts import NO_HOST, Host, load_host
from hwmodels.memory import CONTEXT_BYTES, communication_bytes
from hwmodels.profile import Profile, default_path, read_profile
from hwmodels.training_memory import WORKSPACE_BYTES, as_kept, find_keeping
from simcore.errors import InputError
from simcore.program import Program
from simcore.scenario import Scenario
from simcore.scenario.effect import idle_keys

TRAINING = ("train", "recommend")  # kinds of workload that a training process runs
# vLLM's default gpu_memory_utilization is 0.9: the rest is left to the driver, to the
# communication library's buffers and to fragmentation.
RESERVE_SHARE = 0.1
RESERVE_NOTE = (
    f"{RESERVE_SHARE:.0%} of a device's memory is kept in reserve (vLLM's default "
    "gpu_memory_utilization is 0.9): what a process holds there beside tensors is not known."
)
KNOWN_NOTE = (
    "kept in reserve is what a process holds beside tensors: the driver's context, the "
    "communication library's buffers, workspaces; fragmentation is not known and not in it."
)


@dataclass(frozen=True, slots=True)
class Setting:
    """A cluster, its measured profile where there is one, and the bounds of a rank's memory."""

    cluster: Cluster
    profile: Profile | None
    memory_bytes: float
    reserve_bytes: float
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    host: Host = NO_HOST
    curves: tuple[Curve, ...] | None = None
    reserve: Mapping[str, float] = field(default_factory=dict)  # its parts, where they are known
    framework: Framework | None = None  # as which training is priced and its memory counted

    @property
    def reserve_note(self) -> str:
        """What the reserve stands for."""
        return KNOWN_NOTE if self.reserve else RESERVE_NOTE

    def held(self, program: Program) -> Program:
        """Return the program with what the framework keeps beside its buffers, if one is named."""
        framework = self.framework
        if framework is None or not framework.keeps:
            return program
        keeping = find_keeping(framework.keeps)
        return as_kept(program, keeping, unfused=framework.attention == "unfused")

    def cost(self, mesh: Mapping[str, int]) -> ClusterCost:
        """Return the cost model of a mesh over this cluster."""
        return ClusterCost(self.cluster, mesh, self.profile, host=self.host, curves=self.curves)

    def as_run(self, program: Program) -> tuple[Program, ClusterCost | FrameworkCost]:
        """Return a program as the framework orders it, and its cost model."""
        cost = self.cost(program.mesh)
        if self.framework is None:
            return program, cost
        return arranged(program, self.framework), FrameworkCost(cost, self.framework)

    def peak_flops_per_s(self, dtype: str) -> float:
        """Return what utilisation is measured against: the measured peak, or the datasheet's."""
        if self.profile is not None and self.profile.peaks.get("flops_per_s"):
            return float(self.profile.peaks["flops_per_s"])
        return matrix_peak(self.cluster.chip, dtype)

    def dtype_warnings(self, dtype: str) -> tuple[str, ...]:
        """Return a warning where the chip documents no matrix rate for ``dtype``."""
        chip = self.cluster.chip
        if self.profile is not None or dtype.removesuffix("_block") in chip.peak_flops_per_s:
            return ()
        rate = matrix_peak(chip, dtype)
        if rate == chip.vector_flops_per_s:
            return (f"{chip.name} documents no matrix rate for {dtype}: its vector rate is used.",)
        return (f"{chip.name} multiplies {dtype} in a wider format, at {rate / 1e12:.4g} TFLOP/s.",)


def scenario_cluster(scenario: Scenario) -> Cluster:
    """Return the cluster that a scenario names."""
    table = scenario.cluster
    if table.cluster is not None:
        name = table.cluster
        path = str(scenario.path(name)) if name.endswith(".toml") else name
        return load_cluster(path, table.nodes or 1)
    assert table.gpu is not None
    gpu = str(scenario.path(table.gpu)) if table.gpu.endswith(".toml") else table.gpu
    return make_cluster(
        gpu, table.gpus_per_node or 1, table.nodes or 1, table.scale_up, table.scale_out
    )


def find_profile(cluster: Cluster, path: Path | None) -> Profile | None:
    """Return the measured profile of this machine; None where there is none, or another chip."""
    if cluster.chip.name != THIS_CPU:
        return None
    if path is not None:
        return read_profile(path)
    return read_profile(default_path()) if default_path().is_file() else None


def find_curves(cluster: Cluster, path: Path | None) -> tuple[Curve, ...] | None:
    """Return the curves that price an accelerator: a user's and those shipped; None: these alone.

    A user's come from ``path``, else from where `meshwise calibrate --from` leaves them.
    """
    if cluster.chip.kind == "cpu":
        if path is not None and cluster.chip.name != THIS_CPU:
            raise InputError(
                f"a profile describes {THIS_CPU!r} or an accelerator, but the scenario runs on "
                f"{cluster.chip.name!r}: drop --profile or change [cluster].gpu."
            )
        return None
    found = path or (curves.default_path() if curves.default_path().is_file() else None)
    return None if found is None else curves.with_shipped(curves.read_curves(found))


def machine_bytes() -> float:
    """Return the main memory of this machine, 0 where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 0.0


def rank_memory_bytes(cluster: Cluster) -> float:
    """Return the memory of one rank; on this machine the ranks share its memory evenly."""
    if cluster.chip.name != THIS_CPU:
        return float(cluster.chip.hbm.size_bytes)
    whole = machine_bytes()
    return whole / cluster.gpus_per_node if whole else float(cluster.chip.hbm.size_bytes)


def _speed_notes(
    cluster: Cluster, profile: Profile | None, known: tuple[Curve, ...] | None
) -> tuple[list[str], list[str]]:
    """Return the assumptions and the warnings about where seconds come from."""
    chip = cluster.chip.name
    if profile is not None:
        about = profile.provenance
        return [
            f"seconds on {chip} come from the measured profile {profile.name!r} "
            f"({about.get('measurements', '?')} measurements, {about.get('date', 'undated')})."
        ], []
    if chip == THIS_CPU:
        return ["seconds on this-cpu are a datasheet roofline of a generic x86 core."], [
            "this machine is NOT CALIBRATED: a generic x86 core stands in, and times may be off "
            "several-fold; run 'meshwise calibrate' first."
        ]
    return [
        *_curve_notes(cluster.chip, known),
        f"links are {cluster.scale_up.name} inside a node of {cluster.gpus_per_node}"
        + (
            f" and {cluster.scale_out.name} between {cluster.nodes} nodes"
            if cluster.nodes > 1
            else ""
        )
        + ", as their datasheets state.",
    ], []


def _curve_notes(chip: Chip, known: tuple[Curve, ...] | None) -> list[str]:
    """Return which measurements price the kernels of an accelerator."""
    if chip.kind == "cpu":
        return [f"seconds on {chip.name} are a datasheet roofline, an optimistic bound."]
    found: dict[str, list[str]] = {}
    for name in FAMILIES:
        choice = curves.choose_curves(name, chip, "bf16", curves=known)
        if choice.lent:
            continue
        origin = choice.borrowed or chip.name
        found.setdefault(origin, []).append(name.replace("_", " "))
    notes = []
    for origin, names in found.items():
        kinds = ", ".join(names)
        if origin == chip.name:
            notes.append(f"kernels ({kinds}) follow curves measured on {origin}.")
        elif origin == "nowhere":
            notes.append(f"kernels ({kinds}) are a roofline with typical efficiencies, unmeasured.")
        else:
            notes.append(
                f"kernels ({kinds}) borrow the curves of {origin}, carried to {chip.name} by its "
                "datasheet."
            )
    return notes


def launching(scenario: Scenario, cluster: Cluster, profile: Profile | None) -> Host:
    """Return how kernels are launched: as the scenario says, else as the field does."""
    kind = scenario.workload.kind
    if profile is not None or cluster.chip.kind == "cpu" or kind not in _LAUNCH:
        return NO_HOST
    return load_host(scenario.run.launch or _LAUNCH[kind])


# Engines capture decoding in graphs (vLLM, SGLang and TensorRT-LLM do by default).
_LAUNCH = {"train": "eager", "recommend": "eager", "generate": "graph"}


def _launch_notes(host: Host) -> list[str]:
    if host.issue_s:
        return [f"the host issues kernels one by one, {host.issue_s * 1e6:.3g} us each."]
    if host.launch_s:
        return [f"a pass is one captured graph, launched in {host.launch_s * 1e6:.3g} us."]
    return []


def find_framework(scenario: Scenario, cluster: Cluster) -> Framework | None:
    """Return the framework that a scenario names. Raises `InputError` where it cannot run."""
    name = scenario.run.framework
    if name is None:
        return None
    if scenario.workload.kind != "train":
        raise InputError(
            f"[run].framework is for training, but [workload].kind is {scenario.workload.kind!r}: "
            "remove [run].framework."
        )
    if scenario.run.launch is not None:
        raise InputError(
            "[run].framework says itself how kernels are launched: remove [run].launch."
        )
    if cluster.chip.kind == "cpu":
        raise InputError(
            f"[run].framework counts what a host does for an accelerator, and {cluster.chip.name} "
            "is none: remove [run].framework."
        )
    return load_framework(name)


def _framework_notes(framework: Framework | None) -> list[str]:
    if framework is None:
        return []
    return [
        f"kernels, host times, waits and shares of speed are those of {framework.name}, with which "
        "measured steps were compared (docs/accuracy.md); the planner does without them."
    ]


def resolve(scenario: Scenario, profile: Path | str | None = None) -> Setting:
    """Return where ``scenario`` runs. Raises `InputError` for unknown hardware."""
    cluster = scenario_cluster(scenario)
    framework = find_framework(scenario, cluster)
    path = Path(profile) if profile is not None else None
    found, known = find_profile(cluster, path), find_curves(cluster, path)
    memory = rank_memory_bytes(cluster)
    assumptions, warnings = _speed_notes(cluster, found, known)
    host = launching(scenario, cluster, found)
    reserve = known_reserve(scenario, cluster)
    strategy = scenario.strategy()
    return Setting(
        cluster,
        found,
        memory,
        sum(reserve.values()) if reserve else RESERVE_SHARE * memory,
        (*assumptions, *(_framework_notes(framework) or _launch_notes(host))),
        (*warnings, *(idle_keys(strategy) if strategy else ())),
        host,
        known,
        reserve,
        framework,
    )


def known_reserve(scenario: Scenario, cluster: Cluster) -> dict[str, float]:
    """Return what a training process holds beside tensors, by part; {} where that is not known.

    It was observed on Nvidia's chips. An inference engine sets a share of the memory aside.
    """
    if scenario.workload.kind not in TRAINING or cluster.chip.vendor != "nvidia":
        return {}
    return {
        "context": CONTEXT_BYTES,
        "communication": communication_bytes(cluster.world),
        "workspace": WORKSPACE_BYTES,
    }
