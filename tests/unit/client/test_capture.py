"""The capture format: what goes in comes out, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.client.capture import (
    CapturedEntry,
    CaptureError,
    parse_line,
    read_capture,
    write_capture,
)

entries = st.builds(
    CapturedEntry,
    stream=st.text(min_size=1),
    entry_id=st.text(),
    payload=st.binary(),
    signature=st.binary(),
)
ENTRY = CapturedEntry("oona.normal", "1-0", b"\x00\xff", b"c2ln")


@given(entries)
def test_every_entry_survives_its_line(entry: CapturedEntry) -> None:
    line = entry.line()
    assert line.endswith("\n")
    assert "\n" not in line[:-1]
    assert parse_line(line) == entry


def test_the_line_is_as_documented() -> None:
    assert json.loads(ENTRY.line()) == {
        "stream": "oona.normal",
        "id": "1-0",
        "payload": "AP8=",
        "signature": "c2ln",
    }
    assert CapturedEntry.of("s", "1-0", {b"other": b"1"}) == CapturedEntry("s", "1-0", b"", b"")
    assert ENTRY.fields() == {b"payload": b"\x00\xff", b"signature": b"c2ln"}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{}",
        '{"stream":"s","id":"1-0","payload":"***","signature":""}',
        '{"stream":"s","id":1,"payload":"","signature":""}',
        '{"stream":"s","id":"1-0","payload":"","signature":"\\u4e00"}',
        "[" * 100_000,
    ],
)
def test_anything_else_is_refused(line: str) -> None:
    with pytest.raises(CaptureError):
        parse_line(line)


@given(st.text())
def test_no_text_raises_anything_but_a_capture_error(line: str) -> None:
    try:
        parse_line(line)
    except CaptureError:
        return


def test_a_torn_last_line_is_left_out_and_a_bad_one_in_between_named(tmp_path: Path) -> None:
    path = tmp_path / "capture.jsonl"
    with path.open("w", encoding="utf-8") as file:
        write_capture(file, [ENTRY, ENTRY])
        file.write(ENTRY.line()[:20])
    assert list(read_capture(path)) == [ENTRY, ENTRY]
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
    with pytest.raises(CaptureError, match=r"capture\.jsonl, line 1"):
        list(read_capture(path))
