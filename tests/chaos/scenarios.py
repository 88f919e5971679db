"""The faults of the campaign, each run against real processes and checked by its ledger.

Every scenario takes how often to repeat its fault and returns the figures it found; a broken
promise raises `BrokenPromiseError` with what did not add up.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from support.bus import CATALOG, SECRET, state_packet
from support.clustered import clustered_redis
from support.ledger import DEAD, NORMAL, Balance, Load, balance, connect, wait_quiet
from support.proxy import FaultyProxy
from support.replica import Replica
from support.waiting import WaitingTrainers

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.cli.child import outcomes, scrape
from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.errors import InvalidPacketError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import SignedEnvelope, open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.notices import check_fields

KEYRING = Keyring(SECRET.encode())
PAUSE_S = 10.0
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
Figures = Mapping[str, object]


class BrokenPromiseError(AssertionError):
    """What the ledger found wrong."""


def expect(holds: bool, what: str) -> None:
    """Raise when a promise is broken."""
    if not holds:
        raise BrokenPromiseError(what)


def settle(url: str, load: Load, **allowed: Any) -> Balance:
    """Wait for quiet, check the books and raise on the first thing that is wrong."""
    wait_quiet(url, partitions=load.partitions)
    found = balance(url, load, **allowed)
    expect(not found.problems, "; ".join(found.problems[:5]))
    return found


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def redis_on_tcp(*options: str) -> Iterator[tuple[EmbeddedRedis, int]]:
    """A private server that also listens on a loopback port."""
    port = free_port()
    with EmbeddedRedis(port=port, options=options) as server:
        yield server, port


@contextmanager
def replicas(
    url: str,
    count: int = 1,
    hang_after: tuple[int, ...] = (),
    offset_s: float = 0.0,
    **settings: Any,
) -> Iterator[list[Replica]]:
    """Service processes on one Redis; those still alive at the end are stopped."""
    with tempfile.TemporaryDirectory(prefix="tamiyo-chaos-") as folder:
        fleet = [
            Replica(
                {
                    "redis_url": url,
                    "secret": SECRET,
                    "policy": "bootstrap",
                    "urza_database_url": f"sqlite:///{CATALOG}",
                    "state_dir": Path(folder, str(index)),
                    "http_host": "127.0.0.1",
                    "http_port": 0,
                    "consumer_name": f"replica-{index}",
                    "block_ms": 200,
                    "cpu_engine": "eager",
                    "claim_idle_ms": 400,
                    "commit_timeout_ms": 1000,
                    "state_max_age_ms": 600_000,
                    "emergency_max_per_min": 1_000_000,
                    "log_level": "CRITICAL",
                    **settings,
                },
                clock_offset_s=offset_s,
                hang_after=hang_after,
            ).start()
            for index in range(count)
        ]
        try:
            yield [replica.wait_ready() for replica in fleet]
        finally:
            for replica in fleet:
                if replica.running.is_alive():
                    replica.wake()
                    replica.kill()


def kill_under_load(times: int) -> Figures:
    """SIGKILL the service at random moments and start it again."""
    with (
        EmbeddedRedis() as redis,
        replicas(redis.url) as (replica,),
        Load(redis.url, KEYRING) as load,
    ):
        for _ in range(times):
            time.sleep(random.uniform(0.02, 0.25))
            replica.kill()
            replica.start().wait_ready()
        time.sleep(0.2)
        load.stop()
        found = settle(redis.url, load)
    return {"kills": times, **_counts(found)}


def kill_one_of_three(times: int) -> Figures:
    """Kill one replica, freeze another until its work was claimed, and wake it."""
    with (
        EmbeddedRedis() as redis,
        replicas(redis.url, 3) as fleet,
        Load(redis.url, KEYRING) as load,
    ):
        _kill_and_freeze(fleet, times)
        load.stop()
        found = settle(redis.url, load)
    return {"kills": times, "freezes": times, **_counts(found)}


def kill_one_of_three_on_partitions(times: int) -> Figures:
    """The same on a cluster of one node, whose scripts may touch one slot, with four partitions."""
    partitions = 4
    with (
        clustered_redis() as redis,
        replicas(redis.url, 3, partitions=partitions) as fleet,
        Load(redis.url, KEYRING, partitions=partitions) as load,
    ):
        _kill_and_freeze(fleet, times)
        load.stop()
        found = settle(redis.url, load)
    return {"kills": times, "freezes": times, "partitions": partitions, **_counts(found)}


def _kill_and_freeze(fleet: list[Replica], times: int) -> None:
    for _ in range(times):
        killed, frozen = random.sample(fleet, 2)
        frozen.freeze()
        time.sleep(random.uniform(0.02, 0.2))
        killed.kill()
        time.sleep(0.7)
        frozen.wake()
        killed.start().wait_ready()


def lose_replies(times: int) -> Figures:
    """Swallow the replies of commits and of reads; the command itself was executed."""
    with (
        redis_on_tcp() as (redis, port),
        FaultyProxy(port) as proxy,
        replicas(f"redis://127.0.0.1:{proxy.port}/0") as (replica,),
        Load(redis.url, KEYRING) as load,
    ):
        for number in range(times):
            proxy.swallow = _once(b"EVALSHA" if number % 2 else b"XREADGROUP")
            swallowed = proxy.swallowed
            deadline_s = time.monotonic() + 10
            while proxy.swallowed == swallowed:
                expect(time.monotonic() < deadline_s, "no command came to lose the reply of")
                time.sleep(0.005)
        proxy.swallow = lambda request: False
        time.sleep(0.5)
        load.stop()
        found = settle(redis.url, load)
        _check_counts(replica, load, found)
    return {"lost replies": times, **_counts(found)}


def restart_redis(times: int) -> Figures:
    """Restart Redis and kill it, by turns."""

    def restart(redis: EmbeddedRedis, number: int) -> None:
        if number % 2:
            redis.kill()
        else:
            redis.process.terminate()
            redis.process.wait()
        time.sleep(0.5)
        redis.start()

    return _outages(times, restart)


def pause_redis(times: int) -> Figures:
    """Stop Redis from running for longer than any timeout, and let it go on."""

    def pause(redis: EmbeddedRedis, number: int) -> None:
        redis.process.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE_S)
        redis.process.send_signal(signal.SIGCONT)

    return _outages(times, pause)


def _outages(times: int, strike: Callable[[EmbeddedRedis, int], None]) -> Figures:
    recoveries_s: list[float] = []
    with (
        redis_on_tcp(*DURABLE) as (redis, port),
        replicas(f"redis://127.0.0.1:{port}/0") as (replica,),
        Load(f"redis://127.0.0.1:{port}/0", KEYRING) as load,
    ):
        for number in range(times):
            time.sleep(0.3)
            strike(redis, number)
            recoveries_s.append(_recovery_s(redis.url))
            expect(_alive(replica), "liveness failed while Redis was away")
        load.stop()
        found = settle(redis.url, load)
        _check_counts(replica, load, found, elsewhere=times)
    return {
        "outages": times,
        "recovery p50 s": round(statistics.median(recoveries_s), 2),
        "recovery max s": round(max(recoveries_s), 2),
        **_counts(found),
    }


def flush_redis(times: int) -> Figures:
    """FLUSHALL under load: what was in Redis is lost, and nothing after it."""
    recoveries_s: list[float] = []
    flushed = 0
    with EmbeddedRedis() as redis, replicas(redis.url), connect(redis.url) as admin:
        for number in range(times):
            with Load(redis.url, KEYRING, prefix=f"before-{number}-") as before:
                time.sleep(0.3)
                flushed += len(before.published)
                admin.flushall()
                recoveries_s.append(_recovery_s(redis.url, f"flushed-{number}"))
            with Load(redis.url, KEYRING) as load:
                time.sleep(0.3)
                load.stop()
                found = settle_after_flush(redis.url, load)
    return {
        "flushes": times,
        "packets flushed": flushed,
        "recovery max s": round(max(recoveries_s), 2),
        **_counts(found),
    }


def settle_after_flush(url: str, load: Load) -> Balance:
    """The books of what was published after a flush; probes of the recovery are not in them."""
    wait_quiet(url)
    found = balance(url, load)
    problems = [line for line in found.problems if "which nobody published" not in line]
    expect(not problems, "; ".join(problems[:5]))
    return found


def fail_over(times: int) -> Figures:
    """Promote a copy of Redis and point the service's address at it."""
    recoveries_s: list[float] = []
    uncertain = 0
    for _ in range(times):
        with ExitStack() as stack:
            _, port = stack.enter_context(redis_on_tcp())
            copy, copy_port = stack.enter_context(redis_on_tcp())
            proxy = stack.enter_context(FaultyProxy(port))
            stack.enter_context(replicas(f"redis://127.0.0.1:{proxy.port}/0"))
            with connect(copy.url) as admin:
                admin.replicaof("127.0.0.1", port)
                _until(lambda: admin.info("replication")["master_link_status"] == "up")
                load = Load(f"redis://127.0.0.1:{proxy.port}/0", KEYRING)
                with load:
                    time.sleep(0.5)
                    # An orderly failover: no more writes, the copy catches up, it takes over.
                    proxy.refusing = True
                    proxy.cut()
                    with connect(f"redis://127.0.0.1:{port}/0") as old:
                        written = int(old.info("replication")["master_repl_offset"])
                    _until(partial(_caught_up, admin, written))
                    admin.replicaof("NO", "ONE")
                    proxy.target_port = copy_port
                    proxy.refusing = False
                    recoveries_s.append(_recovery_s(copy.url))
                    time.sleep(0.3)
                    load.stop()
            found = settle(copy.url, load)
            uncertain += len(load.uncertain)
    return {
        "failovers": times,
        "packets unconfirmed": uncertain,
        "recovery max s": round(max(recoveries_s), 2),
        **_counts(found),
    }


