"""The operator's bus commands on a real Redis, beside a real service where it matters."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError
from rich.console import Console, RenderableType
from support.bus import SECRET, Bus, state_packet
from support.running import Running, StartService

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.adapters.oona.connection import client
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.letters import DeadLetter, LetterMover
from tamiyo_svc.cli.dlq import Selection, actions_text, listed, purge, requeue, shown
from tamiyo_svc.cli.stream import status
from tamiyo_svc.cli.tail import OutputFormat, Wanted, tail
from tamiyo_svc.errors import BusError, ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.settings import Settings

pytestmark = pytest.mark.redis

OTHER_SECRET = "another secret for tests"


def settings_for(url: str, **overrides: object) -> Settings:
    values = {"redis_url": url, "secret": SECRET, **overrides}
    return Settings(**values)  # type: ignore[arg-type]


def look(settings: Settings, stream: str) -> dict[str, Any]:
    """What `stream status --json` says of one stream."""
    text = status(settings, as_json=True)
    assert isinstance(text, str)
    (found,) = [each for each in json.loads(text)["streams"] if each["stream"] == stream]
    return dict(found)


def rendered(output: RenderableType) -> str:
    file = io.StringIO()
    Console(width=200, file=file).print(output)
    return file.getvalue()


def tailed(settings: Settings, wanted: Wanted) -> list[dict[str, Any]]:
    """What `tail -o json` prints."""
    lines: list[str] = []
    tail(settings, wanted, OutputFormat.JSON, follow=False, show=lines.append)
    return [json.loads(line) for line in lines]


@pytest.fixture
def redis(redis_url: str) -> Any:
    with Redis.from_url(redis_url) as connection:
        yield connection


def add(
    redis: Any,
    stream: str,
    message: Any,
    secret: str = SECRET,
    entry_id: str = "*",
    **attributes: str,
) -> str:
    fields = seal(message, Keyring(secret.encode()), attributes).fields()
    return str(redis.xadd(stream, fields, id=entry_id).decode())


def bury_by_hand(redis: Any, entry_id: str, message: Any, secret: str = SECRET, **meta: str) -> str:
    fields: dict[Any, Any] = dict(seal(message, Keyring(secret.encode())).fields())
    told = {"stream": "oona.normal", "id": entry_id, "reason": "invalid_signature", **meta}
    fields |= {f"dead.{name}": value for name, value in told.items()}
    return str(redis.xadd("oona.dead", fields).decode())


def recent_id(redis: Any) -> str:
    """An entry id of this moment."""
    seconds, microseconds = redis.time()
    return f"{seconds * 1000 + microseconds // 1000}-0"


def test_status_of_an_empty_server_says_what_is_missing(redis_url: str) -> None:
    found = look(settings_for(redis_url), "oona.normal")
    assert (found["exists"], found["length"], found["groups"]) == (False, 0, [])
    assert "does not exist" in found["diagnosis"][0]
    assert look(settings_for(redis_url), "oona.dead")["diagnosis"] == []


def test_status_names_a_stream_that_nobody_reads(redis_url: str, redis: Any) -> None:
    add(redis, "oona.normal", state_packet("run-1", 1))
    assert look(settings_for(redis_url), "oona.normal")["diagnosis"] == [
        "no consumer group 'tamiyo': no service has read this stream"
    ]
    redis.xgroup_create("oona.normal", "tamiyo", id="0")
    found = look(settings_for(redis_url), "oona.normal")
    assert found["diagnosis"][0] == "no consumer is reading, and none ever did"
    assert "not delivered yet" in found["diagnosis"][1]
    assert found["groups"][0]["oldest_unacked_ms"] >= 0


def test_status_names_the_consumer_that_left_entries_behind(redis_url: str, redis: Any) -> None:
    for step in range(3):
        add(redis, "oona.normal", state_packet("run-1", step))
    redis.xgroup_create("oona.normal", "tamiyo", id="0")
    redis.xreadgroup("tamiyo", "replica-a", {"oona.normal": ">"}, count=2)
    impatient = settings_for(redis_url, claim_idle_ms=1, block_ms=1)
    while True:
        found = look(impatient, "oona.normal")
        if found["groups"][0]["consumers"][0]["idle_ms"] > 3:
            break
    (group,) = found["groups"]
    # Redis 6.2 does not know the lag.
    assert group["lag"] in (1, None)
    assert group["pending"] == 2
    assert [(each["name"], each["pending"]) for each in group["consumers"]] == [("replica-a", 2)]
    nobody, abandoned, waiting = found["diagnosis"]
    assert nobody.startswith("no consumer is reading; the last one, replica-a, was seen ")
    assert abandoned.startswith("2 entries pending for replica-a, which has been gone for ")
    assert "not delivered yet" in waiting


def test_status_shows_an_unknown_lag_as_unknown(redis_url: str, redis: Any) -> None:
    ids = [add(redis, "oona.normal", state_packet("run-1", step)) for step in range(3)]
    redis.xgroup_create("oona.normal", "tamiyo", id="0")
    redis.xreadgroup("tamiyo", "replica-a", {"oona.normal": ">"}, count=1)
    redis.xdel("oona.normal", ids[1])
    found = look(settings_for(redis_url), "oona.normal")
    assert found["groups"][0]["lag"] is None
    table = rendered(status(settings_for(redis_url), as_json=False))
    (row,) = [line for line in table.splitlines() if "oona.normal" in line]
    assert "unknown" in row


async def test_status_beside_a_service_at_work_is_fine(
    bus: Bus, start_service: StartService, redis_url: str
) -> None:
    await start_service()
    packet = state_packet("run-1", 1)
    await bus.publish(packet)
    await bus.command_for(packet)

    async def done() -> bool:
        found = await asyncio.to_thread(look, settings_for(redis_url), "oona.normal")
        (group,) = found["groups"]
        return not group["lag"] and (group["pending"], found["diagnosis"]) == (0, [])

    await bus.until(done)


def test_status_of_a_server_that_is_away_is_a_bus_error(tmp_path: Path) -> None:
    with pytest.raises(BusError):
        status(settings_for(f"unix://{tmp_path}/nobody.sock"), as_json=True)


def test_tail_decodes_and_marks_what_does_not_verify(redis_url: str, redis: Any) -> None:
    add(redis, "oona.normal", state_packet("run-1", 1))
    add(redis, "oona.normal", state_packet("run-1", 2), secret=OTHER_SECRET)
    redis.xadd("oona.normal", {"payload": seal(state_packet("run-1", 3), None).payload})
    redis.xadd("oona.normal", {"bootstrap": "1"})
    redis.xadd("oona.normal", {"payload": b"\xff\xff", "signature": "x"})
    found = tailed(settings_for(redis_url), Wanted())
    assert [each["verification"] for each in found] == [
        "verified",
        "forged",
        "unsigned",
        "not_checked",
        "forged",
    ]
    assert [each.get("message", {}).get("global_step") for each in found[:3]] == ["1", "2", "3"]
    assert found[3]["fields"] == {"bootstrap": "1"}
    assert found[4]["problem"].startswith("malformed_envelope")
    unchecked = tailed(settings_for(redis_url, secret=None), Wanted())
    assert {each["verification"] for each in unchecked} == {"not_checked"}


def test_tail_takes_only_what_is_asked_for_in_the_order_of_ids(redis_url: str, redis: Any) -> None:
    now_ms = time.time_ns() // 1_000_000
    first, other, note, last = (f"{now_ms + later}-0" for later in range(-4, 0))
    add(redis, "oona.normal", state_packet("run-1", 1), entry_id=first)
    add(redis, "oona.normal", state_packet("run-2", 1), entry_id=other)
    telemetry = leyline.TelemetryPacket(packet_id="t")
    add(redis, "oona.telemetry", telemetry, entry_id=note, training_run_id="run-1")
    add(redis, "oona.normal", state_packet("run-1", 2), entry_id=last)
    settings = settings_for(redis_url)

    def ids(**wanted: Any) -> list[str]:
        return [each["id"] for each in tailed(settings, Wanted(**wanted))]

    assert ids() == [first, other, note, last]
    assert ids(newest=1) == [last]
    assert ids(run_id="run-1", type_part="state") == [first, last]
    assert ids(run_id="run-1") == [first, note, last]
    assert ids(streams=("oona.telemetry",)) == [note]
    assert ids(since=last) == [last]
    assert len(ids(since="1h")) == 4
    assert ids(run_id="run-1", newest=1, type_part="system") == [last]
    with pytest.raises(ConfigurationError, match="--type"):
        Wanted(type_part="nonsense")
    with pytest.raises(ConfigurationError, match="--since"):
        ids(since="yesterday")


class EnoughError(Exception):
    """Ends a tail that would go on for good."""


def followed(redis_url: str, count: int, *actions: Callable[[], object]) -> list[str]:
    """The first lines of `tail -f`; each action follows the line before it."""
    lines: list[str] = []
    shown = threading.Semaphore(0)

    def show(line: str) -> None:
        lines.append(line)
        shown.release()
        if len(lines) == count:
            raise EnoughError

    def follow() -> None:
        with pytest.raises(EnoughError):
            tail(settings_for(redis_url), Wanted(), OutputFormat.TEXT, follow=True, show=show)

    thread = threading.Thread(target=follow)
    thread.start()
    for action in actions:
        assert shown.acquire(timeout=20)
        action()
    thread.join(20)
    assert not thread.is_alive()
    return lines


def test_tail_follows_what_comes_after(redis_url: str, redis: Any) -> None:
    add(redis, "oona.normal", state_packet("run-1", 1))
    lines = followed(
        redis_url,
        3,
        lambda: add(redis, "oona.normal", state_packet("run-1", 2)),
        lambda: add(redis, "oona.telemetry", leyline.TelemetryPacket(packet_id="note")),
    )
    expected = ("step 1", "step 2", "note")
    assert all(word in line for word, line in zip(expected, lines, strict=True))
    assert "system_state" in lines[1]


def test_tail_shows_commands_on_reply_streams(redis_url: str, redis: Any) -> None:
    add(redis, "oona.commands.run-1", leyline.AdaptationCommand(command_id="c"))
    redis.set("oona.commands.count", "no stream")
    (found,) = tailed(settings_for(redis_url), Wanted(type_part="command"))
    assert found["stream"] == "oona.commands.run-1"
    (found,) = tailed(settings_for(redis_url), Wanted(type_part="command", since="1h"))
    assert found["message"]["command_id"] == "c"


def test_tail_follows_packets_to_the_reply_stream_they_name(redis_url: str, redis: Any) -> None:
    add(redis, "oona.normal", state_packet("run-1", 1))
    lines = followed(
        redis_url,
        3,
        lambda: add(redis, "oona.normal", state_packet("run-1", 2), reply_to="oona.commands.r"),
        lambda: add(redis, "oona.commands.r", leyline.AdaptationCommand(command_id="c")),
    )
    assert "oona.commands.r" in lines[2]


def test_a_line_of_tail_cannot_steer_the_terminal(redis_url: str, redis: Any) -> None:
    packet = state_packet("run\x1b[2J-1", 1)
    packet.packet_id = "line\nbreak"
    add(redis, "oona.normal", packet)
    lines: list[str] = []
    tail(settings_for(redis_url), Wanted(), OutputFormat.TEXT, follow=False, show=lines.append)
    assert lines[0].isprintable()
    assert "run\\x1b[2J-1" in lines[0]


def test_dead_letters_are_listed_by_reason_stream_and_time(redis_url: str, redis: Any) -> None:
    first = bury_by_hand(redis, "1-1", state_packet("run-1", 1), reason="oversized")
    second = bury_by_hand(redis, "1-2", state_packet("run-2", 1), stream="oona.emergency")
    settings = settings_for(redis_url)

    def ids(**selection: Any) -> list[str]:
        text = listed(settings, Selection(**selection), as_json=True)
        assert isinstance(text, str)
        return [letter["id"] for letter in json.loads(text)]

    assert ids() == [first, second]
    assert ids(reason="oversized") == [first]
    assert ids(stream="oona.emergency") == [second]
    assert ids(since=second) == [second]
    assert "run-2" in rendered(listed(settings, Selection(), as_json=False))
    with pytest.raises(ConfigurationError, match="--reason"):
        Selection(reason="nonsense")
    letter = json.loads(shown(settings, first))
    assert letter["original"]["id"] == "1-1"
    assert letter["original"]["message"]["training_run_id"] == "run-1"
    with pytest.raises(ConfigurationError, match="no such dead letter: 7-7"):
        shown(settings, "7-7")


def test_without_yes_nothing_is_changed(redis_url: str, redis: Any) -> None:
    letter = bury_by_hand(redis, recent_id(redis), state_packet("run-1", 1))
    settings, chosen = settings_for(redis_url), Selection(ids=(letter,))
    (one,) = requeue(settings, chosen, act=False)
    assert one.result == "back to oona.normal: would be decided"
    assert "1 letter would be put back; --yes does it" in actions_text(
        [one], act=False, done="put back", todo="put back"
    )
    purge(settings, chosen, act=False)
    assert redis.xlen("oona.dead") == 1
    assert redis.exists("oona.normal") == 0


@pytest.mark.parametrize("act", [requeue, purge])
def test_acting_on_everything_must_be_asked_for(redis_url: str, act: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match="--all"):
        act(settings_for(redis_url), Selection(), act=True)


def test_dry_run_says_what_would_be_refused_again(redis_url: str, redis: Any) -> None:
    bury_by_hand(redis, recent_id(redis), state_packet("run-1", 1), secret=OTHER_SECRET)
    bury_by_hand(redis, "1-2", state_packet("", 1))
    bury_by_hand(redis, "1-3", state_packet("run-1", 1), stream="somewhere.else")
    redis.xadd("oona.dead", {"note": "by hand"})
    everything = Selection(everything=True)
    results = [one.result for one in requeue(settings_for(redis_url), everything, act=False)]
    assert results == [
        "back to oona.normal: would be refused again (invalid_signature)",
        "back to oona.normal: would be refused again (invalid_field)",
        "left: somewhere.else is no stream that the service reads",
        "left: nothing is no stream that the service reads",
    ]
    actions = requeue(settings_for(redis_url), everything, act=True)
    assert actions_text(actions, act=True, done="moved", todo="").endswith("\n2 letters moved")
    assert redis.xlen("oona.dead") == 2
    assert redis.exists("somewhere.else") == 0


def test_requeued_entry_is_the_original_byte_for_byte(redis_url: str, redis: Any) -> None:
    was = recent_id(redis)
    letter = bury_by_hand(redis, was, state_packet("run-1", 1))
    original = dict(redis.xrange("oona.dead")[0][1])
    requeue(settings_for(redis_url), Selection(ids=(letter,)), act=True)
    ((_, fields),) = redis.xrange("oona.normal")
    assert fields == {
        b"payload": original[b"payload"],
        b"signature": original[b"signature"],
        b"requeued_from": was.encode(),
    }
    assert redis.xlen("oona.dead") == 0


def test_an_entry_that_died_twice_keeps_its_first_id(redis_url: str, redis: Any) -> None:
    fields: dict[Any, Any] = dict(seal(state_packet("run-1", 1), Keyring(SECRET.encode())).fields())
    fields |= {"requeued_from": "5-5", "dead.stream": "oona.normal", "dead.id": recent_id(redis)}
    redis.xadd("oona.dead", fields)
    requeue(settings_for(redis_url), Selection(everything=True), act=True)
    ((_, again),) = redis.xrange("oona.normal")
    assert again[b"requeued_from"] == b"5-5"


async def test_a_letter_is_moved_once_however_often_it_is_asked_for(
    redis_url: str, redis: Any
) -> None:
    bury_by_hand(redis, "1-1", state_packet("run-1", 1))
    ((entry_id, fields),) = redis.xrange("oona.dead")
    letter = DeadLetter.of(Entry("oona.dead", entry_id.decode(), fields))
    async with client(redis_url, 5, connections=8) as connections:
        mover = LetterMover(connections)
        moved = await asyncio.gather(*(mover.requeue(letter) for _ in range(8)))
        assert await mover.purge([letter]) == 0
    assert sum(entry is not None for entry in moved) == 1
    assert redis.xlen("oona.normal") == 1


def test_a_server_without_memory_keeps_the_letter() -> None:
    with EmbeddedRedis() as server, Redis.from_url(server.url) as redis:
        letter = bury_by_hand(redis, recent_id(redis), state_packet("run-1", 1))
        redis.config_set("maxmemory", "1")
        with pytest.raises(ResponseError):
            redis.set("probe", "x")
        chosen = Selection(ids=(letter,))
        with pytest.raises(BusError, match="maxmemory"):
            requeue(settings_for(server.url), chosen, act=True)
        redis.config_set("maxmemory", "0")
        assert (redis.xlen("oona.dead"), redis.exists("oona.normal")) == (1, 0)
        requeue(settings_for(server.url), chosen, act=True)
        assert (redis.xlen("oona.dead"), redis.xlen("oona.normal")) == (0, 1)


def test_purge_removes_what_was_chosen_and_nothing_else(redis_url: str, redis: Any) -> None:
    bury_by_hand(redis, "1-1", state_packet("run-1", 1), reason="oversized")
    kept = bury_by_hand(redis, "1-2", state_packet("run-1", 2))
    removed = purge(settings_for(redis_url), Selection(reason="oversized"), act=True)
    assert len(removed) == 1
    assert [entry_id for entry_id, _ in redis.xrange("oona.dead")] == [kept.encode()]


async def ended(bus: Bus, running: Running, packets: int) -> dict[str, float]:
    async def done() -> bool:
        return sum(running.outcomes().values()) >= packets

    await bus.until(done)
    return running.outcomes()


async def test_requeued_packets_get_their_command_and_copies_get_none(
    bus: Bus, start_service: StartService, redis_url: str
) -> None:
    """Three letters of one packet, refused for a secret the service did not have yet.

    One copy goes at a time, the next only as what has been answered already.
    """
    running = await start_service(secret=OTHER_SECRET)
    packet = state_packet("run-1", 1)
    for _ in range(3):
        await bus.publish(packet)
    assert await ended(bus, running, 3) == {"dead_lettered": 3}
    running.stop.set()
    await running.task
    running = await start_service()
    settings, everything = settings_for(redis_url), Selection(everything=True)
    for letters_left in (2, 1, 0):
        await asyncio.to_thread(requeue, settings, everything, act=True)
        await ended(bus, running, 3 - letters_left)
        assert await bus.redis.xlen("oona.dead") == letters_left
    assert running.outcomes() == {"decided": 1, "duplicate": 2}
    assert len(await bus.commands()) == 1


async def test_requeueing_an_answered_packet_makes_no_second_command(
    bus: Bus, start_service: StartService, redis_url: str, redis: Any
) -> None:
    running = await start_service()
    settings, everything = settings_for(redis_url), Selection(everything=True)
    packet = state_packet("run-1", 1)
    await bus.publish(packet)
    await bus.command_for(packet)
    for round_number in range(1, 4):
        bury_by_hand(redis, f"1-{round_number}", packet)
        (said,) = await asyncio.to_thread(requeue, settings, everything, act=False)
        assert said.result.endswith("would end as a duplicate, without a command")
        await asyncio.to_thread(requeue, settings, everything, act=True)
        assert await ended(bus, running, 1 + round_number) == {
            "decided": 1,
            "duplicate": round_number,
        }
    assert len(await bus.commands()) == 1


async def test_packet_that_its_run_may_have_answered_and_forgotten_stays(
    bus: Bus, start_service: StartService, redis_url: str, redis: Any
) -> None:
    """A run remembers 64 decisions; at 50 a second the replay window holds 3,000."""
    running = await start_service()
    packets = [state_packet("run-1", step) for step in range(70)]
    for number, packet in enumerate(packets, start=1):
        await bus.publish(packet)
        await ended(bus, running, number)
    assert running.outcomes() == {"decided": 70}
    bury_by_hand(redis, recent_id(redis), packets[0])
    bury_by_hand(redis, recent_id(redis), packets[-1])
    bury_by_hand(redis, recent_id(redis), state_packet("run-1", 70))
    settings, everything = settings_for(redis_url), Selection(everything=True)
    said = await asyncio.to_thread(requeue, settings, everything, act=False)
    assert [one.result.partition(": ")[2] for one in said] == [
        "its run has gone on, it may have been answered",
        "would end as a duplicate, without a command",
        "would be decided",
    ]
    await asyncio.to_thread(requeue, settings, everything, act=True)
    assert await ended(bus, running, 72) == {"decided": 71, "duplicate": 1}
    commands = await bus.commands()
    assert len({command.command_id for command in commands}) == len(commands) == 71


def test_packet_of_a_run_that_is_forgotten_stays(redis_url: str, redis: Any) -> None:
    bury_by_hand(redis, "1-1", state_packet("run-1", 1))
    bury_by_hand(redis, recent_id(redis), state_packet("run-2", 1))
    said = requeue(settings_for(redis_url), Selection(everything=True), act=False)
    assert [one.result for one in said] == [
        "left: its run is forgotten, it may have been answered",
        "back to oona.normal: would be decided",
    ]


async def test_requeued_packet_of_long_ago_is_a_replay(
    bus: Bus, start_service: StartService, redis_url: str, redis: Any
) -> None:
    running = await start_service()
    newest = state_packet("run-1", 9)
    await bus.publish(newest)
    await bus.command_for(newest)
    old = state_packet("run-1", 1)
    old.timestamp_ns = newest.timestamp_ns - 61 * 10**9
    bury_by_hand(redis, "1-1", old)
    chosen = Selection(everything=True)
    await asyncio.to_thread(requeue, settings_for(redis_url), chosen, act=True)
    assert await ended(bus, running, 2) == {"decided": 1, "duplicate": 1}
    assert len(await bus.commands()) == 1


async def test_a_publisher_cannot_choose_where_its_letter_goes(
    bus: Bus, start_service: StartService, redis_url: str
) -> None:
    running = await start_service()
    fields: dict[Any, Any] = dict(seal(state_packet("run-1", 1), None).fields())
    await bus.redis.xadd("oona.normal", fields | {"dead.stream": "oona.policy"})
    await ended(bus, running, 1)
    letters = await asyncio.to_thread(listed, settings_for(redis_url), Selection(), as_json=True)
    assert isinstance(letters, str)
    (letter,) = json.loads(letters)
    assert letter["original"]["stream"] == "oona.normal"
