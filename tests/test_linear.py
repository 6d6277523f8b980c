"""Linear attention: chunks and states against the dense product, volumes, chains, refusals."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import LLAMA, Wires, cluster_cost

from simcore.engine import simulate
from simcore.errors import InputError
from simcore.estimate import estimate, lower_bound, serial_sum
from simcore.linear import SCAN, Linear, state_bytes
from simcore.lower import lower_pass, lower_training
from simcore.metrics import model_flops_per_token
from simcore.models import ModelSpec, forward_flops
from simcore.ops import Op, work
from simcore.program import Program
from simcore.sequence import WHOLE, SequenceSplit
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from solvers.bounds import TrainBounds

SEQ, FAR = 512, 65536
LINEAR = replace(LLAMA, name="small-linear", mixers=("linear",) * 4, linear_decay="retnet")
HYBRID = replace(LINEAR, name="small-hybrid", mixers=("linear", "linear", "gqa", "linear"))
STRATEGIES = {
    "lasp": {"cp": 4, "cp_kind": "lasp"},
    "lasp2": {"cp": 4, "cp_kind": "lasp2"},
    "zeco": {"cp": 4, "cp_kind": "zeco"},
    "lasp-tp": {"cp": 2, "tp": 2, "cp_kind": "lasp", "sequence_parallel": True},
    "lasp2-zero3": {"cp": 2, "dp_shard": 2, "cp_kind": "lasp2"},
    "zeco-recompute": {"cp": 4, "cp_kind": "zeco", "recompute": "full"},
}


def lowered(length: int = SEQ, model: ModelSpec = LINEAR, **parallel: object) -> Program:
    strategy = ParallelStrategy(**parallel)  # type: ignore[arg-type]
    return lower_training(model, strategy, TrainStep(strategy.dp * strategy.pp, length))


def ops(program: Program, block: str, kind: str) -> list[Op]:
    return [op for op in program.blocks[block].ops if op.kind == kind]


# ---------------------------------------------------------------- arithmetic


class Place:
    """A rank of an imagined group."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def index(self, group: str) -> int:
        return 0 if group == "tp" else self.rank


@settings(deadline=None, max_examples=12)
@given(
    ranks=st.integers(1, 3),
    rows=st.integers(1, 9),
    chunk=st.integers(1, 5),
    group=st.integers(1, 2),
    decay=st.sampled_from(["none", "retnet"]),
)
def test_chunks_and_states_equal_the_dense_product(
    ranks: int, rows: int, chunk: int, group: int, decay: str
) -> None:
    """Outputs and all gradients, on one rank and on several that pass on their states."""
    torch = pytest.importorskip("torch")
    from backends.linear_ops import LINEAR_OPS

    batch, kv_heads, d = 2, 2, 4
    heads, length = group * kv_heads, ranks * rows
    split = SequenceSplit(ranks, 1, "contiguous", "keys", 0, "gather")
    layer = Linear(split, (batch, rows, heads, kv_heads, d), decay, "fp64")
    random = torch.Generator().manual_seed(length)
    width = (heads + 2 * kv_heads) * d
    whole = torch.randn(batch, length, width, generator=random, dtype=torch.float64)
    grad = torch.randn(batch, length, heads * d, generator=random, dtype=torch.float64)

    def shards(x: torch.Tensor) -> list[torch.Tensor]:
        return [part.reshape(batch * rows, -1) for part in x.split(rows, 1)]

    def run(kind: str, rank: int, *reads: torch.Tensor) -> list[torch.Tensor]:
        op = layer.op(kind, (), ())
        op = replace(op, dims={**op.dims, "c": min(chunk, rows)})
        return LINEAR_OPS[kind](Place(rank), op, reads, ())

    def exchange(states: list[torch.Tensor], *, reverse: bool) -> list[torch.Tensor]:
        sums = layer.exchange("x", "y", lambda *_: "", reverse=reverse)[1]
        every = torch.cat(states)
        return [LINEAR_OPS[sums.kind](Place(r), sums, (every, fade), ())[0] for r in range(ranks)]

    parts, grads = shards(whole), shards(grad)
    own = [run("linear_state", r, x) for r, x in enumerate(parts)]
    fade = own[0][1]
    before = exchange([state for state, _ in own], reverse=False)
    found, gradients = [], []
    local = [run("linear_attention", r, x)[0] for r, x in enumerate(parts)]
    for r, x in enumerate(parts):
        found.append(run("linear_carry", r, local[r], x, before[r])[0])
    carried = [run("linear_carry_backward", r, grads[r], parts[r], before[r]) for r in range(ranks)]
    ahead = exchange([state for state, _ in carried], reverse=True)
    for r, x in enumerate(parts):
        near = run("linear_attention_backward", r, grads[r], x)[0]
        pairs = run("linear_state_backward", r, x, ahead[r])[0]
        gradients.append(near + torch.cat((carried[r][1], pairs), 1))

    leaf = whole.clone().requires_grad_()
    q, k, v = (
        p.unflatten(2, (-1, d)).transpose(1, 2)
        for p in leaf.split([heads * d, kv_heads * d, kv_heads * d], 2)
    )
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    base = 1 - torch.exp2(-5.0 - torch.arange(kv_heads)) * (decay == "retnet")
    gap = torch.arange(length)[:, None] - torch.arange(length)
    mask = base.double()[:, None, None] ** gap.clamp(min=0) * (gap >= 0)
    out = (q @ k.mT * mask.repeat_interleave(group, 0) / d**0.5) @ v
    out = out.transpose(1, 2).flatten(2)
    out.backward(grad)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(torch.cat(found), torch.cat(shards(out.detach())), **close)
    torch.testing.assert_close(torch.cat(gradients), torch.cat(shards(leaf.grad)), **close)


