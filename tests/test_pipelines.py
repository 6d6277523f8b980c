"""Pipeline schedules: orders against torch's own, bubbles and memory against published forms."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import GPT2, LLAMA, Wires, cluster_cost, strategy

from simcore.engine import simulate
from simcore.errors import InputError
from simcore.estimate import estimate
from simcore.liveness import activation_peaks
from simcore.lower import lower_pass, lower_training
from simcore.pipelines.checking import check_schedule
from simcore.pipelines.orders import Order, is_split, stage_ranks
from simcore.pipelines.text import schedule_from_text, schedule_to_text
from simcore.pipelines.unit import EQUAL, run_units
from simcore.program import Action
from simcore.scenario import make_scenario
from simcore.schedules import SCHEDULES, find_schedule
from simcore.workloads import TrainStep
from validation.plots import schedule_figure

SIZES = [(2, 4), (4, 8), (4, 16), (8, 16), (8, 32)]
EIGHT = replace(LLAMA, layers=8)
VIRTUAL = {name: s.stages_per_rank or 2 for name, s in SCHEDULES.items()}


def order_of(name: str, ranks: int, microbatches: int, virtual: int = 0) -> Order:
    return SCHEDULES[name](ranks, microbatches, virtual or VIRTUAL[name])


# ------------------------------------------------------------------------------- torch's own orders


def torch_schedules() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch.distributed.pipelining.schedules")


TORCH = [
    ("interleaved", "ScheduleInterleaved1F1B", 2),
    ("interleaved", "ScheduleInterleaved1F1B", 4),
    ("interleaved_zb", "ScheduleInterleavedZeroBubble", 3),
    ("zb_h1", "ScheduleInterleavedZeroBubble", 1),
    ("looped_bfs", "ScheduleLoopedBFS", 3),
    ("zbv", "ScheduleZBVZeroBubble", 2),
    ("dualpipev", "ScheduleDualPipeV", 2),
]


@pytest.mark.parametrize(("name", "theirs", "virtual"), TORCH)
@pytest.mark.parametrize(("ranks", "count"), [*SIZES, (2, 8), (3, 12), (5, 10)])
def test_orders_equal_torch(name: str, theirs: str, virtual: int, ranks: int, count: int) -> None:
    listed = getattr(torch_schedules(), theirs)
    rounds = max(1, count // ranks)
    fake: Any = SimpleNamespace(
        _n_microbatches=count,
        _stages=[None] * virtual,
        n_local_stages=virtual,
        num_stages=virtual * ranks,
        pp_group_size=ranks,
        microbatches_per_round=count // rounds,
    )
    for rank, actions in enumerate(order_of(name, ranks, count, virtual)):
        found = listed._calculate_single_rank_operations(fake, rank)
        texts = ",".join(str(action) for action in found if action is not None)
        assert schedule_from_text(texts) == [actions]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_torch_s_runtime_loads_the_text(name: str, tmp_path: Path) -> None:
    """Loaded, given messages by torch, and simulated by torch's own checker to the end."""
    theirs = torch_schedules()
    order = order_of(name, 4, 8)
    path = tmp_path / "schedule.csv"
    path.write_text(schedule_to_text(order))
    ranks = stage_ranks(order)
    runtime = object.__new__(theirs._PipelineScheduleRuntime)
    runtime.pipeline_order, runtime._n_microbatches = {}, 8
    runtime._num_stages, runtime.pp_group_size = len(ranks), 4
    runtime._stages, runtime.rank = [SimpleNamespace(stage_index_to_group_rank={})], 0
    if SCHEDULES[name].copies > 1:  # torch knows no second copy: parsing is all it can do
        rows = path.read_text().splitlines()
        assert [[str(theirs._Action.from_str(c)) for c in row.split(",")] for row in rows] == [
            [str(action) for action in actions] for actions in order
        ]
        return
    runtime._defer_pp_recv = False
    runtime._load_csv(str(path), "compute_only")
    assert runtime.stage_index_to_group_rank == dict(enumerate(ranks))
    loaded = {rank: list(actions) for rank, actions in runtime.pipeline_order.items()}
    messages = theirs._add_send_recv(loaded, ranks.__getitem__, len(ranks))
    simulated = theirs._simulate_comms_compute(messages, ranks.__getitem__, len(ranks))
    for rank, actions in enumerate(order):
        run = [str(a) for a in simulated[rank] if a is not None and a.is_compute_op]
        assert run == [str(action) for action in actions]
        assert [str(action) for action in runtime.pipeline_order[rank]] == [
            str(action) for action in actions
        ]


