"""Fixtures shared by the suites."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import structlog
from redis import Redis

from tamiyo_svc.adapters.embedded import EmbeddedRedis


@pytest.fixture(autouse=True)
def plain_logs() -> None:
    """Log lines on the real stderr, without rich tracebacks.

    Those hold up the event loop for half a second, and lines on stdout would mix with what a
    command under test prints.
    """
    structlog.configure(
        processors=[
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.__stderr__),
    )


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """A real Redis server for the whole session."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """URL of a real Redis server with an empty database."""
    with Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url
