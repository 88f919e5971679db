"""A window of a real service's bus recorded, and decided again without any."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.bus import CATALOG, SECRET, Bus, state_packet
from support.running import Running, StartService

from tamiyo_svc.cli.capture import capture
from tamiyo_svc.cli.decision_diff import Agreement, Comparison, comparison_text
from tamiyo_svc.cli.replay import comparison_output, replay_file, write_page
from tamiyo_svc.client.capture import CapturedEntry, read_capture, write_capture
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.settings import Settings

pytestmark = pytest.mark.redis

NOWHERE = "redis://127.0.0.1:1/0"
KEYRING = Keyring(SECRET.encode())


def online(url: str) -> Settings:
    return Settings(redis_url=url, secret=SECRET)  # type: ignore[arg-type]


def offline(state_dir: Path, **overrides: object) -> Settings:
    """Settings as the service under test has them, and a Redis that is not there."""
    values = {
        "redis_url": NOWHERE,
        "secret": SECRET,
        "policy": "bootstrap",
        "urza_database_url": f"sqlite:///{CATALOG}",
        "state_dir": state_dir,
        **overrides,
    }
    return Settings(**values)  # type: ignore[arg-type]


async def serve_steps(
    bus: Bus, running: Running, run_id: str, losses: list[float], **attributes: str
) -> None:
    """One packet after the other, each answered before the next."""
    answered = sum(running.outcomes().values())
    for step, loss in enumerate(losses):
        await bus.publish(state_packet(run_id, step, loss=loss), **attributes)
        answered += 1

        async def done(wanted: float = answered) -> bool:
            return sum(running.outcomes().values()) >= wanted

        await bus.until(done)


LOSSES = [0.5, 0.49, 0.48, 0.9, 0.5, 0.49, 0.45, 0.44]


async def recorded(bus: Bus, start: StartService, redis_url: str, file: Path) -> None:
    """A recording of two runs with a spike each; one has a reply stream."""
    running = await start()
    await serve_steps(bus, running, "run-1", LOSSES)
    await serve_steps(bus, running, "run-2", LOSSES, reply_to="oona.commands.run-2")
    await asyncio.to_thread(capture, online(redis_url), file, duration=None, since="1h")


async def test_replay_of_a_whole_run_is_the_recording_byte_for_byte(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "window.jsonl"
    await recorded(bus, start_service, redis_url, file)
    comparison = await asyncio.to_thread(replay_file, offline(tmp_path), file)
    assert comparison.count(Agreement.IDENTICAL) == comparison.compared == 2 * len(LOSSES)
    assert comparison.agrees
    assert comparison.others == {}
    assert comparison.unmatched == 0
    reasons = [row.replayed_reason for row in comparison.rows if row.run_id == "run-2"]
    assert reasons[:5] == ["policy", "policy", "policy", "loss_spike", "conservative_mode"]
    again = await asyncio.to_thread(replay_file, offline(tmp_path), file)
    assert again == comparison
    assert comparison.digest in comparison_output(again, as_json=False)


async def test_another_policy_shows_what_it_would_have_done(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    file, page = tmp_path / "window.jsonl", tmp_path / "diff.html"
    await recorded(bus, start_service, redis_url, file)
    settings = offline(tmp_path, risk_max_loss_spike=10.0, risk_loss_warning=9.0)
    calmer = await asyncio.to_thread(replay_file, settings, file)
    assert not calmer.agrees
    changed = {
        (row.recorded_reason, row.replayed_reason)
        for row in calmer.rows
        if row.agreement is Agreement.DIFFERENT
    }
    assert changed == {("loss_spike", "policy"), ("conservative_mode", "policy")}
    other = await asyncio.to_thread(replay_file, offline(tmp_path, policy="untrained"), file)
    assert other.policy == "untrained-1"
    assert other.recorded_policies == {"bootstrap-1": 2 * len(LOSSES)}
    assert other.count(Agreement.IDENTICAL) == 0
    assert "annotations.policy_version" in other.rows[0].changes
    write_page(calmer, file, page)
    assert_self_contained(page.read_text(encoding="utf-8"))
    document = json.loads(comparison_output(calmer, as_json=True))
    assert document["agreement"]["different"] == calmer.count(Agreement.DIFFERENT)
    assert len(document["decisions"]) == 2 * len(LOSSES)


@contextmanager
def recording_process(url: str, file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`tamiyo capture` as an operator starts it, until it is interrupted."""
    command = ("-m", "tamiyo_svc.cli.main", "capture", str(file), "--for", "10m")
    environment = {**os.environ, "REDIS_URL": url, "ESPER_LEYLINE_SECRET": SECRET}
    # A shell starts what runs in the background with interrupts ignored, and that is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=subprocess.PIPE, cwd=file.parent
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            process.kill()