# ------------------------------------------------------------------------------- bubbles


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubbles_are_the_published_ones(p: int, m: int) -> None:
    """Idle over busy time, with F = I = W and B = I + W (units of one F).

    Narayanan et al. 2021: (p - 1) / m, and 1 / v of it interleaved. Lamy-Poirier 2023: the same
    breadth first. Qi et al. 2023: ZB-H1 a third, ZB-H2 and ZB-V none between a rank's first and
    last action.
    """
    plain = (p - 1) / m
    for name in ("1f1b", "gpipe"):
        assert run_units(order_of(name, p, m)).bubble_ratio == pytest.approx(plain)
    for name in ("interleaved", "looped_bfs"):
        for v in (2, 3, 4):
            assert run_units(order_of(name, p, m, v)).bubble_ratio == pytest.approx(plain / v)
    assert run_units(order_of("zb_h1", p, m)).bubble_ratio == pytest.approx(plain / 3)
    for name in ("zb_h2", "zbv"):
        if m >= 2 * p - 1:
            assert run_units(order_of(name, p, m)).inner_bubble_fraction == pytest.approx(0)
    assert run_units(order_of("1f1b", p, m)).inner_bubble_fraction > 0.03


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_bubbles_of_pipelines_from_both_ends(p: int) -> None:
    """With m = p and B = 2F: (p - 2) / (3p / 2) (Chimera, Li & Hoefler 2021); BitPipe's two stages

    per copy and rank halve it. The run that makes BitPipe's order misses that beyond 6 ranks.
    """
    published = (p - 2) / (1.5 * p)
    assert run_units(order_of("chimera", p, p), 2).bubble_ratio == pytest.approx(published)
    found = run_units(order_of("bitpipe", p, p), 2).bubble_ratio
    assert found == pytest.approx(published / 2, rel=1e-9 if p <= 6 else 0.1)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_more_waves_idle_less(p: int, m: int) -> None:
    """Liu et al. 2023; one wave idles less than 1F1B already."""
    ratios = [run_units(order_of("hanayo", p, m, v)).bubble_ratio for v in (2, 4)]
    assert ratios[1] < ratios[0] < (p - 1) / m


@pytest.mark.parametrize(("p", "m"), [(4, 8), (4, 16), (8, 32)])
def test_dualpipe_idles_no_more_than_published(p: int, m: int) -> None:
    """At most (p/2 - 1)(F&B + B - 3W), with F&B = F + B as nothing overlaps here.

    DeepSeek-AI 2024, table 2. On unit costs and free messages it is half of that.
    """
    found = run_units(order_of("dualpipe", p, m), 2)
    idle = found.line.step_s - found.busy[0]
    forward, back, weight = (EQUAL[kind] for kind in "FBW")
    published = (p / 2 - 1) * (forward + back + back - 3 * weight)
    assert 0 < idle <= published


# ------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_activations_in_flight_are_the_published_ones(p: int, m: int) -> None:
    """In stages of microbatches; a rank with v stages has v of them per microbatch."""

    def held(name: str, virtual: int = 0) -> tuple[int, ...]:
        order = order_of(name, p, m, virtual)
        return check_schedule(order, copies=SCHEDULES[name].copies).peak_in_flight

    assert held("1f1b") == tuple(range(p, 0, -1))
    assert held("gpipe") == (m,) * p
    for v in (2, 3):  # Narayanan et al. 2021: v p (1 + (p - 1) / (p v)) on the first rank
        each = m // (m // p)
        assert held("interleaved", v)[0] == (v - 1) * each + 2 * (p - 1) + 1
        assert held("looped_bfs", v) == (m * v,) * p
    assert held("zb_h1") == (p,) * p  # as much as 1F1B on its first rank
    assert held("zb_h2") == (2 * p - 1,) * p
    assert held("zbv") == (2 * p,) * p  # of two halves
    assert held("dualpipev") == (2 * p + 1,) * p
    assert held("dualpipe") == (p + 1,) * p  # DeepSeek-AI 2024, table 2


def test_bytes_follow_the_microbatches_in_flight() -> None:
    """ZB-V on every rank as 1F1B on its first; ZB-H2 more; an executed peak is tested elsewhere."""

    def peak(name: str) -> float:
        options: dict[str, Any] = {"virtual_stages": VIRTUAL[name], "schedule": name}
        program = lower_training(EIGHT, strategy("pp4", **options), TrainStep(16, 128))
        return max(activation_peaks(program, rank)[0] for rank in range(4))

    assert peak("zb_h2") > 1.4 * peak("zb_h1")
    assert peak("zbv") < 1.35 * peak("1f1b")
    assert peak("gpipe") > 2.5 * peak("1f1b")


