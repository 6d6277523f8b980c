"""The other tables of a scenario, and the scenario itself."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Discriminator, Field, PrivateAttr, Strict, Tag, model_validator

from simcore.errors import InputError
from simcore.models import ModelSpec
from simcore.recommendation import Recommender
from simcore.scenario.faults import FaultsTable
from simcore.scenario.fields import (
    Capacity,
    CodecName,
    Degree,
    Flag,
    Metric,
    Module,
    RepeatedLayers,
    Schedule,
    Seconds,
    StageLayers,
    Table,
    Text,
    key_of,
    library_name,
    refusal,
)
from simcore.scenario.lengths import lengths_of
from simcore.scenario.model import MODEL_DTYPES, ModelTable
from simcore.scenario.recommender import MODEL_TABLES, RecommenderTable, model_tag
from simcore.scenario.workloads import (
    CollectiveWorkload,
    GenerateWorkload,
    MixerWorkload,
    OpWorkload,
    RecommendWorkload,
    TrainWorkload,
)
from simcore.strategy import ParallelStrategy
from simcore.workloads import CollectiveCall, Generation, OpCall, RecommendStep, TrainStep, Workload


class ClusterTable(Table):
    """The hardware: a chip and how many, or a whole cluster by name or file."""

    gpu: Text | None = key_of("Chip: a catalogue name.", None)
    gpus_per_node: Degree | None = key_of(
        "Chips in one node; with gpu, 1 by default.", None, unit="chips"
    )
    nodes: Degree | None = key_of("Nodes; with gpu, 1 by default.", None, unit="nodes")
    scale_up: Text | None = key_of("Link inside a node; by default the chip's own.", None)
    scale_out: Text | None = key_of("Link between nodes; by default the catalogue's.", None)
    cluster: Text | None = key_of(
        "Cluster: a catalogue name, or a path relative to the scenario's folder; "
        "nodes may override its own.",
        None,
    )

    @property
    def world(self) -> int | None:
        """Number of ranks, or None where only the named cluster knows it."""
        if self.cluster is not None:
            return None
        return (self.gpus_per_node or 1) * (self.nodes or 1)

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.cluster is None and self.gpu is None:
            raise refusal("names no hardware: give gpu, or cluster.")
        for key in ("gpu", "gpus_per_node", "scale_up", "scale_out"):
            if self.cluster is not None and getattr(self, key) is not None:
                raise refusal("and cluster exclude each other: keep one of them.", key)
        if (self.world or 1) > 10**7:
            raise refusal("x gpus_per_node is more than 10000000 ranks: lower one.", "nodes")
        return self


class ParallelTable(Table):
    """The parallel strategy. World = pp x dp_replicate x dp_shard x cp x tp."""

    strategy: Literal["auto"] | None = key_of(
        "auto lets the planner choose, as does leaving the table out.", None
    )
    dp_replicate: Degree = key_of("Data-parallel replicas.", 1, unit="ranks")
    dp_shard: Degree = key_of("Data-parallel ranks that share a replica.", 1, unit="ranks")
    tp: Degree = key_of("Tensor-parallel degree.", 1, unit="ranks")
    pp: Degree = key_of("Pipeline stages.", 1, unit="ranks")
    cp: Degree = key_of("Ranks that share each sequence.", 1, unit="ranks")
    cp_kind: Literal[
        "ring",
        "token_ring",
        "lightseq",
        "ulysses",
        "dsp",
        "servers",
        "usp",
        "lasp",
        "lasp2",
        "zeco",
    ] = key_of(
        "How they attend: blocks of keys and values on a ring; queries on a ring, outputs sent "
        "back; keys to later ranks, while idle ranks take over queries; heads traded for rows by "
        "all-to-all; rows of one axis of a grid for those of the other, between layers; blocks of "
        "queries with their keys on any rank, evenly; or ring and all-to-all, cp = cp_ring x "
        "cp_ulysses. With linear layers: their states from rank to rank (lasp), gathered (lasp2), "
        "or in slices from rank to rank (zeco).",
        "ring",
    )
    cp_layout: Literal["zigzag", "striped", "contiguous"] = key_of(
        "Rows that a place on the ring holds: one early and one late run, every n-th, or one run.",
        "zigzag",
    )
    cp_ring: Degree = key_of("Ring part of cp, for usp.", 1, unit="ranks")
    cp_ulysses: Degree = key_of("Ulysses part of cp, for usp.", 1, unit="ranks")
    cp_window: Annotated[int, Strict(), Field(ge=0, le=10**6)] = key_of(
        "Ranks of an inner ring, for a double ring; 0: one ring.", 0, unit="ranks"
    )
    cp_slices: Annotated[int, Strict(), Field(ge=0, le=10**6)] = key_of(
        "Slices of a state, for zeco; 0: 4.", 0, unit="slices"
    )
    task_rows: Annotated[int, Strict(), Field(ge=0, le=10**9)] = key_of(
        "With servers: most query rows of a task; 0: an eighth of those of a rank.",
        0,
        unit="rows",
    )
    ping_pong: Annotated[bool, Strict()] = key_of(
        "With servers: two halves of a microbatch take turns, so that one computes while the "
        "other's rows travel.",
        False,
    )
    ep: Degree = key_of(
        "Ranks that share out the experts of a layer, out of dp x cp x tp.", 1, unit="ranks"
    )
    etp: Degree | None = key_of(
        "Ranks that split each expert: tp, or with sequence_parallel 1, which are the defaults.",
        None,
        unit="ranks",
    )
    capacity_factor: Capacity | None = key_of(
        "Rows that an expert takes from a rank, over the even share; more are dropped. By default "
        "none is dropped where ep is 1, and 1.0 elsewhere.",
        None,
    )
    balance: Literal["drawn", "static", "flexsp", "hdp", "zeppelin"] | None = key_of(
        "How sequences of unequal length are given to groups of ranks: as drawn; balanced over "
        "groups of cp ranks (the default); groups of different size; as few ranks for each as "
        "memory allows; or split to even shares, short ones local.",
        None,
    )
    microbatch: Degree = key_of("Sequences of one microbatch on one replica.", 1, unit="sequences")
    schedule: Schedule = key_of("Pipeline schedule, or a CSV file with one.", "1f1b")
    update_every: Annotated[int, Strict(), Field(ge=0, le=1_000_000)] = key_of(
        "Microbatches of one update, in a schedule that updates while others are under way; 0: the "
        "fewest that it allows.",
        0,
        unit="microbatches",
    )
    virtual_stages: Degree = key_of("Stages on one pipeline rank.", 1, unit="stages")
    layers_per_stage: StageLayers = key_of(
        "Layers of every stage; empty: split evenly.", (), unit="layers"
    )
    zero_stage: Annotated[int, Strict(), Field(ge=0, le=3)] | None = key_of(
        "What data-parallel ranks shard: 0 nothing, 1 optimizer states, 2 also gradients, 3 also "
        "weights; by default 3 where dp_shard > 1, else 0.",
        None,
    )
    sequence_parallel: Flag = key_of("Whether norms shard the sequence over tp ranks.", False)
    backup_workers: Annotated[int, Strict(), Field(ge=0, le=1_000_000)] = key_of(
        "Data ranks that a step does not wait for; the gradients of the last ones are dropped.",
        0,
        unit="ranks",
    )
    grad_codec: CodecName = key_of("8-bit code in which data ranks exchange gradients.", "none")
    error_feedback: Flag = key_of(
        "Whether what coding gradients loses is added to those of the next step.", False
    )
    act_codec: CodecName = key_of(
        "8-bit code in which pipeline stages exchange activations and their gradients.", "none"
    )
    recompute: Literal["none", "selective", "keep_attention", "full"] = key_of(
        "What backward computes again: nothing, some modules of a layer, all but the output of "
        "attention, or all of it.",
        "none",
    )
    recompute_modules: tuple[Module, ...] = key_of(
        "With selective: whose results are computed again; empty: attention's.", ()
    )
    recompute_layers: RepeatedLayers = key_of(
        "How many layers of every stage recompute, the first ones: a number, or a list of one per "
        "stage; empty: all.",
        (),
        unit="layers",
    )

    stream_chunks: Degree = key_of(
        "Chunks of a sequence that forward and backward of every layer go through one by one, "
        "layers keeping their input alone.",
        1,
        unit="chunks",
    )
    swap_fraction: Annotated[float, Strict(), Field(ge=0, le=1)] | None = key_of(
        "Share of every layer's tokens whose activations go to host memory and back, those of the "
        "others being computed again; attention's output and the layer's input go whole.",
        None,
    )
    loss_chunks: Annotated[int, Strict(), Field(ge=0, le=10**6)] = key_of(
        "Chunks of a microbatch's rows that the head and its backward go through one by one; 0: "
        "stream_chunks.",
        0,
        unit="chunks",
    )

    @model_validator(mode="after")
    def _check_auto(self) -> Self:
        given = sorted(self.model_fields_set - {"strategy", "microbatch"})
        if self.strategy == "auto" and given:
            raise refusal(
                f'= "auto" leaves the choice to the planner: remove {given[0]}.', "strategy"
            )
        stages = self.pp * self.virtual_stages
        if self.layers_per_stage and len(self.layers_per_stage) != stages:
            raise refusal(
                f"lists {len(self.layers_per_stage)} stages but pp x virtual_stages = {stages}: "
                "make them agree.",
                "layers_per_stage",
            )
        return self

    def resolve(self, microbatch: int | None) -> ParallelStrategy:
        """Return the strategy, with ``microbatch`` where it is known."""
        skip = ("strategy", "microbatch")
        values = {key: getattr(self, key) for key in type(self).model_fields if key not in skip}
        return ParallelStrategy(microbatch=microbatch or self.microbatch, **values)


class DecodingTable(Table):
    """How tokens are produced."""

    method: Literal["autoregressive"] = key_of("Decoding method.", "autoregressive")


class GoalTable(Table):
    """What a plan is to make small or large: one metric of the workload's kind."""

    minimise: Metric | None = key_of("Metric to make small.", None)
    maximise: Metric | None = key_of("Metric to make large.", None)

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.minimise is None) == (self.maximise is None):
            raise refusal("needs exactly one of minimise and maximise.")
        return self


