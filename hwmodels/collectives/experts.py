"""Dispatch and combine of a mixture of experts as DeepEP does them: who gets a copy, how long.

A token goes to ``topk`` of E experts, E / R on each of R ranks. Normal mode sends one copy to each
distinct rank that has one of its experts, one to each distinct node over the network; low latency
sends one per expert, each straight to its rank. With k draws without replacement a group that holds
g of E experts is missed with probability C(E-g, k) / C(E, k), so of E / g such groups

    distinct = E / g (1 - C(E-g, k) / C(E, k)).

A call of ``tokens`` per rank takes

    T = call + E expert + tokens' token / lanes + max(bytes_up / R, bytes_out / (e B_out))

call, expert, token: cycles to start, per queue of an expert, per token that a lane takes up; R:
e B_up, at most SMs r where r is what one SM copies. Normal mode has a lane per SM and hides the
taking up behind the copies after ``knee`` tokens; low latency has one per SM that serves experts,
ceil(E / ceil(E / SMs)). A rank's own copies stay where they are. Dispatch carries fp8 with one
fp32 scale per 128 values, combine bf16 (DeepEP, README). Routing is taken as balanced;
``imbalance`` is the busiest rank's load over the mean. Coefficients:
``data/curves/collectives-deepep.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from hwmodels.collectives.algorithms import sizes
from hwmodels.collectives.nccl import library_on
from hwmodels.collectives.traffic import Array
from hwmodels.collectives.tuner import GroupLayout, rate
from simcore.errors import InputError, unknown

DATA = Path(__file__).parents[1] / "data" / "curves" / "collectives-deepep.json"
BYTES_PER_VALUE = {"dispatch": 1 + 4 / 128, "combine": 2.0}
# SMs that a call takes where nobody says: DeepEP's Buffer.num_sms; all of an H100 or H200.
DEFAULT_SMS = {"normal": 20, "low-latency": 132}
ALL_TOKENS = 1e12


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase in one mode, fitted; 0 leaves a term out."""

    call_cycles: float
    share: float  # of the links' payload bandwidth
    token_cycles: float
    knee_tokens: float = ALL_TOKENS
    expert_cycles: float = 0.0
    sm_bytes_per_cycle: float = 0.0


@dataclass(frozen=True, slots=True)
class Routing:
    """What is routed: values per token, experts per token, experts in all."""

    hidden: int
    topk: int
    experts: int


@lru_cache(maxsize=1)
def phases() -> dict[str, Phase]:
    """Return the phases by "mode/phase"."""
    rows = json.loads(DATA.read_text(encoding="utf-8"))["phases"]
    return {name: Phase(**row["coefficients"]) for name, row in rows.items()}


def distinct_groups(experts: int, topk: int, groups: ArrayLike) -> Array:
    """Return how many of ``groups`` equal groups of experts a token's ``topk`` experts touch.

    Raises `InputError` where a token wants more experts than there are.
    """
    if not 1 <= topk <= experts:
        raise InputError(f"a token takes 1 to {experts} experts: got topk = {topk}.")
    count = np.asarray(groups, dtype=np.float64)
    draw = np.arange(topk).reshape(-1, *([1] * count.ndim))
    missed = np.maximum(experts - experts / count - draw, 0) / (experts - draw)
    return np.asarray(count * (1 - missed.prod(axis=0)))


def expert_copies(
    mode: str, routing: Routing, ranks: ArrayLike, ranks_per_node: ArrayLike
) -> tuple[Array, Array]:
    """Return the copies of a token that leave its rank: over links in a node, and between nodes.

    In normal mode a node's copy is passed on inside it, which counts as a copy over its links.
    """
    n, m, k = sizes(ranks, ranks_per_node)
    if mode == "low-latency":
        return routing.topk * (m - 1) / n, routing.topk * (n - m) / n
    if mode != "normal":
        raise unknown("mode", mode, ("normal", "low-latency"))
    on_ranks = distinct_groups(routing.experts, routing.topk, n)
    on_nodes = distinct_groups(routing.experts, routing.topk, k)
    # Of the ranks that want a token one in m is the one where its node's copy lies already.
    return on_ranks * (m - 1) / m, on_nodes * (k - 1) / k


def expert_seconds(
    mode: str,
    phase: str,
    tokens: ArrayLike,
    routing: Routing,
    group: GroupLayout,
    sms: int | None = None,
    imbalance: float = 1.0,
) -> Array:
    """Return the seconds of one dispatch or combine of ``tokens`` per rank; 0 for one rank.

    ``mode``: "normal" or "low-latency"; ``sms``: the chip's units that it takes.
    """
    known = phases()
    if f"{mode}/{phase}" not in known:
        raise unknown("mode/phase", f"{mode}/{phase}", known)
    taken = DEFAULT_SMS[mode] if sms is None else sms
    return price(known[f"{mode}/{phase}"], mode, phase, tokens, routing, group, taken, imbalance)


def price(
    coefficients: Phase,
    mode: str,
    phase: str,
    tokens: ArrayLike,
    routing: Routing,
    group: GroupLayout,
    sms: ArrayLike,
    imbalance: float = 1.0,
) -> Array:
    """Return the seconds of a call under ``coefficients`` (see `expert_seconds`)."""
    n, m, k = sizes(group.ranks, group.ranks_per_node)
    count = np.asarray(tokens, dtype=np.float64)
    up, out = expert_copies(mode, routing, n, m)
    token_bytes = count * routing.hidden * BYTES_PER_VALUE[phase] * imbalance
    clock = library_on(group.scale_up.name).clock_hz
    units = np.asarray(sms, dtype=np.float64)
    up_rate = coefficients.share * rate(group.scale_up, m)
    if coefficients.sm_bytes_per_cycle:
        up_rate = np.minimum(up_rate, units * coefficients.sm_bytes_per_cycle * clock)
    out_rate = coefficients.share * rate(group.scale_out, k)
    experts = routing.experts
    lanes = np.ceil(experts / np.ceil(experts / units)) if mode == "low-latency" else units
    taken_up = np.minimum(count, coefficients.knee_tokens) / lanes
    call = coefficients.call_cycles + experts * coefficients.expert_cycles
    wire_s = np.maximum(token_bytes * up / up_rate, token_bytes * out / out_rate)
    hop_s = np.where(k > 1, group.scale_out.latency_s, 0.0)
    seconds = (call + coefficients.token_cycles * taken_up) / clock + hop_s + wire_s
    return np.where(n > 1, seconds, 0.0)
