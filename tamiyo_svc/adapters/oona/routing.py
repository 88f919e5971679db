"""Which stream a telemetry packet goes to, with the emergency stream's rate limit."""

from __future__ import annotations

from dataclasses import dataclass

from tamiyo_svc.taxonomy import Severity


@dataclass(frozen=True, slots=True)
class Route:
    """A stream, and whether it is the second choice because emergencies are rate limited."""

    stream: str
    emergency: bool = False
    rate_limited: bool = False


class TelemetryRouter:
    """Sends HIGH and CRITICAL to the emergency stream as long as its token bucket lasts.

    The bucket holds one minute's worth and fills evenly.
    """

    def __init__(self, telemetry_stream: str, emergency_stream: str, per_minute: int) -> None:
        self.telemetry_stream = telemetry_stream
        self.emergency_stream = emergency_stream
        self._per_minute = per_minute
        self._tokens = float(per_minute)
        self._filled_s: float | None = None

    def route(self, severity: Severity, now_s: float) -> Route:
        """Choose the stream for a packet of this severity, taking a token for an emergency."""
        if not severity.is_emergency:
            return Route(self.telemetry_stream)
        if self._filled_s is not None:
            gained = (now_s - self._filled_s) * self._per_minute / 60.0
            self._tokens = min(float(self._per_minute), self._tokens + max(0.0, gained))
        self._filled_s = now_s
        if self._tokens < 1.0:
            return Route(self.telemetry_stream, rate_limited=True)
        self._tokens -= 1.0
        return Route(self.emergency_stream, emergency=True)