def exhaust_memory(times: int) -> Figures:
    """Let Redis refuse writes for lack of memory."""
    with (
        EmbeddedRedis() as redis,
        replicas(redis.url) as (replica,),
        Load(redis.url, KEYRING) as load,
    ):
        with connect(redis.url) as admin:
            for _ in range(times):
                time.sleep(0.3)
                admin.config_set("maxmemory", 1)
                _until(lambda: not _ready(replica))
                expect(_alive(replica), "liveness failed while Redis was full")
                admin.config_set("maxmemory", 0)
                _until(lambda: _ready(replica))
        load.stop()
        found = settle(redis.url, load)
        _check_counts(replica, load, found)
    return {"times full": times, **_counts(found)}


def disturb_network(times: int) -> Figures:
    """Delay, stall and half-open connections between everyone and Redis, while trainers wait."""
    with (
        redis_on_tcp() as (redis, port),
        FaultyProxy(port) as proxy,
        replicas(f"redis://127.0.0.1:{proxy.port}/0"),
        Load(redis.url, KEYRING, per_s=50) as load,
        WaitingTrainers(f"redis://127.0.0.1:{proxy.port}/0") as waiting,
    ):
        for number in range(times):
            proxy.delay_s = 0.05
            proxy.stall_share, proxy.stall_s = 0.05, 0.2
            proxy.silent = number % 3 == 2
            time.sleep(1.5)
            proxy.silent = False
            proxy.delay_s = proxy.stall_share = 0.0
            proxy.cut()
            time.sleep(0.5)
        waiting.finish()
        load.stop()
        found = settle_after_flush(redis.url, load)
    trainers, control = waiting.trainers, waiting.control
    expect(trainers.answered > 0, "no trainer got a command")
    return {
        "disturbances": times,
        "trainer steps": len(trainers.over_ms),
        "waits": len(trainers.over_ms) - trainers.skipped,
        "answered": trainers.answered,
        "beyond budget max ms": round(max(trainers.over_ms), 1),
        "control waits": len(control.over_ms),
        "control max ms": round(max(control.over_ms), 1),
        **_counts(found),
    }


