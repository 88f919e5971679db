"""What would become of a dead letter that is put back, and whether that is safe."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from tamiyo_svc.adapters.oona.commit import Committer, run_key
from tamiyo_svc.adapters.oona.entries import id_order
from tamiyo_svc.adapters.oona.letters import DeadLetter
from tamiyo_svc.errors import StoredStateError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import (
    PAYLOAD_FIELD,
    EnvelopeRejectedError,
    open_envelope,
    parse_payload,
)
from tamiyo_svc.runs.state import MAX_DECIDED, RunState, is_duplicate, packet_digest
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.taxonomy import DeadLetterReason


@dataclass(frozen=True, slots=True)
class Prospect:
    """What would happen; a letter that is not `safe` stays where it is."""

    text: str
    safe: bool = True


class Prospects:
    """Judges letters against the runs' states in Redis; `now_ms` is the server's time.

    A packet is put back only when the service can tell for certain whether it was answered: a run
    remembers its last decisions, so one that went on for longer may have answered a copy long
    ago. Of several copies one goes at a time.
    """

    def __init__(self, settings: Settings, committer: Committer, now_ms: int) -> None:
        self._settings = settings
        self._committer = committer
        self._now_ms = now_ms
        self._inputs = (*settings.input_streams, settings.policy_stream)
        self._seen: set[tuple[str, bytes]] = set()

    async def of(self, letter: DeadLetter) -> Prospect:
        """The prospect of one letter; those judged before it count as put back.

        Raises:
            BusError: Redis did not answer.
        """
        stream = letter.original.stream
        if stream not in self._inputs:
            return Prospect(
                f"{stream or 'nothing'} is no stream that the service reads", safe=False
            )
        # Whoever judges may hold other secrets than the service, so safety asks for none.
        packet = _packet(letter)
        if packet is not None:
            prospect = await self._of_packet(letter, *packet)
            if not prospect.safe:
                return prospect
        refusal = self._refusal(letter)
        if refusal:
            return Prospect(f"would be refused again ({refusal})")
        return Prospect("would be read again") if packet is None else prospect

    async def _of_packet(
        self, letter: DeadLetter, packet: leyline.SystemStatePacket, digest: bytes
    ) -> Prospect:
        run_id, timestamp_ns = packet.training_run_id, packet.timestamp_ns
        if not run_id:
            return Prospect(f"would be refused again ({DeadLetterReason.INVALID_FIELD})")
        if (run_id, digest) in self._seen:
            return Prospect("a copy of it goes first", safe=False)
        self._seen.add((run_id, digest))
        _, data = await self._committer.load_run(run_key(run_id, letter.original.tag))
        try:
            state = RunState() if data is None else RunState.from_bytes(data)
        except StoredStateError as error:
            return Prospect(f"its run cannot be read: {error}", safe=False)
        if is_duplicate(state, digest, timestamp_ns, self._settings.replay_window_s):
            return Prospect("would end as a duplicate, without a command")
        if data is None and self._age_s(letter) > self._settings.run_ttl_s:
            return Prospect("its run is forgotten, it may have been answered", safe=False)
        # What is newer than everything that was decided cannot have been, unless its clock is
        # ahead: the run takes no timestamp from the future.
        is_newest = state.newest_timestamp_ns < timestamp_ns <= self._now_ms * 1_000_000
        if len(state.decided) >= MAX_DECIDED and not is_newest:
            return Prospect("its run has gone on, it may have been answered", safe=False)
        return Prospect("would be decided")

    def _age_s(self, letter: DeadLetter) -> float:
        """The age of the letter's original entry, without end where that has no proper id."""
        try:
            return (self._now_ms - id_order(letter.original.entry_id)[0]) / 1e3
        except ValueError:
            return float("inf")

    def _refusal(self, letter: DeadLetter) -> str:
        """Why the service would refuse the letter with these settings; empty if it would not."""
        settings = self._settings
        keyring = settings.keyring() if settings.require_signatures else None
        try:
            envelope = open_envelope(letter.original.fields, keyring, settings.max_message_bytes)
            parse_payload(envelope)
        except EnvelopeRejectedError as error:
            return str(error)
        return ""


def _packet(letter: DeadLetter) -> tuple[leyline.SystemStatePacket, bytes] | None:
    """The state packet in a letter with its digest, whoever signed it."""
    try:
        envelope = leyline.BusEnvelope.FromString(letter.original.fields.get(PAYLOAD_FIELD, b""))
        if envelope.message_type != leyline.BUS_MESSAGE_TYPE_SYSTEM_STATE:
            return None
        return (
            leyline.SystemStatePacket.FromString(envelope.payload),
            packet_digest(envelope.payload),
        )
    except DecodeError:
        return None
