"""Large steps stay cheap: time and memory of a trillion parameters and of 100,000 ranks.

Time is that of the processor, and its limits are twice the goals: other work may share the machine.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest

import meshwise as mw
from simcore.models import parameter_count
from simcore.scenario import load_scenario

TRILLION = Path(__file__).resolve().parents[1] / "examples" / "trillion_3072xa100.toml"
LIMIT_BYTES = 2e9


def timed(scenario: Any, engine: str) -> tuple[dict[str, Any], float]:
    start = time.process_time()
    metrics = mw.predict(scenario, engine).metrics
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < LIMIT_BYTES
    return dict(metrics), time.process_time() - start


@pytest.mark.slow
def test_a_trillion_parameters_on_3072_ranks_by_events() -> None:
    scenario = load_scenario(TRILLION)
    assert scenario.world == 3072
    assert parameter_count(scenario.model_spec()) == pytest.approx(1.008e12, rel=0.002)
    found, cpu_s = timed(scenario, "simulate")
    assert cpu_s < 20.0
    priced, _ = timed(scenario, "estimate")
    assert found["step_s"] == pytest.approx(priced["step_s"], rel=0.02)
    assert found["fits"]


def test_a_hundred_thousand_ranks_are_folded() -> None:
    scenario = {
        "model": {"name": "llama-3.1-405b"},
        "cluster": {"gpu": "h100-sxm-80gb", "gpus_per_node": 8, "nodes": 12500},
        "parallel": {
            **{"tp": 8, "pp": 20, "dp_replicate": 625, "zero_stage": 1},
            **{"recompute": "full", "sequence_parallel": True},
        },
        "workload": {"kind": "train", "global_batch": 20000, "seq_len": 8192},
    }
    found, cpu_s = timed(scenario, "simulate")
    assert cpu_s < 10.0
    priced, _ = timed(scenario, "estimate")
    assert found["step_s"] == pytest.approx(priced["step_s"], rel=0.02)
