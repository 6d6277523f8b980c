"""Collectives between ranks: `Distributed` over torch.distributed, `Local` for one rank alone.

Both answer the same calls and record the payload bytes of each, counted from the tensors that
were really passed, in nccl-tests' convention.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from backends.scan import Scan
from simcore.errors import RunError
from simcore.ops import Op
from simcore.program import Program, axis_degree, group_ranks


class Handle(Protocol):
    """Something that can be waited for."""

    def wait(self) -> Any:
        """Return once the communication is complete."""


class Done:
    """A communication that is already complete."""

    def wait(self) -> None:
        """Return at once."""


@dataclass(slots=True)
class Several:
    """Communications that are waited for together."""

    handles: Sequence[Any]

    def wait(self) -> None:
        """Return once all are complete."""
        for handle in self.handles:
            handle.wait()


def _gather_name() -> Any:
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _scatter_name() -> Any:
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _started(handle: Any) -> Handle:
    """Return the handle of a communication that this rank takes part in."""
    if handle is None:
        raise RunError("a rank was asked to communicate in a group that it is not in.")
    found: Handle = handle
    return found


# Every rank takes part in every quorum of its group, so all count alike over a process's jobs.
_QUORUMS = itertools.count()


def default_store() -> Any:
    """Return the key-value store through which the ranks met."""
    return dist.distributed_c10d._get_default_store()


def group_names(programs: Iterable[Program]) -> set[str]:
    """Return the groups and channels that the programs communicate over."""
    return {
        channel_of(op)
        for program in programs
        for block in program.blocks.values()
        for op in block.ops
        if op.is_communication
    }


def channel_of(op: Op) -> str:
    """Return the name of the process group of an op: messages of each channel have their own."""
    channel = op.attrs.get("channel", "")
    return f"{op.group}/{channel}" if channel else op.group


class Distributed:
    """Real collectives over the process groups of a mesh.

    ``groups`` names mesh axes, axes joined by ``*``, or an axis and a channel (``pp/F``).
    ``beside``: the transport of another mesh of these ranks, in the same run: the two share what
    is recorded, and the groups of the same ranks.
    """

    def __init__(
        self,
        mesh: Mapping[str, int],
        rank: int,
        groups: Iterable[str],
        beside: Distributed | None = None,
    ) -> None:
        self.mesh, self.rank = mesh, rank
        self.recorded: Counter[tuple[str, str]] = beside.recorded if beside else Counter()
        self.made: dict[tuple[str, tuple[int, ...]], Any] = beside.made if beside else {}
        self.groups = {name: self._make(name) for name in sorted(groups)}
        self.unclaimed: list[tuple[Handle, Tensor]] = []  # sent to members that come late

    def _make(self, name: str) -> Any:
        """Create every group along ``name`` on all ranks; return the own one."""
        axes, _, channel = name.partition("/")
        mine = None
        seen: set[tuple[int, ...]] = set()
        for rank in range(dist.get_world_size()):
            ranks = tuple(group_ranks(self.mesh, axes, rank))
            if ranks in seen:
                continue
            seen.add(ranks)
            use = channel, ranks
            if use not in self.made:
                self.made[use] = dist.new_group(list(ranks))
            if self.rank in ranks:
                mine = self.made[use]
        return mine

    def close(self) -> None:
        """Destroy the process groups."""
        for handle, _ in self.unclaimed:
            handle.wait()
        self.unclaimed.clear()
        for (_, ranks), group in self.made.items():
            if self.rank in ranks:
                dist.destroy_process_group(group)
        self.made.clear()

    def _record(self, kind: str, group: str, tensor: Tensor, *, sends: bool = True) -> None:
        self.recorded[kind, group] += tensor.numel() * tensor.element_size() * sends

    def all_reduce(self, tensor: Tensor, group: str) -> Handle:
        """Sum ``tensor`` in place."""
        self._record("all_reduce", group, tensor)
        return _started(dist.all_reduce(tensor, group=self.groups[group], async_op=True))

    def all_gather(self, out: Tensor, tensor: Tensor, group: str) -> Handle:
        """Fill ``out`` with every member's ``tensor``, in group order along dim 0."""
        self._record("all_gather", group, out)
        return _started(_gather_name()(out, tensor, group=self.groups[group], async_op=True))

    def reduce_scatter(self, out: Tensor, tensor: Tensor, group: str) -> Handle:
        """Fill ``out`` with this member's part of the sum of every ``tensor``."""
        self._record("reduce_scatter", group, tensor)
        flat = out.view(-1), tensor.view(-1)  # ranks' parts follow one another whatever the dims
        return _started(_scatter_name()(*flat, group=self.groups[group], async_op=True))

    def all_to_all(
        self, out: Tensor, tensor: Tensor, group: str, counts: Sequence[Sequence[int]] = ()
    ) -> Handle:
        """Send part i of ``tensor`` along dim 0 to member i; fill ``out`` with what they send.

        ``counts``: rows by source and destination where parts are unequal; further rows stay.
        """
        sent: list[int] | None = None
        came: list[int] | None = None
        if counts:
            here = group_ranks(self.mesh, group, self.rank).index(self.rank)
            sent, came = list(counts[here]), [row[here] for row in counts]
            tensor, out = tensor[: sum(sent)], out[: sum(came)]
        self._record("all_to_all", group, tensor)
        return _started(
            dist.all_to_all_single(out, tensor, came, sent, group=self.groups[group], async_op=True)
        )

    def ring_shift(
        self,
        out: Tensor,
        tensor: Tensor,
        group: str,
        distance: int = 1,
        senders: Sequence[bool] = (),
    ) -> Handle:
        """Send ``tensor`` ``distance`` places on round the group; fill ``out`` from as far back.

        ``senders``: which places send; empty: all.
        """
        ranks, where = group_ranks(self.mesh, group, self.rank), self.groups[group]
        here = ranks.index(self.rank)
        following, previous = ((here + d) % len(ranks) for d in (distance, -distance))
        messages, sends = [], not senders or senders[here]
        self._record("ring_shift", group, tensor, sends=sends)
        if sends:
            messages.append(dist.P2POp(dist.isend, tensor, ranks[following], where))
        if not senders or senders[previous]:
            messages.append(dist.P2POp(dist.irecv, out, ranks[previous], where))
        return Several(dist.batch_isend_irecv(messages) if messages else ())

    def quorum(self, out: Tensor, tensor: Tensor, group: str, backups: int) -> Handle:
        """Mark in ``out`` which members come before the last ``backups``; return once known.

        Members take numbers from the process group's store, which hands out each once.
        """
        self._record("quorum", group, out)
        ranks, store = group_ranks(self.mesh, group, self.rank), default_store()
        name, counted = f"quorum/{ranks[0]}/{next(_QUORUMS)}", len(ranks) - backups
        place = store.add(name, 1)
        if place <= counted:
            store.set(f"{name}/{place}", str(ranks.index(self.rank)))
        out.zero_()
        out[[int(store.get(f"{name}/{first + 1}")) for first in range(counted)]] = 1
        return Done()

    def quorum_reduce(self, tensor: Tensor, counted: Tensor, group: str) -> Handle:
        """Make ``tensor`` the mean of the counted members' tensors, times the members.

        The first of them sums and sends to all; it does not wait for those that were not counted.
        """
        self._record("quorum_reduce", group, tensor)
        ranks, where = group_ranks(self.mesh, group, self.rank), self.groups[group]
        members = [rank for rank, mark in zip(ranks, counted.tolist(), strict=True) if mark]
        root = members[0]
        if self.rank in members[1:]:
            dist.send(tensor, root, where)
        if self.rank != root:
            dist.recv(tensor, root, where)
            return Done()
        part = torch.empty_like(tensor)
        for member in members[1:]:
            dist.recv(part, member, where)
            tensor.add_(part)
        tensor.mul_(len(ranks) / len(members))
        given = tensor.clone()  # stays as it is until the last one has come for it
        for rank in ranks:
            if rank != root:
                sent = _started(dist.isend(given, rank, where))
                if rank in members:
                    sent.wait()
                else:
                    self.unclaimed.append((sent, given))
        return Done()

    def state_scan(
        self, out: Tensor, state: Tensor, fade: Tensor, group: str, slices: int, reverse: bool
    ) -> Handle:
        """Fill ``out`` with the faded sum of the states of the ranks before, or behind this one.

        ``state`` [batch, heads, d, d] goes in ``slices`` along its third dim; ``fade`` [heads].
        """
        self._record("state_scan", group, state)
        ranks, where = group_ranks(self.mesh, group, self.rank), self.groups[group]
        if reverse:
            ranks = ranks[::-1]
        here = ranks.index(self.rank)
        ends = ranks[here - 1] if here else None, ranks[here + 1] if ranks[here + 1 :] else None
        return Scan(out, state, fade[None, :, None, None], slices, ends, where)

    def _peer(self, group: str, step: int) -> int:
        ranks = group_ranks(self.mesh, group, self.rank)
        return ranks[ranks.index(self.rank) + step]

    def send(self, tensor: Tensor, group: str, channel: str, step: int, tag: int) -> Handle:
        """Start sending ``tensor`` to the rank ``step`` places on in the group."""
        self._record("send", group, tensor)
        where = self.groups[f"{group}/{channel}"]
        return _started(dist.isend(tensor, self._peer(group, step), where, tag))

    def recv(self, out: Tensor, group: str, channel: str, step: int, tag: int) -> Handle:
        """Start filling ``out`` from the rank ``step`` places on in the group."""
        self._record("recv", group, out)
        where = self.groups[f"{group}/{channel}"]
        return _started(dist.irecv(out, self._peer(group, step), where, tag))


