"""Closed forms: arithmetic on published figures, and the registry of operators as a whole."""

from __future__ import annotations

import math

import numpy as np

from simcore.catalogue import load_model
from simcore.mixers import MIXERS, mixer_cost
from simcore.models import parameter_count
from validation.systems.agreement import SIZES, execute_forms
from validation.systems.attention_operators import attention_share
from validation.systems.frame import Finding, check, need_torch


@check("D6", mutant={"speedup_training": 5.0})
def s2_share(*, speedup_attention: float = 25.3, speedup_training: float = 6.0) -> Finding:
    """The share of time that explains both speedups of S2-Attention."""
    share = attention_share(speedup_training, speedup_attention)
    back = 1 / (1 - share + share / speedup_attention)
    return Finding(
        round(share, 3) == 0.868 and math.isclose(back, speedup_training),
        f"f = {share:.4f}",
        "Amdahl's law solved for the share",
        ("both figures come from one setting",),
    )


def distinct_experts(experts: float, chosen: float, tokens: float) -> float:
    """Return E (1 - (1 - k/E)^n): experts that n tokens touch if each chooses k at random."""
    return float(experts * (1 - (1 - chosen / experts) ** tokens))


@check("D7", mutant={"tokens_off": 1})
def des_expert_traffic(
    *, saved_time: float = 0.38, saved_experts: float = 0.55, tokens_off: int = 0
) -> Finding:
    """The share of step time that expert weights take, and the law of distinct experts.

    The law is compared with draws without replacement per token; ``tokens_off`` shifts its n.
    """
    share = saved_time / saved_experts
    experts, chosen = 128, 8
    random = np.random.default_rng(7)
    worst = 0.0
    for tokens in (1, 4, 16, 64):
        draws = random.random((500, tokens, experts)).argpartition(chosen, -1)[..., :chosen]
        touched = np.zeros((500, experts), dtype=bool)
        np.put_along_axis(touched, draws.reshape(500, -1), True, -1)
        law = distinct_experts(experts, chosen, tokens + tokens_off)
        worst = max(worst, abs(law / touched.sum(-1).mean() - 1))
    return Finding(
        round(share, 2) == 0.69 and worst < 0.02,
        f"{share:.3f} of step time; the law is within {worst:.2%} of 500 draws",
        "tokens choose independently, so an expert is missed with (1 - k/E)^n",
        ("both figures come from one setting", "128 experts, 8 per token, 1 to 64 tokens"),
    )


@check("D27", mutant={"causal_share": 1.0})
def attention_of_a_million(*, tokens: float = 1e6, causal_share: float = 0.5) -> Finding:
    """Attention against the 6 N term in a 7B model at a million tokens."""
    model = load_model("llama-2-7b")
    wide = model.heads * model.head_dim
    attention = causal_share * 12 * model.layers * wide * tokens
    dense = 6 * parameter_count(model)
    times, share = attention / dense, attention / (attention + dense)
    return Finding(
        abs(times - 20) < 1 and round(share, 2) == 0.95,
        f"{times:.1f} times the 6 N term, {share:.1%} of all FLOPs",
        "12 L h s per token, half of it causal, against 6 N",
        ("Llama-2-7B: 32 layers of width 4096", "10^6 tokens"),
    )


@check("D29", mutant={"tokens": 256})
def scan_in_serial_steps(*, tokens: int = 512, speedup: float = 175.0) -> Finding:
    """How many serial steps one scan over the sequence takes, if both wait for launches."""
    steps = tokens / speedup
    return Finding(
        round(steps, 1) == 2.9,
        f"{steps:.2f} serial steps per scan",
        "serial time is tokens x step; the scan's is that over the speedup",
        ("length and speedup come from one setting",),
    )


@check("P12", mutant={"lag": 1})
def operator_registry(*, lag: int = 0) -> Finding:
    """Every mixer is priced in every form, and its executed forms agree.

    Halting tokens (the Universal Transformer) draw their own sizes and are checked by G6.11.
    """
    need_torch()
    wrong = [name for name, sizes in SIZES.items() if not execute_forms(name, sizes, lag).same]
    priced = sum(len(mixer.forms) for mixer in MIXERS.values())
    for name, sizes in SIZES.items():
        for form in MIXERS[name].forms:
            cost = mixer_cost(name, form, {**sizes, "element_bytes": 2})
            if not float(cost.hbm_bytes) > 0:
                wrong.append(f"{name} {form}")
    return Finding(
        not wrong,
        f"{len(MIXERS)} mixers in {priced} forms",
        "all executed forms agree, their matrix products are those predicted"
        if not wrong
        else f"these do not agree: {', '.join(wrong)}",
        ("executed in float64 on the CPU",),
        "cpu",
    )
