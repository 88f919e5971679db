"""A recorded window of the bus, taken apart into what came in and what was answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import Message

from tamiyo_svc.adapters.oona.commit import run_key
from tamiyo_svc.adapters.oona.entries import Entry, id_order
from tamiyo_svc.client.capture import CapturedEntry, CaptureError
from tamiyo_svc.errors import StoredStateError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import EnvelopeRejectedError, open_envelope, parse_payload
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.runs.state import RunState

COMMAND_ID: Final = "command_id"
"""The envelope attribute by which everything sent about a decision names it."""

_STATE_PREFIX: Final = run_key("")
_NOTICES: Final = (leyline.BUS_MESSAGE_TYPE_BSDS_ISSUED, leyline.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL)
_ANSWERS: Final = (
    leyline.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND,
    leyline.BUS_MESSAGE_TYPE_FIELD_REPORT,
    leyline.BUS_MESSAGE_TYPE_TELEMETRY,
)


@dataclass(frozen=True, slots=True)
class RecordedPacket:
    """A state packet's entry with its envelope, not parsed further."""

    entry: Entry
    envelope: leyline.BusEnvelope


@dataclass(frozen=True, slots=True)
class RecordedNotice:
    """A safety sheet or an emergency signal."""

    entry: Entry
    message: Message


@dataclass(slots=True)
class Recording:
    """What a capture holds; `incoming` is in the order of the entries' ids.

    `commands` are the recorded ones by id, `answered` the ids of all decisions that anything in
    the recording tells of, `states` the runs' states from before it, `refused` counts what the
    service would not have taken, by reason.
    """

    incoming: list[RecordedPacket | RecordedNotice] = field(default_factory=list)
    commands: dict[str, leyline.AdaptationCommand] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    states: dict[str, RunState] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)


def read_recording(
    lines: Iterable[CapturedEntry], keyring: Keyring | None, max_bytes: int
) -> Recording:
    """Verify and sort what was captured; with `keyring` None signatures are not looked at.

    Raises:
        CaptureError: a run state or an id in it cannot be read.
    """
    recording = Recording()
    for line in lines:
        if line.stream.startswith(_STATE_PREFIX):
            run_id = line.stream.removeprefix(_STATE_PREFIX)
            try:
                recording.states.setdefault(run_id, RunState.from_bytes(line.payload))
            except StoredStateError as error:
                raise CaptureError(f"the recorded state of run {run_id}: {error}") from None
        else:
            _take(recording, line, keyring, max_bytes)
    recording.incoming.sort(key=lambda one: (id_order(one.entry.entry_id), one.entry.stream))
    return recording


def _take(
    recording: Recording, line: CapturedEntry, keyring: Keyring | None, max_bytes: int
) -> None:
    entry = Entry(line.stream, line.entry_id, line.fields())
    try:
        id_order(entry.entry_id)
    except ValueError:
        raise CaptureError(f"{line.entry_id!r} is no entry id") from None
    try:
        envelope = open_envelope(entry.fields, keyring, max_bytes)
        kind = envelope.message_type
        if kind in _ANSWERS and envelope.attributes.get(COMMAND_ID):
            recording.answered.add(envelope.attributes[COMMAND_ID])
        if kind == leyline.BUS_MESSAGE_TYPE_SYSTEM_STATE:
            recording.incoming.append(RecordedPacket(entry, envelope))
        elif kind in _NOTICES:
            recording.incoming.append(RecordedNotice(entry, parse_payload(envelope)))
        elif kind == leyline.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND:
            command = parse_payload(envelope)
            assert isinstance(command, leyline.AdaptationCommand)
            recording.answered.add(command.command_id)
            recording.commands.setdefault(command.command_id, command)
    except EnvelopeRejectedError as error:
        recording.refused[error.reason.value] += 1
