"""Every reason for which a command is refused, and that a good one is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.client.verification import (
    MAX_EXPECTED,
    CommandRejectedError,
    CommandVerifier,
    VerifiedCommand,
)
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import DEFAULT_MAX_BYTES, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import CommandRejection

KEYRING = Keyring(b"0123456789abcdef")
RUN = "run-1"
NOW_S = 1_760_000_000.0
VECTORS = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "golden.jsonl").read_text().splitlines()
]

Command = leyline.AdaptationCommand
Edit = Callable[[Command], object]


def make_command(
    *,
    issued_s: float = NOW_S,
    command_id: str = "c-1",
    run_id: str = RUN,
    packet_id: str = "p-1",
    step: str = "7",
) -> Command:
    command = Command(version=1, command_id=command_id, command_type=leyline.COMMAND_PAUSE)
    command.issued_at.FromNanoseconds(int(issued_s * 1e9))
    command.annotations.update(training_run_id=run_id, packet_id=packet_id, step_index=step)
    return command


def entry(command: Command, keyring: Keyring = KEYRING) -> dict[bytes, bytes]:
    keyring.sign_command(command)
    return seal(command, keyring).fields()


def make_verifier() -> CommandVerifier:
    verifier = CommandVerifier(KEYRING, RUN)
    verifier.expect("p-1", 7)
    return verifier


def rejection(
    verifier: CommandVerifier, fields: Mapping[bytes, bytes], now_s: float = NOW_S
) -> CommandRejection:
    with pytest.raises(CommandRejectedError) as caught:
        verifier.verify(fields, now_s)
    return caught.value.reason


def test_accepts_a_signed_fresh_command_for_an_expected_packet() -> None:
    verified = make_verifier().verify(entry(make_command()), NOW_S)
    assert isinstance(verified, VerifiedCommand)
    assert (verified.packet_id, verified.step_index) == ("p-1", 7)
    assert verified.command.command_type == leyline.COMMAND_PAUSE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run_id": "run-2"}, CommandRejection.WRONG_RUN),
        ({"packet_id": "p-2"}, CommandRejection.UNKNOWN_PACKET),
        ({"packet_id": ""}, CommandRejection.UNKNOWN_PACKET),
        ({"step": "8"}, CommandRejection.WRONG_STEP),
        ({"step": "07"}, CommandRejection.WRONG_STEP),
    ],
)
def test_refuses_what_was_meant_for_another_step(
    change: dict[str, str], reason: CommandRejection
) -> None:
    assert rejection(make_verifier(), entry(make_command(**change))) is reason  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("issued_s", "reason"),
    [
        (NOW_S - 60.5, CommandRejection.STALE),
        (NOW_S - 59.5, None),
        (NOW_S + 4.5, None),
        (NOW_S + 5.5, CommandRejection.FROM_THE_FUTURE),
        (0.0, CommandRejection.STALE),
    ],
)
def test_freshness_is_sixty_seconds_back_and_five_ahead(
    issued_s: float, reason: CommandRejection | None
) -> None:
    fields = entry(make_command(issued_s=issued_s))
    if reason is None:
        assert make_verifier().verify(fields, NOW_S)
    else:
        assert rejection(make_verifier(), fields) is reason


def test_refuses_a_replayed_command_even_if_its_packet_is_expected_again() -> None:
    verifier = make_verifier()
    fields = entry(make_command())
    verifier.verify(fields, NOW_S)
    verifier.expect("p-1", 7)
    assert rejection(verifier, fields) is CommandRejection.REPLAYED


def test_refuses_a_second_answer_to_the_same_packet() -> None:
    verifier = make_verifier()
    verifier.verify(entry(make_command()), NOW_S)
    second = entry(make_command(command_id="c-2"))
    assert rejection(verifier, second) is CommandRejection.ALREADY_ANSWERED


def test_a_command_id_is_remembered_for_three_hundred_seconds() -> None:
    verifier = make_verifier()
    verifier.verify(entry(make_command()), NOW_S)
    for later_s, reason in ((299.0, CommandRejection.REPLAYED), (300.0, None)):
        verifier.expect("p-1", 7)
        fields = entry(make_command(issued_s=NOW_S + later_s))
        if reason is None:
            assert verifier.verify(fields, NOW_S + later_s)
        else:
            assert rejection(verifier, fields, NOW_S + later_s) is reason


def test_memory_of_ids_and_packets_is_bounded() -> None:
    verifier = CommandVerifier(KEYRING, RUN, max_remembered=8)
    for step in range(MAX_EXPECTED + 1):
        verifier.expect(f"p-{step}", step)
    oldest = entry(make_command(packet_id="p-0", step="0", command_id="old"))
    assert rejection(verifier, oldest) is CommandRejection.UNKNOWN_PACKET
    for step in range(1, 20):
        command = make_command(packet_id=f"p-{step}", step=str(step), command_id=f"c-{step}")
        verifier.verify(entry(command), NOW_S)
    assert verifier.remembered == 8


def test_a_refused_command_is_not_remembered() -> None:
    verifier = make_verifier()
    assert rejection(verifier, entry(make_command(packet_id="p-2"))) is (
        CommandRejection.UNKNOWN_PACKET
    )
    assert verifier.remembered == 0


def outer_unsigned() -> dict[bytes, bytes]:
    return {**entry(make_command()), b"signature": b""}


def outer_forged() -> dict[bytes, bytes]:
    command = make_command()
    KEYRING.sign_command(command)
    return seal(command, Keyring(b"another-secret-16")).fields()


def inner_unsigned() -> dict[bytes, bytes]:
    return seal(make_command(), KEYRING).fields()


def inner_tampered() -> dict[bytes, bytes]:
    command = make_command()
    KEYRING.sign_command(command)
    command.command_type = leyline.COMMAND_OPTIMIZER
    return seal(command, KEYRING).fields()


def without_identity() -> dict[bytes, bytes]:
    command = make_command()
    KEYRING.sign_command(command)
    command.ClearField("issued_at")
    command.annotations.pop("signature")
    command.annotations["signature"] = KEYRING.sign(command.SerializeToString(deterministic=True))
    return seal(command, KEYRING).fields()


def not_a_command() -> dict[bytes, bytes]:
    return seal(leyline.SystemStatePacket(packet_id="p-1"), KEYRING).fields()


def signed_junk() -> dict[bytes, bytes]:
    junk = b"\xff\xff\xff"
    return {b"payload": junk, b"signature": KEYRING.sign(junk).encode()}


def oversized() -> dict[bytes, bytes]:
    return {b"payload": bytes(DEFAULT_MAX_BYTES + 1), b"signature": b"x"}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (outer_unsigned, CommandRejection.MISSING_SIGNATURE),
        (outer_forged, CommandRejection.INVALID_SIGNATURE),
        (inner_unsigned, CommandRejection.MISSING_COMMAND_SIGNATURE),
        (inner_tampered, CommandRejection.INVALID_COMMAND_SIGNATURE),
        (without_identity, CommandRejection.MISSING_IDENTITY),
        (not_a_command, CommandRejection.NOT_A_COMMAND),
        (signed_junk, CommandRejection.MALFORMED),
        (oversized, CommandRejection.OVERSIZED),
    ],
)
def test_refuses_what_is_unsigned_forged_or_malformed(
    make: Callable[[], dict[bytes, bytes]], reason: CommandRejection
) -> None:
    assert rejection(make_verifier(), make()) is reason


def test_during_a_rotation_the_previous_secret_is_accepted() -> None:
    verifier = CommandVerifier(Keyring(b"the-new-secret-16", b"0123456789abcdef"), RUN)
    verifier.expect("p-1", 7)
    assert verifier.verify(entry(make_command()), NOW_S)


def test_without_a_keyring_signatures_are_not_looked_at() -> None:
    verifier = CommandVerifier(None, RUN)
    verifier.expect("p-1", 7)
    assert verifier.verify(seal(make_command(), None).fields(), NOW_S)


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_golden_vectors_are_never_accepted_for_a_packet_that_was_not_sent(
    vector: dict[str, str],
) -> None:
    verifier = CommandVerifier(Keyring(vector["secret"].encode()), RUN)
    fields = {
        b"payload": bytes.fromhex(vector["envelope_hex"]),
        b"signature": vector["signature"].encode(),
    }
    assert rejection(verifier, fields, 1_760_000_000.0) in CommandRejection


@given(st.dictionaries(st.sampled_from([b"payload", b"signature"]), st.binary(max_size=64)))
def test_arbitrary_entries_are_refused_with_a_reason(fields: dict[bytes, bytes]) -> None:
    assert rejection(make_verifier(), fields) in CommandRejection


@given(st.integers(min_value=0), st.integers(min_value=0, max_value=7))
def test_one_flipped_bit_is_refused(position: int, bit: int) -> None:
    fields = entry(make_command())
    payload = bytearray(fields[b"payload"])
    payload[position % len(payload)] ^= 1 << bit
    fields[b"payload"] = bytes(payload)
    assert rejection(make_verifier(), fields) is CommandRejection.INVALID_SIGNATURE