def poison(count: int) -> Figures:
    """Refused vectors and mutated envelopes, signed and unsigned; each is found again."""
    vectors = [
        json.loads(line) for line in (CATALOG.parent / "golden.jsonl").read_text().splitlines()
    ]
    source = random.Random(7)
    with (
        EmbeddedRedis() as redis,
        replicas(redis.url, read_count=256) as (replica,),
        connect(redis.url, 30.0) as client,
    ):
        sent = refused = 0
        for vector in vectors:
            if not vector["accept"]:
                client.xadd(
                    NORMAL,
                    {
                        "payload": bytes.fromhex(vector["envelope_hex"]),
                        "signature": vector["signature"],
                    },
                )
                sent += 1
                refused += 1
        seeds = [bytes.fromhex(vector["envelope_hex"]) for vector in vectors if vector["accept"]]
        commands = 0
        pipeline = client.pipeline(transaction=False)
        for number in range(count):
            mutated = _mutate(source.choice(seeds), source)
            signed = number % 2 == 0
            signature = KEYRING.sign(mutated) if signed else "AAAA"
            pipeline.xadd(NORMAL, {"payload": mutated, "signature": signature})
            refused += not _acceptable(mutated, signature)
            if number % 500 == 499:
                pipeline.execute()
                good = state_packet("witness", number)
                fields: Any = dict(seal(good, KEYRING).fields())
                client.xadd(NORMAL, fields)
                commands += 1
        pipeline.execute()
        wait_quiet(redis.url, 600)
        dead = int(client.xlen(DEAD))
        expect(dead == refused, f"{refused} entries had to be refused, {dead} are dead letters")
        expect(replica.running.is_alive(), "the service died")
        answered = {
            command.annotations["packet_id"] for command in _commands(client) if command.annotations
        }
        last = f"witness-step-{count - count % 500 - 1}"
        if commands:
            expect(last in answered, "the last good packet was not decided")
        counted = outcomes(_url(replica))
        expect(counted["dead_lettered"] == dead, f"{dead} dead letters, {counted} counted")
    return {"entries": count + sent, "dead letters": dead, "outcomes": counted}


