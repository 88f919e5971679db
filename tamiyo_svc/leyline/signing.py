"""HMAC-SHA256 signatures over envelope bytes and over commands."""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import hmac
from typing import Final

from tamiyo_svc.leyline import leyline_pb2 as leyline

SIGNATURE_ANNOTATION = "signature"
"""The command annotation that holds the inner signature."""
MIN_SECRET_BYTES: Final = 16
"""What a service takes for a secret at least."""


def secret_text(given: bytes | str) -> str:
    """A secret as both sides take it from a variable or a file.

    What editors, `echo` and mounted secrets add is no part of it: newlines at the end and a
    byte-order mark at the start.

    Raises:
        ValueError: nothing but blanks, or not UTF-8 text; the message repeats nothing of it.
    """
    try:
        # A variable holds what is not UTF-8 as surrogates.
        data = given if isinstance(given, bytes) else given.encode()
        text = _bare(data).decode()
    except UnicodeError:
        text = None
    if text is None:
        raise ValueError("it is not UTF-8 text")
    if not text.strip():
        raise ValueError("it is blank")
    return text


class Keyring:
    """The shared secret, and during a rotation the one before it.

    Signing uses the current secret; verifying accepts both. A byte-order mark before a secret and
    newlines behind it are no part of it. A pickle or copy holds the secrets, `repr` does not.

    Raises:
        ValueError: a secret is empty or nothing but blanks.
    """

    __slots__ = ("_keys",)

    def __init__(self, current: bytes, previous: bytes | None = None) -> None:
        secrets = [_bare(key) for key in (current, previous or None) if key is not None]
        if not all(key.strip() for key in secrets):
            raise ValueError("the signing secret is empty or blank")
        self._keys = tuple(secrets)

    def __repr__(self) -> str:
        return f"Keyring({len(self._keys)} key{'s' if len(self._keys) > 1 else ''})"

    def sign(self, data: bytes) -> str:
        """Base64 of the HMAC-SHA256 of `data` under the current secret."""
        return base64.b64encode(_digest(self._keys[0], data)).decode("ascii")

    def verify(self, data: bytes, signature: str | bytes) -> bool:
        """Whether `signature` is ours for exactly these bytes; anything undecodable is not."""
        try:
            given = base64.b64decode(signature, validate=True)
        except (binascii.Error, ValueError):
            return False
        return any(hmac.compare_digest(_digest(key, data), given) for key in self._keys)

    def sign_command(self, command: leyline.AdaptationCommand) -> None:
        """Set the command's signature annotation; `command_id` and `issued_at` must be set."""
        if not command.command_id or not command.HasField("issued_at"):
            raise ValueError("a command needs command_id and issued_at before it is signed")
        command.annotations.pop(SIGNATURE_ANNOTATION, None)
        signature = self.sign(command.SerializeToString(deterministic=True))
        command.annotations[SIGNATURE_ANNOTATION] = signature

    def verify_command(self, command: leyline.AdaptationCommand) -> bool:
        """Whether the command carries a valid inner signature; the message is left as it was."""
        signature = command.annotations.get(SIGNATURE_ANNOTATION)
        if not signature:
            return False
        return self.verify(signed_bytes(command), signature)


def signed_bytes(command: leyline.AdaptationCommand) -> bytes:
    """The bytes a command's inner signature covers: all of it but the signature itself."""
    bare = leyline.AdaptationCommand()
    bare.CopyFrom(command)
    bare.annotations.pop(SIGNATURE_ANNOTATION, None)
    return bare.SerializeToString(deterministic=True)


def _bare(secret: bytes) -> bytes:
    return secret.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")


def _digest(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, hashlib.sha256)
