"""The generated contract against the schema, and the codec against every golden vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, json_format
from google.protobuf.descriptor import FieldDescriptor

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import (
    MESSAGE_CLASSES,
    EnvelopeRejectedError,
    RejectReason,
    open_envelope,
    parse_payload,
    seal,
)
from tamiyo_svc.leyline.signing import Keyring, signed_bytes

DATA = Path(__file__).parents[1] / "data"
SCHEMA: dict[str, Any] = json.loads((DATA / "leyline.schema.json").read_text())
VECTORS: list[dict[str, Any]] = [
    json.loads(line) for line in (DATA / "golden.jsonl").read_text().splitlines()
]
SCALARS = {
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
}


def fields_of(vector: dict[str, Any]) -> dict[bytes, bytes]:
    return {
        b"payload": bytes.fromhex(vector["envelope_hex"]),
        b"signature": vector["signature"].encode(),
    }


def type_name(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            parts = field.message_type.fields_by_name
            return f"map<{type_name(parts['key'])},{type_name(parts['value'])}>"
        return str(field.message_type.full_name)
    if field.enum_type is not None:
        return str(field.enum_type.full_name)
    return SCALARS[field.type]


def describe(field: FieldDescriptor) -> dict[str, Any]:
    described: dict[str, Any] = {"number": field.number, "type": type_name(field)}
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if field.is_repeated and not is_map:
        described["repeated"] = True
    if field.containing_oneof is not None:
        described["oneof"] = field.containing_oneof.name
    return described


def test_descriptor_equals_schema() -> None:
    file = leyline.DESCRIPTOR
    assert file.package == SCHEMA["package"]
    enums = {
        name: {value.name: value.number for value in enum.values}
        for name, enum in file.enum_types_by_name.items()
    }
    assert enums == SCHEMA["enums"]
    messages = {
        name: {field.name: describe(field) for field in message.fields}
        for name, message in file.message_types_by_name.items()
    }
    assert messages == SCHEMA["messages"]


def test_reserved_ranges_equal_schema() -> None:
    for name, ranges in SCHEMA["reserved"].items():
        proto = leyline.DESCRIPTOR.message_types_by_name[name]
        described = descriptor_pb2.DescriptorProto()
        proto.CopyToProto(described)
        found = [[part.start, part.end - 1] for part in described.reserved_range]
        assert found == ranges


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_golden_vector(vector: dict[str, Any]) -> None:
    keyring = Keyring(vector["secret"].encode())
    if not vector["accept"]:
        with pytest.raises(EnvelopeRejectedError) as rejected:
            parse_payload(open_envelope(fields_of(vector), keyring))
        assert rejected.value.reason == vector["reason"]
        return
    envelope = open_envelope(fields_of(vector), keyring)
    assert envelope.message_type == vector["message_type"]
    assert dict(envelope.attributes) == vector["attributes"]
    message = parse_payload(envelope)
    assert message.DESCRIPTOR.name == vector["message"]
    decoded = json_format.MessageToDict(message, preserving_proto_field_name=True)
    assert decoded == vector["decoded"]
    if "command_signed_bytes_hex" in vector:
        assert isinstance(message, leyline.AdaptationCommand)
        assert signed_bytes(message).hex() == vector["command_signed_bytes_hex"]
        assert keyring.verify_command(message)


@pytest.mark.parametrize("vector", [v for v in VECTORS if v["accept"]], ids=lambda v: v["name"])
def test_any_changed_bit_is_rejected(vector: dict[str, Any]) -> None:
    keyring = Keyring(vector["secret"].encode())
    payload = bytes.fromhex(vector["envelope_hex"])
    for position in range(0, len(payload), max(1, len(payload) // 50)):
        forged = bytearray(payload)
        forged[position] ^= 1
        fields = {b"payload": bytes(forged), b"signature": vector["signature"].encode()}
        with pytest.raises(EnvelopeRejectedError) as rejected:
            open_envelope(fields, keyring)
        assert rejected.value.reason is RejectReason.INVALID_SIGNATURE


def test_previous_secret_verifies_but_never_signs() -> None:
    old, new = b"the old secret 01", b"the new secret 02"
    message = leyline.BSDSFailed(blueprint_id="b", reason="r")
    rotated = Keyring(new, old)
    assert open_envelope(seal(message, Keyring(old)).fields(), rotated).payload
    assert open_envelope(seal(message, rotated).fields(), Keyring(new)).payload
    with pytest.raises(EnvelopeRejectedError):
        open_envelope(seal(message, rotated).fields(), Keyring(old))


def test_oversized_is_rejected_before_its_signature_is_computed() -> None:
    keyring = Keyring(b"a secret of bytes")
    with pytest.raises(EnvelopeRejectedError) as rejected:
        open_envelope({b"payload": b"x" * 101, b"signature": b"!"}, keyring, max_bytes=100)
    assert rejected.value.reason is RejectReason.OVERSIZED


@pytest.mark.parametrize("message_type", sorted(MESSAGE_CLASSES))
def test_seal_and_open_round_trip(message_type: int) -> None:
    keyring = Keyring(b"a secret of bytes")
    message = MESSAGE_CLASSES[message_type]()
    sealed = seal(message, keyring, {"training_run_id": "run"})
    envelope = open_envelope(sealed.fields(), keyring)
    assert envelope.message_type == message_type
    assert dict(envelope.attributes) == {"training_run_id": "run"}


def test_command_is_not_signed_without_identity() -> None:
    keyring = Keyring(b"a secret of bytes")
    with pytest.raises(ValueError, match="command_id and issued_at"):
        keyring.sign_command(leyline.AdaptationCommand(command_id="x"))


def test_changed_command_does_not_verify() -> None:
    keyring = Keyring(b"a secret of bytes")
    command = leyline.AdaptationCommand(command_id="x")
    command.issued_at.FromNanoseconds(1)
    keyring.sign_command(command)
    assert keyring.verify_command(command)
    command.target_seed_id = "other"
    assert not keyring.verify_command(command)
    del command.annotations["signature"]
    assert not keyring.verify_command(command)


def test_keyring_never_shows_its_secret() -> None:
    assert "hush" not in repr(Keyring(b"hush-hush-hush-hush", b"hush before"))
