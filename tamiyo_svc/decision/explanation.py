"""Why a command is what it is, from the messages that a decision left on the bus."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.engine import POLICY_REASON
from tamiyo_svc.risk.rules import RULES, Effect
from tamiyo_svc.taxonomy import Event, Severity

_SEVERITIES: Final = {severity.level: severity for severity in Severity}
_EFFECTS: Final = {(rule.event.value, rule.severity): rule.effect for rule in reversed(RULES)}
_REASONS: Final = {rule.reason: rule.event.value for rule in RULES}
_EFFECT_TEXTS: Final[Mapping[Effect, str]] = {
    Effect.NONE: "",
    Effect.SEED_TO_OPTIMIZER: "a seed proposal becomes an optimizer command",
    Effect.SEED_TO_PAUSE: "a seed proposal becomes a pause",
    Effect.PAUSE: "pause",
    Effect.SAFE_COMMAND: "there is no proposal, so the safe command",
}
_FAMILY: Final = "tamiyo.gnn.feature_coverage."
_VALUES: Final = ("value", "reason", "names", "detail", "count")
_LIMITS: Final = ("threshold", "budget_ms")


@dataclass(frozen=True, slots=True)
class ExplainedEvent:
    """One event as it was reported; `effect` is what its rule asks for, empty for none."""

    event: str
    severity: str
    value: str
    threshold: str
    effect: str
    attributes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision read back from the bus.

    What was trimmed from the streams already is None or empty. `scores` are by seed and by
    blueprint, the best first.
    """

    command_id: str
    why: str
    reason: str = ""
    command_type: str = ""
    policy_version: str = ""
    packet: leyline.SystemStatePacket | None = None
    command: leyline.AdaptationCommand | None = None
    reports: Sequence[leyline.FieldReport] = ()
    proposed: tuple[str, float] | None = None
    runner_up: tuple[str, float] | None = None
    seed_scores: Sequence[tuple[str, float]] = ()
    blueprint_scores: Sequence[tuple[str, float]] = ()
    coverage: float | None = None
    coverage_by_family: Mapping[str, float] = field(default_factory=dict)
    events: Sequence[ExplainedEvent] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    indicators: Mapping[str, str] = field(default_factory=dict)


def explain(
    command_id: str,
    *,
    telemetry: leyline.TelemetryPacket | None,
    packet: leyline.SystemStatePacket | None = None,
    command: leyline.AdaptationCommand | None = None,
    reports: Sequence[leyline.FieldReport] = (),
) -> Explanation:
    """Put together what the messages of one decision say."""
    if telemetry is None:
        annotated = dict(command.annotations) if command is not None else {}
        return Explanation(
            command_id,
            "the telemetry of this decision is not on the bus any more",
            reason=annotated.get("risk_reason", ""),
            policy_version=annotated.get("policy_version", ""),
            packet=packet,
            command=command,
            reports=reports,
        )
    metrics = {point.name: point for point in telemetry.metrics}
    indicators = dict(telemetry.system_health.indicators)
    events = tuple(_event(event) for event in telemetry.events)
    coverage = metrics.get("tamiyo.gnn.feature_coverage")
    proposed = _choice(metrics.get("tamiyo.policy.proposed"))
    runner_up = _choice(metrics.get("tamiyo.policy.runner_up"))
    reason = indicators.get("reason", "")
    command_type = indicators.get("command", "")
    return Explanation(
        command_id=command_id,
        why=_why(reason, command_type, proposed, runner_up, events),
        reason=reason,
        command_type=command_type,
        policy_version=indicators.get("policy_version", ""),
        packet=packet,
        command=command,
        reports=reports,
        proposed=proposed,
        runner_up=runner_up,
        seed_scores=_scores(metrics.get("tamiyo.selection.seed_score")),
        blueprint_scores=_scores(metrics.get("tamiyo.selection.blueprint_score")),
        coverage=coverage.value if coverage is not None and proposed is not None else None,
        coverage_by_family={
            name.removeprefix(_FAMILY): point.value
            for name, point in sorted(metrics.items())
            if name.startswith(_FAMILY)
        },
        events=events,
        metrics={name: point.value for name, point in metrics.items()},
        indicators=indicators,
    )


def _event(event: leyline.TelemetryEvent) -> ExplainedEvent:
    severity = _SEVERITIES.get(event.level, Severity.INFO)
    attributes = dict(event.attributes)
    effect = _EFFECTS.get((event.description, severity), Effect.NONE)
    if event.description == Event.NO_SEED_CANDIDATES and attributes.get("seeds", "0") != "0":
        # Of this event's two rules the one for a packet that has seeds asks for nothing.
        effect = Effect.NONE
    return ExplainedEvent(
        event=event.description,
        severity=severity.name,
        value=_first(attributes, _VALUES),
        threshold=_first(attributes, _LIMITS),
        effect=_EFFECT_TEXTS[effect],
        attributes=attributes,
    )


def _first(attributes: Mapping[str, str], names: Iterable[str]) -> str:
    return next((attributes[name] for name in names if name in attributes), "")


def _choice(point: leyline.MetricPoint | None) -> tuple[str, float] | None:
    return None if point is None else (point.attributes["action"], point.value)


def _scores(point: leyline.MetricPoint | None) -> tuple[tuple[str, float], ...]:
    if point is None:
        return ()
    pairs: Any = json.loads(point.attributes.get("scores", "[]"))
    return tuple((str(name), float(score)) for name, score in pairs)


def _why(
    reason: str,
    command_type: str,
    proposed: tuple[str, float] | None,
    runner_up: tuple[str, float] | None,
    events: Sequence[ExplainedEvent],
) -> str:
    policy = "the network gave no proposal"
    if proposed is not None:
        policy = f"the policy proposed {proposed[0]} ({proposed[1]:.3f}"
        policy += f"; next {runner_up[0]} {runner_up[1]:.3f})" if runner_up else ")"
    if reason == POLICY_REASON:
        return f"{policy} and no event had a say: {command_type}"
    leading = next((event for event in events if event.event == _REASONS.get(reason)), None)
    if leading is None:
        return f"{policy}; {reason}: {command_type}"
    text = f"{policy}; {leading.event} ({leading.severity}"
    text += f", value {leading.value}" if leading.value else ""
    text += f", threshold {leading.threshold}" if leading.threshold else ""
    text += f") is the most severe of {len(events)} event{'s' if len(events) > 1 else ''}"
    asking = [event.event for event in events if event.effect and event is not leading]
    if leading.effect:
        text += f" and asks for: {leading.effect}"
    if asking:
        text += f"; also asking: {', '.join(asking)}"
    return f"{text}; the most conservative action wins: {command_type}"
