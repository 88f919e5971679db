"""What every replica has to know, kept in Redis: safety sheets, the emergency, catalogue changes.

One member of the consumer group reads a message; it posts here what concerns all of them, and
each replica reads this regularly. Posting twice changes nothing, so a message that is delivered
again does no harm.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Final, cast

from google.protobuf.message import DecodeError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tamiyo_svc.adapters.oona.connection import OUTAGE_ERRORS
from tamiyo_svc.errors import BusError
from tamiyo_svc.leyline import leyline_pb2 as leyline

KEY: Final = "tamiyo:bulletin"

_EDITION: Final = b"edition"
_EMERGENCY: Final = b"emergency"
_CATALOG: Final = b"catalog"
_SHEET: Final = b"sheet:"
_TIME_DIGITS: Final = 20
# A value starts with its time in digits of fixed width, which compare as text.
_POST: Final = """
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known and string.sub(known, 1, string.len(ARGV[2])) > ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ARGV[3], 'edition', ARGV[4])
return 1
"""


@dataclass(frozen=True, slots=True)
class Edition:
    """Everything that is posted; `emergency_ms` is when the emergency came, `catalog` a token."""

    sheets: tuple[leyline.BSDS, ...] = ()
    emergency: leyline.EmergencySignal | None = None
    emergency_ms: int = 0
    catalog: bytes = b""


class Bulletin:
    """Posts to and reads from one hash; of two posts on one matter the newer stays.

    Times are nanoseconds for sheets and milliseconds for the rest, of one clock each.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._script = redis.register_script(_POST)
        self._read: bytes | None = None

    async def post_sheet(self, sheet: leyline.BSDS) -> None:
        """Post a safety sheet; `issued_at` must be set.

        Raises:
            BusError: Redis did not answer or refused; posting again is harmless.
        """
        field = _SHEET + sheet.blueprint_id.encode()
        issued_ns = sheet.issued_at.ToNanoseconds()
        await self._post(field, issued_ns, sheet.SerializeToString(deterministic=True))

    async def post_emergency(self, signal: leyline.EmergencySignal, added_ms: int) -> None:
        """Post an emergency signal for every run.

        Raises:
            BusError: as for `post_sheet`.
        """
        await self._post(_EMERGENCY, added_ms, signal.SerializeToString(deterministic=True))

    async def post_catalog_change(self, added_ms: int) -> None:
        """Post that the catalogue changed.

        Raises:
            BusError: as for `post_sheet`.
        """
        await self._post(_CATALOG, added_ms, b"")

    async def read(self) -> Edition | None:
        """What is posted; None when that is what was read the last time.

        Raises:
            BusError: Redis did not answer or refused.
        """
        edition = await self._call(self._redis.hget(KEY, _EDITION.decode()))
        if edition == self._read:
            return None
        fields: dict[bytes, bytes] = await self._call(self._redis.hgetall(KEY))
        self._read = fields.get(_EDITION)
        return _edition(fields)

    async def _post(self, field: bytes, time: int, value: bytes) -> None:
        stamp = f"{max(0, time):0{_TIME_DIGITS}d}"
        arguments: list[bytes | str] = [field, stamp, value, uuid.uuid4().hex]
        await self._call(cast("Awaitable[Any]", self._script(keys=[KEY], args=arguments)))

    @staticmethod
    async def _call(command: Any) -> Any:
        try:
            return await command
        except (*OUTAGE_ERRORS, RedisError) as error:
            raise BusError(f"bulletin: {error!r}") from error


def _edition(fields: dict[bytes, bytes]) -> Edition:
    sheets = []
    for field, value in sorted(fields.items()):
        if field.startswith(_SHEET):
            try:
                sheets.append(leyline.BSDS.FromString(value[_TIME_DIGITS:]))
            except DecodeError:
                continue
    emergency, emergency_ms = None, 0
    if posted := fields.get(_EMERGENCY):
        try:
            emergency = leyline.EmergencySignal.FromString(posted[_TIME_DIGITS:])
            emergency_ms = int(posted[:_TIME_DIGITS])
        except (DecodeError, ValueError):
            emergency = None
    return Edition(tuple(sheets), emergency, emergency_ms, fields.get(_CATALOG, b""))
