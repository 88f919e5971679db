"""Load with a ledger: what was published, what came of it, and whether the books balance."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from support.bus import state_packet

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.partition import tag_of_run, tags
from tamiyo_svc.leyline.signing import Keyring

NORMAL, EMERGENCY, TELEMETRY, DEAD = (
    "oona.normal",
    "oona.emergency",
    "oona.telemetry",
    "oona.dead",
)


def connect(url: str, timeout_s: float = 5.0) -> Redis:
    """A client that never retries, so that nothing is published twice behind the ledger's back."""
    return Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=timeout_s)


@dataclass
class Load:
    """Publishes packets at a steady rate from a thread until stopped.

    A share of the packets are alone in a run of their own, so each must be decided; the others
    belong to a few runs, where a newer packet may supersede an older one.
    """

    url: str
    keyring: Keyring
    per_s: float = 150.0
    runs: int = 8
    alone_share: float = 0.5
    prefix: str = ""
    """What the names of its runs begin with, to tell them from another load's."""
    partitions: int = 1
    published: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Packet id -> run and step, for packets whose publishing was confirmed."""
    uncertain: set[str] = field(default_factory=set)
    """Packet ids whose publishing got no reply."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Load:
        self._thread = threading.Thread(target=self._publish, name="load", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Publish no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _publish(self) -> None:
        client = connect(self.url)
        steps: Counter[str] = Counter()
        number = 0
        next_s = time.monotonic()
        while not self._stop.is_set():
            number += 1
            alone = random.random() < self.alone_share
            name = f"alone-{number}" if alone else f"run-{random.randrange(self.runs)}"
            run_id = self.prefix + name
            steps[run_id] += 1
            packet = state_packet(run_id, steps[run_id], seeds=random.choice((0, 1, 4)))
            fields: Any = dict(seal(packet, self.keyring).fields())
            try:
                client.xadd(NORMAL + tag_of_run(run_id, self.partitions), fields)
            except (RedisError, OSError):
                self.uncertain.add(packet.packet_id)
                time.sleep(0.05)
            else:
                self.published[packet.packet_id] = (run_id, steps[run_id])
            next_s = max(next_s + 1 / self.per_s, time.monotonic() - 1)
            time.sleep(max(0.0, next_s - time.monotonic()))
        client.close()


@dataclass
class Balance:
    """What the streams hold, and everything that does not add up."""

    published: int
    commands: int
    dead_letters: Counter[str]
    pending: int
    problems: list[str]


def balance(
    url: str, load: Load, *, expired: int = 0, lost: frozenset[str] = frozenset()
) -> Balance:
    """Check the books: nothing pending, one outcome a packet, order within runs.

    `lost` are packets that Redis itself is known to have lost; `expired` counts those that were
    allowed to become too old.
    """
    client = connect(url, 30.0)

    def found(kind: type, *streams: str) -> list[Any]:
        return [
            message
            for tag in tags(load.partitions)
            for stream in streams
            for message in _messages(client, stream + tag, load.keyring, kind)
        ]

    commands = found(leyline.AdaptationCommand, NORMAL)
    reports = found(leyline.FieldReport, NORMAL)
    telemetry = found(leyline.TelemetryPacket, TELEMETRY, EMERGENCY)
    dead: list[Any] = []
    for tag in tags(load.partitions):
        letters: Any = client.xrange(DEAD + tag)
        dead += letters
    problems: list[str] = []
    by_packet: dict[str, list[Any]] = defaultdict(list)
    for command in commands:
        by_packet[command.annotations["packet_id"]].append(command)
        if not load.keyring.verify_command(command):
            problems.append(f"command {command.command_id} does not verify")
    problems += [
        f"{len(several)} commands for {packet_id}"
        for packet_id, several in by_packet.items()
        if len(several) > 1
    ]
    unknown = by_packet.keys() - load.published.keys() - load.uncertain - lost
    problems += [f"a command for {packet_id}, which nobody published" for packet_id in unknown]
    problems += _unanswered(load, set(by_packet), expired, lost)
    problems += _disorder(commands)
    told = Counter(packet.packet_id for packet in telemetry)
    for packet_id in by_packet:
        if told[packet_id] != 1:
            problems.append(f"{told[packet_id]} telemetry packets for {packet_id}")
    reported = Counter(report.command_id for report in reports)
    for command in commands:
        if reported[command.command_id] != 1:
            problems.append(f"{reported[command.command_id]} reports for {command.command_id}")
    pending = _pending(client, load.partitions)
    if pending:
        problems.append(f"{pending} entries are still pending")
    client.close()
    reasons = Counter(fields[b"dead.reason"].decode() for _, fields in dead)
    return Balance(len(load.published), len(commands), reasons, pending, problems)


def wait_quiet(url: str, timeout_s: float = 60.0, partitions: int = 1) -> None:
    """Wait until every entry was delivered and acknowledged."""
    client = connect(url)
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            if _is_quiet(client, partitions):
                break
        except (RedisError, OSError):
            pass
        if time.monotonic() > deadline_s:
            pending = [client.xpending(NORMAL + tag, "tamiyo") for tag in tags(partitions)]
            raise TimeoutError(f"still busy after {timeout_s:g} s: {pending}")
        time.sleep(0.05)
    client.close()


def _inputs(partitions: int) -> list[str]:
    return [stream + tag for tag in tags(partitions) for stream in (NORMAL, EMERGENCY)]


def _is_quiet(client: Redis, partitions: int) -> bool:
    for stream in _inputs(partitions):
        info: Any = client.xinfo_stream(stream)
        groups: Any = client.xinfo_groups(stream)
        if not groups or groups[0]["pending"]:
            return False
        if groups[0]["last-delivered-id"] != info["last-generated-id"] and info["length"]:
            return False
    return True


def _pending(client: Redis, partitions: int) -> int:
    total = 0
    for stream in _inputs(partitions):
        groups: Any = client.xinfo_groups(stream)
        total += sum(group["pending"] for group in groups)
    return total


def _messages(client: Redis, stream: str, keyring: Keyring, kind: type) -> Iterator[Any]:
    entries: Any = client.xrange(stream)
    for _, fields in entries:
        try:
            message = parse_payload(open_envelope(fields, keyring, 1 << 28))
        except ValueError:
            continue
        if isinstance(message, kind):
            yield message


def _unanswered(
    load: Load, answered: set[str], expired: int, lost: frozenset[str]
) -> Iterator[str]:
    """Packets without a command that nothing excuses."""
    newest: dict[str, int] = {}
    for packet_id in answered:
        if packet_id in load.published:
            run_id, step = load.published[packet_id]
            newest[run_id] = max(step, newest.get(run_id, 0))
    missing = [
        packet_id
        for packet_id, (run_id, step) in load.published.items()
        if packet_id not in answered and packet_id not in lost and newest.get(run_id, 0) < step
    ]
    if len(missing) > expired:
        yield f"{len(missing)} packets have no outcome, such as {missing[:3]}"


def _disorder(commands: list[Any]) -> Iterator[str]:
    """Runs whose commands stand in another order than their steps."""
    last: dict[str, int] = {}
    for command in commands:
        run_id = command.annotations["training_run_id"]
        step = int(command.annotations["step_index"])
        if step <= last.get(run_id, -1):
            yield f"{run_id}: step {step} was answered after step {last[run_id]}"
        last[run_id] = step
