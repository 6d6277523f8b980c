"""Errors of parts carried to the whole, and the host's share of a step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshwise as mw
from hwmodels.hosts import Host, hosts, load_host
from simcore.errors import InputError
from simcore.uncertainty import combined, interval

PARTS = st.dictionaries(
    st.text("abc", min_size=1, max_size=2),
    st.tuples(st.floats(0.01, 10), st.floats(0.01, 1)),
    min_size=1,
)


@given(PARTS)
def test_the_whole_is_no_less_certain_than_its_worst_part(
    parts: dict[str, tuple[float, float]],
) -> None:
    seconds = {name: s for name, (s, _) in parts.items()}
    found = combined(seconds, {name: s * d for name, (s, d) in parts.items()})
    assert found <= max(d for _, d in parts.values()) * (1 + 1e-12)
    weighted = sum(s * d for s, d in parts.values()) / sum(seconds.values())
    assert found <= weighted * (1 + 1e-12)


def test_independent_errors_add_as_squares() -> None:
    assert combined({"a": 1.0, "b": 1.0}, {"a": 0.3, "b": 0.4}) == pytest.approx(0.25)
    assert combined({}, {}) == 0.0


def test_an_interval_is_log_normal() -> None:
    low, high = interval(2.0, 0.1)
    assert low * high == pytest.approx(4.0)
    assert math.log(high / 2.0) == pytest.approx(0.12816)


GENERATE: dict[str, Any] = {
    "model": {"name": "llama-3.1-8b"},
    "cluster": {"gpu": "h100-sxm-80gb", "gpus_per_node": 8},
    "parallel": {"tp": 8},
    "workload": {"kind": "generate", "batch": 1, "input_tokens": 128, "output_tokens": 16},
}


@pytest.mark.parametrize("engine", ["estimate", "simulate"])
def test_small_passes_wait_for_an_eager_host(engine: str) -> None:
    graph, eager = (
        mw.predict({**GENERATE, "run": {"launch": mode}}, engine).metrics["tpot_s"]
        for mode in ("graph", "eager")
    )
    kernels = 400  # a layer of this model has over ten, of 32 layers
    assert eager > kernels * load_host("eager").issue_s
    assert graph < 0.8 * eager


def test_every_kind_with_a_timeline_has_an_interval() -> None:
    metrics = mw.predict(GENERATE).metrics
    low, high = metrics["interval_s"]
    assert low < metrics["seconds"] < high


def test_an_engine_adds_work_per_step_and_per_sequence() -> None:
    host = replace(load_host("graph"), step_s=1e-3, sequence_s=1e-5)
    np.testing.assert_allclose(host.pass_seconds(np.array([1, 100])), [1.025e-3, 2.015e-3])


def test_every_host_has_sources_and_an_unknown_one_is_refused() -> None:
    for host in hosts().values():
        used = [k for k in ("issue_s", "launch_s", "step_s", "sequence_s") if getattr(host, k)]
        assert set(used) <= set(host.sources)
    with pytest.raises(InputError, match="did you mean 'graph'"):
        load_host("grap")
    assert Host("none").pass_seconds(8) == 0.0