# ---------------------------------------------------------------- volumes


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("length", [SEQ, 8 * SEQ])
def test_messages_depend_on_neither_length_nor_ranks(ranks: int, length: int) -> None:
    """A scan moves one state each way, a gather one per rank (LASP-2, section 3.3)."""
    one = state_bytes(1, LINEAR.kv_heads, LINEAR.head_dim)
    for kind, each in (("lasp", 1), ("zeco", 1), ("lasp2", ranks)):
        program = lowered(length, cp=ranks, cp_kind=kind)
        for block in ("linear.F", "linear.B"):
            moved = [op for op in program.blocks[block].ops if op.group == "cp"]
            assert [float(work(op).payload_bytes) for op in moved] == [each * one]


def test_work_grows_with_the_length_alone() -> None:
    """Chunks of c tokens: 4 c d per token and head, 2 d^2 per head and 2 d^2 per KV head."""
    for length in (256, 1024):
        (op,) = ops(lowered(length), "linear.F", "linear_attention")
        h, kv, d = LINEAR.heads, LINEAR.kv_heads, LINEAR.head_dim
        assert work(op).flops == length * (4 * 64 * d * h + 2 * d * d * (h + kv))
    tall = [forward_flops(LINEAR, 1, length) / length for length in (256, 1024)]
    assert tall[0] == tall[1]
    gqa = replace(LINEAR, mixers=())
    assert model_flops_per_token(gqa, 4096) > model_flops_per_token(LINEAR, 4096)
    assert model_flops_per_token(LINEAR, 4096) == model_flops_per_token(LINEAR, 256)


def test_gathered_softmax_layers_move_keys_and_values_once_each_way() -> None:
    program = lowered(model=HYBRID, cp=4, cp_kind="lasp2")
    kv = SEQ * 2 * LLAMA.kv_heads * LLAMA.head_dim * 2
    for block, kinds in (
        ("layer.F", ["all_gather"]),
        ("layer.B", ["all_gather", "reduce_scatter"]),
    ):
        moved = [op for op in program.blocks[block].ops if op.group == "cp"]
        assert [op.kind for op in moved] == kinds
        assert {float(work(op).payload_bytes) for op in moved} == {kv}


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("model", [LINEAR, HYBRID], ids=lambda m: m.name)
@pytest.mark.parametrize("name", STRATEGIES)
def test_machines_agree(name: str, model: ModelSpec) -> None:
    program = lowered(FAR, model, **STRATEGIES[name])
    cost, wires = cluster_cost(program), Wires(2e-6, 20e9)
    whole = estimate(program, cost, wires)
    detail = simulate(program, cost, wires, detail=True)
    assert whole.step_s == pytest.approx(detail.step_s, rel=1e-9)
    every = simulate(program, cost, wires, every_rank=True)
    assert every.step_s == pytest.approx(detail.step_s, rel=0.02)
    assert lower_bound(program, cost) <= detail.step_s * (1 + 1e-9)
    assert detail.step_s <= serial_sum(program, cost, wires) * (1 + 1e-9)


