"""Pipeline schedules: closed forms, orders against torch's own, activations in flight."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from machines import LLAMA, Constant, Wires, strategy

from simcore.engine import simulate
from simcore.estimate import estimate
from simcore.liveness import activation_peaks
from simcore.lower import lower_training
from simcore.ops import Buffer, Op
from simcore.program import Action, Block, Call, Program
from simcore.schedules import SCHEDULES
from simcore.workloads import TrainStep

SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (3, 8), (4, 2), (4, 4), (4, 16), (8, 5), (8, 32)]
FORWARD_S, BACKWARD_S = 0.7, 1.9


def uniform(schedule: str, stages: int, microbatches: int) -> Program:
    """Return a program whose every stage has one forward op and one backward op."""

    def op(kind: str, reads: tuple[str, ...], writes: tuple[str, ...]) -> Op:
        return Op(kind, {"t": 1, "n": 1, "m": 1, "k": 1}, "fp32", reads, writes)

    def message(kind: str, channel: str, step: int) -> Op:
        name = "h" if channel == "F" else "d.h"
        reads, writes = ((name,), ()) if kind == "send" else ((), (name,))
        return Op(
            kind,
            {"n": 1},
            "fp32",
            reads,
            writes,
            f"{kind}_{channel.lower()}",
            "pp",
            {"peer": step if kind == "send" else -step, "channel": channel},
        )

    blocks = {
        "F": op("gelu", ("h",), ("h+",)),
        "B": op("gelu_backward", ("d.h+", "h"), ("d.h",)),
        **{
            f"{kind}_{c}": message(kind, c, 1 if c == "F" else -1)
            for kind in ("send", "recv")
            for c in "FB"
        },
    }
    bodies: dict[str, tuple[Call, ...]] = {}
    for s in range(stages):
        bodies |= {f"{s}F": (Call("F", s),), f"{s}B": (Call("B", s),)}
        bodies |= {
            f"{s}SEND_F": (Call("send_F", s + 1),),
            f"{s}RECV_F": (Call("recv_F", s),),
            f"{s}SEND_B": (Call("send_B", s),),
            f"{s}RECV_B": (Call("recv_B", s + 1),),
        }
    order = []
    for s, actions in enumerate(SCHEDULES[schedule](stages, microbatches)):
        mine: list[Action] = []
        for action in actions:
            forward = action.kind == "F"
            channel = "F" if forward else "B"
            if (s > 0) if forward else (s < stages - 1):
                mine.append(action._replace(kind=f"RECV_{channel}"))
            mine.append(action)
            if (s < stages - 1) if forward else (s > 0):
                mine.append(action._replace(kind=f"SEND_{channel}"))
        order.append(tuple(mine))
    buffers = {name: Buffer((1,), "fp32") for name in ("h", "d.h")}
    return Program(
        {"pp": stages},
        {n: Block(n, (o,)) for n, o in blocks.items()},
        buffers,
        bodies,
        tuple(order),
        tuple(range(stages)),
    )


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "count"), SIZES)
def test_uniform_stages_take_the_closed_form(schedule: str, stages: int, count: int) -> None:
    """(m + p - 1)(t_F + t_B), of which p - 1 in m + p - 1 are bubble (Narayanan et al. 2021)."""
    program = uniform(schedule, stages, count)
    cost = Constant({"gelu": FORWARD_S, "gelu_backward": BACKWARD_S})
    rounds = count + stages - 1
    for synchronous in (False, True):
        cost = replace(cost, synchronous=synchronous)
        for found in (
            estimate(program, cost, Wires()),
            simulate(program, cost, Wires(), detail=False),
            simulate(program, cost, Wires(), detail=True),
        ):
            assert found.step_s == pytest.approx(rounds * (FORWARD_S + BACKWARD_S), rel=1e-9)
            assert found.bubble_fraction == pytest.approx(
                (stages - 1) / rounds, rel=1e-9, abs=1e-12
            )
            assert found.exposed_communication_fraction == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("stages", "count"), [(p, m) for p, m in SIZES if 8 % p == 0])
def test_lowered_pipelines_take_the_closed_form(stages: int, count: int) -> None:
    """The same of a real network, where only its layers' attention takes time."""
    model = replace(LLAMA, layers=8)
    for schedule in ("gpipe", "1f1b"):
        parallel = strategy("one", pp=stages, schedule=schedule)
        program = lower_training(model, parallel, TrainStep(count, 64))
        cost = Constant({"attention": FORWARD_S, "attention_backward": BACKWARD_S})
        found = estimate(program, cost, Wires()).step_s
        closed = (count + stages - 1) * (8 / stages) * (FORWARD_S + BACKWARD_S)
        assert found == pytest.approx(closed, rel=1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "count"), SIZES)
def test_every_microbatch_once_and_forward_first(schedule: str, stages: int, count: int) -> None:
    for stage, actions in enumerate(SCHEDULES[schedule](stages, count)):
        assert len(set(actions)) == len(actions) == 2 * count
        for microbatch in range(count):
            forward, back = (actions.index(Action(stage, kind, microbatch)) for kind in "FB")
            assert forward < back


@pytest.mark.parametrize(("stages", "count"), [(p, m) for p, m in SIZES if m >= p])
def test_orders_equal_torch(stages: int, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("torch.distributed.pipelining.schedules")
    fake: Any = SimpleNamespace(_num_stages=stages, _n_microbatches=count)
    gpipe = theirs.ScheduleGPipe._get_pipeline_order(fake)
    for rank in range(stages):
        assert _texts(SCHEDULES["gpipe"](stages, count)[rank]) == _texts(gpipe[rank])
        warm = stages - 1 - rank
        listed = theirs._get_1f1b_rank_ops(
            1, stages, warm, count - warm, warm, rank, lambda _, r=rank: r, lambda _, r=rank: r
        )
        assert _texts(SCHEDULES["1f1b"](stages, count)[rank]) == _texts(listed)


def _texts(actions: Any) -> list[str]:
    """Return forwards and backwards in torch's notation."""
    kept = [str(action) for action in actions if action is not None]
    return [text for text in kept if "REDUCE" not in text]


@pytest.mark.parametrize(("stages", "count"), [(2, 1), (2, 4), (4, 2), (4, 8), (8, 3), (8, 12)])
def test_activations_in_flight(stages: int, count: int) -> None:
    """Stage s keeps min(p - s, m) microbatches under 1F1B, m under GPipe."""
    model = replace(LLAMA, layers=8)

    def levels(schedule: str, microbatches: int, stage: int) -> float:
        parallel = strategy("one", pp=stages, schedule=schedule)
        program = lower_training(model, parallel, TrainStep(microbatches, 64))
        found = activation_peaks(program, stage)[1]
        return max(level for action, level in found if action.kind == "F")

    for stage in range(stages):
        one = levels("gpipe", 3, stage) - levels("gpipe", 2, stage)
        received = 64 * model.hidden * 2.0  # receives are posted one action ahead
        for schedule, expected in (("gpipe", count), ("1f1b", min(stages - stage, count))):
            held = levels(schedule, count, stage)
            assert one * expected - 1e-6 <= held <= one * expected + 2 * received
