"""Vocabularies on disk, written so that a crash leaves the old file or the new one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tamiyo_svc.errors import ConfigurationError, StoredStateError
from tamiyo_svc.graph.vocabulary import Vocabularies

_FILE: Final = "vocabularies.json"
_LOCK: Final = "vocabularies.lock"


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
    """Replace the kept vocabularies with ones that continue them.

    Raises:
        OSError: the directory cannot be written to.
        StoredStateError: another process keeps other names there, whose numbers would change.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    path = state_dir / _FILE
    with _locked(state_dir / _LOCK):
        if path.exists() and not _continues(text, path.read_text(encoding="utf-8")):
            raise StoredStateError(
                f"{path} holds names in another order; replicas must not share a state directory"
            )
        temporary = state_dir / f"{_FILE}.{os.getpid()}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def _continues(text: str, kept: str) -> bool:
    """Whether every vocabulary in `text` begins with the names in `kept`."""
    try:
        before = Vocabularies.from_json(kept).snapshot()
    except ValueError:
        return False
    after = Vocabularies.from_json(text).snapshot()
    return all(after[table][: len(names)] == names for table, names in before.items())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds other processes of this machine back until the block ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