# ------------------------------------------------------------------------------- checks


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    ranks=st.integers(1, 6),
    count=st.integers(1, 14),
    virtual=st.integers(1, 4),
)
def test_every_schedule_runs_or_says_why_not(
    name: str, ranks: int, count: int, virtual: int
) -> None:
    schedule = SCHEDULES[name]
    try:
        order = schedule(ranks, count, schedule.stages_per_rank or virtual)
    except InputError:  # the refusals have a test of their own
        return
    report = check_schedule(order, copies=schedule.copies)
    assert report.problems == ()
    assert report.microbatches == count
    per_rank = (schedule.stages_per_rank or virtual) * schedule.copies
    assert sorted(report.stage_rank) == sorted(list(range(ranks)) * per_rank)
    assert schedule_from_text(schedule_to_text(order)) == order


def broken(change: str) -> Order:
    order = [list(actions) for actions in order_of("zb_h1", 3, 4)]
    first = order[0]
    if change == "missing":
        first.remove(Action(0, "W", 2))
    elif change == "twice":
        first.append(Action(0, "F", 1))
    elif change == "weights first":
        i, w = first.index(Action(0, "I", 0)), first.index(Action(0, "W", 0))
        first[i], first[w] = first[w], first[i]
    elif change == "deadlock":
        order[2].reverse()
        order[2].sort(key=lambda a: "FIW".index(a.kind))
        order[0].sort(key=lambda a: a.microbatch)
    elif change == "two ranks":
        order[1][0] = order[1][0]._replace(stage=0)
    elif change == "gap":
        order[2] = [a._replace(stage=5) for a in order[2]]
    return order


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "stage 0 does F+I of microbatch 2"),
        ("twice", "0F1 occurs 2 times"),
        ("weights first", "0I0 comes after 0W0"),
        ("deadlock", "deadlocks"),
        ("two ranks", "ranks 0 and 1"),
        ("gap", "no action of stage 2"),
    ],
)
def test_faults_are_found(change: str, words: str) -> None:
    report = check_schedule(broken(change))
    assert not report.runs
    assert words in report.problems[0]


def test_stages_elsewhere_than_they_should_be_are_found() -> None:
    order = order_of("zbv", 2, 4)
    assert check_schedule(order, (0, 1, 1, 0)).runs
    assert "stage 2 is on rank 1 instead of 0" in check_schedule(order, (0, 1, 0, 1)).problems


# ------------------------------------------------------------------------------- programs


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_lowered_schedules_agree_on_every_machine(name: str) -> None:
    """Estimate and both engines give one time; wires that cost nothing give no more."""
    virtual = VIRTUAL[name]
    parallel = strategy("pp4", schedule=name, virtual_stages=virtual)
    program = lower_training(EIGHT, parallel, TrainStep(8, 64))
    order = order_of(name, 4, 8)
    assert program.stage_rank == stage_ranks(order)
    cost = cluster_cost(program)
    found = estimate(program, cost, cost).step_s
    for detail in (False, True):
        assert simulate(program, cost, cost, detail=detail).step_s == pytest.approx(found, rel=1e-6)
    assert estimate(program, cost, Wires()).step_s <= found
    kept = [[a for a in row if a.kind.rstrip("R") in ("F", "B", "I", "W")] for row in program.order]
    assert [[a._replace(kind=a.kind.rstrip("R")) for a in row] for row in kept] == order


def test_no_message_stays_on_a_rank() -> None:
    program = lower_training(
        EIGHT, strategy("pp4", schedule="zbv", virtual_stages=2), TrainStep(8, 64)
    )
    kinds = {action.body for actions in program.order for action in actions}
    assert {"3RECV_F", "4SEND_F"} <= kinds  # down to rank 3, and up again from it
    assert not {"3SEND_F", "4RECV_F", "4SEND_B", "3RECV_B"} & kinds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "zbv"}, "virtual_stages = 2"),
        ({"schedule": "1f1b", "virtual_stages": 2}, "virtual_stages = 1"),
        ({"schedule": "hanayo", "virtual_stages": 1}, "must be even"),
        ({"schedule": "zb_h1", "dp_shard": 2}, "zero_stage 0 or 1"),
        ({"schedule": "dualpipe", "pp": 4}, "even number of microbatches"),
        ({"schedule": "dualpipev", "virtual_stages": 2, "pp": 4}, "at least 8 microbatches"),
        ({"schedule": "chimera", "pp": 1}, "even pp"),
        ({"schedule": "zbw"}, "'zbv'"),
        ({"schedule": "/no/such.csv"}, "cannot be read"),
    ],
)
def test_refusals_say_what_to_do(options: dict[str, Any], words: str) -> None:
    parallel = strategy("pp", **options)
    with pytest.raises(InputError, match=words):
        lower_training(EIGHT, parallel, TrainStep(6 * parallel.dp, 64))