def repeat_packets(count: int) -> Figures:
    """Publish valid packets again, out of order and doubled."""
    source = random.Random(11)
    with (
        EmbeddedRedis() as redis,
        replicas(redis.url, 2) as _,
        connect(redis.url, 30.0) as client,
    ):
        packets: list[tuple[str, Any]] = []
        for number in range(max(1, count // 10)):
            packet = state_packet(f"run-{number % 50}", number)
            packets.append((packet.packet_id, dict(seal(packet, KEYRING).fields())))
        for _, fields in packets:
            client.xadd(NORMAL, fields)
        wait_quiet(redis.url)
        first = len(_commands(client))
        for _ in range(count):
            client.xadd(NORMAL, source.choice(packets)[1])
        wait_quiet(redis.url, 120)
        commands = _commands(client)
    ids = [command.annotations["packet_id"] for command in commands]
    expect(len(ids) == len(set(ids)), "a packet got a second command")
    return {"published again": count, "packets": len(packets), "commands": first, "after": len(ids)}


def shift_clocks(times: int) -> Figures:
    """A service or a trainer whose clock is an hour off."""
    verified = refused = 0
    for number in range(times):
        offset_s = (3600.0, -3600.0)[number % 2]
        service_off = number % 4 < 2
        with (
            EmbeddedRedis() as redis,
            replicas(redis.url, offset_s=offset_s if service_off else 0.0),
            Load(redis.url, KEYRING, alone_share=1.0) as load,
        ):
            run_id = f"shifted-{number}"
            with TamiyoClient(redis.url, KEYRING, run_id) as trainer:
                for step in range(10):
                    packet = state_packet(run_id, step)
                    if not service_off:
                        packet.timestamp_ns += int(offset_s * 1e9)
                    trainer.publish_packet(packet)
                    trainer.wait(packet.global_step, 0.2)
                accepted, stale = trainer.counters.received, trainer.counters.rejected.total()
            # Commands carry the service's time; packets are aged by the clock of Redis.
            expect(
                (accepted if service_off else stale) == 0,
                f"{accepted} commands accepted and {stale} refused, "
                f"the {'service' if service_off else 'trainer'} is off",
            )
            verified += accepted
            refused += stale
            load.stop()
            found = settle_after_flush(redis.url, load)
            with connect(redis.url) as client:
                telemetry = int(client.xlen("oona.telemetry")) + int(client.xlen("oona.emergency"))
            expect(
                telemetry <= found.commands + found.published + 40,
                f"{telemetry} telemetry packets for {found.commands} commands",
            )
    expect(refused > 0, "no command of a service whose clock is off was refused")
    return {"shifts": times, "commands verified": verified, "refused as stale": refused}


def hang_lane(times: int) -> Figures:
    """A lane that never comes back is replaced; liveness fails when the new one hangs as well."""
    safe = 0
    for number in range(times):
        doomed = number % 2 == 1
        with (
            EmbeddedRedis() as redis,
            replicas(
                redis.url,
                hang_after=(5, 0) if doomed else (5,),
                lane_hang_s=0.5,
                step_timeout_ms=200.0,
            ) as (replica,),
            Load(redis.url, KEYRING, per_s=40, alone_share=1.0) as load,
        ):
            if doomed:
                _until(lambda: not _alive(replica), 30)
            else:
                _until(lambda: _hangs(replica) == 1, 30)
                _until(lambda: _ready(replica))
                time.sleep(0.5)
                expect(_alive(replica), "liveness failed although the new lane works")
            load.stop()
            found = settle(redis.url, load)
            with connect(redis.url) as client:
                reasons = [command.annotations["risk_reason"] for command in _commands(client)]
            safe += sum(reason in ("timeout_inference", "lane_busy") for reason in reasons)
            expect(safe > 0, "no safe command was given")
    return {"hangs": times, "safe commands": safe, **_counts(found)}


def stop_under_load(times: int) -> Figures:
    """SIGTERM under load: it drains in its time and ends with exit code 0."""
    took_s: list[float] = []
    with (
        EmbeddedRedis() as redis,
        replicas(redis.url) as (replica,),
        Load(redis.url, KEYRING) as load,
    ):
        for _ in range(times):
            time.sleep(random.uniform(0.05, 0.3))
            started = time.monotonic()
            code = replica.stop()
            took_s.append(time.monotonic() - started)
            expect(code == 0, f"exit code {code}")
            replica.start().wait_ready()
        load.stop()
        found = settle(redis.url, load)
    return {"stops": times, "stop max s": round(max(took_s), 2), **_counts(found)}


def _caught_up(copy: Redis, offset: int) -> bool:
    return int(copy.info("replication")["slave_repl_offset"]) >= offset


def _counts(found: Balance) -> dict[str, object]:
    return {
        "published": found.published,
        "commands": found.commands,
        "dead letters": found.dead_letters.total(),
    }


def _once(command: bytes) -> Callable[[bytes], bool]:
    armed = [True]

    def swallow(request: bytes) -> bool:
        if armed[0] and command in request.upper():
            armed[0] = False
            return True
        return False

    return swallow


def _recovery_s(url: str, run_id: str = "recovery") -> float:
    """How long after Redis answers again until a fresh packet has its command."""
    while True:
        try:
            with connect(url) as client:
                client.ping()
                break
        except (RedisError, OSError):
            time.sleep(0.01)
    started = time.monotonic()
    stream = f"oona.commands.{run_id}-{time.time_ns()}"
    packet = state_packet(stream, 1)
    fields: Any = dict(seal(packet, KEYRING, {"reply_to": stream}).fields())
    with connect(url) as client:
        client.xadd(NORMAL, fields)
        while not client.exists(stream):
            expect(time.monotonic() - started < 30, "no command after Redis was back")
            time.sleep(0.01)
    return time.monotonic() - started


def _until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        expect(time.monotonic() < deadline_s, f"waited {timeout_s:g} s in vain")
        time.sleep(0.01)


def _url(replica: Replica) -> str:
    return f"http://127.0.0.1:{replica.http_port}"


def _probe(replica: Replica, name: str) -> bool:
    try:
        with urllib.request.urlopen(f"{_url(replica)}/{name}", timeout=5):
            return True
    except OSError:
        return False


def _alive(replica: Replica) -> bool:
    return _probe(replica, "livez")


def _ready(replica: Replica) -> bool:
    return _probe(replica, "readyz")


def _hangs(replica: Replica) -> int:
    """How often the service reported a hung lane."""
    prefix = 'tamiyo_events_total{event="executor_hung"'
    samples = scrape(_url(replica)).items()
    return int(sum(value for name, value in samples if name.startswith(prefix)))


def _check_counts(replica: Replica, load: Load, found: Balance, elsewhere: int = 0) -> None:
    """See that a replica that lived through it all counts what the streams show.

    `elsewhere` packets had their commands sent to streams of their own.
    """
    counted = outcomes(_url(replica))
    least = len(load.published) + elsewhere
    expect(
        counted["decided"] == found.commands + elsewhere
        and counted["duplicate"] == 0
        and least <= sum(counted.values()) <= least + len(load.uncertain),
        f"{found.published} packets and {found.commands} commands, {len(load.uncertain)} packets "
        f"uncertain and {elsewhere} elsewhere, but the service counts {counted}",
    )


def _commands(client: Redis) -> list[Any]:
    found = []
    entries: Any = client.xrange(NORMAL)
    for _, fields in entries:
        try:
            message = parse_payload(open_envelope(fields, KEYRING))
        except ValueError:
            continue
        if isinstance(message, leyline.AdaptationCommand) and KEYRING.verify_command(message):
            found.append(message)
    return found


def _mutate(data: bytes, source: random.Random) -> bytes:
    mutated = bytearray(data)
    for _ in range(source.randint(1, 8)):
        match source.randrange(4):
            case 0 if mutated:
                mutated[source.randrange(len(mutated))] = source.randrange(256)
            case 1:
                mutated.insert(source.randrange(len(mutated) + 1), source.randrange(256))
            case 2 if mutated:
                del mutated[source.randrange(len(mutated)) :]
            case _:
                at = source.randrange(len(mutated) + 1)
                mutated[at:at] = source.randbytes(source.randrange(16))
    return bytes(mutated)


def _acceptable(payload: bytes, signature: str) -> bool:
    """Whether the service takes the entry, by the codec it uses and the fields it needs."""
    fields = SignedEnvelope(payload, signature).fields()
    try:
        envelope = open_envelope(fields, KEYRING)
        if envelope.message_type in _UNPARSED:
            return True
        message = parse_payload(envelope)
        check_fields(message)
    except (ValueError, InvalidPacketError):
        return False
    return not isinstance(message, leyline.SystemStatePacket) or bool(message.training_run_id)


_UNPARSED = (
    leyline.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND,
    leyline.BUS_MESSAGE_TYPE_FIELD_REPORT,
    leyline.BUS_MESSAGE_TYPE_TELEMETRY,
    leyline.BUS_MESSAGE_TYPE_POLICY_UPDATE,
    leyline.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_REQUEST,
    leyline.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_READY,
    leyline.BUS_MESSAGE_TYPE_KERNEL_PREFETCH_ERROR,
    leyline.BUS_MESSAGE_TYPE_BENCHMARK_REPORT,
)
"""Types that are acknowledged without a look inside."""
