"""Vocabularies on disk, written so that a crash leaves the old file or the new one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.graph.vocabulary import Vocabularies

_FILE: Final = "vocabularies.json"


def load_vocabularies(state_dir: Path) -> Vocabularies:
    """The vocabularies kept under `state_dir`, or fresh ones.

    Raises:
        ConfigurationError: the file is there and cannot be read; starting without it would give
            known names other numbers.
    """
    path = state_dir / _FILE
    try:
        return Vocabularies.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Vocabularies()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"TAMIYO_STATE_DIR: {path} cannot be read ({error}); restore it, or remove it to "
            "start with empty vocabularies"
        ) from None


def save_vocabularies(state_dir: Path, text: str) -> None:
    """Replace the kept vocabularies.

    Raises:
        OSError: the directory cannot be written to.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    temporary = state_dir / f"{_FILE}.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(state_dir / _FILE)
