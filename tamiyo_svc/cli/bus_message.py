"""A stream entry as an operator reads it: verified, decoded, on one line or as JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from google.protobuf.json_format import MessageToDict, SerializeToJsonError
from google.protobuf.message import Message

from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import (
    PAYLOAD_FIELD,
    SIGNATURE_FIELD,
    EnvelopeRejectedError,
    RejectReason,
    open_envelope,
    parse_payload,
)
from tamiyo_svc.leyline.signing import Keyring

REPLY_TO: Final = "reply_to"
"""The envelope attribute by which a packet names the stream its command goes to."""

_TYPE_PREFIX: Final = "BUS_MESSAGE_TYPE_"
_FORGED: Final = (RejectReason.MISSING_SIGNATURE, RejectReason.INVALID_SIGNATURE)
_SHOWN_BYTES: Final = 256
_GIST_CHARS: Final = 240
TYPES: Final = tuple(
    name.removeprefix(_TYPE_PREFIX).lower() for name in leyline.BusMessageType.keys()[1:]
)
"""Short names of the message types, such as `adaptation_command`."""


class Verification(StrEnum):
    """What is known of an entry's signature."""

    VERIFIED = "verified"
    UNSIGNED = "unsigned"
    FORGED = "forged"
    NOT_CHECKED = "not_checked"
    """There is no secret to check it with."""


@dataclass(frozen=True, slots=True)
class BusMessage:
    """An entry with all that could be made of it; `problem` says why there is not more."""

    entry: Entry
    verification: Verification
    type_name: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    message: Message | None = None
    problem: str = ""

    @property
    def run_id(self) -> str:
        """The run it belongs to, empty where none is named."""
        named = self.attributes.get("training_run_id", "")
        for name in ("training_run_id", "run_id"):
            named = named or str(getattr(self.message, name, ""))
        return named

    @property
    def time(self) -> str:
        """When the server added it, UTC with milliseconds."""
        return shown_time(self.entry.added_ms)

    def document(self) -> dict[str, Any]:
        """Everything, as values JSON can hold."""
        return {
            "stream": self.entry.stream,
            "id": self.entry.entry_id,
            "time": self.time,
            "type": self.type_name or None,
            "verification": self.verification.value,
            "run_id": self.run_id or None,
            **self.content(),
        }

    def content(self) -> dict[str, Any]:
        """Attributes, message and whatever other fields there are, as values JSON can hold."""
        known = () if self.message is None else (PAYLOAD_FIELD, SIGNATURE_FIELD)
        fields = {
            name.decode(errors="replace"): _shown_field(value)
            for name, value in self.entry.fields.items()
            if name not in known
        }
        content: dict[str, Any] = {"attributes": dict(self.attributes), "fields": fields}
        if self.message is None:
            return content | {"problem": self.problem}
        return content | {"message": _message_document(self.message)}

    def line(self) -> str:
        """Time, stream, id, type, run and gist on one line without control characters."""
        mark = "" if self.verification is Verification.VERIFIED else f" [{self.verification.value}]"
        gist = self.problem if self.message is None else _gist(self.message)
        if len(gist) > _GIST_CHARS:
            gist = gist[:_GIST_CHARS] + "…"
        parts = (
            self.time,
            self.entry.stream,
            self.entry.entry_id,
            f"{self.type_name or 'no message'}{mark}",
            self.run_id or "-",
            gist,
        )
        return plain("  ".join(parts))


def decode(entry: Entry, keyring: Keyring | None, max_bytes: int) -> BusMessage:
    """Verify and decode an entry; nothing about it raises.

    What fails the check is decoded all the same and marked, for nothing is done with it.
    """
    if PAYLOAD_FIELD not in entry.fields:
        return BusMessage(entry, Verification.NOT_CHECKED, problem=_bare(entry))
    verification = _verify(entry, keyring, max_bytes)
    try:
        envelope = open_envelope(entry.fields, None, max_bytes)
    except EnvelopeRejectedError as error:
        return BusMessage(entry, verification, problem=str(error))
    type_name = _name(leyline.BusMessageType, envelope.message_type, _TYPE_PREFIX)
    attributes = dict(envelope.attributes)
    try:
        message = parse_payload(envelope)
    except EnvelopeRejectedError as error:
        return BusMessage(entry, verification, type_name, attributes, problem=str(error))
    return BusMessage(entry, verification, type_name, attributes, message)


def plain(text: str, keep: str = "") -> str:
    """Text whose control characters are spelled out, so that none reaches the terminal."""
    return "".join(one if one.isprintable() or one in keep else repr(one)[1:-1] for one in text)