def test_a_rank_waits_for_the_one_before_it() -> None:
    """Where hops are long, states arrive one hop after the other, and from the far end back."""
    program = lowered(cp=4, cp_kind="lasp")
    cost = cluster_cost(program, latency=1000.0)
    line = simulate(program, cost, cost, every_rank=True)
    (hop,) = {
        float(cost.seconds(replace(op, attrs={**op.attrs, "between": (0, 1)})))
        for op in ops(program, "linear.F", SCAN)
    }
    first = {way: {} for way in "FB"}
    for span in line.spans:
        if span.name == SCAN:
            found = first["F" if "F" in span.action else "B"]
            found.setdefault(span.rank, span.end_s)
    forward = [first["F"][rank] - first["F"][0] for rank in range(4)]
    assert forward == pytest.approx([hop * rank for rank in range(4)], rel=1e-6)
    back = [first["B"][rank] - first["B"][3] for rank in range(4)]
    assert back == sorted(back, reverse=True)


@pytest.mark.parametrize("latency", [1.0, 300.0])
def test_a_chain_is_waited_for_once_each_way_not_in_every_layer(latency: float) -> None:
    """Ranks stay as late as the first layer made them: the last hop comes in time everywhere."""
    deep = {n: replace(LINEAR, layers=n, mixers=("linear",) * n) for n in (2, 8)}
    extra = {}
    for layers, model in deep.items():
        steps = {}
        for kind in ("lasp", "none"):
            program = lowered(FAR, model, cp=4, cp_kind="lasp")
            cost = cluster_cost(program, latency=latency if kind == "lasp" else 1e-6)
            steps[kind] = simulate(program, cost, cost, every_rank=True).step_s
        extra[layers] = steps["lasp"] - steps["none"]
    assert extra[8] == pytest.approx(extra[2], rel=0.35, abs=1e-5)


def test_slices_shorten_a_chain_whose_states_are_large() -> None:
    wide = replace(LINEAR, heads=2, kv_heads=2, head_dim=512)
    seconds = {}
    for slices in (1, 2, 8):
        program = lowered(model=wide, cp=16, cp_kind="zeco", cp_slices=slices)
        cost = cluster_cost(program, bandwidth=0.05)
        (scan,) = ops(program, "linear.F", SCAN)
        seconds[slices] = float(cost.seconds(scan))
    (scan,) = ops(lowered(model=wide, cp=16, cp_kind="lasp"), "linear.F", SCAN)
    assert seconds[1] == float(cost.seconds(scan))
    assert seconds[8] < seconds[2] < seconds[1]


def test_a_sequence_as_long_as_its_ranks_takes_as_long_as_one_rank_s() -> None:
    """Weak scaling of a network whose work per token does not grow with the length."""
    steps = []
    for ranks in (1, 8):
        program = lowered(ranks * 16384, cp=ranks, **({"cp_kind": "zeco"} if ranks > 1 else {}))
        cost = cluster_cost(program, per_node=8, bandwidth=10.0)
        steps.append(estimate(program, cost, cost).step_s)
    assert 1.0 <= steps[1] / steps[0] < 1.1


def test_the_planner_bounds_linear_layers_and_refuses_a_mix() -> None:
    strategy, step = ParallelStrategy(dp_shard=2), TrainStep(2, 1024)
    program = lower_training(LINEAR, strategy, step)
    cost = cluster_cost(program)
    bounds = TrainBounds(LINEAR, step, lambda parallel: cost)
    assert 0 < bounds.seconds(strategy) <= estimate(program, cost, cost).step_s * (1 + 1e-9)
    with pytest.raises(InputError, match="mixes linear and softmax"):
        TrainBounds(HYBRID, step, lambda parallel: cost).seconds(strategy)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "parallel", "words"),
    [
        (LINEAR, {"cp": 2}, ("linear layers", "lasp2")),
        (LLAMA, {"cp": 2, "cp_kind": "lasp"}, ("has not", "'ring'")),
        (LINEAR, {"cp": 2, "cp_kind": "zeco", "cp_slices": 3}, ("head_dim 64", "cp_slices = 1")),
        (LINEAR, {"cp": 2, "cp_kind": "lasp", "cp_slices": 2}, ("zeco",)),
        (LINEAR, {"cp": 2, "cp_kind": "lasp3"}, ("cp_kind", "'lasp'")),
        (replace(LINEAR, causal=False), {}, ("causal",)),
    ],
)
def test_what_does_not_fit_is_refused(
    model: ModelSpec, parallel: dict[str, object], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        lowered(model=model, **parallel)
    assert all(word in str(caught.value) for word in words)


def test_generation_has_no_linear_layers() -> None:
    with pytest.raises(InputError, match="linear layers"):
        lower_pass(LINEAR, ParallelStrategy(), 2, 8, 0)


def test_a_layer_is_known_from_its_ops() -> None:
    layer = Linear(WHOLE, (1, 8, 2, 1, 4), "none", "bf16")
    assert Linear.of(layer.op("linear_carry", (), ())) == layer
    assert layer.attrs["split"] == astuple(WHOLE)
