"""A service at work in the test's own process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.service.lifecycle import Service


@dataclass
class Running:
    """A service at work."""

    service: Service
    metrics: Metrics
    stop: asyncio.Event
    task: asyncio.Task[None]

    def outcomes(self) -> dict[str, float]:
        """Packets by outcome, without those at 0."""
        return {
            sample.labels["outcome"]: sample.value
            for family in self.metrics.registry.collect()
            if family.name == "tamiyo_packets"
            for sample in family.samples
            if sample.value
        }

    def value(self, name: str, **labels: str) -> float | None:
        """A sample of the service's metrics."""
        return self.metrics.registry.get_sample_value(name, labels)


StartService = Callable[..., Awaitable[Running]]
