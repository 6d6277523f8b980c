"""Recommendation models: bytes by closed form, and steps on ranks equal to the dense network's."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from machines import Wires, cluster_cost

import meshwise as mw
from simcore.accounting import step_totals
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.estimate import estimate, lower_bound, serial_sum
from simcore.liveness import activation_peaks, residents
from simcore.recommendation import Recommender, lower_recommender

WIDE = Recommender("wide", 16, 100_000, 64, 13, (512, 256), (512, 256))


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_machines_agree(ranks: int) -> None:
    program = lower_recommender(WIDE, ranks, 2048)
    cost = cluster_cost(program)
    for network in (cost, Wires()):
        found = estimate(program, cost, network).step_s
        for options in ({"detail": False}, {"detail": True}, {"every_rank": True}):
            other = simulate(program, cost, network, **options).step_s
            assert other == pytest.approx(found, rel=1e-9)
    assert lower_bound(program, cost) <= found * (1 + 1e-9)
    assert found <= serial_sum(program, cost, cost) * (1 + 1e-9)


def test_bytes_are_the_closed_forms() -> None:
    """Rows travel out and, as gradients, back; the networks' gradients do not see the tables."""
    for tables in (8, 16, 32):
        model = Recommender("one", tables, 1000, 32, 13, (64,), (64,))
        payload = step_totals(lower_recommender(model, 4, 256), 0).payload_bytes
        assert payload["all_to_all", "dp_replicate"] == 2 * 256 * tables * 32 * 4 / 4
        above = 32 + tables * (tables + 1) // 2
        dense = 14 * 64 + 65 * 32 + (above + 1) * 64 + 65 * 2
        assert payload["all_reduce", "dp_replicate"] == dense * 4
        assert model.dense_parameters == dense


def test_tables_are_shared_out_and_have_no_other_state() -> None:
    held = [residents(lower_recommender(WIDE, ranks, 2048), 0).parts for ranks in (1, 4)]
    tables = 16 * 100_000 * 64 * 4
    dense = WIDE.dense_parameters * 4
    assert held[0]["weights"] == tables + dense
    assert held[1]["weights"] == tables / 4 + dense
    assert held[1]["optimizer"] == 2 * dense


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(InputError, match="tables = 16 is not a multiple of the 3"):
        lower_recommender(WIDE, 3, 3 * 64)
    with pytest.raises(InputError, match="60 would be"):
        lower_recommender(WIDE, 4, 62)


SCENARIO = {
    "model": {"kind": "recommender", "tables": 16, "rows": 1000, "dim": 32, "features": 13},
    "cluster": {"gpu": "a100-sxm-80gb", "gpus_per_node": 4},
    "workload": {"kind": "recommend", "global_batch": 256},
}


def changed(table: str, **keys: object) -> dict[str, object]:
    return {**SCENARIO, table: {**SCENARIO.get(table, {}), **keys}}