def shown_time(added_ms: int) -> str:
    """Milliseconds since the epoch as UTC; what no calendar reaches stays a number."""
    try:
        time = datetime.fromtimestamp(added_ms / 1e3, UTC)
    except (OverflowError, ValueError, OSError):
        return str(added_ms)
    return time.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")


def _verify(entry: Entry, keyring: Keyring | None, max_bytes: int) -> Verification:
    if keyring is None:
        return Verification.NOT_CHECKED
    if not entry.fields.get(SIGNATURE_FIELD):
        return Verification.UNSIGNED
    try:
        open_envelope(entry.fields, keyring, max_bytes)
    except EnvelopeRejectedError as error:
        if error.reason is RejectReason.OVERSIZED:
            return Verification.NOT_CHECKED
        if error.reason in _FORGED:
            return Verification.FORGED
    return Verification.VERIFIED


def _bare(entry: Entry) -> str:
    names = ", ".join(name.decode(errors="replace") for name in entry.fields)
    return f"no payload field (fields: {names or 'none'})"


def _shown_field(value: bytes) -> str:
    """A field's value: text as it is, anything else base64; long ones are cut."""
    cut = value[:_SHOWN_BYTES]
    more = f"… ({len(value)} bytes)" if len(value) > _SHOWN_BYTES else ""
    try:
        return cut.decode() + more
    except UnicodeDecodeError:
        return base64.b64encode(cut).decode("ascii") + more


def _gist(message: Message) -> str:
    match message:
        case leyline.SystemStatePacket():
            return (
                f"{message.packet_id} step {message.global_step} epoch {message.current_epoch} "
                f"loss {message.validation_loss:.4g} seeds {len(message.seed_states)}"
            )
        case leyline.AdaptationCommand():
            reason = message.annotations.get("risk_reason", "-")
            packet_id = message.annotations.get("packet_id", "-")
            return f"{decision_text(message)} ({reason}) for {packet_id}"
        case leyline.TelemetryPacket():
            level = _name(leyline.TelemetryLevel, message.level, "TELEMETRY_LEVEL_")
            events = ", ".join(event.description for event in message.events)
            return f"{message.packet_id} {level} {events or message.system_health.summary}"
        case leyline.FieldReport():
            outcome = _name(leyline.FieldReportOutcome, message.outcome, "FIELD_REPORT_OUTCOME_")
            return f"{outcome} {message.command_id}"
        case leyline.PolicyUpdate():
            return f"{message.policy_id} {message.tamiyo_policy_version}"
        case leyline.EmergencySignal():
            level = _name(leyline.EmergencyLevel, message.level, "EMERGENCY_LEVEL_")
            return f"{level} {message.reason}"
        case _:
            return f"{message.ByteSize()} bytes"


def decision_text(command: leyline.AdaptationCommand) -> str:
    """What a command orders, in a few words."""
    kind = _name(leyline.CommandType, command.command_type, "COMMAND_")
    match command.WhichOneof("payload"):
        case "seed_operation":
            operation = _name(leyline.SeedOperation, command.seed_operation.operation, "SEED_OP_")
            blueprint = command.seed_operation.blueprint_id
            return f"{kind} {operation} {command.target_seed_id} {blueprint}".rstrip()
        case "optimizer_adjustment":
            adjustment = command.optimizer_adjustment
            changes = ", ".join(
                f"{name} {value:.4g}" for name, value in sorted(adjustment.hyperparameters.items())
            )
            return f"{kind} {adjustment.optimizer_id} {changes}".rstrip()
        case "circuit_breaker":
            state = command.circuit_breaker.desired_state
            return f"{kind} {_name(leyline.CircuitBreakerState, state, 'CIRCUIT_STATE_')}"
        case _:
            return kind


def _name(kind: Any, value: int, prefix: str) -> str:
    """An enum value's name in lower case; the number where the contract has no name for it."""
    try:
        return str(kind.Name(value)).removeprefix(prefix).lower()
    except ValueError:
        return str(int(value))


def _message_document(message: Message) -> dict[str, Any]:
    shown = message
    if isinstance(message, leyline.PolicyUpdate):
        shown = leyline.PolicyUpdate()
        shown.CopyFrom(message)
        # Weights are no reading matter.
        shown.payload = b""
    try:
        return MessageToDict(shown, preserving_proto_field_name=True)
    except (ValueError, OverflowError, SerializeToJsonError) as error:
        # A time that no calendar reaches has no JSON form.
        return {"problem": f"has no JSON form: {error}"}
