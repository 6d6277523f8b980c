"""Checks of sequence parallelism of linear attention: states by chain, gather and sliced scan."""

from __future__ import annotations

from hwmodels.catalogue import load_chip, make_cluster
from hwmodels.cost import ClusterCost
from hwmodels.mixers import mixer_seconds
from simcore.mixers import mixer_cost
from simcore.ops import Op
from validation.systems.frame import Finding, check, need_torch
from validation.systems.linear_operators import SETTING_TOLERANCE
from validation.systems.training_machine import exchange_seconds

HEADS, D_K, D_V, LAYERS, WIDTH = 16, 128, 128, 16, 2048  # a 1B network (TinyLlama-like width)
STATE_BYTES = HEADS * D_K * D_V * 2  # per sequence and layer in bf16
HOP_SOFTWARE_S = 2.5e-5  # of a send and its receive, issued by an eager host
LAYOUT = {"layout": "nt", "weight_dtype": "bf16"}
ON_CPU = "executed in float64 on the CPU; ranks in one process pass their states"


def exact(exchange: str, lag: int = 0) -> tuple[bool, list[int], int]:
    """Return whether output and gradients are the dense ones, bytes sent per rank, and hops."""
    need_torch()
    from backends.references.compare import gradients_agree, tensors
    from backends.references.states import dense, sharded
    from backends.references.wire import Wire

    wire = Wire(4)
    same = gradients_agree(lambda q, k, v: sharded(q, k, v, wire, exchange, lag), dense, tensors())
    return same, wire.sent_bytes, wire.hops


def local_seconds(tokens: int) -> float:
    """Return forward and backward of a layer's linear attention on a rank's tokens (A100)."""
    shape = {
        "batch": 1, "seq_len": tokens, "heads": HEADS, "d_k": D_K, "d_v": D_V,
        "element_bytes": 2, "chunk": 128,
    }  # fmt: skip
    cost = mixer_cost("linear_attention", "chunked", shape)
    return 3 * float(mixer_seconds(cost, load_chip("a100-sxm-80gb"), "bf16"))


def dense_part_seconds(tokens: int) -> float:
    """Return forward and backward of a layer's matrices (12 h^2) on a rank's tokens."""
    cost = ClusterCost(make_cluster("a100-sxm-80gb", 1), {"tp": 1})
    dims = {"m": tokens, "n": 12 * WIDTH, "k": WIDTH}
    return 3 * float(cost.seconds(Op("matmul", dims, "bf16", ("x",), ("y",), attrs=LAYOUT)))


def chain_seconds(ranks: int, rate: float) -> float:
    """Return the seconds until a state has passed all ranks, forward and back."""
    return 2 * (ranks - 1) * (STATE_BYTES / rate + HOP_SOFTWARE_S)


