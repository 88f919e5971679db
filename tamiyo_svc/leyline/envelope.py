"""Stream entries to verified envelopes and back.

An entry has two fields, `payload` (a serialized `BusEnvelope`) and `signature`. What arrives is
checked in this order: size, signature over the very bytes received, envelope, message type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from google.protobuf.message import DecodeError, Message

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.signing import Keyring

PAYLOAD_FIELD: Final = b"payload"
SIGNATURE_FIELD: Final = b"signature"
DEFAULT_MAX_BYTES: Final = 1 << 20

MESSAGE_CLASSES: Final[Mapping[int, type[Message]]] = {
    leyline.BUS_MESSAGE_TYPE_SYSTEM_STATE: leyline.SystemStatePacket,
    leyline.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND: leyline.AdaptationCommand,
    leyline.BUS_MESSAGE_TYPE_FIELD_REPORT: leyline.FieldReport,
    leyline.BUS_MESSAGE_TYPE_TELEMETRY: leyline.TelemetryPacket,
    leyline.BUS_MESSAGE_TYPE_POLICY_UPDATE: leyline.PolicyUpdate,
    leyline.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_REQUEST: leyline.KernelPrefetchRequest,
    leyline.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_READY: leyline.KernelArtifactReady,
    leyline.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_ERROR: leyline.KernelArtifactError,
    leyline.BUS_MESSAGE_TYPE_KERNEL_CATALOG_UPDATE: leyline.KernelCatalogUpdate,
    leyline.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL: leyline.EmergencySignal,
    leyline.BUS_MESSAGE_TYPE_BSDS_ISSUED: leyline.BSDSIssued,
    leyline.BUS_MESSAGE_TYPE_BSDS_FAILED: leyline.BSDSFailed,
    leyline.BUS_MESSAGE_TYPE_BENCHMARK_REPORT: leyline.BenchmarkReport,
}
"""The message class each bus message type carries."""

MESSAGE_TYPES: Final[Mapping[type[Message], int]] = {
    message: number for number, message in MESSAGE_CLASSES.items()
}


class RejectReason(StrEnum):
    """Why an entry was refused."""

    MISSING_SIGNATURE = "missing_signature"
    INVALID_SIGNATURE = "invalid_signature"
    MALFORMED_ENVELOPE = "malformed_envelope"
    MALFORMED_PAYLOAD = "malformed_payload"
    UNSUPPORTED_MESSAGE_TYPE = "unsupported_message_type"
    OVERSIZED = "oversized"


class EnvelopeRejectedError(ValueError):
    """An entry that must not be processed; `reason` says why."""

    def __init__(self, reason: RejectReason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SignedEnvelope:
    """An outgoing entry: the envelope's bytes and the signature over them."""

    payload: bytes
    signature: str

    def fields(self) -> dict[bytes, bytes]:
        """The two fields as Redis stores them."""
        return {PAYLOAD_FIELD: self.payload, SIGNATURE_FIELD: self.signature.encode("ascii")}


def seal(
    message: Message, keyring: Keyring | None, attributes: Mapping[str, str] | None = None
) -> SignedEnvelope:
    """Wrap and sign `message`; without a keyring the signature is empty.

    Raises:
        KeyError: the message has no bus message type.
    """
    payload = message.SerializeToString(deterministic=True)
    return seal_payload(MESSAGE_TYPES[type(message)], payload, keyring, attributes)


def seal_payload(
    message_type: int,
    payload: bytes,
    keyring: Keyring | None,
    attributes: Mapping[str, str] | None = None,
) -> SignedEnvelope:
    """Wrap and sign the bytes of a message, as `seal` does."""
    envelope = leyline.BusEnvelope(
        message_type=message_type,  # type: ignore[arg-type]
        payload=payload,
        attributes=attributes,
    )
    data = envelope.SerializeToString(deterministic=True)
    return SignedEnvelope(data, keyring.sign(data) if keyring else "")


def open_envelope(
    fields: Mapping[bytes, bytes],
    keyring: Keyring | None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> leyline.BusEnvelope:
    """Check an incoming entry and parse its envelope; the inner payload stays bytes.

    With `keyring` None signatures are not looked at.

    Raises:
        EnvelopeRejectedError: oversized, unsigned, forged, malformed or of an unknown type.
    """
    payload = fields.get(PAYLOAD_FIELD, b"")
    if len(payload) > max_bytes:
        raise EnvelopeRejectedError(
            RejectReason.OVERSIZED, f"{len(payload)} bytes, at most {max_bytes} are taken"
        )
    if keyring is not None:
        signature = fields.get(SIGNATURE_FIELD, b"")
        if not signature:
            raise EnvelopeRejectedError(RejectReason.MISSING_SIGNATURE)
        if not keyring.verify(payload, signature):
            raise EnvelopeRejectedError(RejectReason.INVALID_SIGNATURE)
    try:
        envelope = leyline.BusEnvelope.FromString(payload)
    except DecodeError as error:
        raise EnvelopeRejectedError(RejectReason.MALFORMED_ENVELOPE, str(error)) from None
    if envelope.message_type == leyline.BUS_MESSAGE_TYPE_UNSPECIFIED:
        raise EnvelopeRejectedError(RejectReason.MALFORMED_ENVELOPE, "no message type")
    if envelope.message_type not in MESSAGE_CLASSES:
        raise EnvelopeRejectedError(
            RejectReason.UNSUPPORTED_MESSAGE_TYPE, f"type {int(envelope.message_type)}"
        )
    return envelope


def parse_payload(envelope: leyline.BusEnvelope) -> Message:
    """Parse the inner message of a checked envelope.

    Raises:
        EnvelopeRejectedError: the payload is empty or not that message.
    """
    if not envelope.payload:
        raise EnvelopeRejectedError(RejectReason.MALFORMED_PAYLOAD, "empty payload")
    try:
        return MESSAGE_CLASSES[envelope.message_type].FromString(envelope.payload)
    except DecodeError as error:
        raise EnvelopeRejectedError(RejectReason.MALFORMED_PAYLOAD, str(error)) from None
