"""What a client makes of a Redis server that refuses, moves or answers for nobody."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError
from support.proxy import FaultyProxy
from support.running import StartService

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.client import ClientSettings, State, TamiyoClient
from tamiyo_svc.client.testing import KEYRING, LONG_S, FakeService, make_packet, make_pause
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import CommandRejection

pytestmark = pytest.mark.redis

RUN = "run-1"
STREAM = "oona.normal"
REPLIES = f"oona.commands.{RUN}"
PATIENCE_S = 3 * LONG_S
USER, PASSWORD = "trainer-7", "hunter-42"


def eventually(holds: Callable[[], Any], what: str = "") -> None:
    """Return as soon as it holds; fail when it does not in good time."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.002)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "tamiyo.client" and record.levelno >= logging.WARNING
    ]


def execute(redis: Any, *commands: str) -> None:
    for command in commands:
        redis.execute_command(*command.split())


def answer(redis: Redis, service: FakeService, step: int) -> None:
    fields: Any = service.sign(make_pause(), make_packet(step))
    redis.xadd(REPLIES, fields)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def admin(server: EmbeddedRedis) -> Iterator[Redis]:
    with Redis.from_url(server.url, protocol=2) as admin:
        admin.flushall()
        yield admin


@pytest.fixture
def client(server: EmbeddedRedis, admin: Redis) -> Iterator[TamiyoClient]:
    settings = ClientSettings(max_wait_s=LONG_S)
    with TamiyoClient(server.url, KEYRING, RUN, settings) as client:
        yield client


@dataclass(frozen=True)
class Trouble:
    """Commands that make a server refuse, and that end it."""

    strike: tuple[str, ...]
    heal: tuple[str, ...]
    says: str


