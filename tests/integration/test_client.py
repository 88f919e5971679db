"""The client against a real Redis server."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.client.transport import TransportOptions
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import CommandRejection

pytestmark = pytest.mark.redis

KEYRING = Keyring(b"0123456789abcdef")
RUN = "run-1"
LONG_S = 10.0
NOW_S = 1_760_000_000.0


def make_packet(step: int) -> leyline.SystemStatePacket:
    return leyline.SystemStatePacket(
        version=1, packet_id=f"p-{step}", global_step=step, training_run_id=RUN
    )


def answer(redis: Redis, step: int, *, keyring: Keyring = KEYRING, command_id: str = "") -> None:
    command = leyline.AdaptationCommand(
        version=1, command_id=command_id or f"c-{step}", command_type=leyline.COMMAND_PAUSE
    )
    command.issued_at.FromNanoseconds(int(NOW_S * 1e9))
    command.annotations.update(training_run_id=RUN, packet_id=f"p-{step}", step_index=str(step))
    keyring.sign_command(command)
    fields: Any = seal(command, keyring).fields()
    redis.xadd(f"oona.commands.{RUN}", fields)


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url, protocol=2) as client:
        yield client


@pytest.fixture
def client(redis_url: str) -> Iterator[TamiyoClient]:
    with TamiyoClient(redis_url, KEYRING, RUN, clock=lambda: NOW_S) as client:
        yield client


def test_publish_writes_a_signed_packet_that_says_where_to_answer(
    redis: Redis, client: TamiyoClient
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert client.publish(make_packet(3), blueprint_ids=("a", "b"), traceparent=trace)
    entries: Any = redis.xrange("oona.normal")
    ((_, fields),) = entries
    envelope = open_envelope(fields, KEYRING)
    assert dict(envelope.attributes) == {
        "reply_to": "oona.commands.run-1",
        "training_run_id": RUN,
        "packet_id": "p-3",
        "step_index": "3",
        "blueprint_id": "a,b",
        "traceparent": trace,
    }
    assert parse_payload(envelope) == make_packet(3)
    assert client.counters.published == 1


def test_wait_returns_the_command_for_the_packet(redis: Redis, client: TamiyoClient) -> None:
    client.publish(make_packet(1))
    answer(redis, 1)
    verified = client.wait("p-1", LONG_S)
    assert verified is not None
    assert verified.command.command_id == "c-1"
    assert (client.counters.received, client.counters.missed) == (1, 0)


def test_a_command_written_while_the_client_waits_arrives(
    redis: Redis, client: TamiyoClient
) -> None:
    client.publish(make_packet(1))
    timer = threading.Timer(0.05, answer, (redis, 1))
    timer.start()
    assert client.wait("p-1", LONG_S) is not None
    timer.join()


def test_poll_does_not_wait_and_does_not_count_a_miss(redis: Redis, client: TamiyoClient) -> None:
    client.publish(make_packet(1))
    assert client.poll() is None
    answer(redis, 1)
    while (verified := client.poll()) is None:
        pass
    assert verified.packet_id == "p-1"
    assert client.counters.missed == 0


def test_no_answer_is_a_miss_and_the_next_step_still_works(
    redis: Redis, client: TamiyoClient
) -> None:
    client.publish(make_packet(1))
    assert client.wait("p-1", 0.005) is None
    client.publish(make_packet(2))
    answer(redis, 2)
    assert client.wait("p-2", LONG_S) is not None
    assert (client.counters.received, client.counters.missed) == (1, 1)


def test_a_late_command_is_counted_and_not_returned(redis: Redis, client: TamiyoClient) -> None:
    client.publish(make_packet(1))
    assert client.wait("p-1", 0.0) is None
    client.publish(make_packet(2))
    answer(redis, 1)
    answer(redis, 2)
    verified = client.wait("p-2", LONG_S)
    assert verified is not None
    assert verified.packet_id == "p-2"
    assert client.counters.late == 1


def test_bad_answers_are_counted_by_reason_and_the_good_one_is_found(
    redis: Redis, client: TamiyoClient
) -> None:
    client.publish(make_packet(1))
    answer(redis, 1, keyring=Keyring(b"another-secret-16"))
    redis.xadd(client.reply_stream, {"bootstrap": "1"})
    answer(redis, 1)
    answer(redis, 1)
    answer(redis, 1, command_id="c-other")
    assert client.wait("p-1", LONG_S) is not None
    client.publish(make_packet(2))
    answer(redis, 2)
    assert client.wait("p-2", LONG_S) is not None
    assert client.counters.rejected == {
        CommandRejection.INVALID_SIGNATURE: 1,
        CommandRejection.MISSING_SIGNATURE: 1,
        CommandRejection.REPLAYED: 1,
        CommandRejection.ALREADY_ANSWERED: 1,
    }


def test_commands_from_before_this_client_are_not_read(redis: Redis, client: TamiyoClient) -> None:
    answer(redis, 1)
    client.publish(make_packet(1))
    assert client.wait("p-1", 0.01) is None
    assert not client.counters.rejected


def test_a_packet_of_another_run_is_a_programming_error(client: TamiyoClient) -> None:
    with pytest.raises(ValueError, match="not a packet of run"):
        client.publish(leyline.SystemStatePacket(packet_id="p", training_run_id="other"))


class FakeTime:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_an_outage_costs_one_attempt_per_back_off_and_ends_by_itself() -> None:
    time = FakeTime()
    with EmbeddedRedis() as server:
        url = server.url
        with TamiyoClient(url, KEYRING, RUN, clock=lambda: NOW_S, monotonic=time) as client:
            assert client.publish(make_packet(1))
            server.kill()
            assert client.wait("p-1", LONG_S) is None
            for step in range(2, 6):
                assert not client.publish(make_packet(step))
                assert client.wait(f"p-{step}", LONG_S) is None
            assert client.counters.bus_errors == 1
            assert (client.counters.unpublished, client.counters.missed) == (4, 5)
            server.start()
            time.now_s += 60.0
            assert client.publish(make_packet(6))
            with Redis.from_url(url, protocol=2) as redis:
                answer(redis, 6)
            assert client.wait("p-6", LONG_S) is not None


def test_a_connection_whose_other_end_is_gone_is_found_out_and_replaced() -> None:
    time = FakeTime()
    with (
        EmbeddedRedis() as server,
        TamiyoClient(server.url, KEYRING, RUN, clock=lambda: NOW_S, monotonic=time) as client,
    ):
        client.publish(make_packet(1))
        server.process.send_signal(signal.SIGSTOP)
        try:
            assert client.wait("p-1", 0.0) is None
            assert client.counters.bus_errors == 0
            time.now_s += 3.0
            assert client.wait("p-1", 0.0) is None
            assert client.counters.bus_errors == 1
        finally:
            server.process.send_signal(signal.SIGCONT)
        time.now_s += 60.0
        assert client.publish(make_packet(2))
        with Redis.from_url(server.url, protocol=2) as redis:
            answer(redis, 2)
        assert client.wait("p-2", LONG_S) is not None


def test_a_server_that_accepts_and_never_answers_costs_the_socket_timeout_once() -> None:
    time = FakeTime()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        options = TransportOptions(connect_timeout_s=0.05, socket_timeout_s=0.05)
        url = f"redis://127.0.0.1:{port}/0"
        with TamiyoClient(url, KEYRING, RUN, options=options, monotonic=time) as client:
            assert not client.publish(make_packet(1))
            assert not client.publish(make_packet(2))
            assert (client.counters.unpublished, client.counters.bus_errors) == (2, 1)
