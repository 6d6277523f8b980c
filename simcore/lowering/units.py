"""Blocks of a network's units (embedding, layers, head), and a stage's bodies made of them."""

from __future__ import annotations

from dataclasses import replace

from simcore.adjoints import Tape, backward
from simcore.axes import SPACE, TIME, grid_of, turn, turns
from simcore.errors import InputError
from simcore.lowering.sharding import PARTS, Lowering
from simcore.models import GRID, LINEAR, ModelSpec, is_moe_layer, mixer_of
from simcore.moe import LAYER, ExpertGrid, moe_block
from simcore.network import (
    Rows,
    TensorParallel,
    embed_block,
    head_block,
    layer_block,
)
from simcore.ops import Buffer, Op, Size
from simcore.ping_pong import HALVES, halves_backward, halves_forward, layer_halves
from simcore.program import Call
from simcore.recompute import recompute_ops, recomputed_layers
from simcore.streaming import (
    layer_backward,
    layer_chunks,
    layer_forward,
    loss_backward,
    loss_chunks,
)
from simcore.swapping import swap_layer

LAYERS = ("layer", *GRID, LINEAR, LAYER)  # units that layers are: see `layer_unit`
UNITS = ("embed", *LAYERS, "head")
QUORUM = "quorum"  # the block that finds which data ranks count


