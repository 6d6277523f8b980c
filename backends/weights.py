"""The weights that a run starts from: the same whole weights for every layout of ranks."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from simcore.errors import RunError
from simcore.ops import Buffer
from simcore.program import Program

WEIGHT_STD = 0.02


def seeded(*parts: object) -> torch.Generator:
    """Return a CPU generator whose seed is a checksum of ``parts``."""
    text = "/".join(map(str, parts))
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def dense_weight(
    name: str, layer: int, buffer: Buffer, tp: int, seed: int, dtype: torch.dtype
) -> Tensor:
    """Return the whole weight of which ranks hold shards; the same on every rank."""
    if buffer.experts:
        each = replace(buffer, dims=buffer.dims[1:], experts=0)
        names = (f"{name}.{expert}" for expert in range(buffer.experts))
        return torch.stack([dense_weight(n, layer, each, tp, seed, dtype) for n in names])
    dims = [int(dim) for dim in buffer.dims]
    if buffer.shard_dim == 0:
        dims[0] = sum(buffer.pieces)
    elif buffer.shard_dim == 1:
        dims[1] *= tp
    if buffer.init in ("ones", "zeros"):
        return torch.full(dims, float(buffer.init == "ones"), dtype=dtype)
    noise = torch.randn(dims, generator=seeded(seed, name, layer), dtype=torch.float32)
    return noise.mul_(WEIGHT_STD).to(dtype)


def shard_weight(whole: Tensor, buffer: Buffer, index: int, tp: int) -> Tensor:
    """Return the part of ``whole`` that tensor rank ``index`` holds, zero-padded where it ends."""
    if buffer.shard_dim < 0 or tp == 1:
        return whole
    if buffer.shard_dim == 1:
        return whole.chunk(tp, 1)[index]
    parts, first = [], 0
    for piece in buffer.pieces:
        rows = -(-piece // tp)
        part = whole[first : first + piece][index * rows : (index + 1) * rows]
        if part.shape[0] < rows:
            part = torch.cat((part, part.new_zeros(rows - part.shape[0], *part.shape[1:])))
        parts.append(part)
        first += piece
    return torch.cat(parts)


def local_weight(whole: Tensor, buffer: Buffer, index: Callable[[str], int], tp: int) -> Tensor:
    """Return what a rank holds of ``whole``; ``index`` gives its place in a group."""
    if not buffer.experts:
        return shard_weight(whole, buffer, index("tp"), tp)
    held, first = int(buffer.dims[0]), 0
    if buffer.expert_group:
        first = index(buffer.expert_group) * held
    mine = whole[first : first + held]
    return torch.stack([shard_weight(expert, buffer, index("tp"), tp) for expert in mine])


def members(program: Program, unit: str) -> dict[str, Buffer]:
    """Return the weights that lie in the unit's flat buffer."""
    return {
        name: buffer
        for name, buffer in program.buffers.items()
        if buffer.base == f"{unit}.w" and not buffer.part
    }


def flat_weights(
    program: Program,
    unit: str,
    layer: int,
    index: Callable[[str], int],
    seed: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return a rank's flat weights of a unit, cut from the whole ones.

    ``index`` gives the rank's place in a group.
    """
    flat = torch.zeros(int(program.buffers[f"{unit}.w"].elements), dtype=dtype)
    tp = program.mesh["tp"]
    for name, buffer in members(program, unit).items():
        whole = dense_weight(name, layer, buffer, tp, seed, dtype)
        place(flat, buffer, local_weight(whole, buffer, index, tp))
    return flat


def drawn_weights(program: Program, unit: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return flat weights drawn on the device itself: for shapes too large to draw whole."""
    flat = torch.empty(int(program.buffers[f"{unit}.w"].elements), dtype=dtype, device=device)
    flat.normal_(0.0, WEIGHT_STD)
    for buffer in members(program, unit).values():
        if buffer.init in ("ones", "zeros"):
            place(flat, buffer, float(buffer.init == "ones"))
    return flat


def place(flat: Tensor, buffer: Buffer, value: Tensor | float) -> None:
    """Write ``value`` where ``buffer`` lies in ``flat``."""
    target = flat[int(buffer.offset) : int(buffer.offset + buffer.elements)]
    if isinstance(value, float):
        target.fill_(value)
    elif value.numel() == target.numel():
        target.copy_(value.reshape(-1))
    else:
        raise RunError(
            f"a weight of {tuple(value.shape)} cannot be cut into ranks of {buffer.dims}: run with "
            "a tp that divides the model's KV heads."
        )