def test_a_scenario_is_the_programs_step() -> None:
    """Both engines agree, and tell the program's memory and the network's size."""
    found = [mw.predict(SCENARIO, engine) for engine in ("estimate", "simulate")]
    first, second = (each.metrics for each in found)
    assert second["step_s"] == pytest.approx(first["step_s"], rel=1e-9)
    assert first["samples_per_s"] == 256 / first["step_s"]
    program = lower_recommender(Recommender("", 16, 1000, 32, 13), 4, 256)
    peak = residents(program, 0).total + activation_peaks(program, 0)[0]
    assert first["peak_memory_bytes"] == peak
    dense = 14 * 32 + (32 + 17 * 16 // 2 + 1) * 2
    assert found[0].provenance["parameters"] == 16 * 1000 * 32 + dense


@pytest.mark.parametrize(
    ("table", "keys", "sentence"),
    [
        ("model", {"kind": "recomender"}, "did you mean 'recommender'"),
        ("model", {"row": 4}, "row is not a key of a .model. of kind recommender: did you mean"),
        ("model", {"layers": 4}, "layers is not a key of a .model. of kind recommender"),
        ("model", {"below": [4.5]}, r"below\[0\] must be a whole number"),
        ("model", {"tables": 6}, "tables = 6 is not a multiple of the 4 ranks"),
        ("workload", {"global_batch": 63}, "global_batch = 63 .* 60 would be"),
        ("workload", {"kind": "train", "seq_len": 8}, "give .workload..kind = 'recommend'"),
        ("parallel", {"tp": 4}, "has no meaning for a workload of kind 'recommend'"),
    ],
)
def test_a_wrong_scenario_is_one_sentence(
    table: str, keys: dict[str, object], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        mw.load_scenario(changed(table, **keys))


def test_other_networks_are_not_recommended() -> None:
    with pytest.raises(InputError, match="must be a recommender"):
        mw.load_scenario({**SCENARIO, "model": {"name": "llama-2-7b"}})
    with pytest.raises(InputError, match=r"rows is not a key of \[model\]: it belongs to a"):
        mw.load_scenario({**SCENARIO, "model": {"name": "llama-2-7b", "rows": 3}})
    with pytest.raises(InputError, match="a plan needs"):
        mw.plan(SCENARIO)


# ------------------------------------------------------------------------------- on real ranks

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from backends.data import sample  # noqa: E402
from backends.launch import Job, RunOptions, RunResult, run_many  # noqa: E402
from backends.recommend_ops import TABLE_RATE  # noqa: E402
from backends.weights import dense_weight  # noqa: E402

SEED, BATCH, STEPS = 3, 8, 3
SMALL = Recommender("small", 4, 11, 6, 5, (7,), (9,))
EXACT = RunOptions(SEED, STEPS - 1, 1, dtype="fp64", dump=("losses", "gradients"), timeout_s=60)
COUNTED = RunOptions(SEED, 1, 0, track_memory=True, count_flops=True, timeout_s=60)


@cache
def results() -> list[RunResult]:
    program = lower_recommender(SMALL, 2, BATCH)
    return run_many([Job(program, EXACT), Job(program, COUNTED)])


class Network(nn.Module):
    """The whole network on one device, with a table per feature."""

    def __init__(self) -> None:
        super().__init__()
        program = lower_recommender(SMALL, 1, BATCH)

        def weight(name: str) -> nn.Parameter:
            whole = dense_weight(name, -1, program.buffers[name], 1, SEED, torch.float64)
            return nn.Parameter(whole)

        self.tables = nn.ParameterList(nn.Parameter(t) for t in weight("tables.table").data)
        names = [n for n in program.buffers if n.startswith("mlp.") and n[4] in "wb" and len(n) > 6]
        self.dense = nn.ParameterDict({n[4:]: weight(n) for n in names})

    def forward(self, dense: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        p = self.dense
        x = F.relu(F.linear(dense, p["wbelow0"], p["bbelow0"]))
        x = F.relu(F.linear(x, p["wbelow1"], p["bbelow1"]))
        rows = [x, *(table[index[:, t]] for t, table in enumerate(self.tables))]
        products = [
            (rows[i] * rows[j]).sum(1) for i in range(len(rows)) for j in range(i + 1, len(rows))
        ]
        y = F.relu(
            F.linear(torch.cat((x, torch.stack(products, 1)), 1), p["wabove0"], p["babove0"])
        )
        return F.linear(y, p["wabove1"], p["babove1"])


@pytest.mark.distributed
def test_steps_equal_the_dense_networks() -> None:
    """Losses of three steps, so descent on the tables is right too, and the dense gradients."""
    program, network = lower_recommender(SMALL, 2, BATCH), Network()
    dense, index, clicked = (
        torch.stack(parts)
        for parts in zip(*(sample(SEED, i, program) for i in range(BATCH)), strict=True)
    )
    adam = torch.optim.Adam(network.dense.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    descent = torch.optim.SGD(network.tables.parameters(), lr=TABLE_RATE)
    losses, gradients = [], {}
    for _ in range(STEPS):
        adam.zero_grad()
        descent.zero_grad()
        loss = F.cross_entropy(network(dense.double(), index), clicked)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = gradients or {n: p.grad.clone() for n, p in network.dense.items()}
        adam.step()
        descent.step()
    exact = results()[0]
    assert exact.losses == pytest.approx(losses, rel=1e-10)
    assert losses[2] < losses[1] < losses[0]
    for rank in exact.ranks:
        (flat,) = rank.arrays.values()
        for name, gradient in gradients.items():
            held = program.buffers[f"mlp.{name}"]
            part = flat[held.offset : held.offset + held.elements]
            np.testing.assert_allclose(part, gradient.numpy().ravel(), rtol=1e-9, atol=1e-13)


@pytest.mark.distributed
def test_ranks_move_hold_and_do_what_the_program_says() -> None:
    program = lower_recommender(SMALL, 2, BATCH)
    for rank in results()[1].ranks:
        totals = step_totals(program, 0)
        assert rank.payload_bytes == dict(totals.payload_bytes)
        assert rank.flops == totals.flops
        assert rank.peak_live_bytes == residents(program, 0).total + activation_peaks(program, 0)[0]


@pytest.mark.distributed
def test_a_scenario_is_run_and_compared() -> None:
    small = changed("cluster", gpu="this-cpu", gpus_per_node=2) | {"run": {"repeats": 1}}
    found = mw.validate(small, profile=None).metrics
    rows, dense = 2 * 256 * 16 * 32 * 4 / 2, 14 * 32 + (32 + 17 * 16 // 2 + 1) * 2
    for rank in found["ranks"]:
        moved = {"all_to_all.dp_replicate": rows, "all_reduce.dp_replicate": dense * 4}
        assert rank["payload_bytes"] == moved
    assert found["error"] == found["predicted_step_s"] / found["measured_step_s"] - 1
