"""What can be counted while a step runs: live bytes, FLOPs, gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backends.interpreter import Interpreter
from simcore.ops import Op


class LiveBytes:
    """The most bytes that the tensors of a rank held at once; given data do not count."""

    def __init__(self) -> None:
        self.peak = 0

    def before(self, op: Op, layer: int, reads: Sequence[Tensor]) -> None:
        """Do nothing."""

    def after(self, interpreter: Interpreter, written: Sequence[Tensor]) -> None:
        """Count every storage once."""
        buffers = interpreter.program.buffers
        held = [
            t
            for key, t in interpreter.tensors.items()
            if buffers[key[0]].scope not in ("data", "host")
        ]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*held, *written)
        }
        self.peak = max(self.peak, sum(storages.values()))


class Gradients:
    """The whole gradients of a step, by (buffer, layer), as the optimizer finds them."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def before(self, op: Op, layer: int, reads: Sequence[Tensor]) -> None:
        """Copy the gradient that an optimizer op is about to use."""
        if op.kind == "adam":
            self.found[f"{op.reads[0]}/{layer}"] = reads[0].detach().cpu().numpy().copy()

    def after(self, interpreter: Interpreter, written: Sequence[Tensor]) -> None:
        """Do nothing."""


class Logits:
    """The logits of every pass, as the op that chooses the next token finds them."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def before(self, op: Op, layer: int, reads: Sequence[Tensor]) -> None:
        """Copy the logits that are about to be sampled, shard by shard."""
        if op.kind == "sample":
            parts = reads[0].chunk(op.attrs["shards"])
            whole = torch.cat(parts, 1)[:, : op.attrs["vocab"]]
            self.found[f"pass{len(self.found)}"] = whole.detach().cpu().numpy().copy()

    def after(self, interpreter: Interpreter, written: Sequence[Tensor]) -> None:
        """Do nothing."""


def _addmm_in_place(out: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """Return the FLOPs of a kind that torch's counter lacks, from shapes."""
    return 2 * left[0] * left[1] * right[1]


@contextmanager
def counted_flops(interpreters: Sequence[Interpreter]) -> Iterator[FlopCounterMode]:
    """Count matrix-product FLOPs, with attention as explicit products."""
    mapping = {torch.ops.aten.addmm_: _addmm_in_place}
    for interpreter in interpreters:
        interpreter.context.fused = False
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        yield counter
    for interpreter in interpreters:
        interpreter.context.fused = interpreter.fused
