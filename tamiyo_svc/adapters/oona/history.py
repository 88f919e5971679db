"""What is still on the streams, read back without a consumer group: nothing is acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

from google.protobuf.message import Message
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.errors import BusError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import EnvelopeRejectedError, open_envelope, parse_payload
from tamiyo_svc.leyline.signing import Keyring

_TIMEOUT_S: Final = 5.0
_PAGE: Final = 200


@dataclass(frozen=True, slots=True)
class Past:
    """One verified entry; its message is parsed when asked for."""

    entry: Entry
    envelope: leyline.BusEnvelope

    @property
    def message(self) -> Message:
        """The message.

        Raises:
            EnvelopeRejectedError: the payload is not that message.
        """
        return parse_payload(self.envelope)

    def attribute(self, name: str) -> str:
        """An envelope attribute, empty when it is not there."""
        return self.envelope.attributes.get(name, "")


class History:
    """Reads streams page by page; entries that do not verify are left out and counted."""

    def __init__(self, redis: Redis, keyring: Keyring | None, max_bytes: int) -> None:
        self._redis = redis
        self._keyring = keyring
        self._max_bytes = max_bytes
        self.refused = 0

    def forward(self, stream: str, kind: int, since_ms: int = 0) -> Iterator[Past]:
        """Entries of one message type added since a server time, the oldest first.

        Raises:
            BusError: Redis did not answer.
        """
        start = str(max(0, since_ms))
        while page := self._page(self._redis.xrange, stream, start, "+"):
            yield from self._opened(stream, page, kind)
            start = f"({page[-1][0].decode()}"

    def backward(self, stream: str, kind: int, until_ms: int | None = None) -> Iterator[Past]:
        """Entries of one message type added until a server time, the newest first.

        Raises:
            BusError: Redis did not answer.
        """
        end = "+" if until_ms is None else str(until_ms)
        while page := self._page(self._redis.xrevrange, stream, end, "-"):
            yield from self._opened(stream, page, kind)
            end = f"({page[-1][0].decode()}"

    @staticmethod
    def _page(
        read: Callable[..., Any], stream: str, first: str, last: str
    ) -> list[tuple[bytes, Any]]:
        try:
            return cast("list[tuple[bytes, Any]]", read(stream, first, last, count=_PAGE))
        except (OSError, RedisError) as error:
            raise BusError(f"{stream} cannot be read: {error}") from error

    def _opened(self, stream: str, page: list[tuple[bytes, Any]], kind: int) -> Iterator[Past]:
        for entry_id, fields in page:
            entry = Entry(stream, entry_id.decode(), fields or {})
            try:
                envelope = open_envelope(entry.fields, self._keyring, self._max_bytes)
            except EnvelopeRejectedError:
                self.refused += 1
                continue
            if envelope.message_type == kind:
                yield Past(entry, envelope)


@contextmanager
def open_history(url: str, keyring: Keyring | None, max_bytes: int) -> Iterator[History]:
    """A history on a connection of its own that is closed at the end of the block."""
    with Redis.from_url(
        url,
        protocol=2,
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    ) as redis:
        yield History(redis, keyring, max_bytes)