def test_rounds_must_be_equal() -> None:
    for name in ("interleaved", "interleaved_zb"):
        with pytest.raises(InputError, match="8 would do"):
            SCHEDULES[name](4, 9, 2)


def test_copies_of_tied_embeddings_are_refused() -> None:
    parallel = strategy("pp", schedule="chimera")
    with pytest.raises(InputError, match="one copy"):
        lower_training(GPT2, parallel, TrainStep(4, 64))


def test_a_tied_table_is_reduced_when_its_gradient_is_whole(tmp_path: Path) -> None:
    order = order_of("zbv", 2, 4)
    last = next(action for action in reversed(order[0]) if action.stage == 3)
    order[0].remove(last)
    order[0].append(last)
    path = tmp_path / "late.csv"
    path.write_text(schedule_to_text(order))
    parallel = strategy("pp", schedule=str(path), virtual_stages=2)
    assert lower_training(LLAMA, parallel, TrainStep(4, 64)).stage_rank == (0, 1, 1, 0)
    with pytest.raises(InputError, match="first stage's last action"):
        lower_training(GPT2, parallel, TrainStep(4, 64))


def test_generation_has_one_stage_per_rank() -> None:
    with pytest.raises(InputError, match="virtual_stages"):
        lower_pass(EIGHT, strategy("pp", virtual_stages=2), 2, 4, 0)


# ------------------------------------------------------------------------------- files


def test_a_schedule_from_a_file_runs_like_the_named_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(schedule_to_text(order_of("zbv", 2, 6)))
    programs = [
        lower_training(EIGHT, strategy("pp", schedule=name, virtual_stages=2), TrainStep(6, 64))
        for name in (str(path), "zbv")
    ]
    assert programs[0].order == programs[1].order
    scenario = make_scenario(
        model={"name": "llama-3-8b"},
        cluster={"gpu": "h100-sxm-80gb", "gpus_per_node": 2},
        parallel={"pp": 2, "schedule": str(path), "virtual_stages": 2},
        workload={"kind": "train", "global_batch": 6, "seq_len": 128},
    )
    assert scenario.strategy().schedule == str(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0,0B0\n1F0,1X0\n", "row 2, cell 2"),
        ("0F0,0B0\n1F0\n", "stage 1 does F of microbatch 0"),
        ("", "no rows"),
        ("0B0,0F0\n", "0F0 comes after 0B0"),
        ("0F0,0B0\n1F0,1B0\n", "for microbatches = 1, but the scenario has 6"),
    ],
)
def test_faulty_files_are_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        find_schedule(str(path))(2, 6)


def test_text_of_torch_with_messages_and_pairs_is_read() -> None:
    text = "0F0,,(0F1;0B0)OVERLAP_F_B,0SEND_F1,0UNSHARD,0I1,0W1\n"
    assert [str(a) for a in schedule_from_text(text)[0]] == ["0F0", "0F1", "0B0", "0I1", "0W1"]


# ------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_has_a_picture(name: str) -> None:
    order = order_of(name, 4, 8)
    figure = schedule_figure(run_units(order, SCHEDULES[name].copies).line, name)
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert ("weight gradient" in labels) == is_split(order)
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} >= {str(m) for m in range(8)}


@pytest.mark.parametrize(("name", "chunks"), [("chimera", 1), ("bitpipe", 2), ("dualpipe", 1)])
def test_copies_are_summed_beside_what_is_left(name: str, chunks: int) -> None:
    """All sums but those of a rank's last stage start before its last backward."""
    plan = strategy("pp4", schedule=name, virtual_stages=chunks)
    program = lower_training(replace(LLAMA, layers=8), plan, TrainStep(8, 64))
    pairs = [[a.stage % (4 * chunks) for a in actions if "TIE" in a.kind]
             for actions in program.order]  # fmt: skip
    for rank, actions in enumerate(program.order):
        kinds = [a.kind for a in actions]
        last = max(i for i, kind in enumerate(kinds) if kind in ("BR", "WR"))
        assert min(i for i, kind in enumerate(kinds) if "TIE" in kind) < last
        assert pairs[rank] == pairs[3 - rank] == sorted(pairs[rank], reverse=True)
