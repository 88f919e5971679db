"""`tamiyo keys`: the shared secret that signs everything on the bus."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from tamiyo_svc.errors import ConfigurationError

_SECRET_BYTES: Final = 32


def generate(path: Path) -> None:
    """Write a new random secret to a new file that only its owner can read.

    Raises:
        ConfigurationError: the file exists or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        # Overwriting it would lock out everybody who still signs with the old one.
        raise ConfigurationError(f"{path}: exists already, takes a new file") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written ({error.strerror})") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(_SECRET_BYTES) + "\n")
