"""Stages as a pipeline: their bodies, the messages between them, and gradients that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simcore.codecs import coded_boundary, coded_bytes
from simcore.errors import InputError
from simcore.lowering.sharding import Lowering
from simcore.lowering.units import stage_bodies, units_of
from simcore.ops import Op, Size
from simcore.pipelines.placement import Placement
from simcore.program import MIRROR, Action, Call
from simcore.strategy import stage_layers


def _message(low: Lowering, kind: str, peer: int, elements: Size) -> str:
    """Add the block of a message to or from the rank ``peer`` places on; return its name."""
    call, channel = kind.lower().split("_")
    forward = channel == "f"
    usual = 1 if forward == (call == "send") else -1
    name = kind.lower() if peer == usual else f"{kind.lower()}{peer:+d}"
    buffer, dtype = ("h",) if forward else ("d.h",), low.model.compute_dtype
    if low.parallel.act_codec != "none":
        buffer, elements, dtype = (f"{buffer[0]}.code",), coded_bytes(elements), "uint8"
    reads, writes = (buffer, ()) if call == "send" else ((), buffer)
    attrs = {"peer": peer, "channel": channel.upper()}
    low.blocks[name] = (Op(call, {"n": elements}, dtype, reads, writes, name, "pp", attrs),)
    return name


def summed_and_updated(
    bodies: dict[str, tuple[Call, ...]],
    placement: Placement,
    rank: int,
    actions: Sequence[Action],
) -> Iterator[Action]:
    """Yield a rank's actions with the sums over copies or tied ends, then the optimizer.

    A copy's sums start once its last gradient is there, beside what the rank still computes (eager
    synchronisation; Li and Hoefler 2021, Chimera, section 3.2). Later stages come first, on both
    ranks of a pair. Tied ends wait for all: the last rank has its gradient long before the first.
    """
    copied = len(placement.stage_rank) > placement.chain
    mine = [stage for stage, place in enumerate(placement.stage_rank) if place == rank]
    waiting = sorted(mine, key=lambda stage: stage % placement.chain)
    reduced: set[int] = set()
    for action, following in zip(actions, [*actions[1:], None], strict=True):
        yield action
        if action.kind in ("BR", "WR"):
            reduced.add(action.stage)
        if following is not None and following.kind.startswith("SEND"):
            continue  # what others wait for leaves first
        while waiting and (waiting[-1] in reduced if copied else following is None):
            stage = waiting.pop()
            ties = [body for body in bodies if body.startswith(f"{stage}TIE")]
            yield from (Action(stage, body.removeprefix(str(stage)), 0) for body in ties)
    yield from (Action(stage, "O", 0) for stage in mine)


def pipeline_bodies(
    low: Lowering, boundary: Size, placement: Placement
) -> dict[str, tuple[Call, ...]]:
    """Return the bodies of all stages, with their messages and the sums of shared gradients.

    ``boundary``: elements of the residual stream that a message carries.
    """
    layers = stage_layers(low.model, low.parallel)
    last = placement.chain - 1
    bodies: dict[str, tuple[Call, ...]] = {}
    for stage in range(len(placement.stage_rank)):
        place = stage % placement.chain
        first, count = sum(layers[:place]), layers[place]
        units = units_of(low, first, count, embed=place == 0, head=place == last)
        bodies |= stage_bodies(low, stage, units)
        edges = (
            (first, placement.before(stage), ("RECV_F", "SEND_B")),
            (first + count, placement.after(stage), ("SEND_F", "RECV_B")),
        )
        for layer, other, kinds in edges:
            step = placement.step(stage, other)
            for kind in kinds if step else ():
                bodies[f"{stage}{kind}"] = (Call(_message(low, kind, step, boundary), layer),)
                if low.parallel.act_codec != "none":
                    _code_boundary(low, bodies, stage, kind, layer)
    if low.model.tied_embeddings and last and "embed.step" in low.blocks:
        _tie(low, bodies, placement)
    if len(placement.stage_rank) > placement.chain:
        _sum_copies(low, bodies, placement)
    return bodies


def _code_boundary(
    low: Lowering, bodies: dict[str, tuple[Call, ...]], stage: int, kind: str, layer: int
) -> None:
    """Pack what a message sends behind the actions that give it, or unpack what it brings."""
    call, name = kind[:4], "h" if kind.endswith("F") else "d.h"
    what = "pack" if call == "SEND" else "unpack"
    low.blocks[f"{name}.{what}"] = (
        coded_boundary(low.buffers, name, low.parallel.act_codec)[what],
    )
    more = (Call(f"{name}.{what}", layer),)
    for action in ("F",) if name == "h" else ("B", "BR", "I"):
        body = bodies.get(f"{stage}{action}")
        if body is not None:
            bodies[f"{stage}{action}"] = (*body, *more) if call == "SEND" else (*more, *body)


def _sum_copies(low: Lowering, bodies: dict[str, tuple[Call, ...]], placement: Placement) -> None:
    """Sum every unit's gradient over the two ranks that have a copy of it."""
    if low.model.tied_embeddings:
        raise InputError(
            "tied embeddings need a schedule with one copy of the network: choose 'dualpipev' or "
            "'1f1b'."
        )
    for stage in range(len(placement.stage_rank)):
        for number, call in enumerate(bodies[f"{stage}O"]):
            unit = call.block.removesuffix(".step")
            name = f"{unit}.gs" if low.shards.stage else f"{unit}.g"
            grads = low.buffers[name]
            summed = Op(
                "all_reduce",
                {"n": grads.elements},
                grads.dtype,
                (name,),
                (name,),
                "dp",
                MIRROR,
            )
            low.blocks[f"{unit}.sum"] = (summed,)
            bodies[f"{stage}TIE{number}"] = (Call(f"{unit}.sum", call.layer),)