class Local:
    """One rank alone: collectives become the local copies that they imply."""

    def __init__(self, mesh: Mapping[str, int], rank: int, beside: Transport | None = None) -> None:
        self.mesh, self.rank = mesh, rank
        self.recorded: Counter[tuple[str, str]] = beside.recorded if beside else Counter()

    def close(self) -> None:
        """Do nothing."""

    def _record(self, kind: str, group: str, tensor: Tensor, *, sends: bool = True) -> None:
        self.recorded[kind, group] += tensor.numel() * tensor.element_size() * sends

    def all_reduce(self, tensor: Tensor, group: str) -> Handle:
        """Read and write the tensor once."""
        self._record("all_reduce", group, tensor)
        tensor.mul_(1.0)
        return Done()

    def all_gather(self, out: Tensor, tensor: Tensor, group: str) -> Handle:
        """Copy the own part into every part."""
        self._record("all_gather", group, out)
        for part in out.view(axis_degree(self.mesh, group), -1):
            if part.data_ptr() != tensor.data_ptr():
                part.copy_(tensor.reshape(-1))
        return Done()

    def reduce_scatter(self, out: Tensor, tensor: Tensor, group: str) -> Handle:
        """Sum the parts of the own tensor."""
        self._record("reduce_scatter", group, tensor)
        torch.sum(tensor.view(axis_degree(self.mesh, group), *out.shape), 0, out=out)
        return Done()

    def all_to_all(
        self, out: Tensor, tensor: Tensor, group: str, counts: Sequence[Sequence[int]] = ()
    ) -> Handle:
        """Copy the tensor."""
        if counts:
            here = group_ranks(self.mesh, group, self.rank).index(self.rank)
            tensor = tensor[: sum(counts[here])]
            rows = min(len(out), len(tensor))
            self._record("all_to_all", group, tensor)
            out[:rows].copy_(tensor[:rows])
            return Done()
        self._record("all_to_all", group, tensor)
        out.copy_(tensor)
        return Done()

    def ring_shift(
        self,
        out: Tensor,
        tensor: Tensor,
        group: str,
        distance: int = 1,
        senders: Sequence[bool] = (),
    ) -> Handle:
        """Copy the tensor."""
        here = group_ranks(self.mesh, group, self.rank).index(self.rank)
        self._record("ring_shift", group, tensor, sends=not senders or senders[here])
        out.copy_(tensor)
        return Done()

    def quorum(self, out: Tensor, tensor: Tensor, group: str, backups: int) -> Handle:
        """Count every member."""
        self._record("quorum", group, out)
        out.fill_(1)
        return Done()

    def quorum_reduce(self, tensor: Tensor, counted: Tensor, group: str) -> Handle:
        """Read and write the tensor once."""
        self._record("quorum_reduce", group, tensor)
        tensor.mul_(1.0)
        return Done()

    def state_scan(
        self, out: Tensor, state: Tensor, fade: Tensor, group: str, slices: int, reverse: bool
    ) -> Handle:
        """Copy the state."""
        self._record("state_scan", group, state)
        out.copy_(state)
        return Done()

    def send(self, tensor: Tensor, group: str, channel: str, step: int, tag: int) -> Handle:
        """Do nothing: the peer is not there."""
        self._record("send", group, tensor)
        return Done()

    def recv(self, out: Tensor, group: str, channel: str, step: int, tag: int) -> Handle:
        """Fill the buffer with small numbers in place of what the peer would send."""
        self._record("recv", group, out)
        if out.dtype.is_floating_point:
            out.normal_(0.0, 0.02)
        else:
            out.zero_()
        return Done()


Transport = Distributed | Local
