"""A sliced scan of states along a chain of ranks, message by message."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TAG = 1  # apart from a ring's messages between the same ranks


class Scan:
    """Each rank adds its own part to every slice that comes, and passes it on.

    The first rank sends at once; the others have their receives posted and pass slices on when
    they are waited for.
    """

    def __init__(
        self,
        out: Tensor,
        state: Tensor,
        fade: Tensor,
        slices: int,
        ends: tuple[int | None, int | None],
        group: Any,
    ) -> None:
        self.fade, self.group = fade, group
        self.before, self.after = ends
        self.outs, self.own = out.chunk(slices, 2), state.chunk(slices, 2)
        self.sent: list[Any] = []
        if self.before is None:
            out.zero_()
            for index in range(slices):
                self._pass_on(index)
            return
        self.came = [torch.empty_like(part).contiguous() for part in self.outs]
        self.receiving = [dist.irecv(part, self.before, group, TAG) for part in self.came]

    def _pass_on(self, index: int) -> None:
        if self.after is not None:
            total = (self.outs[index] * self.fade + self.own[index]).contiguous()
            self.sent.append((dist.isend(total, self.after, self.group, TAG), total))

    def wait(self) -> None:
        """Return once the state is there and has been passed on."""
        if self.before is not None:
            for index, work in enumerate(self.receiving):
                assert work is not None
                work.wait()
                self.outs[index].copy_(self.came[index])
                self._pass_on(index)
        for work, _ in self.sent:
            work.wait()
