"""A ledger that follows the streams while they are written and trimmed, for long runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from redis import Redis
from support.bus import state_packet
from support.ledger import DEAD, EMERGENCY, NORMAL, TELEMETRY

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring

_PAGE = 1000


@dataclass(slots=True)
class RunBooks:
    """What was seen of one run; the arrays count by step, of which the first is 1."""

    commands: bytearray = field(default_factory=lambda: bytearray(1))
    told: bytearray = field(default_factory=lambda: bytearray(1))
    reported: bytearray = field(default_factory=lambda: bytearray(1))
    newest: int = 0
    """Step of the newest command."""

    @property
    def published(self) -> int:
        """The last step that was published."""
        return len(self.commands) - 1

    def next_step(self) -> int:
        """Make room for one more step."""
        for counts in (self.commands, self.told, self.reported):
            counts.append(0)
        return self.published


class RunningLedger:
    """Publishes packets and books every output, reading each stream entry once.

    Entries that are trimmed before `follow` has read them show up as missing.
    """

    def __init__(self, redis: Redis, keyring: Keyring, runs: int) -> None:
        self._redis = redis
        self._keyring = keyring
        self.runs = {f"soak-{number}": RunBooks() for number in range(runs)}
        self._after: dict[Any, Any] = dict.fromkeys((NORMAL, TELEMETRY, EMERGENCY, DEAD), "0-0")
        self._problems: list[str] = []
        self.published = 0
        self.commands = 0
        self.dead_letters = 0

    def publish(self, counts: Mapping[str, int], seeds: int) -> None:
        """Publish the next packets of each run in one round trip."""
        pipeline = self._redis.pipeline(transaction=False)
        for run_id, count in counts.items():
            books = self.runs[run_id]
            for _ in range(count):
                packet = state_packet(run_id, books.next_step(), seeds=seeds)
                fields: Any = dict(seal(packet, self._keyring).fields())
                pipeline.xadd(NORMAL, fields)
        pipeline.execute()
        self.published += sum(counts.values())

    def follow(self) -> None:
        """Book everything that was written since the last call."""
        while True:
            reply: Any = self._redis.xread(self._after, count=_PAGE)
            for stream, entries in reply:
                self._after[stream.decode()] = entries[-1][0]
                for _, fields in entries:
                    self._book(stream.decode(), fields)
            if all(len(entries) < _PAGE for _, entries in reply):
                return

    def _book(self, stream: str, fields: Mapping[bytes, bytes]) -> None:
        if stream == DEAD:
            self.dead_letters += 1
            return
        envelope = open_envelope(fields, self._keyring)
        if envelope.message_type == leyline.BUS_MESSAGE_TYPE_SYSTEM_STATE:
            return
        books = self.runs.get(envelope.attributes["training_run_id"])
        if books is None or "packet_id" not in envelope.attributes:
            return  # it concerns the replica or no single packet
        step = int(envelope.attributes["step_index"])
        message = parse_payload(envelope)
        match message:
            case leyline.AdaptationCommand():
                self.commands += 1
                books.commands[step] += 1
                self._check(message, books, step)
            case leyline.TelemetryPacket():
                books.told[step] += 1
            case leyline.FieldReport() if not message.report_id.startswith("fr-synth"):
                books.reported[step] += 1

    def _check(self, command: leyline.AdaptationCommand, books: RunBooks, step: int) -> None:
        if not self._keyring.verify_command(command):
            self._problems.append(f"command {command.command_id} does not verify")
        if step <= books.newest:
            self._problems.append(f"step {step} was answered after step {books.newest}")
        books.newest = max(step, books.newest)

    def problems(self, outcomes: Mapping[str, int]) -> Iterator[str]:
        """What does not add up once all is quiet, the service's own counts included."""
        yield from self._problems
        for run_id, books in self.runs.items():
            if books.newest != books.published:
                yield f"{run_id}: {books.published} packets, the last command is for {books.newest}"
            for outputs in (books.told, books.reported):
                if outputs != books.commands:
                    yield f"{run_id}: commands, telemetry and reports differ"
            if max(books.commands) > 1:
                yield f"{run_id}: two commands for one step"
        if self.dead_letters:
            yield f"{self.dead_letters} dead letters"
        expected = Counter(decided=self.commands, superseded=self.published - self.commands)
        if Counter(outcomes) != expected:
            yield f"the service counted {dict(outcomes)} instead of {dict(expected)}"
