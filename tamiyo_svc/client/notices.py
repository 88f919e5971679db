"""What the client says in the log; saying it never harms whoever is training."""

from __future__ import annotations

import logging
from typing import Final

_LOG: Final = logging.getLogger("tamiyo.client")


def note(level: int, text: str, *values: object, error: BaseException | None = None) -> None:
    """Log a line, with the traceback of `error`; a handler that raises has not been told."""
    try:
        _LOG.log(level, text, *values, exc_info=error)
    # Handlers are the host's or others', and here they run in the training thread too.
    except Exception:
        return