def forward_blocks(low: Lowering, tp: TensorParallel, rows: Rows, loss_scale: float) -> None:
    """Add the forward block of every unit, and lay its weights out in flat buffers."""
    buffers, model = low.buffers, low.model
    buffers["positions"] = Buffer((rows.tokens,), "int64", "data", layered=False)
    low.add("embed.F", embed_block(model, tp, rows, buffers))
    units = {layer_unit(model, layer) for layer in range(model.layers)}
    streamed = low.parallel.stream_chunks
    chunked = streamed > 1 or low.parallel.swap_fraction is not None
    if chunked and (units != {"layer"} or rows.documents):
        raise InputError(
            "[parallel].stream_chunks and swap_fraction need layers that attend to every earlier "
            "token of a sequence, which is one document: leave them out."
        )
    if streamed > 1:
        chunk = layer_block(model, tp, replace(rows, new=rows.new // streamed), buffers)
        low.chunks["layer"] = layer_chunks(chunk, buffers, rows.batch, streamed)
        low.add("layer.F", layer_forward(low.chunks["layer"]))
    elif low.parallel.ping_pong:
        half = replace(rows, batch=rows.batch // HALVES)
        low.chunks["layer"] = layer_halves(lambda own: layer_block(model, tp, half, own), buffers)
        low.add("layer.F", halves_forward(low.chunks["layer"]))
    elif "layer" in units:
        low.add("layer.F", layer_block(model, tp, rows, buffers))
    for mixer in units.intersection((*GRID, LINEAR)):
        found = layer_block(model, tp, rows, buffers, prefix=mixer, mixer=mixer)
        low.add(f"{mixer}.F", found)
    if LAYER in units:
        grid = ExpertGrid.of(low.parallel)
        low.add(f"{LAYER}.F", moe_block(model, tp, rows, buffers, grid))
    count = low.parallel.loss_chunks or streamed
    if count > 1 and not rows.keep_cache:
        chunk = head_block(model, tp, Rows(1, rows.tokens // count), buffers, loss_scale)
        runs = tp.degree if tp.shards_tokens else 1
        low.chunks["head"] = loss_chunks(chunk, buffers, count, runs)
    else:
        low.add("head.F", head_block(model, tp, rows, buffers, loss_scale))
    for unit in UNITS:
        for part in PARTS.get(unit, (unit,)):
            low.flatten(part)


def backward_blocks(low: Lowering) -> None:
    """Add the backward of every unit, whole and in its two parts, and what is computed again."""
    outputs = {"embed": ("h",), **dict.fromkeys(LAYERS, ("h+",)), "head": ()}
    layers = halves_backward if low.parallel.ping_pong else layer_backward
    chunked = {"layer": layers, "head": loss_backward}
    for unit, chunks in low.chunks.items():
        back = chunked[unit](chunks, low.buffers, backward)
        low.add(f"{unit}.B", back)
        if unit == "layer":
            low.add("layer.R", recompute_ops(low.parallel, low.blocks["layer.F"], back))
    for unit in (u for u in UNITS if f"{u}.F" in low.blocks and u not in low.chunks):
        tape: Tape = backward(low.blocks[f"{unit}.F"], low.buffers, outputs[unit])
        low.add(f"{unit}.B", tape.joined())
        low.add(f"{unit}.I", tape.input_ops)
        low.add(f"{unit}.W", [op for _, op in tape.weight_ops])
        if unit == "layer" and low.parallel.swap_fraction is not None:
            _swap_blocks(low, tape.joined())
        elif unit in LAYERS:
            again = recompute_ops(low.parallel, low.blocks[f"{unit}.F"], tape.joined())
            low.add(f"{unit}.R", again)


def _swap_blocks(low: Lowering, back: tuple[Op, ...]) -> None:
    """Add the blocks by which a layer's activations go to the host and come back, or are redone."""
    tp = TensorParallel(low.parallel.tp)

    def build(tokens: int) -> tuple[list[Op], dict[str, Buffer]]:
        rest = dict(low.buffers)
        return layer_block(low.model, tp, Rows(1, tokens), rest), rest

    share = low.parallel.swap_fraction
    assert share is not None
    found = swap_layer(low.blocks["layer.F"], back, low.buffers, share, build)
    low.add("layer.offload", found.offload)
    low.add("layer.release", found.release)
    low.add("layer.fetch", found.fetch)
    low.add("layer.R", found.again)


def layer_unit(model: ModelSpec, layer: int) -> str:
    """Return the unit that a layer (from 0) is: plain, of a mixer of its own, or with experts."""
    if is_moe_layer(model, layer):
        return LAYER
    mixer = mixer_of(model, layer)
    return mixer if mixer in LAYERS else "layer"


def turn_blocks(low: Lowering, batch: Size, length: int) -> None:
    """Add the units that turn the residual stream from one axis of a grid to the other."""
    dtype = low.model.compute_dtype
    for axis in sorted(set(turns(low.model, low.parallel).values())):
        other = TIME if axis == SPACE else SPACE
        for name, kinds, to in (("h", "F", axis), ("d.h", "BI", other)):
            for kind in kinds:
                grid = grid_of(low.model, length)
                ops = turn(low.buffers, name, batch, grid, low.parallel.cp, to, dtype)
                low.add(f"to_{axis}.{kind}", ops)


def units_of(low: Lowering, first: int, count: int, *, embed: bool, head: bool) -> list[Call]:
    """Return a stage's units: ``count`` layers from ``first``, with either end of the network."""
    model, turned = low.model, turns(low.model, low.parallel)
    calls = []
    for layer in range(first, first + count):
        if layer in turned:
            calls.append(Call(f"to_{turned[layer]}", layer))
        calls.append(Call(layer_unit(model, layer), layer))
    if embed:
        calls.insert(0, Call("embed", first))
    if head:
        calls.append(Call("head", first + count))
    return calls


def _prefetched(calls: list[list[Call]], unshard: list[list[Call]]) -> tuple[Call, ...]:
    """Interleave gathers one unit ahead of the unit that needs them."""
    body: list[Call] = []
    for index, unit in enumerate(calls):
        wanted = unshard[:2] if index == 0 else unshard[index + 1 : index + 2]
        body += [call for gathers in wanted for call in gathers]
        body += unit
    return tuple(body)


def stage_bodies(low: Lowering, stage: int, units: list[Call]) -> dict[str, tuple[Call, ...]]:
    """Return the bodies of one stage: F, B, BR (backward of the last microbatch), O (optimizer).

    Where backwards are split also I, W and WR.
    """

    def present(unit: Call, what: str) -> list[Call]:
        name = f"{unit.block}.{what}"
        return [Call(name, unit.layer)] if name in low.blocks else []

    # A stage without layers only passes on what comes.
    ends = {"embed": units[0], "head": units[-1]} if units else {}
    tied = low.model.tied_embeddings and all(ends[name].block == name for name in ends)

    def first(unit: Call, what: str) -> list[Call]:
        """What comes before a unit's backward; the head's also prepares a tied table."""
        if not tied or unit.block not in ends:
            return present(unit, what)
        return (
            present(ends["head"], what) + present(ends["embed"], what)
            if (unit.block == "head")
            else []
        )

    always = low.shards.stage >= 2
    backups = low.parallel.backup_workers
    layers = [unit.layer for unit in units if unit.block in LAYERS]
    swaps = low.parallel.swap_fraction is not None
    repeated = set(layers) if swaps else recomputed_layers(low.parallel, stage, layers)

    def forwards() -> list[list[Call]]:
        """Every unit's forward; what it copied to the host leaves the device one unit later."""
        found = [[*present(unit, "F"), *present(unit, "offload")] for unit in units]
        for index, unit in enumerate(units):
            found[min(index + 1, len(found) - 1)] += present(unit, "release")
        return found

    def again(unit: Call) -> list[Call]:
        return present(unit, "R") if unit.layer in repeated else []

    def back(unit: Call, last: bool) -> list[Call]:
        reduce = present(unit, "reduce") if always or (last and not backups) else []
        return [*first(unit, "clear"), *again(unit), *present(unit, "B"), *reduce]

    def backs(last: bool) -> list[list[Call]]:
        """Every unit's backward; its reduced gradients are settled one unit later, when they
        have had time to arrive."""
        found = [back(unit, last) for unit in reverse]
        for index, unit in enumerate(reverse):
            later = present(unit, "settle") if always or last else []
            found[min(index + 1, len(found) - 1)] += later
        if last and backups:
            found[-1] += [Call(QUORUM, 0), *(c for u in reverse for c in present(u, "reduce"))]
        return found

    reverse = units[::-1]
    gathers = [present(u, "unshard") if present(u, "F") else [] for u in units]
    regathers = [[*first(u, "unshard"), *present(u, "fetch")] for u in reverse]
    split: dict[str, tuple[Call, ...]] = {}
    if low.split:
        split = {
            f"{stage}I": tuple(c for u in reverse for c in (*again(u), *present(u, "I"))),
            f"{stage}W": tuple(c for u in reverse for c in present(u, "W")),
            f"{stage}WR": tuple(
                c
                for u in reverse
                for c in (*present(u, "W"), *present(u, "reduce"), *present(u, "settle"))
            ),
        }
    return split | {
        f"{stage}F": _prefetched(forwards(), gathers),
        f"{stage}B": _prefetched(backs(False), regathers),
        f"{stage}BR": _prefetched(backs(True), regathers),
        f"{stage}O": tuple(call for u in units for call in present(u, "step")),
    }