async def test_recording_that_begins_mid_run_brings_the_state_of_the_run(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    running = await start_service()
    await serve_steps(bus, running, "run-1", LOSSES[:4])
    before: Any = await bus.redis.client_list()
    known = {each["id"] for each in before}
    file = tmp_path / "window.jsonl"
    with recording_process(redis_url, file) as process:

        async def began() -> bool:
            clients: Any = await bus.redis.client_list()
            return any(each["cmd"] == "xread" and each["id"] not in known for each in clients)

        await bus.until(began)
        await serve_steps(bus, running, "run-1", LOSSES[4:])
        await serve_steps(bus, running, "run-new", LOSSES)

        async def written() -> bool:
            commands = [line for line in read_capture(file) if b"run-new-step-7" in line.payload]
            return len(commands) >= 3

        await bus.until(written)
        process.send_signal(signal.SIGINT)
        told, _ = await asyncio.to_thread(process.communicate, None, 20)
        assert process.returncode == 0
    assert b"oona.normal" in told
    lines = list(read_capture(file))
    assert [line.stream for line in lines if line.stream.startswith("tamiyo:")] == [
        "tamiyo:run:run-1"
    ]
    comparison = await asyncio.to_thread(replay_file, offline(tmp_path), file)
    assert comparison.count(Agreement.IDENTICAL) == comparison.compared == 12
    # Conservative since the spike before the recording, which nothing in the packets tells.
    assert comparison.rows[0].replayed_reason == "conservative_mode"
    without = tmp_path / "without.jsonl"
    with without.open("w", encoding="utf-8") as stripped:
        write_capture(stripped, [line for line in lines if not line.stream.startswith("tamiyo:")])
    assert not (await asyncio.to_thread(replay_file, offline(tmp_path), without)).agrees


async def test_packets_the_recorded_state_knows_already_are_not_decided_twice(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    """As when a packet is decided between the start of a recording and its look at the states."""
    running = await start_service()
    await serve_steps(bus, running, "run-1", LOSSES[:5])
    state: Any = await bus.redis.hget("tamiyo:run:run-1", "state")
    await serve_steps(bus, running, "run-1", LOSSES[5:])
    file = tmp_path / "window.jsonl"
    await asyncio.to_thread(capture, online(redis_url), file, duration=None, since="1h")
    with file.open("a", encoding="utf-8") as opened:
        write_capture(opened, [CapturedEntry("tamiyo:run:run-1", "1-0", state, b"")])
    comparison = await asyncio.to_thread(replay_file, offline(tmp_path), file)
    assert comparison.others == {"before the recording": 5}
    assert comparison.count(Agreement.IDENTICAL) == len(comparison.rows) == 3


async def test_superseded_and_repeated_packets_end_as_they_did(
    bus: Bus, start_service: StartService, redis_url: str, tmp_path: Path
) -> None:
    packets = [state_packet("run-1", step, loss=0.5 - step / 100) for step in range(6)]
    for packet in packets:
        await bus.publish(packet)
    running = await start_service()

    async def first_done() -> bool:
        return sum(running.outcomes().values()) == 6

    await bus.until(first_done)
    await bus.publish(packets[-1])

    async def all_done() -> bool:
        return running.outcomes().get("duplicate") == 1

    await bus.until(all_done)
    outcomes = running.outcomes()
    await serve_steps(bus, running, "run-1", [0.45])
    file = tmp_path / "window.jsonl"
    await asyncio.to_thread(capture, online(redis_url), file, duration=None, since="1h")
    comparison = await asyncio.to_thread(replay_file, offline(tmp_path), file)
    assert comparison.count(Agreement.IDENTICAL) == outcomes["decided"] + 1
    assert comparison.others["superseded"] == outcomes["superseded"]
    assert comparison.others["duplicate"] == 1


def captured(file: Path, packets: Iterator[Any] | list[Any], keyring: Keyring = KEYRING) -> None:
    with file.open("w", encoding="utf-8") as opened:
        write_capture(
            opened,
            [
                CapturedEntry.of("oona.normal", f"{1_700_000_000_000 + n}-0", fields)
                for n, fields in enumerate(seal(p, keyring).fields() for p in packets)
            ],
        )


def test_packets_alone_are_all_decided_and_compared_with_nothing(tmp_path: Path) -> None:
    file = tmp_path / "packets.jsonl"
    captured(file, [state_packet("run-1", step) for step in range(3)])
    comparison = replay_file(offline(tmp_path), file)
    assert (len(comparison.rows), comparison.compared) == (3, 0)
    assert comparison.agrees
    assert "holds no commands to compare with" in comparison_text(comparison, 5)


def test_what_the_service_would_refuse_is_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "packets.jsonl"
    good, unnamed = state_packet("run-1", 1), state_packet("", 1)
    captured(file, [good, unnamed])
    with file.open("a", encoding="utf-8") as opened:
        forged = seal(state_packet("run-1", 2), Keyring(b"another secret for tests")).fields()
        garbage = {b"payload": b"\xff", b"signature": KEYRING.sign(b"\xff").encode()}
        write_capture(
            opened,
            [
                CapturedEntry.of("oona.normal", "1700000000010-0", forged),
                CapturedEntry.of("oona.normal", "1700000000011-0", garbage),
            ],
        )
    comparison = replay_file(offline(tmp_path), file)
    assert [row.packet_id for row in comparison.rows] == [good.packet_id]
    assert comparison.refused == {"invalid_signature": 1, "malformed_envelope": 1}
    assert comparison.others == {"dead_lettered": 1}


def test_safety_sheets_of_the_recording_count_from_where_they_came(tmp_path: Path) -> None:
    file = tmp_path / "packets.jsonl"
    packets = [state_packet("run-1", step) for step in range(2)]
    captured(file, packets)
    before = replay_file(offline(tmp_path), file).rows
    assert [row.replayed_reason for row in before] == ["policy", "policy"]
    chosen = before[0].replayed.rpartition(" ")[2]
    sheet = leyline.BSDSIssued()
    sheet.bsds.blueprint_id = chosen
    sheet.bsds.hazard_band = leyline.HAZARD_BAND_CRITICAL
    sheet.bsds.issued_at.GetCurrentTime()
    captured(file, [packets[0], sheet, packets[1]])
    after = replay_file(offline(tmp_path), file).rows
    assert after[0].replayed == before[0].replayed
    assert after[1].replayed != before[1].replayed


def test_alarm_of_the_recording_turns_its_run_conservative(tmp_path: Path) -> None:
    alarm = leyline.EmergencySignal(
        run_id="run-2", level=leyline.EMERGENCY_LEVEL_HALT, reason="operator"
    )
    file = tmp_path / "packets.jsonl"
    captured(file, [alarm, *(state_packet(f"run-{number}", 1) for number in (1, 2, 3))])
    reasons = [row.replayed_reason for row in replay_file(offline(tmp_path), file).rows]
    assert reasons == ["policy", "conservative_mode", "policy"]


def test_alarm_for_all_runs_is_heard_by_each(tmp_path: Path) -> None:
    alarm = leyline.EmergencySignal(level=leyline.EMERGENCY_LEVEL_HALT, reason="operator")
    file = tmp_path / "packets.jsonl"
    captured(file, [alarm, *(state_packet(f"run-{number}", 1) for number in (1, 2))])
    reasons = [row.replayed_reason for row in replay_file(offline(tmp_path), file).rows]
    assert reasons == ["emergency_signal", "emergency_signal"]


@pytest.mark.parametrize(
    "content",
    [
        "not json\n",
        '{"stream":"s","id":"1-1","payload":"!","signature":""}\n',
        '{"stream":"s","id":"one","payload":"","signature":""}\n',
        '{"stream":"tamiyo:run:r","id":"1-1","payload":"AAAA","signature":""}\n',
    ],
)
def test_file_that_is_no_capture_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        replay_file(offline(tmp_path), file)
    assert "\n" not in str(caught.value)


def test_capture_never_writes_over_a_file_and_needs_a_window(
    redis_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "window.jsonl"
    file.write_text("precious")
    with pytest.raises(ConfigurationError, match="File exists"):
        capture(online(redis_url), file, duration="1s", since=None)
    assert file.read_text() == "precious"
    with pytest.raises(ConfigurationError, match="--for"):
        capture(online(redis_url), tmp_path / "new.jsonl", duration=None, since=None)
    assert not (tmp_path / "new.jsonl").exists()


def test_capture_keeps_every_byte_and_leaves_out_what_has_no_payload(
    redis_url: str, tmp_path: Path
) -> None:
    fields: dict[Any, Any] = {b"payload": bytes(range(256)), b"signature": b"\xff not base64"}
    with Redis.from_url(redis_url) as redis:
        entry_id: Any = redis.xadd("oona.normal", fields)
        redis.xadd("oona.normal", {"bootstrap": "1"})
    file = tmp_path / "window.jsonl"
    assert capture(online(redis_url), file, duration=None, since="1h").endswith(
        "entries recorded: 1 (oona.normal 1)"
    )
    (line,) = read_capture(file)
    assert (line.stream, line.entry_id, line.fields()) == (
        "oona.normal",
        entry_id.decode(),
        fields,
    )


def assert_self_contained(page: str) -> None:
    """Well nested, and nothing in it is fetched from anywhere."""
    stack: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not {"src", "href"} & {name for name, _ in attrs}
            if tag not in ("meta", "br"):
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

    Reader().feed(page)
    assert stack == []
    assert "url(" not in page
    assert "@import" not in page


def test_page_escapes_what_trainers_wrote(tmp_path: Path) -> None:
    file, page = tmp_path / "packets.jsonl", tmp_path / "<page>.html"
    captured(file, [state_packet("<script>alert(1)</script>", 1)])
    comparison: Comparison = replay_file(offline(tmp_path), file)
    write_page(comparison, tmp_path / "<b>.jsonl", page)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>.jsonl" not in text
    assert_self_contained(text)
