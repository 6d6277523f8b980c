"""Programs run on real ranks equal the dense reference, and do what the program says they do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from simcore.accounting import step_totals
from simcore.liveness import activation_peaks, residents
from simcore.lower import lower_pass, lower_training
from simcore.lowering.units import layer_unit
from simcore.models import ModelSpec
from simcore.ops import COMMUNICATION, WORK
from simcore.program import Program, coordinates, group_ranks
from simcore.recommendation import Recommender, lower_recommender
from simcore.strategy import ParallelStrategy
from simcore.workloads import Generation, TrainStep

torch = pytest.importorskip("torch")

from dense import Dense, Experts, Layer  # noqa: E402

from backends.data import sequence  # noqa: E402
from backends.launch import GenerationJob, Job, RunOptions, RunResult, run_many  # noqa: E402
from backends.torch_ops import OPS  # noqa: E402
from backends.weights import dense_weight, local_weight  # noqa: E402

pytestmark = pytest.mark.distributed

SEED, STEPS = 5, 2
FP32 = {"weights_dtype": "fp32", "compute_dtype": "fp32", "kv_dtype": "fp32"}
LLAMA = ModelSpec("llama-like", 3, 16, 4, 2, 4, 24, 29, **FP32)  # 29: no degree divides it
TIED = replace(LLAMA, name="tied", tied_embeddings=True)
GPT2 = ModelSpec(
    "gpt2-like",
    3,
    16,
    4,
    4,
    4,
    24,
    29,
    ffn_kind="mlp",
    activation="gelu_tanh",
    norm="layernorm",
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    position="learned",
    max_positions=16,
    tied_embeddings=True,
    **FP32,
)
FALCON = replace(
    LLAMA,
    name="falcon-like",
    ffn_kind="mlp",
    activation="gelu",
    parallel_block=True,
    norm="layernorm",
    norms_per_layer=2,
)
GEMMA3 = replace(LLAMA, name="gemma3-like", activation="gelu_tanh", qk_norm=True, norms_per_layer=4)
DEEP = replace(LLAMA, name="deep", layers=4)
DEEPER = replace(LLAMA, name="deeper", layers=8)
DEEP_TIED = replace(GPT2, name="deep-gpt2", layers=4)
MIXTRAL = replace(LLAMA, name="mixtral-like", experts=4, experts_per_token=2, moe_ffn=12, ffn=0)
SHARED = replace(MIXTRAL, name="shared-like", dense_layers=1, shared_experts=2, ffn=24)
BOTH_WAYS = replace(LLAMA, name="not-causal", causal=False)
LATTE = replace(
    GPT2,
    name="latte-like",
    layers=4,
    causal=False,
    frames=2,
    mixers=("space", "time", "time", "space"),
    tied_embeddings=False,
)
OTHER_WAY = replace(LATTE, name="time-first", mixers=("time", "space") * 2, causal=True)
LINEAR = replace(LLAMA, name="linear-like", mixers=("linear",) * 3)
HYBRID = replace(
    LLAMA, name="hybrid-like", mixers=("linear", "gqa", "linear"), linear_decay="retnet"
)
MODELS = {
    m.name: m
    for m in (
        *(LLAMA, TIED, GPT2, FALCON, GEMMA3, MIXTRAL, SHARED, DEEP, DEEPER, DEEP_TIED),
        *(BOTH_WAYS, LATTE, OTHER_WAY, LINEAR, HYBRID),
    )
}
TRAIN = TrainStep(global_batch=4, seq_len=8)


@dataclass(frozen=True)
class Case:
    """A model under a strategy."""

    name: str
    model: ModelSpec
    parallel: ParallelStrategy
    documents: tuple[int, ...] = ()

    @property
    def program(self) -> Program:
        return lower_training(self.model, self.parallel, replace(TRAIN, documents=self.documents))

    @property
    def dispatch(self) -> tuple[int, float]:
        """Tokens that fill the experts together, and the most that an expert takes of them."""
        shape, parallel = self.model, self.parallel
        factor = parallel.capacity_factor or (1.0 if parallel.ep > 1 else math.inf)
        rows = parallel.microbatch * TRAIN.seq_len
        rows //= parallel.tp if parallel.sequence_parallel else 1
        if not shape.experts or factor == math.inf:
            return 0, math.inf
        return rows, math.ceil(factor * rows * shape.experts_per_token / shape.experts)


def case(name: str, model: ModelSpec = LLAMA, **parallel: object) -> Case:
    return Case(name, model, ParallelStrategy(**parallel))  # type: ignore[arg-type]


def packed(name: str, *documents: int, model: ModelSpec = LLAMA, **parallel: object) -> Case:
    return replace(case(name, model, **parallel), documents=documents)


def looped(name: str, model: ModelSpec = DEEP, virtual: int = 2, **parallel: object) -> Case:
    return case(name, model, virtual_stages=virtual, **parallel)


RECOMPUTING = [  # some modules, some layers
    case("selective", recompute="selective", microbatch=2),
    case(
        "selective-every-module",
        GPT2,
        recompute="selective",
        recompute_modules=("norms", "activation", "attention"),
    ),
    case("full-of-two-layers", recompute="full", recompute_layers=(2,)),
    case(
        "selective-tp-sp-gathers",
        GEMMA3,
        tp=2,
        sequence_parallel=True,
        recompute="selective",
        recompute_modules=("gathers", "attention"),
    ),
    case("selective-ring", cp=2, recompute="selective"),
    looped(
        "selective-zbv",
        pp=2,
        schedule="zbv",
        recompute="selective",
        recompute_modules=("activation",),
        recompute_layers=(1, 0, 0, 1),
    ),
]
STREAMED = [  # layers and losses in chunks of the sequence
    case("streamed", stream_chunks=4),
    case("streamed-gpt2", GPT2, stream_chunks=2, loss_chunks=8, microbatch=2),
    case("streamed-gemma3", GEMMA3, stream_chunks=2, microbatch=2),
    case("streamed-parallel-block", FALCON, stream_chunks=2),
    case("streamed-zero3", dp_shard=2, stream_chunks=2),
    case("streamed-tp", tp=2, stream_chunks=4, microbatch=2),
    case("streamed-tied-pp", TIED, pp=2, stream_chunks=2),
    case("loss-chunks-tp-sp", TIED, tp=2, sequence_parallel=True, loss_chunks=4, microbatch=2),
    case("loss-chunks-moe-ring", MIXTRAL, cp=2, loss_chunks=2),
]
SWAPPED = [  # activations copied to the host by token
    case("swapped", swap_fraction=0.4),
    case("swapped-gpt2-whole", GPT2, swap_fraction=1.0, microbatch=2),
    case("swapped-gemma3-none", GEMMA3, swap_fraction=0.0),
    case("swapped-parallel-block", FALCON, swap_fraction=0.5, microbatch=2),
    case("swapped-tp", tp=2, swap_fraction=0.5),
    case("swapped-zero3", dp_shard=2, swap_fraction=0.25),
    case("swapped-tied-pp", TIED, pp=2, swap_fraction=0.6),
]
PIPELINES = [  # several stages on a rank, split backwards, two directions
    looped("interleaved", pp=2, schedule="interleaved"),
    looped("interleaved-4", DEEPER, 4, pp=2, schedule="interleaved", recompute="full"),
    looped("bfs", pp=2, schedule="looped_bfs"),
    looped("gpt2-interleaved", DEEP_TIED, pp=2, schedule="interleaved"),
    case("zb-h1", pp=2, schedule="zb_h1"),
    case("zb-h2", pp=2, schedule="zb_h2"),
    case("zb-h2-full-recompute", pp=2, schedule="zb_h2", recompute="full"),
    case("gpt2-zb-h1", GPT2, pp=2, schedule="zb_h1"),
    looped("interleaved-zb", pp=2, schedule="interleaved_zb"),
    looped("zbv", pp=2, schedule="zbv"),
    looped("gpt2-zbv", DEEP_TIED, pp=2, schedule="zbv"),
    looped("dualpipev", pp=2, schedule="dualpipev"),
    case("dualpipe", pp=2, schedule="dualpipe"),
    case("chimera", pp=2, schedule="chimera"),
    looped("bitpipe", pp=2, schedule="bitpipe"),
    looped("hanayo", DEEPER, 4, pp=2, schedule="hanayo"),
    case("chimera-on-4", DEEP, pp=4, schedule="chimera"),
    looped("bitpipe-on-4", DEEPER, pp=4, schedule="bitpipe"),
    looped("interleaved-on-4", DEEPER, pp=4, schedule="interleaved"),
    looped("zbv-on-4", DEEPER, pp=4, schedule="zbv"),
    case("zb-h2-on-4", DEEP, pp=4, schedule="zb_h2"),
    looped("zero3-interleaved", dp_shard=2, pp=2, schedule="interleaved"),
    case("tp-zb-h1", tp=2, pp=2, schedule="zb_h1", sequence_parallel=True),
    looped("tp-zbv", tp=2, pp=2, schedule="zbv"),
    case("dp-zb-h1", GPT2, dp_replicate=2, pp=2, schedule="zb_h1"),
    case("tp-dualpipe", tp=2, pp=2, schedule="dualpipe"),
]
CASES = [
    case("single"),
    case("single-full-recompute", recompute="full"),
    case("single-keep-attention", recompute="keep_attention"),
    case("single-gpt2", GPT2, microbatch=2),
    case("single-tied", TIED),
    case("single-parallel-block", FALCON),
    # two ranks
    case("dp", dp_replicate=2),
    case("dp-microbatch", dp_replicate=2, microbatch=2),
    case("zero1", dp_shard=2, zero_stage=1),
    case("zero2", dp_shard=2, zero_stage=2),
    case("zero3", dp_shard=2),
    case("zero3-full-recompute", dp_shard=2, recompute="full"),
    case("tp", tp=2),
    case("tp-sp", tp=2, sequence_parallel=True),
    case("tp-full-recompute", tp=2, recompute="full", microbatch=2),
    case("pp-gpipe", pp=2, schedule="gpipe"),
    case("pp-1f1b", pp=2),
    case("pp-1f1b-uneven", pp=2, layers_per_stage=(1, 2), microbatch=2),
    case("pp-gpipe-full-recompute", pp=2, schedule="gpipe", recompute="full"),
    case("gpt2-dp", GPT2, dp_replicate=2),
    case("gemma3-zero3", GEMMA3, dp_shard=2),
    case("gemma3-tp", GEMMA3, tp=2),
    case("gemma3-tp-sp", GEMMA3, tp=2, sequence_parallel=True, zero_stage=0),
    case("gpt2-zero3", GPT2, dp_shard=2),
    case("gpt2-tp", GPT2, tp=2),
    case("gpt2-tp-sp", GPT2, tp=2, sequence_parallel=True, microbatch=2),
    case("gpt2-pp", GPT2, pp=2),
    case("tied-zero1", TIED, dp_shard=2, zero_stage=1),
    case("tied-zero2", TIED, dp_shard=2, zero_stage=2),
    case("tied-zero3", TIED, dp_shard=2),
    case("tied-tp-sp", TIED, tp=2, sequence_parallel=True),
    case("tied-pp", TIED, pp=2),
    case("parallel-block-tp-sp", FALCON, tp=2, sequence_parallel=True),
    case("ring", cp=2),
    case("ring-contiguous", cp=2, cp_layout="contiguous", microbatch=2),
    case("ring-striped", cp=2, cp_layout="striped"),
    case("ring-not-causal", BOTH_WAYS, cp=2),
    case("ring-full-recompute", cp=2, recompute="full"),
    case("ring-keep-attention", cp=2, recompute="keep_attention", zero_stage=3),
    case("ring-zero3", cp=2, zero_stage=3),
    case("gpt2-ring", GPT2, cp=2, microbatch=2),
    case("gemma3-ring-striped", GEMMA3, cp=2, cp_layout="striped"),
    case("token-ring", cp=2, cp_kind="token_ring", microbatch=2),
    case("lightseq", cp=2, cp_kind="lightseq", microbatch=2),
    case("ulysses", cp=2, cp_kind="ulysses"),
    case(
        "gpt2-ulysses",
        GPT2,
        cp=2,
        cp_kind="ulysses",
        microbatch=2,
        zero_stage=1,
        recompute="keep_attention",
    ),
    case("ulysses-not-causal", BOTH_WAYS, cp=2, cp_kind="ulysses"),
    case("grid", LATTE, microbatch=2),
    case("dsp", LATTE, cp=2, cp_kind="dsp", microbatch=2, recompute="full"),
    case("grid-ulysses", LATTE, cp=2, cp_kind="ulysses", microbatch=2),
    packed("documents", 1, 5, 2, microbatch=2),
    case("servers", cp=2, cp_kind="servers", recompute="full"),
    packed("servers-documents", 3, 5, cp=2, cp_kind="servers", task_rows=2, microbatch=2),
    case("ping-pong", cp=2, cp_kind="servers", microbatch=2, ping_pong=True, recompute="full"),
    # four ranks
    packed("servers-of-four", 7, 1, cp=4, cp_kind="servers", task_rows=1, zero_stage=3),
    packed(
        "ping-pong-documents-tp",
        5,
        3,
        cp=2,
        tp=2,
        cp_kind="servers",
        microbatch=4,
        task_rows=1,
        ping_pong=True,
        zero_stage=1,
    ),
    packed("servers-tp", 6, 2, model=GPT2, cp=2, tp=2, cp_kind="servers", sequence_parallel=True),
    case("dsp-pp", LATTE, cp=2, cp_kind="dsp", pp=2, schedule="zb_h1", microbatch=2),
    case("dsp-tp", OTHER_WAY, cp=2, cp_kind="dsp", tp=2),
    case("ring-of-four", cp=4),
    case("ring-of-four-contiguous", cp=4, cp_layout="contiguous"),
    case("ring-of-four-striped", cp=4, cp_layout="striped", zero_stage=2),
    case("double-ring", cp=4, cp_window=2, microbatch=2),
    case("double-ring-gpt2", GPT2, cp=4, cp_window=2, cp_layout="contiguous", zero_stage=3),
    case("token-ring-of-four", cp=4, cp_kind="token_ring"),
    case("token-ring-of-four-gpt2", GPT2, cp=4, cp_kind="token_ring", cp_layout="contiguous"),
    case("lightseq-of-four", cp=4, cp_kind="lightseq", recompute="keep_attention"),
    case("lightseq-of-four-gpt2", GPT2, cp=4, cp_kind="lightseq", zero_stage=3, microbatch=2),
    case("usp", cp=4, cp_kind="usp", cp_ring=2, cp_ulysses=2),
    case("usp-gpt2", GPT2, cp=4, cp_kind="usp", cp_ring=2, cp_ulysses=2, zero_stage=3),
    case("ring-dp", cp=2, dp_replicate=2, cp_layout="contiguous"),
    case("ring-zero3-dp", cp=2, dp_shard=2),
    case("ring-tp-sp", cp=2, tp=2, sequence_parallel=True),
    case("ring-tied-pp", TIED, cp=2, pp=2),
    case("ulysses-pp", cp=2, pp=2, cp_kind="ulysses"),
    case("ulysses-gpt2-tp", GPT2, cp=2, tp=2, cp_kind="ulysses"),
    case("hsdp", dp_replicate=2, dp_shard=2),
    case("zero1-both-axes", dp_replicate=2, dp_shard=2, zero_stage=1),
    case("zero2-both-axes", dp_replicate=2, dp_shard=2, zero_stage=2),
    case("tp-pp", tp=2, pp=2, microbatch=2),
    case("tp-sp-pp-gpipe", tp=2, pp=2, sequence_parallel=True, schedule="gpipe"),
    case("dp-pp", dp_replicate=2, pp=2),
    case("zero3-tp", dp_shard=2, tp=2),
    case("zero3-tp-sp", dp_shard=2, tp=2, sequence_parallel=True),
    case("zero1-pp-tied", TIED, dp_shard=2, zero_stage=1, pp=2),
    case("dp-pp-gpt2", GPT2, dp_replicate=2, pp=2, schedule="gpipe"),
    case("zero2-pp-full-recompute", dp_shard=2, zero_stage=2, pp=2, recompute="full"),
    case("zero3-pp", dp_shard=2, pp=2),
    *PIPELINES,
    *RECOMPUTING,
    *STREAMED,
    *SWAPPED,
    # mixtures of experts
    case("moe", MIXTRAL, microbatch=2),
    case("moe-capacity", MIXTRAL, capacity_factor=1.0),
    case("moe-shared-recompute", SHARED, recompute="full"),
    case("moe-dp", MIXTRAL, dp_replicate=2),
    case("moe-ep", MIXTRAL, dp_replicate=2, ep=2),
    case("moe-ep-zero3", SHARED, dp_shard=2, ep=2, capacity_factor=0.75),
    case("moe-zero2", MIXTRAL, dp_shard=2, zero_stage=2),
    case("moe-tp", SHARED, tp=2, recompute="keep_attention"),
    case("moe-tp-capacity", MIXTRAL, tp=2, capacity_factor=1.0),
    case("moe-tp-sp", SHARED, tp=2, sequence_parallel=True),
    case("moe-tp-sp-ep", SHARED, tp=2, sequence_parallel=True, ep=2, microbatch=2),
    case("moe-pp", SHARED, pp=2),
    case("moe-ep-zero3-four", MIXTRAL, dp_shard=4, ep=2),
    case("moe-ep-hsdp", SHARED, dp_replicate=2, dp_shard=2, ep=2),
    case("moe-zero3-hsdp", MIXTRAL, dp_replicate=2, dp_shard=2),
    case("moe-ep-tp", SHARED, dp_replicate=2, tp=2, ep=2, capacity_factor=2.0),
    case("moe-ep-folded", MIXTRAL, dp_shard=2, tp=2, sequence_parallel=True, ep=4),
    case(
        "moe-ep-folded-zero1", SHARED, dp_shard=2, zero_stage=1, tp=2, sequence_parallel=True, ep=2
    ),
    case("moe-ep-pp", SHARED, dp_replicate=2, pp=2, ep=2, recompute="full"),
]
CASES += [  # linear attention, and what of it gets from rank to rank
    case("linear", LINEAR, microbatch=2),
    case("hybrid-tp", HYBRID, tp=2, sequence_parallel=True, recompute="selective"),
    case("hybrid-pp", HYBRID, pp=2, recompute="full"),
    case("lasp", HYBRID, cp=2, cp_kind="lasp", microbatch=2),
    case("lasp2", HYBRID, cp=2, cp_kind="lasp2", microbatch=2, recompute="selective"),
    case("zeco", LINEAR, cp=2, cp_kind="zeco", cp_slices=2, zero_stage=1),
    case("lasp-on-4", LINEAR, cp=4, cp_kind="lasp", zero_stage=3),
    case("lasp2-on-4", HYBRID, cp=4, cp_kind="lasp2", zero_stage=2, recompute="full"),
    case("zeco-on-4", HYBRID, cp=4, cp_kind="zeco", microbatch=4),
    case("lasp-dp", HYBRID, cp=2, dp_shard=2, cp_kind="lasp", recompute="full"),
    case("lasp2-tp", HYBRID, cp=2, tp=2, cp_kind="lasp2", sequence_parallel=True),
    case("zeco-pp", HYBRID, cp=2, pp=2, cp_kind="zeco", schedule="zb_h1"),
]
BY_NAME = {c.name: c for c in CASES}
BF16_CASES = [
    case("bf16-zero3", replace(LLAMA, weights_dtype="bf16", compute_dtype="bf16"), dp_shard=2),
    case(
        "bf16-zero1",
        replace(LLAMA, weights_dtype="bf16", compute_dtype="bf16"),
        dp_shard=2,
        zero_stage=1,
    ),
    case("bf16-tp", replace(LLAMA, weights_dtype="bf16", compute_dtype="bf16"), tp=2),
]
PROMPT = Generation(batch=4, input_tokens=5, output_tokens=6)
GENERATIONS = [
    case("generate-single"),
    case("generate-gpt2", GPT2),
    case("generate-gemma3", GEMMA3),
    case("generate-dp", dp_replicate=2),
    case("generate-tp", tp=2),
    case("generate-pp", pp=2),
    case("generate-gpt2-tp", GPT2, tp=2),
    case("generate-tied-pp", TIED, pp=2),
    case("generate-tp-pp", tp=2, pp=2),
    case("generate-dp-tp", dp_shard=2, tp=2),
    case("generate-moe", MIXTRAL),
    case("generate-moe-tp", SHARED, tp=2),
    case("generate-moe-ep", SHARED, dp_shard=2, ep=2, capacity_factor=2.0),  # drops nothing
    case("generate-moe-ep-tp", MIXTRAL, dp_replicate=2, tp=2, ep=2, capacity_factor=2.0),
]
EXACT = RunOptions(
    SEED, repeats=STEPS - 1, warmup=1, dtype="fp64", dump=("losses", "gradients"), timeout_s=60
)
COUNTED = RunOptions(SEED, repeats=1, warmup=0, track_memory=True, count_flops=True, timeout_s=60)
BF16 = replace(EXACT, dtype=None, dump=("losses",))
GENERATE = RunOptions(
    SEED, repeats=1, warmup=1, dtype="fp64", dump=("tokens", "logits"), timeout_s=60
)


def generation_job(found: Case) -> GenerationJob:
    """Return the programs of a generation."""
    rows = PROMPT.input_tokens
    prefill = lower_pass(found.model, found.parallel, PROMPT.batch, rows, 0)
    decode = lower_pass(found.model, found.parallel, PROMPT.batch, 1, rows)
    return GenerationJob(prefill, decode, PROMPT)


@cache
def results(world: int) -> dict[str, RunResult]:
    """Run all that needs ``world`` ranks in one launch; return results by name."""
    jobs: dict[str, Job] = {}
    for c in CASES:
        jobs[f"{c.name} exact"] = Job(c.program, EXACT)
        jobs[f"{c.name} counted"] = Job(c.program, COUNTED)
    for c in BF16_CASES:
        jobs[c.name] = Job(c.program, BF16)
    for c in GENERATIONS:
        jobs[c.name] = Job(generation_job(c), GENERATE)
    mine = {name: job for name, job in jobs.items() if job.processes == world}
    return dict(zip(mine, run_many(list(mine.values())), strict=True))


@pytest.fixture(params=list(BY_NAME))
def ran(request: pytest.FixtureRequest) -> tuple[Case, RunResult, RunResult]:
    """A case with its exact and its counted run."""
    found = BY_NAME[request.param]
    every = results(found.parallel.world)
    return found, every[f"{found.name} exact"], every[f"{found.name} counted"]


# ---------------------------------------------------------------- the reference


def dense_model(model: ModelSpec) -> Dense:
    """Return the dense module with the weights that a run of ``model`` starts from."""
    program = lower_training(model, ParallelStrategy(), TRAIN)
    dense = Dense(model).double()
    with torch.no_grad():
        for (name, layer), parameter in dense.named().items():
            parameter.copy_(
                dense_weight(name, layer, program.buffers[name], 1, SEED, torch.float64)
            )
    return dense


@cache
def reference(
    name: str, dispatch: tuple[int, float] = (0, math.inf), documents: tuple[int, ...] = ()
) -> tuple[list[float], Mapping[tuple[str, int], torch.Tensor]]:
    """Return the losses of some steps, and the gradients of the first."""
    model = MODELS[name]
    dense = dense_model(model)
    for module in dense.modules():
        if isinstance(module, Layer):
            module.documents = documents
        if isinstance(module, Experts):
            module.rows, module.most = dispatch
    rows = torch.stack(
        [sequence(SEED, i, TRAIN.seq_len, model.vocab) for i in range(TRAIN.global_batch)]
    )
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    losses, gradients = [], {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = dense.loss(rows[:, :-1], rows[:, 1:])
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = gradients or {key: value.grad.clone() for key, value in dense.named().items()}
        optimizer.step()
    return losses, gradients


def gradient_shard(
    program: Program,
    rank: int,
    name: str,
    layer: int,
    gradients: Mapping[tuple[str, int], torch.Tensor],
) -> np.ndarray:
    """Cut from whole gradients what the flat buffer ``name`` of ``rank`` should hold."""
    unit, kind = name.rsplit(".", 1)
    tp = program.mesh["tp"]

    def index(group: str) -> int:
        return group_ranks(program.mesh, group, rank).index(rank)

    flat = np.zeros(program.buffers[f"{unit}.g"].elements)
    for member, buffer in program.buffers.items():
        if buffer.base != f"{unit}.w" or buffer.part:
            continue
        whole = gradients[member, layer if buffer.layered else -1]
        part = local_weight(whole, buffer, index, tp).numpy().ravel()
        flat[buffer.offset : buffer.offset + buffer.elements] = part
    if kind == "g":
        return flat
    ops = (op for block in program.blocks.values() for op in block.ops)
    group = next(op.group for op in ops if op.kind == "reduce_scatter" and f"{unit}.g" in op.reads)
    place = index(group)
    size = program.buffers[name].elements
    return flat[place * size : (place + 1) * size]


# ---------------------------------------------------------------- training


def test_the_reference_drops_what_exceeds_a_capacity() -> None:
    """So that cases with a capacity are checked on rows that were really dropped."""
    kept = reference(MIXTRAL.name, BY_NAME["moe"].dispatch)[0]
    for name in ("moe-ep", "moe-ep-tp", "moe-tp-capacity"):
        factor = BY_NAME[name].parallel.capacity_factor or 1.0
        found = reference(MIXTRAL.name, BY_NAME[name].dispatch)[0]
        assert (found == pytest.approx(kept, rel=1e-12)) == (factor >= 2.0)


def test_losses_equal_the_dense_reference(ran: tuple[Case, RunResult, RunResult]) -> None:
    """Also after optimizer steps, so updates and gathers of weights are right too."""
    found, exact, _ = ran
    losses, _ = reference(found.model.name, found.dispatch, found.documents)
    assert exact.losses == pytest.approx(losses, rel=1e-10)


def test_gradient_shards_equal_the_dense_gradients(ran: tuple[Case, RunResult, RunResult]) -> None:
    found, exact, _ = ran
    _, gradients = reference(found.model.name, found.dispatch, found.documents)
    units = set()
    for rank in exact.ranks:
        for key, array in rank.arrays.items():
            name, layer = key.rsplit("/", 1)
            expected = gradient_shard(found.program, rank.rank, name, int(layer), gradients)
            layered = found.program.buffers[name].layered
            units.add((name.split(".")[0], int(layer) if layered else -1))
            np.testing.assert_allclose(array, expected, rtol=1e-9, atol=1e-13)
    layers = {(layer_unit(found.model, i), i) for i in range(found.model.layers)}
    layers |= {("experts", i) for unit, i in layers if unit == "moe"}
    assert units == {("embed", -1), ("head", -1), *layers}


def test_collectives_move_what_the_program_says(ran: tuple[Case, RunResult, RunResult]) -> None:
    found, _, counted = ran
    program = found.program
    for rank in counted.ranks:
        totals = step_totals(program, coordinates(program.mesh, rank.rank)["pp"], rank.rank)
        assert rank.payload_bytes == dict(totals.payload_bytes)


def test_ranks_do_the_flops_that_the_program_says(ran: tuple[Case, RunResult, RunResult]) -> None:
    found, _, counted = ran
    program = found.program
    for rank in counted.ranks:
        totals = step_totals(program, coordinates(program.mesh, rank.rank)["pp"], rank.rank)
        assert rank.flops == totals.flops


def test_ranks_hold_the_bytes_that_liveness_says(ran: tuple[Case, RunResult, RunResult]) -> None:
    found, _, counted = ran
    program = found.program
    for rank in counted.ranks:
        stage = coordinates(program.mesh, rank.rank)["pp"]
        predicted = residents(program, stage).total + activation_peaks(program, stage)[0]
        assert rank.peak_live_bytes == predicted


@pytest.mark.parametrize("found", BF16_CASES, ids=lambda c: c.name)
def test_lower_precision_stays_near_the_reference(found: Case) -> None:
    """bf16 weights with fp32 master copies, sharded and not."""
    losses, _ = reference(LLAMA.name)
    assert results(2)[found.name].losses == pytest.approx(losses, rel=2e-3)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("found", GENERATIONS, ids=lambda c: c.name)
def test_generation_equals_the_dense_reference(found: Case) -> None:
    result = results(found.parallel.world)[found.name]
    dense = dense_model(found.model)
    rows = torch.stack(
        [sequence(SEED, i, PROMPT.input_tokens, found.model.vocab) for i in range(PROMPT.batch)]
    )[:, : PROMPT.input_tokens]
    with torch.no_grad():
        tokens = dense.generate(rows, PROMPT.output_tokens)
        logits = dense(torch.cat((rows, tokens), 1))[:, PROMPT.input_tokens - 1 : -1]
    mesh = result.mesh
    batch = PROMPT.batch // (mesh["dp_replicate"] * mesh["dp_shard"])
    for rank in result.ranks:
        where = coordinates(mesh, rank.rank)
        first = (where["dp_replicate"] * mesh["dp_shard"] + where["dp_shard"]) * batch
        mine = slice(first, first + batch)
        assert np.array_equal(rank.tokens, tokens[mine])
        for number, array in enumerate(rank.arrays.values()):
            np.testing.assert_allclose(array, logits[mine, number], rtol=1e-9)
        if where["pp"] == mesh["pp"] - 1:
            assert len(rank.arrays) == PROMPT.output_tokens
    assert len(result.pass_seconds) == PROMPT.output_tokens


# ---------------------------------------------------------------- contract


def test_every_kind_of_work_can_be_executed() -> None:
    assert set(OPS) == set(WORK) - COMMUNICATION


def test_cases_cover_every_kind_of_work() -> None:
    programs = [c.program for c in CASES]
    jobs = map(generation_job, GENERATIONS)
    programs += [program for job in jobs for program in (job.prefill, job.decode)]
    programs.append(lower_training(replace(GPT2, activation="relu"), ParallelStrategy(), TRAIN))
    coded = ParallelStrategy(pp=2, act_codec="int8")
    programs.append(lower_training(LLAMA, coded, TRAIN))
    programs.append(lower_recommender(Recommender("small", 2, 3, 4, 5), 2, 4))
    backed = ParallelStrategy(dp_replicate=2, backup_workers=1)
    programs.append(lower_training(LLAMA, backed, TRAIN))
    kinds = {op.kind for p in programs for block in p.blocks.values() for op in block.ops}
    assert kinds == set(WORK)
    assert math.isfinite(sum(step_totals(p, 0).flops for p in programs))
