"""The client against a real Redis server."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.patience import PATIENT

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.client import (
    AckOutcome,
    AsyncTamiyoClient,
    ClientMode,
    ClientSettings,
    State,
    TamiyoClient,
    TransportOptions,
)
from tamiyo_svc.client.capture import read_capture
from tamiyo_svc.client.core import ClientCore
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


def entries(redis: Redis) -> Any:
    return redis.xrange("oona.normal")


def publish(client: ClientCore, step: int) -> None:
    """Publish, and return when it is on the bus."""
    assert client.publish_packet(make_packet(step))
    assert client._exchange.flush(LONG_S)


def eventually(holds: Callable[[], bool]) -> None:
    """Return as soon as it holds; fail when it does not in good time."""
    deadline_s = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url, protocol=2) as client:
        yield client


@pytest.fixture
def client(redis_url: str) -> Iterator[TamiyoClient]:
    with TamiyoClient(redis_url, KEYRING, RUN, PATIENT, clock=lambda: NOW_S) as client:
        yield client


def test_publish_writes_a_signed_packet_that_says_where_to_answer(
    redis: Redis, client: TamiyoClient
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert client.publish_packet(make_packet(3), blueprint_ids=("a", "b"), traceparent=trace)
    assert client.flush(LONG_S)
    ((_, fields),) = entries(redis)
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
    publish(client, 1)
    answer(redis, 1)
    verified = client.wait(1, LONG_S)
    assert verified is not None
    assert verified.command.command_id == "c-1"
    assert (client.counters.received, client.counters.missed) == (1, 0)


def test_a_command_written_while_the_client_waits_arrives(
    redis: Redis, client: TamiyoClient
) -> None:
    publish(client, 1)
    timer = threading.Timer(0.05, answer, (redis, 1))
    timer.start()
    assert client.wait(1, LONG_S) is not None
    timer.join()


def test_poll_does_not_wait_and_does_not_count_a_miss(redis: Redis, client: TamiyoClient) -> None:
    publish(client, 1)
    assert client.poll() is None
    answer(redis, 1)
    while (verified := client.poll()) is None:
        pass
    assert verified.packet_id == "p-1"
    assert client.counters.missed == 0


def test_no_answer_is_a_miss_and_the_next_step_still_works(
    redis: Redis, client: TamiyoClient
) -> None:
    publish(client, 1)
    assert client.wait(1, 0.005) is None
    publish(client, 2)
    answer(redis, 2)
    assert client.wait(2, LONG_S) is not None
    assert (client.counters.received, client.counters.missed) == (1, 1)


def test_a_late_command_is_counted_and_not_returned(redis: Redis, client: TamiyoClient) -> None:
    publish(client, 1)
    assert client.wait(1, 0.0) is None
    publish(client, 2)
    answer(redis, 1)
    answer(redis, 2)
    verified = client.wait(2, LONG_S)
    assert verified is not None
    assert verified.packet_id == "p-2"
    assert client.counters.late == 1


def test_bad_answers_are_counted_by_reason_and_the_good_one_is_found(
    redis: Redis, client: TamiyoClient
) -> None:
    publish(client, 1)
    answer(redis, 1, keyring=Keyring(b"another-secret-16"))
    redis.xadd(client.reply_stream, {"bootstrap": "1"})
    answer(redis, 1)
    answer(redis, 1)
    answer(redis, 1, command_id="c-other")
    assert client.wait(1, LONG_S) is not None
    publish(client, 2)
    answer(redis, 2)
    assert client.wait(2, LONG_S) is not None
    assert client.counters.rejected == {
        CommandRejection.INVALID_SIGNATURE: 1,
        CommandRejection.MISSING_SIGNATURE: 1,
        CommandRejection.REPLAYED: 1,
        CommandRejection.ALREADY_ANSWERED: 1,
    }


def test_commands_from_before_this_client_are_not_read(redis: Redis, client: TamiyoClient) -> None:
    answer(redis, 1)
    publish(client, 1)
    assert client.wait(1, 0.01) is None
    assert not client.counters.rejected
    assert client.counters.late == 0


def test_a_packet_of_another_run_is_a_programming_error(client: TamiyoClient) -> None:
    with pytest.raises(ValueError, match="not a packet of run"):
        client.publish_packet(leyline.SystemStatePacket(packet_id="p", training_run_id="other"))


def test_state_from_plain_values_becomes_a_packet_with_ids_and_a_trace(
    redis: Redis, client: TamiyoClient
) -> None:
    state = State(
        training_loss=0.5,
        epoch=2,
        metrics={"loss": 0.5, "nothing": None},
        seeds=[{"seed_id": "seed-0", "stage": leyline.SEED_STAGE_TRAINING}],
        hardware={"device_type": "cpu"},
    )
    packet_id = client.publish(state, 7)
    assert client.flush(LONG_S)
    envelope = open_envelope(entries(redis)[0][1], KEYRING)
    packet: Any = parse_payload(envelope)
    assert packet.packet_id == packet_id == envelope.attributes["packet_id"]
    assert (packet.global_step, packet.current_epoch) == (7, 2)
    assert packet.timestamp_ns == int(NOW_S * 1e9)
    assert dict(packet.training_metrics) == {"loss": 0.5}
    assert packet.seed_states[0].stage == leyline.SEED_STAGE_TRAINING
    version, trace, span, flags = envelope.attributes["traceparent"].split("-")
    assert (version, len(trace), len(span), flags) == ("00", 32, 16, "01")


def test_an_ack_is_a_signed_field_report(redis: Redis, client: TamiyoClient) -> None:
    publish(client, 1)
    answer(redis, 1)
    verified = client.wait(1, LONG_S)
    assert verified is not None
    client.ack(verified, AckOutcome.REJECTED, "gate: min_steps")
    assert client.flush(LONG_S)
    envelope = open_envelope(entries(redis)[-1][1], KEYRING)
    report: Any = parse_payload(envelope)
    assert isinstance(report, leyline.FieldReport)
    assert (report.report_id, report.command_id) == ("fr-ack-c-1", "c-1")
    assert report.outcome == leyline.FIELD_REPORT_OUTCOME_ABORTED
    assert report.notes == "rejected: gate: min_steps"
    assert envelope.attributes["command_id"] == "c-1"
    assert client.counters.acknowledged == 1


def test_an_outage_ends_by_itself_and_what_was_queued_is_sent() -> None:
    with EmbeddedRedis() as server, TamiyoClient(server.url, KEYRING, RUN) as client:
        publish(client, 1)
        server.kill()
        eventually(lambda: client._exchange.reachable is False)
        started_s = time.monotonic()
        for step in range(2, 6):
            assert client.publish_packet(make_packet(step))
            assert client.wait(step, LONG_S) is None
        assert time.monotonic() - started_s < LONG_S
        assert client.counters.missed == client.counters.waits_skipped == 4
        server.start()
        eventually(lambda: client.counters.published == 5)
        with Redis.from_url(server.url, protocol=2) as redis:
            steps = [
                open_envelope(fields, KEYRING).attributes["step_index"]
                for _, fields in entries(redis)
            ]
        assert steps == ["2", "3", "4", "5"]


def test_a_server_that_stops_answering_is_found_out_and_replaced() -> None:
    with EmbeddedRedis() as server, TamiyoClient(server.url, KEYRING, RUN) as client:
        publish(client, 1)
        server.process.send_signal(signal.SIGSTOP)
        try:
            assert client.publish_packet(make_packet(2))
            eventually(lambda: client.counters.bus_errors > 0)
        finally:
            server.process.send_signal(signal.SIGCONT)
        eventually(lambda: client.counters.published == 2)


def test_a_server_that_accepts_and_never_answers_costs_the_trainer_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        options = TransportOptions(connect_timeout_s=0.05, socket_timeout_s=0.05)
        settings = ClientSettings(transport=options, close_timeout_s=0.0)
        with TamiyoClient(f"redis://127.0.0.1:{port}/0", KEYRING, RUN, settings) as client:
            assert client.publish_packet(make_packet(1))
            eventually(lambda: client.counters.bus_errors > 0)
            assert client.wait(1, LONG_S) is None
    assert (client.counters.published, client.counters.unpublished) == (0, 1)


def test_observing_verifies_and_hands_out_nothing(redis: Redis, redis_url: str) -> None:
    settings = ClientSettings(mode=ClientMode.OBSERVE)
    with TamiyoClient(redis_url, KEYRING, RUN, settings, clock=lambda: NOW_S) as client:
        publish(client, 1)
        answer(redis, 1)
        eventually(lambda: client.counters.observed == 1)
        assert client.wait(1, LONG_S) is None
        assert client.poll() is None
        assert (client.counters.received, client.counters.late) == (0, 0)


def test_offline_spools_in_the_capture_format_and_waits_for_nothing(tmp_path: Path) -> None:
    spool = tmp_path / "run" / "spool.jsonl"
    settings = ClientSettings(mode=ClientMode.OFFLINE, spool=spool)
    with TamiyoClient("redis://nowhere:1/0", KEYRING, RUN, settings) as client:
        for step in (1, 2, 3):
            publish(client, step)
            assert client.wait(step, LONG_S) is None
    captured = list(read_capture(spool))
    assert [entry.stream for entry in captured] == ["oona.normal"] * 3
    assert [open_envelope(e.fields(), KEYRING).attributes["packet_id"] for e in captured] == [
        "p-1",
        "p-2",
        "p-3",
    ]
    ids = [tuple(map(int, entry.entry_id.split("-"))) for entry in captured]
    assert ids == sorted(set(ids))


def test_disabled_starts_no_thread_and_does_nothing() -> None:
    settings = ClientSettings(mode=ClientMode.DISABLED)
    before = threading.active_count()
    with TamiyoClient("redis://nowhere:1/0", None, RUN, settings) as client:
        assert client.publish(State(), 1) == ""
        assert client.wait(1, LONG_S) is None
        assert client.poll() is None
        assert threading.active_count() == before
    assert client.counters.missed == 0


async def test_the_asyncio_client_waits_without_blocking_its_loop(
    redis: Redis, redis_url: str
) -> None:
    async with AsyncTamiyoClient(redis_url, KEYRING, RUN, PATIENT, clock=lambda: NOW_S) as client:
        await asyncio.to_thread(publish, client, 1)
        waiting = asyncio.create_task(client.wait(1, LONG_S))
        await asyncio.to_thread(answer, redis, 1)
        verified = await waiting
        assert verified is not None
        assert verified.command.command_id == "c-1"
        await asyncio.to_thread(publish, client, 2)
        assert await client.wait(2, 0.001) is None
    assert (client.counters.received, client.counters.missed) == (1, 1)


def test_a_resumed_run_refuses_the_commands_it_has_applied(redis: Redis, redis_url: str) -> None:
    with TamiyoClient(redis_url, KEYRING, RUN, PATIENT, clock=lambda: NOW_S) as client:
        publish(client, 1)
        answer(redis, 1)
        assert client.wait(1, LONG_S) is not None
        saved = client.state_dict()
    with TamiyoClient(redis_url, KEYRING, RUN, PATIENT, clock=lambda: NOW_S) as resumed:
        resumed.load_state_dict(saved)
        publish(resumed, 1)
        answer(redis, 1)
        answer(redis, 1, command_id="c-1-new")
        verified = resumed.wait(1, LONG_S)
        assert verified is not None
        assert verified.command.command_id == "c-1-new"
        assert resumed.counters.rejected == {CommandRejection.REPLAYED: 1}


def test_the_state_of_another_run_is_left_alone(redis_url: str) -> None:
    with TamiyoClient(redis_url, KEYRING, RUN) as client:
        client.load_state_dict(
            {"version": 1, "run_id": "other", "cursor": "9-9", "accepted_s": {"c": 1.0}}
        )
        assert client.state_dict() == {
            "version": 1,
            "run_id": RUN,
            "cursor": "",
            "accepted_s": {},
        }


def test_a_forked_child_starts_afresh_and_leaves_its_parents_connection_alone(
    redis: Redis, client: TamiyoClient
) -> None:
    publish(client, 1)
    pid = os.fork()
    if pid == 0:
        # Nothing of pytest may run in the child.
        try:
            publish(client, 2)
            client.close()
            os._exit(0 if client.counters.published == 1 else 3)
        except BaseException:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [e[1][b"payload"] for e in entries(redis)] != []
    assert len(entries(redis)) == 2
    answer(redis, 1)
    assert client.wait(1, LONG_S) is not None
    assert client.counters.bus_errors == 0


@pytest.mark.parametrize("url", ["{redis}", "unix:///nonexistent/redis.sock"])
def test_a_process_that_forgets_to_close_still_ends_and_sends_what_it_can(
    redis: Redis, redis_url: str, url: str
) -> None:
    script = f"""
        from tamiyo_svc.client import Keyring, State, TamiyoClient
        client = TamiyoClient({url.format(redis=redis_url)!r}, Keyring(b"0123456789abcdef"), "r")
        for step in range(50):
            client.publish(State(training_loss=1.0), step)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
    assert len(entries(redis)) == (50 if "{redis}" in url else 0)


def test_a_client_nobody_holds_any_more_ends_its_threads(redis_url: str) -> None:
    before = threading.active_count()
    client = TamiyoClient(redis_url, KEYRING, RUN)
    publish(client, 1)
    assert threading.active_count() > before
    del client
    eventually(lambda: threading.active_count() == before)


def test_importing_the_client_imports_neither_torch_nor_the_service() -> None:
    script = (
        "import sys, tamiyo_svc.client; "
        "bad = {'torch', 'torch_geometric', 'numpy', 'lightning', 'transformers'};"
        "mine = {m for m in sys.modules if m.startswith('tamiyo_svc.')};"
        "print(sorted(bad & set(sys.modules)), sorted(m.split('.')[1] for m in mine))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    loaded, packages = printed.split("] [")
    assert loaded == "["
    assert set(packages.strip("]\n'").split("', '")) == {
        "client",
        "errors",
        "leyline",
        "taxonomy",
    }