class RunTable(Table):
    """How a real or simulated run is made."""

    seed: Annotated[int, Strict(), Field(ge=0, le=2**32 - 1)] = key_of("Seed of every draw.", 0)
    backend: Literal["auto", "cpu", "gpu"] = key_of("Where a real run takes place.", "auto")
    repeats: Annotated[int, Strict(), Field(ge=1, le=10**6)] = key_of(
        "Measured repeats.", 5, unit="runs"
    )
    warmup: Annotated[int, Strict(), Field(ge=0, le=10**6)] = key_of(
        "Repeats before the measured ones.", 2, unit="runs"
    )
    timeout_s: Seconds = key_of("Time after which a real run is stopped.", 600.0, unit="seconds")
    launch: Literal["eager", "graph"] | None = key_of(
        "How an accelerator's kernels are launched: one by one, or captured in a graph; by default "
        "eager for training, graph for generation.",
        None,
    )
    framework: Annotated[str, Strict(), Field(min_length=1)] | None = key_of(
        "The training framework whose kernels, host times, waits and memory are to be counted: "
        "ideal, megatron-lm, nanotron or fsdp; by default every op is one kernel of an eager host.",
        None,
    )


class Scenario(Table):
    """One question: which model, on which cluster, laid out how, doing what."""

    model: (
        Annotated[
            Annotated[ModelTable, Tag("network")] | Annotated[RecommenderTable, Tag("recommender")],
            Discriminator(model_tag),
        ]
        | None
    ) = key_of("The network; train, generate and recommend need it.", None)
    cluster: ClusterTable = key_of("The hardware.")
    parallel: ParallelTable | None = key_of(
        "The parallel strategy; without it the planner chooses.", None
    )
    workload: Annotated[
        TrainWorkload
        | GenerateWorkload
        | RecommendWorkload
        | CollectiveWorkload
        | Annotated[OpWorkload, Field(discriminator="op")],
        Field(discriminator="kind"),
    ] = key_of("What is to be run; the other keys depend on kind, and on op.")
    decoding: DecodingTable | None = key_of("How a generation produces tokens.", None)
    goal: GoalTable | None = key_of("What a plan is to reach.", None)
    run: RunTable = key_of("How a run is made.", RunTable())
    faults: FaultsTable | None = key_of("What goes wrong in a long training run.", None)

    _folder: Path = PrivateAttr(default_factory=Path)

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._folder

    @property
    def world(self) -> int | None:
        """Number of ranks of the cluster, or None where only the named cluster knows it."""
        return self.cluster.world

    @property
    def microbatch(self) -> int | None:
        """Sequences of one microbatch, or None where the scenario leaves it open."""
        if self.parallel is not None and "microbatch" in self.parallel.model_fields_set:
            return self.parallel.microbatch
        return getattr(self.workload, "microbatch", None)

    def path(self, name: str) -> Path:
        """Return the file that a relative ``name`` in the scenario stands for."""
        return self._folder / name

    def model_spec(self) -> ModelSpec:
        """Return the network, its dtypes overridden where the scenario names them."""
        table = self.model
        if table is None:
            raise InputError("the table [model] is missing: give name, hf_config or the numbers.")
        if isinstance(table, RecommenderTable):
            raise InputError(
                "[model] is a recommender, which has no layers of a transformer: give [workload]."
                "kind = 'recommend', or another model."
            )
        if table.hf_config is not None:
            config = importlib.import_module("simcore.hf_config")
            spec: ModelSpec = config.load_hf_config(self.path(table.hf_config))
        elif table.inline:
            spec = table.inline_spec()
        else:
            spec = importlib.import_module("simcore.catalogue").load_model(table.name)
        dtypes = {key: getattr(table, key) for key in MODEL_DTYPES if getattr(table, key)}
        return dataclasses.replace(spec, **dtypes)

    def recommender(self) -> Recommender:
        """Return the recommendation model. Raises `InputError` where [model] is none."""
        if not isinstance(self.model, RecommenderTable):
            raise InputError(
                "[model] must be a recommender for a workload of kind 'recommend': give kind = "
                "'recommender', tables, rows, dim and features."
            )
        return self.model.recommender()

    def strategy(self) -> ParallelStrategy | None:
        """Return the parallel strategy, or None where the planner is to choose."""
        if self.parallel is None or self.parallel.strategy == "auto":
            return None
        return self.parallel.resolve(self.microbatch)

    def work(self) -> Workload:
        """Return what is to be run."""
        table = self.workload
        if isinstance(table, TrainWorkload):
            params = table.params_dtype or ""
            count, longest = table.global_batch, table.seq_len
            lengths: tuple[int, ...] = ()
            if table.lengths is not None:
                lengths = lengths_of(table.lengths, self._folder, count, longest)
            return TrainStep(
                table.global_batch,
                longest,
                table.optimizer,
                params,
                table.grads_dtype,
                lengths=lengths,
                documents=table.documents,
            )
        if isinstance(table, GenerateWorkload):
            return Generation(table.batch, table.input_tokens, table.output_tokens)
        if isinstance(table, RecommendWorkload):
            return RecommendStep(table.global_batch)
        if isinstance(table, CollectiveWorkload):
            size, library = float(table.bytes), library_name(table.implementation)
            return CollectiveCall(table.op, size, table.ranks, table.dtype, library)
        mixer = (table.mixer, table.form) if isinstance(table, MixerWorkload) else ("", "")
        library = library_name(table.implementation)
        return OpCall(table.op, table.dims(), table.dtype, library, *mixer)


