"""Where telemetry goes, and how often it may go to the emergency stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.adapters.oona.routing import Route, TelemetryRouter
from tamiyo_svc.taxonomy import Severity


def router(per_minute: int = 2) -> TelemetryRouter:
    return TelemetryRouter("telemetry", "emergency", per_minute)


@pytest.mark.parametrize(
    ("severity", "stream"),
    [
        (Severity.INFO, "telemetry"),
        (Severity.WARNING, "telemetry"),
        (Severity.HIGH, "emergency"),
        (Severity.CRITICAL, "emergency"),
    ],
)
def test_severity_chooses_the_stream(severity: Severity, stream: str) -> None:
    assert router().route(severity, 0.0).stream == stream


def test_beyond_the_rate_emergencies_go_to_the_telemetry_stream() -> None:
    limited = router()
    routes = [limited.route(Severity.HIGH, 0.0) for _ in range(3)]
    emergency = Route("emergency", emergency=True)
    assert routes == [emergency, emergency, Route("telemetry", rate_limited=True)]


def test_tokens_come_back_evenly_and_never_beyond_a_minutes_worth() -> None:
    limited = router()
    for _ in range(2):
        limited.route(Severity.HIGH, 0.0)
    assert limited.route(Severity.HIGH, 29.0).rate_limited
    assert limited.route(Severity.HIGH, 31.0).emergency
    late = [limited.route(Severity.CRITICAL, 10_000.0).emergency for _ in range(4)]
    assert late == [True, True, False, False]


def test_ordinary_telemetry_takes_no_token() -> None:
    limited = router()
    for _ in range(100):
        limited.route(Severity.WARNING, 0.0)
    assert limited.route(Severity.HIGH, 0.0).emergency


@given(st.lists(st.floats(0, 600), max_size=200))
def test_no_minute_sees_more_than_two_minutes_worth(times_s: list[float]) -> None:
    limited = router(per_minute=5)
    granted = [at for at in sorted(times_s) if limited.route(Severity.HIGH, at).emergency]
    for start in granted:
        assert sum(start <= at < start + 60 for at in granted) <= 10
