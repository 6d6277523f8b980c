"""Collectives between ranks: `Distributed` over torch.distributed, `Local` for one rank alone.

Both answer the same four calls and record the payload bytes of each, counted from the tensors
that were really passed, in nccl-tests' convention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from simcore.program import axis_degree, coordinates, group_ranks


class Handle(Protocol):
    """Something that can be waited for."""

    def wait(self) -> Any:
        """Return once the communication is complete."""


class Done:
    """A communication that is already complete."""

    def wait(self) -> None:
        """Return at once."""


def _gather_name() -> Any:
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _scatter_name() -> Any:
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Distributed:
    """Real collectives over the process groups of a mesh."""

    def __init__(self, mesh: Mapping[str, int], rank: int, groups: set[str]) -> None:
        self.mesh, self.rank = mesh, rank
        self.recorded: Counter[tuple[str, str]] = Counter()
        self.groups = {name: self._make(name) for name in sorted(groups)}

    def _make(self, name: str) -> Any:
        world = dist.get_world_size()
        made: dict[tuple[int, ...], Any] = {}
        for rank in range(world):
            members = tuple(group_ranks(self.mesh, name, rank))
            if members not in made and rank in members:
                made[members] = dist.new_group(list(members))
        return made.get(tuple(group_ranks(self.mesh, name, self.rank)))

    def _record(self, kind: str, group: str, tensor: Tensor) -> None:
        self.recorded[kind, group] += tensor.numel() * tensor.element_size()

    def all_reduce(self, tensor: Tensor, group: str) -> Handle:
        """Sum ``tensor`` in place."""
        self._record("all_reduce", group, tensor)
        return dist.all_reduce(tensor, group=self.groups[group], async_op=True)

    def all_gather(self, out: Tensor, tensor: Tensor, group: str) -> Handle:
        """Fill ``out`` with every member's ``tensor``, in group order along dim 0."""
        self._record("all_gather", group, out)
        return _gather_name()(out, tensor, group=self.groups[group], async_op=True)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, group: str) -> Handle:
        """Fill ``out`` with this member's part of the sum of every ``tensor``."""
        self._record("reduce_scatter", group, tensor)
        return _scatter_name()(out, tensor, group=self.groups[group], async_op=True)

    def _neighbour(self, group: str, step: int) -> int:
        where = coordinates(self.mesh, self.rank)
        return group_ranks(self.mesh, group, self.rank)[where[group] + step]

    def send(self, tensor: Tensor, group: str, step: int, tag: int) -> Handle:
        """Start sending ``tensor`` to the neighbour ``step`` places on."""
        self._record("send", group, tensor)
        return dist.isend(tensor, self._neighbour(group, step), tag=tag)

    def recv(self, out: Tensor, group: str, step: int, tag: int) -> Handle:
        """Start filling ``out`` from the neighbour ``step`` places on."""
        self._record("recv", group, out)
        return dist.irecv(out, self._neighbour(group, step), tag=tag)


class Local:
    """One rank alone: collectives become the local copies that they imply."""

    def __init__(self, mesh: Mapping[str, int], rank: int) -> None:
        self.mesh, self.rank = mesh, rank
        self.recorded: Counter[tuple[str, str]] = Counter()

    def _record(self, kind: str, group: str, tensor: Tensor) -> None:
        self.recorded[kind, group] += tensor.numel() * tensor.element_size()

    def all_reduce(self, tensor: Tensor, group: str) -> Handle:
        """Read and write the tensor once."""
        self._record("all_reduce", group, tensor)
        tensor.mul_(1.0)
        return Done()

    def all_gather(self, out: Tensor, tensor: Tensor, group: str) -> Handle:
        """Copy the own part into every part."""
        self._record("all_gather", group, out)
        out.view(axis_degree(self.mesh, group), -1).copy_(tensor.reshape(1, -1))
        return Done()

    def reduce_scatter(self, out: Tensor, tensor: Tensor, group: str) -> Handle:
        """Sum the parts of the own tensor."""
        self._record("reduce_scatter", group, tensor)
        torch.sum(tensor.view(axis_degree(self.mesh, group), *out.shape), 0, out=out)
        return Done()

    def send(self, tensor: Tensor, group: str, step: int, tag: int) -> Handle:
        """Do nothing: the peer is not there."""
        self._record("send", group, tensor)
        return Done()

    def recv(self, out: Tensor, group: str, step: int, tag: int) -> Handle:
        """Fill the buffer with small numbers in place of what the peer would send."""
        self._record("recv", group, out)
        out.normal_(0.0, 0.02)
        return Done()


Transport = Distributed | Local
