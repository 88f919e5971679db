"""What fired during a decision, with the numbers that explain it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tamiyo_svc.taxonomy import Event, Severity


@dataclass(frozen=True, slots=True)
class FiredEvent:
    """One event of a decision or of the service; attributes are telemetry strings."""

    event: Event
    severity: Severity
    attributes: Mapping[str, str] = field(default_factory=dict)


def most_severe(events: Iterable[FiredEvent]) -> FiredEvent | None:
    """The most severe event, the first among equals; None without any."""
    return max(events, key=lambda fired: fired.severity, default=None)


def number(value: float) -> str:
    """A number as it stands in annotations and attributes: six digits, never bare like an int."""
    text = format(value, ".6g")
    return text if not text.lstrip("-").isdigit() else text + ".0"
