"""Programs as plain JSON data, for the worker and for anyone who wants to read one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from simcore.mixed import MixedProgram, Piece, Variant
from simcore.ops import Buffer, Op
from simcore.program import Action, Block, Call, Program, Versions

DEFAULT_BUFFER = asdict(Buffer((), ""))
DEFAULT_OP = {"stream": "compute", "group": "", "attrs": {}}


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON data; numpy scalars become numbers, arrays are refused."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"a program with {type(value).__name__} dims is a lattice: it cannot be run")


def _tuples(value: Any) -> Any:
    """Return ``value`` with lists as tuples, at every depth."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _without(record: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value)
        for key, value in record.items()
        if key not in defaults or value != defaults[key]
    }


def _record(op: Op) -> dict[str, Any]:
    return {f.name: getattr(op, f.name) for f in fields(op)}


def program_to_json(program: Program) -> dict[str, Any]:
    """Return the program as JSON data. Raises TypeError where dims are arrays."""
    return {
        "mesh": _plain(program.mesh),
        "blocks": {
            name: [_without(_record(op), DEFAULT_OP) for op in block.ops]
            for name, block in program.blocks.items()
        },
        "buffers": {
            name: _without(
                {f.name: getattr(buffer, f.name) for f in fields(buffer)},
                {k: v for k, v in DEFAULT_BUFFER.items() if k not in ("dims", "dtype")},
            )
            for name, buffer in program.buffers.items()
        },
        "bodies": {name: [list(call) for call in calls] for name, calls in program.bodies.items()},
        "order": [[list(action) for action in actions] for actions in program.order],
        "stage_rank": list(program.stage_rank),
        "info": _plain(program.info),
        "versions": {str(stage): list(held) for stage, held in program.versions.items()},
    }


def program_from_json(data: Mapping[str, Any]) -> Program:
    """Return the program that `program_to_json` wrote."""
    blocks = {
        name: Block(name, tuple(Op(**_tuples(op)) for op in ops))
        for name, ops in data["blocks"].items()
    }
    return Program(
        dict(data["mesh"]),
        blocks,
        {name: Buffer(**_tuples(buffer)) for name, buffer in data["buffers"].items()},
        {name: tuple(Call(*call) for call in calls) for name, calls in data["bodies"].items()},
        tuple(tuple(Action(*action) for action in actions) for actions in data["order"]),
        tuple(data["stage_rank"]),
        _tuples(dict(data["info"])),
        {int(stage): Versions(*_tuples(held)) for stage, held in data["versions"].items()},
    )


def mixed_to_json(mixed: MixedProgram) -> dict[str, Any]:
    """Return a step over unequal lengths as JSON data."""
    return {
        "variants": [[*kind, program_to_json(p)] for kind, p in mixed.variants.items()],
        "pieces": [list(piece) for piece in mixed.pieces],
        "lengths": list(mixed.lengths),
        "lanes": [list(lane) for lane in mixed.lanes],
        "orders": [
            [count, [[list(action) for action in actions] for actions in order]]
            for count, order in mixed.orders.items()
        ],
    }


def mixed_from_json(data: Mapping[str, Any]) -> MixedProgram:
    """Return the step that `mixed_to_json` wrote."""
    return MixedProgram(
        {Variant(*kind): program_from_json(text) for *kind, text in data["variants"]},
        tuple(Piece(tuple(numbers), *rest) for numbers, *rest in data["pieces"]),
        tuple(data["lengths"]),
        tuple(map(tuple, data["lanes"])),
        {
            count: tuple(tuple(Action(*action) for action in actions) for actions in order)
            for count, order in data["orders"]
        },
    )
