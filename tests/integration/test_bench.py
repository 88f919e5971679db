"""The benchmark's own books: what it publishes, receives and reports adds up."""

from __future__ import annotations

import json
import sys

import pytest

from tamiyo_svc.cli.bench import Load, measure

pytestmark = pytest.mark.redis


@pytest.mark.parametrize("rate", [40.0, 0.0])
def test_a_load_is_measured_and_nothing_is_lost(redis_url: str, rate: float) -> None:
    interval_s = sys.getswitchinterval()
    load = Load(trainers=2, rate=rate, duration_s=1.0, warm_up_s=0.2)
    variables = {"TAMIYO_POLICY": "bootstrap", "TAMIYO_STEP_TIMEOUT_MS": "2000"}
    try:
        result = measure(load, variables, redis_url, catalog=None)
    finally:
        sys.setswitchinterval(interval_s)

    assert len(result.command_ms) >= 2
    assert result.unverified == 0
    assert result.received == sum(result.outcomes.values()) >= len(result.command_ms)
    assert len(result.stages_ms["tamiyo.step.latency_ms"]) >= len(result.command_ms)
    assert result.cpu_cores > 0
    figures = json.loads(json.dumps(result.as_json(2000.0)))
    assert figures["publish_to_command_ms"]["count"] == len(result.command_ms)
    assert figures["probe_ms"]["count"] > 0
