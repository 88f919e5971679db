"""`tamiyo explain`: one decision read back from the bus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import isfinite
from typing import Any, Final

from google.protobuf import json_format
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tamiyo_svc.adapters.oona.history import History, Past, open_history
from tamiyo_svc.decision.explanation import Explanation, explain
from tamiyo_svc.decision.record import command_id_for
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.partition import tag_in
from tamiyo_svc.runs.state import packet_digest
from tamiyo_svc.service.settings import Settings

_REPLY_TO: Final = "reply_to"


def find(settings: Settings, command_id: str) -> Explanation | None:
    """The decision behind a command; None when nothing of it is on the bus any more.

    Raises:
        ConfigurationError: signatures are required and there is no secret.
        BusError: Redis did not answer.
    """
    keyring = settings.keyring() if settings.require_signatures else None
    with open_history(settings.redis_url, keyring, settings.max_message_bytes) as history:
        told = _telemetry(history, settings, command_id)
        answered = _packet(history, settings, command_id, told)
        replies = answered.attribute(_REPLY_TO) if answered is not None else ""
        commands = settings.in_partitions(settings.command_stream)
        command = _command(history, command_id, (replies, *commands))
        reports = tuple(_reports(history, settings, command_id))
    if not (told or answered or command or reports):
        return None
    return explain(
        command_id,
        telemetry=told.message if told is not None else None,  # type: ignore[arg-type]
        packet=answered.message if answered is not None else None,  # type: ignore[arg-type]
        command=command,
        reports=reports,
    )


def _telemetry(history: History, settings: Settings, command_id: str) -> Past | None:
    for stream in settings.in_partitions(settings.telemetry_stream, settings.emergency_stream):
        for past in history.backward(stream, leyline.BUS_MESSAGE_TYPE_TELEMETRY):
            if past.attribute("command_id") == command_id:
                return past
    return None


def _packet(
    history: History, settings: Settings, command_id: str, told: Past | None
) -> Past | None:
    """The packet whose bytes have this command's id, looked for from its telemetry backwards."""
    until_ms = told.entry.added_ms if told is not None else None
    for stream in settings.in_partitions(settings.normal_stream, settings.emergency_stream):
        if told is not None and told.entry.tag != tag_in(stream):
            continue
        for past in history.backward(stream, leyline.BUS_MESSAGE_TYPE_SYSTEM_STATE, until_ms):
            packet = past.message
            assert isinstance(packet, leyline.SystemStatePacket)
            digest = packet_digest(past.envelope.payload)
            if command_id_for(packet.training_run_id, digest) == command_id:
                return past
    return None


def _command(
    history: History, command_id: str, streams: tuple[str, ...]
) -> leyline.AdaptationCommand | None:
    for stream in filter(None, streams):
        for past in history.backward(stream, leyline.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND):
            message = past.message
            assert isinstance(message, leyline.AdaptationCommand)
            if message.command_id == command_id:
                return message
    return None


def _reports(
    history: History, settings: Settings, command_id: str
) -> Iterator[leyline.FieldReport]:
    for stream in settings.in_partitions(settings.field_report_stream):
        for past in history.forward(stream, leyline.BUS_MESSAGE_TYPE_FIELD_REPORT):
            message = past.message
            assert isinstance(message, leyline.FieldReport)
            if message.command_id == command_id:
                yield message


def explanation_json(explanation: Explanation) -> str:
    """Everything that is known, as JSON; messages in their protobuf JSON form."""
    found: dict[str, Any] = {
        "command_id": explanation.command_id,
        "why": explanation.why,
        "reason": explanation.reason,
        "command_type": explanation.command_type,
        "policy_version": explanation.policy_version,
        "proposed": _named(explanation.proposed, "action", "probability"),
        "runner_up": _named(explanation.runner_up, "action", "probability"),
        "seed_scores": [_named(pair, "seed_id", "score") for pair in explanation.seed_scores],
        "blueprint_scores": [
            _named(pair, "blueprint_id", "score") for pair in explanation.blueprint_scores
        ],
        "coverage": explanation.coverage,
        "coverage_by_family": dict(explanation.coverage_by_family),
        "events": [
            {
                "event": event.event,
                "severity": event.severity,
                "value": event.value,
                "threshold": event.threshold,
                "effect": event.effect,
                "attributes": dict(event.attributes),
            }
            for event in explanation.events
        ],
        "metrics": {
            name: value if isfinite(value) else None for name, value in explanation.metrics.items()
        },
        "indicators": dict(explanation.indicators),
        "packet": _message(explanation.packet),
        "command": _message(explanation.command),
        "reports": [_message(report) for report in explanation.reports],
    }
    return json.dumps(found, indent=1)


def _named(pair: tuple[str, float] | None, name: str, value: str) -> dict[str, Any] | None:
    return None if pair is None else {name: pair[0], value: pair[1]}


def _message(message: Any) -> Any:
    if message is None:
        return None
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def explanation_view(explanation: Explanation) -> RenderableType:
    """The explanation for a terminal."""
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(explanation):
        facts.add_row(Text(name, "bold"), Text(text))
    events = Table(title="Events", title_justify="left")
    for column in ("event", "severity", "value", "threshold", "asks for"):
        events.add_column(column)
    for event in explanation.events:
        cells = (event.event, event.severity, event.value, event.threshold, event.effect)
        events.add_row(*map(Text, cells))
    parts: list[RenderableType] = [facts]
    if explanation.events:
        parts.append(events)
    if explanation.coverage_by_family:
        parts.append(_pairs("Coverage", "family", explanation.coverage_by_family.items()))
    if explanation.seed_scores:
        parts.append(_pairs("Seeds", "seed", explanation.seed_scores))
    if explanation.blueprint_scores:
        parts.append(_pairs("Blueprints", "blueprint", explanation.blueprint_scores))
    return Group(*parts)


def _facts(explanation: Explanation) -> Iterator[tuple[str, str]]:
    yield "command", explanation.command_id
    yield "why", explanation.why
    yield "reason", explanation.reason
    if (command := explanation.command) is not None:
        kind = leyline.CommandType.Name(command.command_type)
        operation = leyline.SeedOperation.Name(command.seed_operation.operation)
        target = f" {operation} {command.target_seed_id}" if command.target_seed_id else ""
        yield "sent", f"{kind}{target}"
    if (packet := explanation.packet) is not None:
        yield "run", packet.training_run_id
        yield "packet", f"{packet.packet_id}, {len(packet.seed_states)} seeds"
        yield "step", f"{packet.global_step}, epoch {packet.current_epoch}"
        yield "validation loss", f"{packet.validation_loss:.6g}"
    else:
        yield "packet", "not on the bus any more"
    if explanation.proposed is not None:
        yield "proposed", f"{explanation.proposed[0]} {explanation.proposed[1]:.3f}"
    if explanation.runner_up is not None:
        yield "runner-up", f"{explanation.runner_up[0]} {explanation.runner_up[1]:.3f}"
    if explanation.coverage is not None:
        yield "coverage", f"{explanation.coverage:.3f}"
    yield "policy", explanation.policy_version
    for report in explanation.reports:
        outcome = leyline.FieldReportOutcome.Name(report.outcome)
        yield "report", f"{report.report_id} {outcome} {report.notes}"


def _pairs(title: str, name: str, pairs: Any) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(name)
    table.add_column("value", justify="right")
    for key, value in pairs:
        table.add_row(Text(str(key)), f"{value:.3f}")
    return table