@check("G4.1", mutant={"lag": 1})
def lasp(*, ranks: int = 128, tokens: int = 4096 * 1024, lag: int = 0) -> Finding:
    """4096K tokens of a 1B network on 128 A100: memory, message size and the chain's seconds."""
    same, sent, hops = exact("chain", lag)
    each = tokens // ranks
    params = 1.1e9
    states = 4 * params + 12 * params / ranks  # replicated halves, states sharded
    activations = each * WIDTH * 34 * LAYERS  # bytes per token and layer, nothing recomputed
    logits = each * 50304 * (2 + 4)
    need, have = states + activations + logits, 0.9 * load_chip("a100-sxm-80gb").hbm.size_bytes
    cluster = make_cluster("a100-sxm-80gb", 8, ranks // 8)
    chain = chain_seconds(ranks, cluster.scale_out.bytes_per_s)
    work = local_seconds(each) + dense_part_seconds(each)
    fixed = len({s for s in sent if s}) == 1
    return Finding(
        same and fixed and hops == 3 and each == 32768 and need <= have,
        f"{need / 1e9:.0f} of {have / 1e9:.0f} GB; chain of {ranks - 1} hops {chain * 1e3:.1f} ms "
        f"per layer beside {work * 1e3:.1f} ms of local work",
        "a state per rank and layer, whatever the length; only the last rank waits for all hops"
        if same
        else "a state of the wrong rank gives another output",
        ("1.1B parameters, 16 layers of width 2048, bf16, 34 bytes per token, layer and width",
         "25 us of software per hop", ON_CPU),
        "cpu",
    )  # fmt: skip


@check("G4.2", mutant={"software_s": 0.0})
def lasp2(
    *,
    ranks: int = 64,
    tokens: int = 2048 * 1024,
    software_s: float = HOP_SOFTWARE_S,
    over_lasp: float = 1.152,
    over_ring: float = 1.366,
) -> Finding:
    """LASP-2 against LASP and a ring of keys and values of linear attention, 32K tokens per rank.

    ``software_s``: of a hop; without it the chain costs only its bytes.
    """
    same = all(exact(name)[0] for name in ("chain", "gather"))
    each = tokens // ranks
    cluster = make_cluster("a100-sxm-80gb", 8, ranks // 8)
    rate = cluster.scale_out.bytes_per_s
    local = local_seconds(each) + dense_part_seconds(each)
    gather = 2 * exchange_seconds("all_gather", STATE_BYTES * ranks, ranks, cluster)
    chain = 2 * (ranks - 1) * (STATE_BYTES / rate + software_s)
    ring = 2 * (ranks - 1) * (2 * each * WIDTH * 2 / rate + software_s)
    times = {
        "LASP-2": local + gather,
        "LASP": local + chain,
        "ring": local + max(0.0, ring - local_seconds(each) * ranks / 2),
    }
    ratios = times["LASP"] / times["LASP-2"], times["ring"] / times["LASP-2"]
    order = times["LASP-2"] < times["LASP"] < times["ring"]
    near = (
        abs(ratios[0] / over_lasp - 1) <= SETTING_TOLERANCE / 2
        and abs(ratios[1] / over_ring - 1) <= SETTING_TOLERANCE / 2
    )
    return Finding(
        same and order and near,
        f"{ratios[0]:.3f}x over LASP, {ratios[1]:.3f}x over Ring Attention",
        "a chain has P-1 hops one after the other, a gather one exchange"
        if order and near
        else "hops of keys and values between nodes outlast linear attention's blocks by far: what "
        "the published ring baseline computes and moves per hop is missing",
        ("1.1B network on 8 nodes of 8 A100, one sequence", "a ring's hops hide behind half of P "
         "blocks", f"within {SETTING_TOLERANCE / 2:.1%}", ON_CPU),
        "cpu",
    )  # fmt: skip


@check("G4.3", mutant={"exchange": "gather"})
def zeco(*, exchange: str = "all_scan", ranks: int = 64, slices: int = 16) -> Finding:
    """Bytes of the sliced scan against a gather, and weak scaling from one device to 64."""
    same, sent, _ = exact(exchange)
    _, gathered, _ = exact("gather")
    each = 2**20 // ranks
    cluster = make_cluster("a100-sxm-80gb", 8, ranks // 8)
    rounds = ranks - 2 + slices
    scan = rounds * (STATE_BYTES / slices / cluster.scale_out.bytes_per_s + 5e-6)
    local = local_seconds(each) + dense_part_seconds(each)
    hidden = local_seconds(each) / 3  # the chunk's own part needs no state
    one, many = local, local + 2 * max(0.0, scan - hidden)
    ratio = many / one
    return Finding(
        same and max(sent) < min(gathered) and each == 16384 and ratio <= 1.05,
        f"{max(sent)} bytes per rank against {min(gathered)} gathered; weak scaling {ratio:.3f} at "
        f"{ranks} ranks ({scan * 1e3:.2f} ms of scan, {hidden * 1e3:.2f} ms hide it)",
        "each rank sends one state in slices; the scan runs beside the part within the chunk"
        if ratio <= 1.05
        else "the scan's rounds outlast the local part that may hide them",
        (
            "5 us per slice in a kernel that polls its peer, 16 slices",
            "1.1B network on A100",
            ON_CPU,
        ),
        "cpu",
    )
