"""What is to be run: a training step, a generation, one collective or one operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One optimizer step over ``global_batch`` sequences of ``seq_len`` tokens.

    ``lengths``: tokens of each sequence, where they differ; ``seq_len`` is then the longest.
    """

    global_batch: int
    seq_len: int
    optimizer: str = "adam"
    params_dtype: str = ""  # "" means the model's weights_dtype
    grads_dtype: str = "fp32"
    documents: tuple[int, ...] = ()  # tokens of those packed in every sequence; empty: one
    lengths: tuple[int, ...] = ()
    loss_tokens: int = 0  # that the loss is a mean over; 0: all of the step's

    @property
    def tokens(self) -> int:
        """Tokens of the step, without padding."""
        return sum(self.lengths) or self.global_batch * self.seq_len


@dataclass(frozen=True, slots=True)
class Generation:
    """``batch`` prompts of ``input_tokens`` tokens, each continued by ``output_tokens``."""

    batch: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class RecommendStep:
    """One training step of a recommendation model over ``global_batch`` samples."""

    global_batch: int


@dataclass(frozen=True, slots=True)
class CollectiveCall:
    """One collective over the first ``ranks`` ranks; ``size_bytes`` in nccl-tests' convention."""

    op: str
    size_bytes: float
    ranks: int
    dtype: str = "bf16"
    implementation: str = ""  # the library; "" for the usual one


@dataclass(frozen=True, slots=True)
class OpCall:
    """One operator on one device: its kind and its dimensions."""

    op: str
    dims: Mapping[str, float] = field(default_factory=dict)
    dtype: str = "bf16"
    implementation: str = ""  # the library; "" for the mean of those that were measured
    mixer: str = ""  # of op "mixer": which one, and in which form
    form: str = ""


Workload = TrainStep | Generation | RecommendStep | CollectiveCall | OpCall
