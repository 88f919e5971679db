"""Stream entries in a file: one JSON object a line, the same for spooling, capture and replay.

Each line has four strings: `stream`, the stream's name; `id`, the entry's id as Redis writes it,
`<milliseconds>-<number>`; `payload`, base64 of the envelope bytes; `signature`, the signature
field with each byte as the Latin-1 character of that value, so that a damaged one survives too.
Lines end with a newline; whoever writes appends whole lines, so only the last can be torn.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Self

from tamiyo_svc.errors import TamiyoError
from tamiyo_svc.leyline.envelope import PAYLOAD_FIELD, SIGNATURE_FIELD

_KEYS: Final = ("stream", "id", "payload", "signature")


class CaptureError(TamiyoError):
    """A capture file holds something that is not an entry; the message names the line."""

    label = "capture"


@dataclass(frozen=True, slots=True)
class CapturedEntry:
    """One entry of a stream."""

    stream: str
    entry_id: str
    payload: bytes
    signature: bytes

    @classmethod
    def of(cls, stream: str, entry_id: str, fields: Mapping[bytes, bytes]) -> Self:
        """From the fields Redis returned; a field that is missing is empty."""
        return cls(
            stream, entry_id, fields.get(PAYLOAD_FIELD, b""), fields.get(SIGNATURE_FIELD, b"")
        )

    def fields(self) -> dict[bytes, bytes]:
        """The two fields as Redis stores them."""
        return {PAYLOAD_FIELD: self.payload, SIGNATURE_FIELD: self.signature}

    def line(self) -> str:
        """The entry as one line, newline included."""
        values = (
            self.stream,
            self.entry_id,
            base64.b64encode(self.payload).decode("ascii"),
            self.signature.decode("latin-1"),
        )
        return json.dumps(dict(zip(_KEYS, values, strict=True)), separators=(",", ":")) + "\n"


def parse_line(line: str) -> CapturedEntry:
    """Read one line.

    Raises:
        CaptureError: it is not an entry.
    """
    try:
        document = json.loads(line)
        stream, entry_id, payload, signature = (document[key] for key in _KEYS)
        if not all(isinstance(value, str) for value in (stream, entry_id, payload, signature)):
            raise CaptureError("a value is not a string")
        return CapturedEntry(
            stream,
            entry_id,
            base64.b64decode(payload, validate=True),
            signature.encode("latin-1"),
        )
    except (KeyError, TypeError, ValueError, RecursionError, binascii.Error) as error:
        raise CaptureError(f"not a captured entry: {error}") from None


def write_capture(file: IO[str], entries: Iterable[CapturedEntry]) -> None:
    """Append entries to a text file opened as UTF-8, and flush it."""
    file.write("".join(entry.line() for entry in entries))
    file.flush()


def read_capture(path: Path) -> Iterator[CapturedEntry]:
    """Entries in the order written; an unfinished last line, as a crash leaves it, is left out.

    Raises:
        CaptureError: a line is not an entry.
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield parse_line(line)
            except CaptureError as error:
                raise CaptureError(f"{path.name}, line {number}: {error}") from None