def _tie(low: Lowering, bodies: dict[str, tuple[Call, ...]], placement: Placement) -> None:
    """Sum the tied table's gradient over the first and the last stage (Megatron-LM).

    Where one rank holds both, it keeps one gradient, and nothing is left to do.
    """
    last = placement.chain - 1
    if low.shards.stage >= 2:
        raise InputError(
            "tied embeddings with pp > 1 need zero_stage 0 or 1 in this version: lower "
            "[parallel].zero_stage or pp."
        )
    if placement.stage_rank[0] == placement.stage_rank[last]:
        return
    grads = low.buffers["embed.gs" if low.shards.stage else "embed.g"]
    name = "embed.gs" if low.shards.stage else "embed.g"
    low.add(
        "embed.tie",
        [Op("all_reduce", {"n": grads.elements}, grads.dtype, (name,), (name,), "dp", "ends")],
    )
    for stage in (0, last):
        bodies[f"{stage}TIE"] = (Call("embed.tie", 0),)
    bodies[f"{last}O"] += (Call("embed.step", 0),)
    for kind in ("B", "BR", "WR"):
        if Call("embed.reduce", 0) in bodies.get(f"0{kind}", ()):
            bodies[f"{last}{kind}"] += (Call("embed.reduce", 0),)


def token_return(
    low: Lowering,
    bodies: dict[str, tuple[Call, ...]],
    order: tuple[tuple[Action, ...], ...],
    batch: Size,
) -> tuple[tuple[Action, ...], ...]:
    """Send the chosen tokens from the last stage back to the first, which embeds them next."""
    last = len(order) - 1
    head = next(call.layer for call in bodies[f"{last}F"] if call.block == "head.F")
    ends = {"send": (last, -last), "recv": (0, last)}
    found = list(order)
    for kind, (stage, peer) in ends.items():
        reads, writes = (("next",), ()) if kind == "send" else ((), ("next",))
        low.blocks[f"{kind}_t"] = (
            Op(
                kind,
                {"n": batch},
                "int64",
                reads,
                writes,
                f"{kind}_t",
                "pp",
                {"peer": peer, "channel": "T"},
            ),
        )
        name = f"{kind.upper()}_T"
        bodies[f"{stage}{name}"] = (Call(f"{kind}_t", head),)
        found[stage] = (*found[stage], Action(stage, name, 0))
    return tuple(found)
