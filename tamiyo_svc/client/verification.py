"""Which of the entries on a reply stream a trainer may act on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tamiyo_svc.errors import TamiyoError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import (
    DEFAULT_MAX_BYTES,
    EnvelopeRejectedError,
    RejectReason,
    open_envelope,
    parse_payload,
)
from tamiyo_svc.leyline.signing import SIGNATURE_ANNOTATION, Keyring
from tamiyo_svc.taxonomy import CommandRejection

MAX_AGE_S: Final = 60.0
MAX_AHEAD_S: Final = 5.0
REMEMBERED_S: Final = 300.0
MAX_REMEMBERED: Final = 1 << 16
"""Command ids kept. The oldest go first; they are safe to forget once `MAX_AGE_S` old, so this
holds a thousand commands a second."""
MAX_EXPECTED: Final = 1024

_REJECTIONS: Final = {
    RejectReason.OVERSIZED: CommandRejection.OVERSIZED,
    RejectReason.MISSING_SIGNATURE: CommandRejection.MISSING_SIGNATURE,
    RejectReason.INVALID_SIGNATURE: CommandRejection.INVALID_SIGNATURE,
    RejectReason.MALFORMED_ENVELOPE: CommandRejection.MALFORMED,
    RejectReason.MALFORMED_PAYLOAD: CommandRejection.MALFORMED,
    RejectReason.UNSUPPORTED_MESSAGE_TYPE: CommandRejection.NOT_A_COMMAND,
}


class CommandRejectedError(TamiyoError):
    """A command that must not be applied; `reason` says why, `detail` more if there is more."""

    label = "command_rejected"

    def __init__(self, reason: CommandRejection, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class VerifiedCommand:
    """A command whose signatures, freshness, run and packet have been checked."""

    command: leyline.AdaptationCommand
    packet_id: str
    step_index: int


@dataclass(slots=True)
class _Expectation:
    step_index: int
    answered: bool = False


class CommandVerifier:
    """Checks commands for one training run and remembers what it has accepted.

    Without a keyring signatures are not looked at. Memory is bounded: `max_remembered` command
    ids and the last `MAX_EXPECTED` packets.
    """

    def __init__(
        self, keyring: Keyring | None, run_id: str, *, max_remembered: int = MAX_REMEMBERED
    ) -> None:
        self._keyring = keyring
        self._run_id = run_id
        self._max_remembered = max_remembered
        self._accepted_s: OrderedDict[str, float] = OrderedDict()
        self._expected: OrderedDict[str, _Expectation] = OrderedDict()

    @property
    def remembered(self) -> int:
        """How many command ids are kept."""
        return len(self._accepted_s)

    def accepted(self) -> dict[str, float]:
        """The command ids kept and when each was accepted, Unix time in seconds."""
        return dict(self._accepted_s)

    def restore(self, accepted_s: Mapping[str, float]) -> None:
        """Refuse these command ids too, as `accepted` gave them."""
        merged = {**accepted_s, **self._accepted_s}
        self._accepted_s = OrderedDict(sorted(merged.items(), key=lambda item: item[1]))

    def expect(self, packet_id: str, step_index: int) -> None:
        """Accept one command for this packet from now on."""
        self._expected[packet_id] = _Expectation(step_index)
        self._expected.move_to_end(packet_id)
        if len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    def verify(self, fields: Mapping[bytes, bytes], now_s: float) -> VerifiedCommand:
        """Check one entry; `now_s` is Unix time.

        Raises:
            CommandRejectedError: the entry must not be applied.
        """
        return self.accept(self.open(fields), now_s)

    def accept(self, command: leyline.AdaptationCommand, now_s: float) -> VerifiedCommand:
        """Check a command that `open` has authenticated; `now_s` is Unix time.

        Raises:
            CommandRejectedError: the command must not be applied.
        """
        if not command.command_id or not command.HasField("issued_at"):
            raise CommandRejectedError(CommandRejection.MISSING_IDENTITY)
        age_s = now_s - (command.issued_at.seconds + 1e-9 * command.issued_at.nanos)
        if not age_s <= MAX_AGE_S:
            raise CommandRejectedError(
                CommandRejection.STALE, f"issued {age_s:.0f} s ago by this machine's clock"
            )
        if age_s < -MAX_AHEAD_S:
            raise CommandRejectedError(
                CommandRejection.FROM_THE_FUTURE,
                f"issued {-age_s:.0f} s from now by this machine's clock",
            )
        self._forget(now_s)
        if command.command_id in self._accepted_s:
            raise CommandRejectedError(CommandRejection.REPLAYED)
        verified = self._match(command)
        self._accepted_s[command.command_id] = now_s
        return verified

    def open(self, fields: Mapping[bytes, bytes]) -> leyline.AdaptationCommand:
        """The command in an entry, its signatures checked; touches none of the memory.

        Raises:
            CommandRejectedError: the entry is no such command.
        """
        try:
            envelope = open_envelope(fields, self._keyring, DEFAULT_MAX_BYTES)
            if envelope.message_type != leyline.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND:
                raise CommandRejectedError(CommandRejection.NOT_A_COMMAND)
            command = parse_payload(envelope)
        except EnvelopeRejectedError as error:
            raise CommandRejectedError(_REJECTIONS[error.reason]) from None
        if not isinstance(command, leyline.AdaptationCommand):
            raise CommandRejectedError(CommandRejection.NOT_A_COMMAND)
        if self._keyring is not None:
            if not command.annotations.get(SIGNATURE_ANNOTATION):
                raise CommandRejectedError(CommandRejection.MISSING_COMMAND_SIGNATURE)
            if not self._keyring.verify_command(command):
                raise CommandRejectedError(CommandRejection.INVALID_COMMAND_SIGNATURE)
        return command

    def _match(self, command: leyline.AdaptationCommand) -> VerifiedCommand:
        annotations = command.annotations
        if annotations.get("training_run_id") != self._run_id:
            raise CommandRejectedError(CommandRejection.WRONG_RUN)
        packet_id = annotations.get("packet_id", "")
        expectation = self._expected.get(packet_id)
        if expectation is None:
            raise CommandRejectedError(CommandRejection.UNKNOWN_PACKET)
        if annotations.get("step_index") != str(expectation.step_index):
            raise CommandRejectedError(CommandRejection.WRONG_STEP)
        if expectation.answered:
            raise CommandRejectedError(CommandRejection.ALREADY_ANSWERED)
        expectation.answered = True
        return VerifiedCommand(command, packet_id, expectation.step_index)

    def _forget(self, now_s: float) -> None:
        accepted = self._accepted_s
        while accepted:
            oldest = next(iter(accepted))
            if len(accepted) < self._max_remembered and now_s - accepted[oldest] < REMEMBERED_S:
                return
            del accepted[oldest]