TROUBLES = {
    "READONLY": Trouble(("REPLICAOF 127.0.0.1 1",), ("REPLICAOF NO ONE",), "replica"),
    "MASTERDOWN": Trouble(
        ("CONFIG SET replica-serve-stale-data no", "REPLICAOF 127.0.0.1 1"),
        ("REPLICAOF NO ONE", "CONFIG SET replica-serve-stale-data yes"),
        # To a write it says READONLY.
        "",
    ),
    "NOREPLICAS": Trouble(
        ("CONFIG SET min-replicas-to-write 1",),
        ("CONFIG SET min-replicas-to-write 0",),
        "NOREPLICAS",
    ),
    "OOM": Trouble(("CONFIG SET maxmemory 1",), ("CONFIG SET maxmemory 0",), "OOM"),
    "NOPERM": Trouble(
        ("ACL SETUSER default -xadd",), ("ACL SETUSER default +@all",), "ACL SETUSER"
    ),
    "NOPERM for a key": Trouble(
        ("ACL SETUSER default resetkeys ~oona.commands.*",),
        ("ACL SETUSER default allkeys",),
        "ACL SETUSER",
    ),
    "WRONGTYPE": Trouble(
        ("RENAME oona.normal kept", "SET oona.normal x"),
        ("RENAME kept oona.normal",),
        "is no stream",
    ),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_server_that_refuses_is_an_outage_that_is_told_once_and_ends_by_itself(
    name: str, admin: Redis, client: TamiyoClient, caplog: pytest.LogCaptureFixture
) -> None:
    trouble = TROUBLES[name]
    assert client.publish(State(), 1)
    assert client.flush(LONG_S)
    try:
        execute(admin, *trouble.strike)
        assert client.publish(State(), 2)
        eventually(lambda: client.counters.bus_errors >= 3, name)
        assert client.wait(2, LONG_S) is None
    finally:
        execute(admin, *trouble.heal)
    assert client.publish(State(), 3)
    eventually(lambda: client.counters.published == 3, name)
    eventually(lambda: "connected again" in lines(caplog))
    told = [line for line in lines(caplog) if line.startswith("going on without Tamiyo")]
    assert len(told) == 1
    # Whichever connection comes to know it first, a blocked read may be told other words.
    assert trouble.says in told[0] or "UNBLOCKED" in told[0]
    assert client.counters.faults == 0


@pytest.mark.parametrize(
    ("allowed", "says"),
    [
        ("-xread", "XREAD and XREVRANGE on oona.commands.run-1"),
        ("-xrevrange", "XREAD and XREVRANGE on oona.commands.run-1"),
    ],
)
def test_a_client_that_may_not_read_says_so_once_and_shows_no_user(
    allowed: str, says: str, server: EmbeddedRedis, admin: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    execute(admin, f"ACL SETUSER {USER} on >{PASSWORD} allkeys +@all {allowed}")
    url = server.url.replace("?db=0", f"?username={USER}&password={PASSWORD}")
    with TamiyoClient(url, KEYRING, RUN) as client:
        assert client.publish(State(), 1)
        eventually(lambda: client.counters.bus_errors >= 4)
    (told,) = lines(caplog)
    assert says in told
    assert USER not in caplog.text
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize("given", [f"{USER}:wrong-{PASSWORD}", f"nobody-7:{PASSWORD}", ""])
def test_a_log_on_that_is_refused_is_told_once_without_what_was_given(
    given: str, server: EmbeddedRedis, admin: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.url.replace("unix://", f"unix://{given}@" if given else "unix://")
    admin.config_set("requirepass", "another")
    try:
        with TamiyoClient(url, KEYRING, RUN) as client:
            assert client.publish(State(), 1)
            eventually(lambda: client.counters.bus_errors >= 3)
    finally:
        admin.config_set("requirepass", "")
    (told,) = lines(caplog)
    assert "refuses the log-on" in told
    assert "REDIS_URL" in told
    assert not any(part and part in caplog.text for part in given.split(":"))


def test_a_packet_that_a_busy_server_refused_is_sent_when_it_has_time(
    server: EmbeddedRedis, admin: Redis, client: TamiyoClient, caplog: pytest.LogCaptureFixture
) -> None:
    assert client.publish(State(), 1)
    assert client.flush(LONG_S)
    execute(admin, "CONFIG SET lua-time-limit 1")

    def loop() -> None:
        url = server.url
        # It is killed.
        with Redis.from_url(url, socket_timeout=PATIENCE_S) as busy, pytest.raises(ResponseError):
            busy.eval("while true do end", 0)

    script = threading.Thread(target=loop)
    script.start()

    def is_busy() -> bool:
        try:
            admin.ping()
        except ResponseError:
            return True
        return False

    eventually(is_busy)
    assert client.publish(State(), 2)
    eventually(lambda: client.counters.bus_errors >= 2)
    admin.script_kill()
    script.join()
    eventually(lambda: client.counters.published == 2)
    eventually(lambda: "connected again" in lines(caplog))
    assert client.counters.faults == 0
    assert len(lines(caplog)) == 2


@dataclass
class Pair:
    """Two servers, and a client whose address leads to the first until it is `switched`."""

    old: Redis
    new: Redis
    proxy: FaultyProxy
    client: TamiyoClient
    new_port: int

    def switch(self) -> None:
        """Let new connections through to the second; those there are stay where they are."""
        self.proxy.target_port = self.new_port


@pytest.fixture
def pair(free_tcp_port_factory: Callable[[], int]) -> Iterator[Pair]:
    ports = free_tcp_port_factory(), free_tcp_port_factory()
    with (
        EmbeddedRedis(port=ports[0]) as first,
        EmbeddedRedis(port=ports[1]) as second,
        FaultyProxy(ports[0]) as proxy,
        Redis.from_url(first.url, protocol=2) as old,
        Redis.from_url(second.url, protocol=2) as new,
        TamiyoClient(
            f"redis://127.0.0.1:{proxy.port}/0", KEYRING, RUN, ClientSettings(max_wait_s=LONG_S)
        ) as client,
    ):
        yield Pair(old, new, proxy, client, ports[1])


def talk(redis: Redis, client: TamiyoClient, step: int) -> bool:
    """Publish a step and answer it on this server; whether the client has the command."""
    before = redis.xlen(STREAM)
    assert client.publish_packet(make_packet(step))
    eventually(lambda: redis.xlen(STREAM) > before)
    answer(redis, FakeService(), step)
    return client.wait(step, LONG_S) is not None


def test_writing_and_reading_follow_the_address_when_a_primary_is_demoted(pair: Pair) -> None:
    assert talk(pair.old, pair.client, 1)
    pair.switch()
    pair.old.replicaof("127.0.0.1", 1)
    assert pair.client.publish(State(), 2)
    eventually(lambda: pair.new.xlen(STREAM) == 1)
    eventually(lambda: pair.client._exchange.reachable)
    assert talk(pair.new, pair.client, 3)
    assert pair.client.counters.faults == 0


@pytest.mark.parametrize("command", ["xadd", "xread"])
def test_one_connection_that_had_to_move_takes_the_other_along(pair: Pair, command: str) -> None:
    assert talk(pair.old, pair.client, 1)
    pair.switch()
    # Nobody tells the other one, whose server goes on as before.
    for connection in pair.old.client_list():
        if connection["cmd"] == command:
            pair.old.client_kill_filter(_id=connection["id"])
    assert pair.client.publish(State(), 2)
    eventually(lambda: pair.client.counters.published == 2)
    eventually(lambda: pair.client._exchange.reachable)
    assert pair.client.publish(State(), 3)
    eventually(lambda: pair.new.xlen(STREAM) > 0)
    eventually(lambda: pair.client._exchange.reachable)
    assert talk(pair.new, pair.client, 4)
    assert not [c for c in pair.old.client_list() if c["cmd"] in ("xadd", "xread")]


def test_a_server_whose_ids_are_behind_those_seen_before_is_heard_too(pair: Pair) -> None:
    # As after a restore from the past, or on a server whose clock was ahead.
    pair.old.xadd(REPLIES, {"bootstrap": "1"}, id="99999999999999-0")
    assert talk(pair.old, pair.client, 1)
    pair.switch()
    pair.old.replicaof("127.0.0.1", 1)
    assert pair.client.publish(State(), 2)
    eventually(lambda: pair.new.xlen(STREAM) == 1)
    eventually(lambda: pair.client._exchange.reachable)
    assert talk(pair.new, pair.client, 3)


def publish_and_wait(client: TamiyoClient, steps: range, wait_s: float = 0.01) -> None:
    for step in steps:
        assert client.publish(State(), step)
        client.flush(LONG_S)
        client.wait(step, wait_s)


def test_a_stream_that_nobody_reads_is_told_once(
    client: TamiyoClient, caplog: pytest.LogCaptureFixture
) -> None:
    publish_and_wait(client, range(40))
    eventually(lambda: lines(caplog))
    publish_and_wait(client, range(40, 80))
    client.close()
    (told,) = lines(caplog)
    assert "nobody reads oona.normal" in told
    assert "OONA_PARTITIONS" in told


def test_a_trainer_that_closes_before_it_is_time_is_told_all_the_same(
    client: TamiyoClient, caplog: pytest.LogCaptureFixture
) -> None:
    publish_and_wait(client, range(3), 0.001)
    client.close()
    (told,) = lines(caplog)
    assert "nobody reads" in told


@pytest.mark.parametrize(
    ("read", "says"), [(True, "read from oona.normal by tamiyo"), (False, "not read any more")]
)
def test_a_group_that_reads_and_does_not_answer_is_told_from_one_that_does_not_read(
    read: bool,
    says: str,
    admin: Redis,
    client: TamiyoClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    admin.xgroup_create(STREAM, "tamiyo", "0", mkstream=True)
    for step in range(4):
        assert client.publish(State(), step)
        assert client.flush(LONG_S)
        if read:
            admin.xreadgroup("tamiyo", "one", {STREAM: ">"})
        client.wait(step, 0.001)
    client.close()
    (told,) = lines(caplog)
    assert says in told
    assert ("secret" in told) is read


def test_silence_is_over_with_the_first_command(
    admin: Redis, client: TamiyoClient, caplog: pytest.LogCaptureFixture
) -> None:
    publish_and_wait(client, range(4))
    eventually(lambda: lines(caplog))
    assert client.publish_packet(make_packet(9))
    assert client.flush(LONG_S)
    answer(admin, FakeService(), 9)
    eventually(lambda: len(lines(caplog)) == 2)
    assert "again" in lines(caplog)[1]


@pytest.mark.parametrize(
    ("offset_s", "reason", "seconds"),
    [
        (-3600.0, CommandRejection.STALE, "3600 s ago"),
        (7200.0, CommandRejection.FROM_THE_FUTURE, "7200 s from now"),
    ],
)
def test_a_clock_that_is_wrong_is_told_with_the_seconds(
    offset_s: float,
    reason: CommandRejection,
    seconds: str,
    admin: Redis,
    client: TamiyoClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = FakeService()
    service.clock_offset_s = offset_s
    for step in range(6):
        assert client.publish_packet(make_packet(step))
        assert client.flush(LONG_S)
        answer(admin, service, step)
        eventually(lambda: client.counters.rejected[reason] == client.counters.published)
        client.wait(step, 0.001)
    client.close()
    (told,) = lines(caplog)
    assert "clock" in told
    # The service signs a moment before, which rounds either way.
    assert seconds in told or f"{7199} s from now" in told or f"{3601} s ago" in told


def test_commands_of_another_secret_are_told_once(
    admin: Redis, client: TamiyoClient, caplog: pytest.LogCaptureFixture
) -> None:
    service = FakeService(keyring=Keyring(b"a secret of somebody else"))
    for step in range(6):
        assert client.publish_packet(make_packet(step))
        assert client.flush(LONG_S)
        answer(admin, service, step)
        client.wait(step, 0.01)
    eventually(lambda: client.counters.rejected[CommandRejection.INVALID_SIGNATURE] == 6)
    client.close()
    (told,) = lines(caplog)
    assert "ESPER_LEYLINE_SECRET" in told


async def test_a_trainer_with_another_secret_than_the_real_service_is_told_to_look_at_it(
    start_service: StartService, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await start_service()
    with TamiyoClient(redis_url, Keyring(b"not the secret of the service"), RUN) as client:
        await asyncio.to_thread(publish_and_wait, client, range(5))
        await asyncio.to_thread(eventually, lambda: lines(caplog))
    (told,) = lines(caplog)
    assert "read from oona.normal by tamiyo and not answered" in told
    assert "ESPER_LEYLINE_SECRET" in told


def test_two_trainers_of_one_run_id_are_told_so(
    admin: Redis, server: EmbeddedRedis, client: TamiyoClient, caplog: pytest.LogCaptureFixture
) -> None:
    with TamiyoClient(server.url, KEYRING, RUN) as other:
        assert other.publish_packet(make_packet(1))
        assert client.publish_packet(make_packet(2))
        assert client.flush(LONG_S)
        eventually(lambda: client._exchange.reachable)
        answer(admin, FakeService(), 1)
        eventually(lambda: client.counters.rejected[CommandRejection.UNKNOWN_PACKET])
    assert any("does another one use this run id" in line for line in lines(caplog))
