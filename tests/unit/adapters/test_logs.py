"""Log lines: their shape, their secrets, and what a stuck or broken stream costs."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from tamiyo_svc.adapters.logs import LogFormat, LogLevel, LogWriter, configure_logging


class TerminalStream(io.StringIO):
    """A stream that says a person is reading."""

    def isatty(self) -> bool:
        return True


class StuckStream(io.StringIO):
    """A stream whose first write waits until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.released = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        self.released.wait()
        return super().write(text)


class BrokenStream(io.StringIO):
    """A stream whose reader went away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.fixture
def stuck() -> Iterator[StuckStream]:
    stream = StuckStream()
    yield stream
    stream.released.set()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_holds_event_level_time_and_fields() -> None:
    stream = io.StringIO()
    with configure_logging(stream=stream):
        structlog.get_logger().info("policy.applied", policy_version="v7", latency_ms=1.5)
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "policy.applied",
        "level": "info",
        "policy_version": "v7",
        "latency_ms": 1.5,
    }


def test_a_logger_made_before_configuration_follows_it() -> None:
    logger = structlog.get_logger()
    for _ in range(2):
        stream = io.StringIO()
        with configure_logging(stream=stream):
            logger.warning("bus.lost")
        assert [line["event"] for line in lines(stream)] == ["bus.lost"]


def test_fields_bound_to_the_context_are_on_every_line() -> None:
    stream = io.StringIO()
    with configure_logging(stream=stream), structlog.contextvars.bound_contextvars(run_id="r1"):
        structlog.get_logger().info("run.resumed")
    assert lines(stream)[0]["run_id"] == "r1"


def test_lines_below_the_level_are_left_out() -> None:
    stream = io.StringIO()
    with configure_logging(LogLevel.WARNING, stream=stream):
        structlog.get_logger().info("quiet")
        structlog.get_logger().warning("loud")
        logging.getLogger("library").info("quiet")
        logging.getLogger("library").error("loud too")
    assert [line["event"] for line in lines(stream)] == ["loud", "loud too"]


def test_records_of_libraries_come_out_in_the_same_shape() -> None:
    stream = io.StringIO()
    with configure_logging(stream=stream):
        logging.getLogger("redis.asyncio").warning("lost %s", "connection")
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["level"]) == (
        "lost connection",
        "redis.asyncio",
        "warning",
    )


def test_a_broken_library_log_call_does_not_reach_its_caller(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own handler raises
    stream = io.StringIO()
    with configure_logging(stream=stream):
        logging.getLogger("library").warning("%d", "not a number")
    assert stream.getvalue() == ""
    assert "not a number" in capsys.readouterr().err


def test_exceptions_are_one_json_line_with_a_traceback() -> None:
    stream = io.StringIO()
    with configure_logging(stream=stream):
        try:
            raise LookupError("no such run")
        except LookupError:
            structlog.get_logger().exception("run.failed")
            logging.getLogger("library").exception("library failed")
    assert [line["event"] for line in lines(stream)] == ["run.failed", "library failed"]
    assert all("LookupError: no such run" in line["exception"] for line in lines(stream))


@pytest.mark.parametrize(
    ("log_format", "stream", "is_json"),
    [
        (LogFormat.AUTO, io.StringIO, True),
        (LogFormat.AUTO, TerminalStream, False),
        (LogFormat.JSON, TerminalStream, True),
        (LogFormat.CONSOLE, io.StringIO, False),
    ],
)
def test_auto_is_console_only_on_a_terminal(
    log_format: LogFormat, stream: type[io.StringIO], is_json: bool
) -> None:
    target = stream()
    with configure_logging(log_format=log_format, stream=target):
        structlog.get_logger().info("service.started")
    assert "service.started" in target.getvalue()
    assert target.getvalue().startswith("{") is is_json


@pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.CONSOLE])
@pytest.mark.parametrize("secret", ["hunter2-hunter2-hunter2", 'quo"te\\and\nünïcode-secret'])
def test_secrets_never_appear(log_format: LogFormat, secret: str) -> None:
    stream = io.StringIO()
    with configure_logging(log_format=log_format, stream=stream, secrets=[secret, ""]):
        structlog.get_logger().info("leak", plain=secret, nested={"key": [secret]})
        logging.getLogger("library").warning("using %r", secret)
        try:
            raise ValueError(secret)
        except ValueError:
            structlog.get_logger().exception("failed")
    text = stream.getvalue()
    assert secret not in text
    assert json.dumps(secret)[1:-1] not in text
    assert text.count("********") >= 4


def test_a_full_queue_drops_and_counts_without_waiting(stuck: StuckStream) -> None:
    writer = LogWriter(stuck, capacity_lines=3)
    writer.open()
    writer.write("held by the stream")
    assert stuck.entered.wait(10)
    for number in range(5):
        writer.write(f"line {number}")
    assert writer.dropped == 2
    stuck.released.set()
    writer.close()
    assert stuck.getvalue().splitlines() == ["held by the stream", "line 0", "line 1", "line 2"]
    assert writer.dropped == 2


def test_closing_on_a_stuck_stream_gives_up_and_counts_what_it_held(stuck: StuckStream) -> None:
    writer = LogWriter(stuck, close_timeout_s=0.01)
    writer.open()
    writer.write("held by the stream")
    assert stuck.entered.wait(10)
    writer.write("queued")
    writer.close()
    assert writer.dropped == 2


def test_a_line_after_closing_is_counted_as_dropped() -> None:
    writer = LogWriter(io.StringIO())
    writer.open()
    writer.close()
    writer.write("too late")
    assert writer.dropped == 1


def test_a_broken_stream_is_counted_and_does_not_stop_the_writer() -> None:
    with configure_logging(stream=BrokenStream()) as writer:
        structlog.get_logger().info("one")
        structlog.get_logger().info("two")
    assert writer.dropped == 2


def test_a_real_descriptor_gets_every_line_in_order() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as source, os.fdopen(writing, "w") as stream:
        with configure_logging(stream=stream):
            for number in range(200):
                structlog.get_logger().info("tick", number=number)
        stream.close()
        assert [json.loads(line)["number"] for line in source] == list(range(200))


def test_leaving_restores_the_standard_library_root_logger() -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    with configure_logging(LogLevel.DEBUG, stream=io.StringIO()):
        assert root.level == logging.DEBUG
    assert (root.level, list(root.handlers)) == before
