"""Entries as an operator reads them, whatever is in them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.cli.bus_message import Verification, decision_text, decode, plain, shown_time
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import MESSAGE_CLASSES, seal
from tamiyo_svc.leyline.signing import Keyring

KEYRING = Keyring(b"a secret for the tests")
MAX_BYTES = 1 << 20


def entry_of(message: Any, **attributes: str) -> Entry:
    return Entry("oona.normal", "1700000000000-1", seal(message, KEYRING, attributes).fields())


@given(
    st.dictionaries(st.sampled_from([b"payload", b"signature", b"x"]), st.binary(max_size=60)),
    st.sampled_from([None, KEYRING]),
)
def test_nothing_on_a_stream_breaks_the_reader(
    fields: dict[bytes, bytes], keyring: Keyring | None
) -> None:
    message = decode(Entry("s", "1700000000000-1", fields), keyring, MAX_BYTES)
    json.dumps(message.document())
    assert message.line().isprintable()


@given(st.sampled_from(sorted(MESSAGE_CLASSES)), st.binary(max_size=80))
def test_no_message_breaks_the_reader(kind: int, payload: bytes) -> None:
    envelope = leyline.BusEnvelope(message_type=kind, payload=payload)  # type: ignore[arg-type]
    data = envelope.SerializeToString()
    fields = {b"payload": data, b"signature": KEYRING.sign(data).encode()}
    message = decode(Entry("s", "1700000000000-1", fields), KEYRING, MAX_BYTES)
    assert message.verification is Verification.VERIFIED
    json.dumps(message.document())
    assert message.line().isprintable()


def test_numbers_without_a_name_and_times_without_a_calendar_are_shown() -> None:
    command = leyline.AdaptationCommand(command_type=99)  # type: ignore[arg-type]
    command.seed_operation.operation = 98  # type: ignore[assignment]
    command.issued_at.seconds = 2**62
    assert decision_text(command) == "99 98"
    assert (
        "no JSON form"
        in decode(entry_of(command), KEYRING, MAX_BYTES).document()["message"]["problem"]
    )


@pytest.mark.parametrize(
    ("message", "run_id"),
    [
        (leyline.SystemStatePacket(training_run_id="r"), "r"),
        (leyline.EmergencySignal(run_id="r"), "r"),
        (leyline.TelemetryPacket(packet_id="t"), ""),
    ],
)
def test_run_is_the_messages_unless_the_envelope_names_one(message: Any, run_id: str) -> None:
    assert decode(entry_of(message), KEYRING, MAX_BYTES).run_id == run_id
    named = decode(entry_of(message, training_run_id="other"), KEYRING, MAX_BYTES)
    assert named.run_id == "other"


def test_large_entries_and_weights_are_not_printed() -> None:
    update = leyline.PolicyUpdate(policy_id="p", payload=b"w" * 1000)
    small = decode(entry_of(update), KEYRING, MAX_BYTES)
    assert "payload" not in small.document()["message"]
    large = decode(entry_of(update), KEYRING, 512)
    assert large.problem.startswith("oversized")
    assert large.verification is Verification.NOT_CHECKED
    assert len(json.dumps(large.document())) < 1500


def test_plain_spells_control_characters_out() -> None:
    assert plain("a\x1b[31mb\n\u202e") == "a\\x1b[31mb\\n\\u202e"
    assert plain("a\nb\r", keep="\n") == "a\nb\\r"


def test_ids_beyond_the_calendar_stay_numbers() -> None:
    assert shown_time(1_700_000_000_123) == "2023-11-14 22:13:20.123"
    assert shown_time(2**63) == str(2**63)
