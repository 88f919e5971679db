"""Telemetry packets to outputs: the stream by severity, the rate limit, the signature."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.commit import Output
from tamiyo_svc.adapters.oona.routing import TelemetryRouter
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import Severity


class TelemetryDispatch:
    """Makes the output for a telemetry packet; nothing is dropped for being too frequent."""

    def __init__(self, router: TelemetryRouter, metrics: Metrics, keyring: Keyring | None) -> None:
        self._router = router
        self._metrics = metrics
        self._keyring = keyring

    def output(
        self,
        telemetry: leyline.TelemetryPacket,
        severity: Severity,
        attributes: Mapping[str, str] | None = None,
    ) -> Output:
        """Route, mark and sign one packet."""
        route = self._router.route(severity, time.monotonic())
        if route.rate_limited:
            telemetry.system_health.indicators["emergency_rate_limited"] = "1"
            self._metrics.emergency_rate_limited()
        elif route.emergency:
            self._metrics.emergency_published()
        return Output.of(route.stream, seal(telemetry, self._keyring, attributes))
