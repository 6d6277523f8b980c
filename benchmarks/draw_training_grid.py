"""Draws `examples/training_grid.toml`: training strategies at random, from a seed, unseen.

python benchmarks/draw_training_grid.py > examples/training_grid.toml

The cases are drawn before any of them is run or priced; what the scenario or the lowering refuses
is drawn anew. Every world size goes round its kinds of strategy, so that each occurs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from simcore.errors import InputError
from simcore.lower import lower_training
from simcore.scenario import make_scenario
from simcore.schedules import SCHEDULES
from simcore.strategy import check_strategy
from simcore.workloads import TrainStep

SEED = 20261121
CASES = {1: 4, 2: 24, 4: 20}  # ranks -> cases
FORMATS = {"weights_dtype": "fp32", "kv_dtype": "fp32", "compute_dtype": "fp32"}
MODELS: dict[str, dict[str, Any]] = {
    "deep": {"layers": 8, "hidden": 256, "heads": 8, "kv_heads": 4, "ffn": 704, "vocab": 2048},
    "wide": {"layers": 4, "hidden": 512, "heads": 8, "kv_heads": 8, "ffn": 1408, "vocab": 4096},
    "experts": {
        "layers": 4,
        "hidden": 256,
        "heads": 8,
        "kv_heads": 4,
        "ffn": 704,
        "vocab": 2048,
        "experts": 8,
        "experts_per_token": 2,
        "moe_ffn": 352,
    },
}
DENSE = ("deep", "wide")
ORDERS = (  # the schedules that there were when the grid was drawn
    *("1f1b", "gpipe", "interleaved", "looped_bfs", "zb_h1", "zb_h2", "interleaved_zb", "zbv"),
    *("dualpipev", "dualpipe", "hanayo", "chimera", "bitpipe"),
)
Draw = np.random.Generator
Table = dict[str, Any]


def pick(draw: Draw, *values: Any) -> Any:
    """Return one of the values."""
    return values[int(draw.integers(len(values)))]


def data(draw: Draw, world: int) -> Table:
    """Data parallelism at a random sharding stage."""
    axis = pick(draw, "dp_replicate", "dp_shard")
    return {axis: world, "zero_stage": pick(draw, 0, 1, 2, 3)} if world > 1 else {}


def tensor(draw: Draw, world: int) -> Table:
    """Tensor parallelism, with or without sharded tokens."""
    return {"tp": world, "sequence_parallel": pick(draw, True, False)} if world > 1 else {}


def pipeline(draw: Draw, world: int) -> Table:
    """Any schedule."""
    name = pick(draw, *ORDERS)
    stages = SCHEDULES[name].stages_per_rank or 2
    return {"pp": world, "schedule": name, "virtual_stages": stages}


def sequence(draw: Draw, world: int) -> Table:
    """A ring, a ring of queries, an exchange, or two of these in a mesh."""
    kind = pick(draw, "ring", "token_ring", "ulysses", *(["usp", "window"] if world > 2 else []))
    table: Table = {"cp": world, "cp_kind": "ring" if kind == "window" else kind}
    if kind == "usp":
        table |= {"cp_ring": 2, "cp_ulysses": world // 2}
    if kind == "window":
        table["cp_window"] = 2
    if kind != "ulysses":
        table["cp_layout"] = pick(draw, "zigzag", "striped", "contiguous")
    return table


def experts(draw: Draw, world: int) -> Table:
    """Experts whole, exchanged, or split, over data-parallel ranks."""
    table = data(draw, world)
    if world > 1 and pick(draw, True, True, False):
        table |= {"ep": world, "capacity_factor": pick(draw, 1.0, 1.25, 2.0)}
    return table


def mixed(draw: Draw, world: int) -> Table:
    """Two kinds at once, two ranks each."""
    first, second = draw.choice(len(SIMPLE), 2, replace=False)
    return {**SIMPLE[int(first)](draw, 2), **SIMPLE[int(second)](draw, 2)}


def mixed_experts(draw: Draw, world: int) -> Table:
    """Experts over two data-parallel ranks, beside another kind."""
    return {**experts(draw, 2), **pick(draw, tensor, pipeline, sequence)(draw, 2)}


SIMPLE = (data, tensor, pipeline, sequence)
KINDS = {
    1: (data, experts),
    2: (data, pipeline, sequence, experts, tensor, pipeline),
    4: (mixed, pipeline, sequence, mixed_experts, mixed),
}


def drawn(draw: Draw, world: int, number: int) -> Table:
    """Return a case, which may not be allowed."""
    kind = KINDS[world][number % len(KINDS[world])]
    model = "experts" if kind in (experts, mixed_experts) else pick(draw, *DENSE)
    seq_len = pick(draw, 128, 256)
    batch = 1024 // seq_len * pick(draw, 1, 2)
    parallel = {**kind(draw, world), "microbatch": pick(draw, 1, 1, 2)}
    if pick(draw, False, False, False, True):
        parallel["recompute"] = "full"
    return {
        "model": model,
        "cluster": {"gpus_per_node": world},
        "parallel": parallel,
        "workload": {"kind": "train", "global_batch": batch, "seq_len": seq_len},
    }


def allowed(case: Mapping[str, Any]) -> bool:
    """Whether the case can be run."""
    try:
        scenario = make_scenario(
            model={**FORMATS, **MODELS[case["model"]]},
            cluster={"gpu": "this-cpu", **case["cluster"]},
            parallel=case["parallel"],
            workload=case["workload"],
        )
        strategy, step = scenario.strategy(), scenario.work()
        assert strategy is not None
        assert isinstance(step, TrainStep)
        check_strategy(scenario.model_spec(), strategy, strategy.world)
        lower_training(scenario.model_spec(), strategy, step)
    except InputError:
        return False
    return True


def text_of(case: Mapping[str, Any], name: str) -> str:
    """Return a case in TOML."""

    def inline(table: Mapping[str, Any]) -> str:
        return "{ " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in table.items()) + " }"

    lines = ["[[case]]", f'name = "{name}"', f'model = "{case["model"]}"']
    lines += [f"{k} = {inline(case[k])}" for k in ("cluster", "parallel", "workload")]
    return "\n".join(lines)


def grid() -> str:
    """Return the grid file."""
    parts = [
        "# `meshwise validate examples/training_grid.toml`: strategies of training, really run on\n"
        f"# one, two and four ranks of this machine. Drawn with seed {SEED} before any was\n"
        "# run, by `python benchmarks/draw_training_grid.py`.",
        'title = "Training strategies on CPU ranks"',
        '[defaults.cluster]\ngpu = "this-cpu"',
        "[defaults.run]\nrepeats = 5\nwarmup = 1\ntimeout_s = 120.0",
    ]
    for name, table in MODELS.items():
        rows = [f"{k} = {json.dumps(v)}" for k, v in {**table, **FORMATS}.items()]
        parts.append("\n".join([f"[models.{name}]", *rows]))
    for world, count in CASES.items():
        draw = np.random.default_rng([SEED, world])
        seen: list[Table] = []
        while len(seen) < count:
            case = drawn(draw, world, len(seen))
            if case not in seen and allowed(case):
                seen.append(case)
                parts.append(text_of(case, f"{world} ranks {len(seen):02d}, {case['model']}"))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(grid())
