"""What the training thread leaves to the client's own: values to be built, sealed and signed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from tamiyo_svc.client.packets import Snapshot, build_packet, build_report
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import SignedEnvelope, seal, seal_payload
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import AckOutcome

_BASE_BYTES: Final = 256
_METRIC_BYTES: Final = 96
_REPORT_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An entry on its way to a stream."""

    stream: str
    envelope: SignedEnvelope


@dataclass(frozen=True, slots=True)
class Origin:
    """What all entries of one client have in common."""

    keyring: Keyring | None
    run_id: str
    experiment: str
    stream: str
    report_stream: str
    reply_stream: str
    trace_id: str


@dataclass(slots=True, eq=False)
class PacketDraft:
    """A state packet: its values or, when it was built elsewhere, its bytes."""

    content: Snapshot | bytes
    packet_id: str
    step: int
    timestamp_ns: int = 0
    blueprint_ids: tuple[str, ...] = ()
    traceparent: str = ""

    @property
    def size_bytes(self) -> int:
        """Size of the packet, estimated from values."""
        content = self.content
        if isinstance(content, bytes):
            return len(content)
        size_bytes = _BASE_BYTES + _METRIC_BYTES * len(content.metrics)
        return size_bytes + sum(map(len, content.seeds)) + len(content.hardware or b"")

    def seal(self, origin: Origin) -> Outgoing:
        """Build and sign it.

        Raises:
            TypeError, ValueError: a value does not fit its field.
        """
        payload = self.content
        if isinstance(payload, Snapshot):
            payload = build_packet(
                payload,
                run_id=origin.run_id,
                packet_id=self.packet_id,
                step=self.step,
                timestamp_ns=self.timestamp_ns,
                experiment=origin.experiment,
            ).SerializeToString(deterministic=True)
        attributes = {
            "reply_to": origin.reply_stream,
            "training_run_id": origin.run_id,
            "packet_id": self.packet_id,
            "step_index": str(self.step),
            "traceparent": self.traceparent or f"00-{origin.trace_id}-{os.urandom(8).hex()}-01",
        }
        if self.blueprint_ids:
            attributes["blueprint_id"] = ",".join(self.blueprint_ids)
        return Outgoing(
            origin.stream,
            seal_payload(
                leyline.BUS_MESSAGE_TYPE_SYSTEM_STATE, payload, origin.keyring, attributes
            ),
        )


@dataclass(slots=True, eq=False)
class ReportDraft:
    """The report of what became of a command."""

    command: leyline.AdaptationCommand
    packet_id: str
    step: int
    outcome: AckOutcome
    reason: str
    issued_ns: int

    @property
    def size_bytes(self) -> int:
        """Size of the report, estimated."""
        return _REPORT_BYTES

    def seal(self, origin: Origin) -> Outgoing:
        """Build and sign it.

        Raises:
            TypeError, ValueError: a value does not fit its field.
        """
        report = build_report(
            self.command, self.outcome, self.reason, run_id=origin.run_id, issued_ns=self.issued_ns
        )
        attributes = {
            "training_run_id": origin.run_id,
            "packet_id": self.packet_id,
            "step_index": str(self.step),
            "command_id": report.command_id,
            "policy_version": report.tamiyo_policy_version,
        }
        return Outgoing(origin.report_stream, seal(report, origin.keyring, attributes))


Draft = PacketDraft | ReportDraft
