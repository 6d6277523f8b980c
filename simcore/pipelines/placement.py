"""Which rank holds which stage, and the messages that follow from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from simcore.pipelines.orders import Order, stage_ranks
from simcore.program import Action


@dataclass(frozen=True, slots=True)
class Placement:
    """The rank of every stage. Stage ``chain`` + s is a second copy of stage s of the network."""

    stage_rank: tuple[int, ...]
    chain: int  # stages of the network

    @classmethod
    def of(cls, order: Order, copies: int = 1) -> Placement:
        """Return the placement that an order implies; its stages are ``copies`` of the network."""
        ranks = stage_ranks(order)
        return cls(ranks, len(ranks) // copies)

    def after(self, stage: int) -> int | None:
        """Return the stage that takes this one's activations; None for the last."""
        return None if (stage + 1) % self.chain == 0 else stage + 1

    def before(self, stage: int) -> int | None:
        """Return the stage that takes this one's gradients; None for the first."""
        return None if stage % self.chain == 0 else stage - 1

    def step(self, stage: int, other: int | None) -> int:
        """Return how many ranks on ``other`` is; 0 on the same rank, or where there is none."""
        return 0 if other is None else self.stage_rank[other] - self.stage_rank[stage]

    def received(self, action: Action) -> Message | None:
        """Return the message that an action needs, if any."""
        if action.kind == "F":
            return self._message(self.before(action.stage), action, "F")
        if action.kind in BACKWARD:
            return self._message(self.after(action.stage), action, "B")
        return None

    def sent(self, action: Action) -> Message | None:
        """Return the message that an action gives rise to, if any."""
        if action.kind == "F":
            return self._message(action.stage, action, "F", self.after(action.stage))
        if action.kind in BACKWARD:
            return self._message(action.stage, action, "B", self.before(action.stage))
        return None

    def _message(
        self, source: int | None, action: Action, channel: str, target: int | None = -1
    ) -> Message | None:
        target = action.stage if target == -1 else target
        if source is None or target is None or not self.step(source, target):
            return None
        ranks = self.stage_rank[source], self.stage_rank[target]
        return Message(source, target, *ranks, channel, action.microbatch)


class Message(NamedTuple):
    """Activations (channel ``F``) or gradients (``B``) of a microbatch on their way."""

    source: int  # stages
    target: int
    src: int  # their ranks
    dst: int
    channel: str
    microbatch: int

    @property
    def send(self) -> Action:
        """The action that sends it."""
        return Action(self.source, f"SEND_{self.channel}", self.microbatch)

    @property
    def receive(self) -> Action:
        """The action that receives it."""
        return Action(self.target, f"RECV_{self.channel}", self.microbatch)

    @property
    def way(self) -> tuple[int, int, str]:
        """What keeps messages in order: the two ranks and the channel."""
        return self.src, self.dst, self.channel


BACKWARD = ("B", "BR", "I")  # what gives the gradient that the stage before needs
Ways = dict[tuple[int, int, str], deque[Message]]


def ways(order: Sequence[Sequence[Action]], placement: Placement) -> Ways:
    """Return the messages between every two ranks as they are sent."""
    found: Ways = {}
    for actions in order:
        for message in filter(None, map(placement.sent, actions)):
            found.setdefault(message.way, deque()).append(message)
    return found


def with_messages(order: Sequence[Sequence[Action]], placement: Placement) -> list[list[Action]]:
    """Add sends after and receives one action before the actions that need them.

    Messages from one rank to another are received as they are sent: those that come before a
    needed one are received with it.
    """
    sent = ways(order, placement)
    done: set[Message] = set()

    def receives(action: Action) -> Iterator[Action]:
        wanted = placement.received(action)
        while wanted is not None and wanted not in done:
            message = sent[wanted.way].popleft()
            done.add(message)
            yield message.receive

    found: list[list[Action]] = []
    for actions in order:
        out = [*receives(actions[0])]
        for action, following in zip(actions, [*actions[1:], None], strict=True):
            out += receives(following) if following else []
            message = placement.sent(action)
            out += [action, *([message.send] if message else [])]
        found.append(out)
    return found


def last_reduces(actions: Sequence[Action]) -> list[Action]:
    """Mark each stage's last backward or weight gradient, which also reduces gradients."""
    final = {a.stage: i for i, a in enumerate(actions) if a.kind in ("B", "W")}
    return [
        a._replace(kind=a.kind + "R") if final.get(a.stage) == i else a
        for i, a in enumerate(actions)
    ]