KIND_TABLES: dict[str, type[Table]] = {
    "train": TrainWorkload,
    "generate": GenerateWorkload,
    "recommend": RecommendWorkload,
    "collective": CollectiveWorkload,
}
OP_TABLES: dict[str, type[Table]] = {
    op: table
    for table in get_args(OpWorkload)
    for op in get_args(table.model_fields["op"].annotation)
}
KINDS = (*KIND_TABLES, "op")
TABLE_CLASSES: dict[str, type[Table]] = {  # but for [model] and [workload], which are several
    "cluster": ClusterTable,
    "parallel": ParallelTable,
    "decoding": DecodingTable,
    "goal": GoalTable,
    "run": RunTable,
    "faults": FaultsTable,
}
TABLES = ("model", "cluster", "parallel", "workload", "decoding", "goal", "run", "faults")


def class_of(name: str, raw: object) -> type[Table]:
    """Return the class of a raw table, [workload] apart; what [model] is depends on its kind."""
    return MODEL_TABLES[model_tag(raw)] if name == "model" else TABLE_CLASSES[name]


def homes_of(key: str) -> list[str]:
    """Return the tables, or kinds of workload, that have a key of this name."""
    found = ["[model]"] if key in ModelTable.model_fields else []
    found += [f"[{name}]" for name, table in TABLE_CLASSES.items() if key in table.model_fields]
    if key in RecommenderTable.model_fields:
        found.append("a [model] of kind recommender")
    found += [f"a {kind} [workload]" for kind, t in KIND_TABLES.items() if key in t.model_fields]
    found += [f"a {op} [workload]" for op, table in OP_TABLES.items() if key in table.model_fields]
    return found
