"""Peak memory of a training rank in closed form: states, activations in flight, logits.

    peak = states + context + in flight x layers x activations + logits                    (1)

Activations of a layer in bytes, by what autograd keeps of each token (Korthikanti et al. 2022,
section 4): inputs of norms and products, of the activation function and of the residual's
dropout (one byte). They are kept whole on every tensor rank outside the parallel products, unless
the sequence is sharded too. Unfused attention also keeps probabilities, their dropout's mask and
its result: 5 bytes a pair of tokens and head. Full recomputation keeps a layer's input, and one
layer's activations while its backward runs. Logits are kept in 16 bits and, for the loss, in fp32.
A framework that leaves fusion to no one (``eager``) also keeps the gate's result, the gathered
inputs of products, vectors before and after rotation, and every step of the loss.

A 1F1B rank r of p keeps p - r microbatches; with v chunks of layers interleaved it keeps
(v - 1) p + 2 (p - 1 - r) + 1 chunks (Narayanan et al. 2021, section 2.2; Megatron-LM schedules.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from simcore.errors import InputError

# Workspaces of the product library and small buffers of a process; observed in allocations of
# Megatron-LM at rest, beside the states that the formula gives.
WORKSPACE_BYTES = 7.0e7
LOGIT_BYTES = 6.0  # 16 bits, and fp32 for the loss
EAGER_LOGIT_BYTES = 14.0  # beside both, their distance from the maximum and its exponential


@dataclass(frozen=True, slots=True)
class Layer:
    """A transformer layer as its memory sees it; ``ffn`` is the width of one FFN or expert."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool = False
    experts: int = 0
    experts_per_token: int = 1
    biases: bool = True

    @property
    def dense_parameters(self) -> float:
        """Parameters outside the FFN or experts."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        vectors = (self.head_dim * (self.heads + 2 * self.kv_heads) + self.hidden) * self.biases
        return attention + vectors + 4 * self.hidden + self.experts * self.hidden

    @property
    def ffn_parameters(self) -> float:
        """Parameters of the FFN, or of all experts."""
        each = (3 if self.gated else 2) * self.hidden * self.ffn
        each += ((1 + self.gated) * self.ffn + self.hidden) * self.biases
        return each * max(1, self.experts)


@dataclass(frozen=True, slots=True)
class Rank:
    """What a rank holds and how: degrees, bytes of states, what is kept for the backward pass."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1  # tensor parallelism inside experts
    dp: int = 1
    chunks: int = 1  # of layers, interleaved
    rank: int = 0  # along the pipeline
    sequence_parallel: bool = False
    unfused: bool = False
    recompute: str = "none"  # or "full"
    dropout: bool = True
    weight_bytes: float = 2.0
    grad_bytes: float = 4.0
    state_bytes: float = 12.0  # fp32 copy and Adam's two moments
    sharded_states: bool = False  # over data parallel ranks
    sharded_all: bool = False  # weights and gradients too
    eager: bool = False  # torch's own ops one by one, each keeping its inputs

    def __post_init__(self) -> None:
        if self.recompute not in ("none", "full"):
            raise InputError(f"recompute {self.recompute!r}: use 'none' or 'full'.")
        if not 0 <= self.rank < self.pp:
            raise InputError(f"rank {self.rank} is not one of {self.pp} pipeline ranks.")


def chunks_in_flight(rank: Rank, microbatches: int) -> int:
    """Return the (microbatch, chunk of layers) pairs that a pipeline rank keeps at most."""
    after = rank.pp - 1 - rank.rank
    if rank.chunks == 1:
        return min(after + 1, microbatches)
    return min((rank.chunks - 1) * rank.pp + 2 * after + 1, microbatches * rank.chunks)


def state_bytes(parameters: float, rank: Rank, replicas: float) -> float:
    """Return the bytes of weights, gradients and optimizer states of ``parameters`` on a rank."""
    kept = rank.weight_bytes + rank.grad_bytes
    kept = kept / replicas if rank.sharded_all else kept
    shared = rank.sharded_states or rank.sharded_all
    return parameters * (kept + rank.state_bytes / (replicas if shared else 1.0))


def activation_bytes(layer: Layer, rank: Rank, batch: int, seq_len: int) -> float:
    """Return the bytes that a layer keeps of one microbatch for its backward pass."""
    tokens = batch * seq_len / rank.cp
    whole = rank.tp if rank.sequence_parallel else 1
    h, query = layer.hidden, layer.heads * layer.head_dim
    outside = (8.0 + 2.0 * rank.dropout) * h / whole  # norms' and products' inputs, two masks
    inside = 2.0 * (2 * query + 2 * layer.kv_heads * layer.head_dim) / rank.tp
    core = 5.0 * layer.heads * seq_len / rank.tp if rank.unfused else 0.0
    wide = (3.0 + rank.eager if layer.gated else 2.0) * 2.0 * layer.ffn
    if rank.eager:  # inputs of products gathered; queries, keys and values before rotation as well
        outside += 4.0 * h * (1 - 1 / whole)
        inside += 2.0 * (query + 2 * layer.kv_heads * layer.head_dim) / rank.tp
    if not layer.experts:
        return tokens * (outside + inside + core + wide / rank.tp)
    # Each token is copied to its experts; rows gather over the tensor ranks that share an expert.
    rows = layer.experts_per_token * rank.etp / rank.tp
    routed = rows * (4.0 * h + wide / rank.etp)
    router = 4.0 * 3 * layer.experts / whole
    return tokens * (outside + inside + core + routed + router)


def peak_bytes(
    layer: Layer,
    rank: Rank,
    layers: int,
    vocab_rows: float,
    tables: int,
    batch: int,
    seq_len: int,
    microbatches: int,
) -> float:
    """Return the peak bytes of a rank that holds ``layers`` layers: equation (1).

    ``vocab_rows``: of the whole vocabulary, padded; ``tables``: vocabulary matrices on the rank
    (embedding, head). Logits exist on the last pipeline rank.
    """
    copies = rank.dp * rank.cp
    dense = (
        layers * (layer.dense_parameters / rank.tp) + tables * vocab_rows * layer.hidden / rank.tp
    )
    states = state_bytes(dense, rank, copies)
    share = rank.etp * rank.ep if layer.experts else rank.tp
    replicas = max(1.0, copies * rank.tp / share) if layer.experts else copies
    states += state_bytes(layers * layer.ffn_parameters / share, rank, replicas)
    flying = chunks_in_flight(rank, microbatches)
    kept = activation_bytes(layer, rank, batch, seq_len)
    tokens = batch * seq_len / rank.cp
    if rank.recompute == "full":
        inputs = 2.0 * tokens * layer.hidden / (rank.tp if rank.sequence_parallel else 1)
        held = flying * layers / rank.chunks * inputs
    else:
        held = flying * layers / rank.chunks * kept
    logits = 0.0
    if rank.rank == rank.pp - 1:
        logits = tokens * vocab_rows / rank.tp
        logits *= EAGER_LOGIT_BYTES if rank.eager else LOGIT_BYTES
    beside = kept if rank.recompute == "full" else 0.0
    return states + WORKSPACE_BYTES + held + max(logits, beside)
