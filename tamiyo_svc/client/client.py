"""The synchronous client: publish a step, get its command or go on without."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tamiyo_svc.client.core import NORMAL_STREAM, ClientCore, ClientSettings
from tamiyo_svc.client.notices import note
from tamiyo_svc.client.verification import VerifiedCommand
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline.partition import MAX_PARTITIONS
from tamiyo_svc.leyline.signing import MIN_SECRET_BYTES, Keyring, secret_text
from tamiyo_svc.taxonomy import ClientMode


class TamiyoClient(ClientCore):
    """Client of one training run for ordinary code."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def wait(self, step: int, timeout_s: float) -> VerifiedCommand | None:
        """The command for this step, the last one published; None when there is none in time.

        Waits at most `timeout_s` and the settings' `max_wait_s`, and not at all while the bus is
        away or the service has been silent for some steps.
        """
        if not self._enabled:
            return None
        try:
            command = self._exchange.wait(step, min(timeout_s, self.settings.max_wait_s))
        # Any other error here is one of the host's signal handlers.
        except MemoryError:
            command = None
        if command is None:
            self._ask()
        return command

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued is sent; False when it is not."""
        return self._exchange.flush(timeout_s)

    def close(self) -> None:
        """Send what is queued within the settings' `close_timeout_s`, then let go of the bus."""
        self._stop()


def from_environment(run_id: str, environment: Mapping[str, str] | None = None) -> TamiyoClient:
    """A client set up by the variables the service knows, and TAMIYO_CLIENT_MODE.

    They are REDIS_URL, ESPER_LEYLINE_SECRET and ESPER_LEYLINE_SECRET_PREVIOUS or files under the
    same names with _FILE, OONA_NORMAL_STREAM, OONA_FIELD_REPORT_STREAM and OONA_PARTITIONS. Empty
    variables count as not set.

    Raises:
        ConfigurationError: the secret is missing or cannot be read, or another value is none. The
            message names the variable and repeats nothing of secrets, user names and passwords.
    """
    variables = os.environ if environment is None else environment
    try:
        mode = ClientMode(variables.get("TAMIYO_CLIENT_MODE") or ClientMode.ONLINE)
    except ValueError:
        modes = ", ".join(ClientMode)
        raise ConfigurationError(f"TAMIYO_CLIENT_MODE must be one of {modes}") from None
    keyring = None
    if secret := _secret("ESPER_LEYLINE_SECRET", variables):
        keyring = Keyring(secret, _secret("ESPER_LEYLINE_SECRET_PREVIOUS", variables))
    elif mode is not ClientMode.DISABLED:
        raise ConfigurationError("ESPER_LEYLINE_SECRET is not set; the service holds the same one")
    stream = _stream("OONA_NORMAL_STREAM", variables, NORMAL_STREAM)
    settings = ClientSettings(
        mode=mode,
        stream=stream,
        report_stream=_stream("OONA_FIELD_REPORT_STREAM", variables, stream),
        partitions=_partitions(variables),
    )
    url = variables.get("REDIS_URL") or "redis://localhost:6379/0"
    try:
        return TamiyoClient(url, keyring, run_id, settings)
    except ValueError as error:
        problem = str(error)
    # Outside, so that what led to it is not kept with it.
    raise ConfigurationError(f"REDIS_URL or the run id: {problem}")


def _stream(name: str, variables: Mapping[str, str], default: str) -> str:
    stream = variables.get(name) or default
    if re.fullmatch(r"[^\s{}]{1,200}", stream) is None:
        raise ConfigurationError(f"{name}: takes a stream name without spaces and braces")
    return stream


def _partitions(variables: Mapping[str, str]) -> int:
    text = variables.get("OONA_PARTITIONS") or "1"
    if not text.isdecimal() or not 1 <= int(text) <= MAX_PARTITIONS:
        raise ConfigurationError(
            f"OONA_PARTITIONS: got {text!r}, takes a whole number from 1 to {MAX_PARTITIONS}"
        )
    return int(text)


def _secret(name: str, variables: Mapping[str, str]) -> bytes | None:
    """The secret of that name from its variable or its file, None where neither is set.

    The service reads both in the same way and refuses the same.
    """
    given: bytes | str = variables.get(name, "")
    file = variables.get(f"{name}_FILE", "")
    if given and file:
        raise ConfigurationError(f"{name}_FILE: {name} is set as well, set only one of them")
    if file:
        try:
            given = Path(file).read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{name}_FILE: {file!r}: {error.strerror}") from None
    elif not given:
        return None
    try:
        secret = secret_text(given).encode()
    except ValueError as error:
        source = f"{name}_FILE: the secret in {file!r}" if file else f"{name}: the secret"
        raise ConfigurationError(f"{source}: {error}") from None
    if len(secret) < MIN_SECRET_BYTES:
        note(
            logging.WARNING,
            "%s has %d bytes; a service takes %d or more",
            name,
            len(secret),
            MIN_SECRET_BYTES,
        )
    return secret
