"""Structured logs that never block: lines go through a bounded queue to a writer thread."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from types import TracebackType
from typing import Final, TextIO

import structlog

_CAPACITY_LINES: Final = 10_000
_CLOSE_TIMEOUT_S: Final = 2.0
_HIDDEN: Final = "********"


class LogLevel(StrEnum):
    """The least severe level that is written."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"
    CRITICAL = "CRITICAL"


class LogFormat(StrEnum):
    """How a line looks; `auto` is console on a terminal and JSON elsewhere."""

    AUTO = "auto"
    JSON = "json"
    CONSOLE = "console"


class LogWriter:
    """Writes lines to a stream on its own thread; a full queue drops and counts.

    Every occurrence of one of `secrets` is masked just before it is written. Closing waits
    at most `close_timeout_s` for what is queued; what a blocked stream then still holds up is
    counted as dropped.
    """

    def __init__(
        self,
        stream: TextIO,
        secrets: Sequence[str] = (),
        capacity_lines: int = _CAPACITY_LINES,
        close_timeout_s: float = _CLOSE_TIMEOUT_S,
    ) -> None:
        self._stream = stream
        self._masked = _spellings(secrets)
        self._capacity_lines = capacity_lines
        self._close_timeout_s = close_timeout_s
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._dropped = 0
        self._writing_lines = 0
        self._thread = threading.Thread(target=self._run, name="tamiyo-logs", daemon=True)

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads the stream as it is written."""
        return self._stream.isatty()

    @property
    def dropped(self) -> int:
        """Lines lost so far, to a full queue or to a stream that failed."""
        return self._dropped

    def write(self, line: str) -> None:
        """Queue one line, without its newline; never waits for the stream."""
        with self._changed:
            if self._closing or len(self._lines) >= self._capacity_lines:
                self._dropped += 1
            else:
                self._lines.append(line)
                self._changed.notify()

    def open(self) -> None:
        """Start the writer thread."""
        self._thread.start()

    def close(self) -> None:
        """Write what is queued and stop, within the time limit."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(self._close_timeout_s)
        with self._changed:
            self._dropped += len(self._lines) + self._writing_lines
            self._lines.clear()
            self._writing_lines = 0

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._closing:
                    self._changed.wait()
                if not self._lines:
                    return
                text = "\n".join(self._lines) + "\n"
                self._writing_lines = len(self._lines)
                self._lines.clear()
            for secret in self._masked:
                text = text.replace(secret, _HIDDEN)
            try:
                _write_all(self._stream, text)
            except (OSError, ValueError):  # a closed pipe or a closed file
                with self._changed:
                    self._dropped += self._writing_lines
            with self._changed:
                self._writing_lines = 0


class _QueueLogger:
    """The end of structlog's chain; structlog calls the method named like the level."""

    def __init__(self, writer: LogWriter) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = writer.write


class _QueueHandler(logging.Handler):
    """Sends the standard library's records through the same writer."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(self.format(record))
        except Exception:
            # A library's broken log call must not break what it was doing.
            self.handleError(record)


class LoggingSession:
    """Logging as configured, for the length of a `with` block; yields the writer."""

    def __init__(self, level: LogLevel, log_format: LogFormat, writer: LogWriter) -> None:
        self._level = logging.getLevelNamesMapping()[level]
        self._format = log_format
        self._writer = writer
        self._root_level = logging.WARNING
        self._handler = _QueueHandler(writer)

    def __enter__(self) -> LogWriter:
        renderer = _renderer(self._format, colors=self._writer.is_terminal)
        annotate: list[structlog.typing.Processor] = [
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ]
        structlog.configure(
            processors=[*annotate, *renderer],
            wrapper_class=structlog.make_filtering_bound_logger(self._level),
            logger_factory=lambda *_: _QueueLogger(self._writer),
            cache_logger_on_first_use=False,
        )
        self._handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=[structlog.stdlib.add_logger_name, *annotate],
                processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
            )
        )
        root = logging.getLogger()
        self._root_level = root.level
        root.setLevel(self._level)
        root.addHandler(self._handler)
        self._writer.open()
        return self._writer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        root = logging.getLogger()
        root.removeHandler(self._handler)
        root.setLevel(self._root_level)
        structlog.reset_defaults()
        self._writer.close()


def configure_logging(
    level: LogLevel = LogLevel.INFO,
    log_format: LogFormat = LogFormat.AUTO,
    stream: TextIO | None = None,
    secrets: Sequence[str] = (),
) -> LoggingSession:
    """Route structlog and the standard library's logging to `stream` (default: stderr).

    Use the result as a context manager; leaving it flushes within a bound and undoes everything.
    """
    target = sys.stderr if stream is None else stream
    if log_format is LogFormat.AUTO:
        log_format = LogFormat.CONSOLE if target.isatty() else LogFormat.JSON
    return LoggingSession(level, log_format, LogWriter(target, secrets))


def _renderer(log_format: LogFormat, *, colors: bool) -> list[structlog.typing.Processor]:
    if log_format is LogFormat.CONSOLE:
        # The default traceback prints local variables, which may hold a secret in pieces.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]


def _spellings(secrets: Sequence[str]) -> tuple[str, ...]:
    """Each secret as it is, as `repr` and as JSON write it, longest first."""
    plain = {text for secret in secrets if secret for text in (secret, repr(secret)[1:-1])}
    found = plain | {json.dumps(text)[1:-1] for text in plain}
    return tuple(sorted(found, key=len, reverse=True))


def _write_all(stream: TextIO, text: str) -> None:
    """Write past the stream's buffer, whose lock would hang interpreter exit on a stuck pipe."""
    try:
        descriptor = stream.fileno()
    except (io.UnsupportedOperation, AttributeError):
        stream.write(text)
        stream.flush()
        return
    data = text.encode("utf-8", "backslashreplace")
    while data:
        data = data[os.write(descriptor, data) :]
