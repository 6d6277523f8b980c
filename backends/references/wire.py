"""Ranks in one process: what passes between them is copied and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


def size_bytes(*tensors: Tensor) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(slots=True)
class Wire:
    """Bytes that each of ``ranks`` has sent; autograd follows what is moved."""

    ranks: int
    sent_bytes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sent_bytes = [0] * self.ranks

    def move(self, src: int, dst: int, tensor: Tensor) -> Tensor:
        """Return the receiver's copy; a message to oneself costs nothing."""
        if src != dst:
            self.sent_bytes[src] += size_bytes(tensor)
        return tensor.clone()

    def shift(self, held: Sequence[Tensor], by: int = 1) -> list[Tensor]:
        """Every rank passes what it holds ``by`` places on."""
        count = self.ranks
        return [self.move((r - by) % count, r, held[(r - by) % count]) for r in range(count)]

    def all_to_all(
        self, parts: Sequence[Sequence[Tensor]], ranks: Sequence[int]
    ) -> list[list[Tensor]]:
        """Part ``j`` of the i-th rank goes to the j-th; ``ranks`` are the members' numbers."""
        return [
            [self.move(src, dst, parts[i][j]) for i, src in enumerate(ranks)]
            for j, dst in enumerate(ranks)
        ]
