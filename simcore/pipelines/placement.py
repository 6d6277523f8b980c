"""Which rank holds which stage, and the messages that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    def received(self, action: Action) -> tuple[str, int] | None:
        """Return (kind of message, step to its sender) that an action needs, if any."""
        if action.kind == "F":
            kind, step = "RECV_F", self.step(action.stage, self.before(action.stage))
        elif action.kind in BACKWARD:
            kind, step = "RECV_B", self.step(action.stage, self.after(action.stage))
        else:
            return None
        return (kind, step) if step else None

    def sent(self, action: Action) -> tuple[str, int] | None:
        """Return (kind of message, step to its receiver) that an action gives rise to, if any."""
        if action.kind == "F":
            kind, step = "SEND_F", self.step(action.stage, self.after(action.stage))
        elif action.kind in BACKWARD:
            kind, step = "SEND_B", self.step(action.stage, self.before(action.stage))
        else:
            return None
        return (kind, step) if step else None


BACKWARD = ("B", "BR", "I")  # what gives the gradient that the stage before needs


def with_messages(actions: Sequence[Action], placement: Placement) -> list[Action]:
    """Add sends after and receives one action before the actions that need them."""

    def receives(action: Action) -> list[Action]:
        found = placement.received(action)
        return [action._replace(kind=found[0])] if found else []

    out = receives(actions[0])
    for action, following in zip(actions, [*actions[1:], None], strict=True):
        out += receives(following) if following else []
        sent = placement.sent(action)
        out += [action, *([action._replace(kind=sent[0])] if sent else [])]
    return out


def last_reduces(actions: Sequence[Action]) -> list[Action]:
    """Mark each stage's last backward or weight gradient, which also reduces gradients."""
    final = {a.stage: i for i, a in enumerate(actions) if a.kind in ("B", "W")}
    return [
        a._replace(kind=a.kind + "R") if final.get(a.stage) == i else a
        for i, a in enumerate(actions)
    ]
