"""Times as an operator types them: `500ms`, `90s`, `5m`, `2h`, `1d`, or an entry's id."""

from __future__ import annotations

import re
from typing import Final

from tamiyo_svc.errors import ConfigurationError

_UNITS_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)")
_ENTRY_ID: Final = re.compile(r"[0-9]{10,20}(-[0-9]{1,20})?")


def parse_duration_ms(option: str, text: str) -> int:
    """A duration in milliseconds.

    Raises:
        ConfigurationError: it is none; the message names the option.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigurationError(f"{option}: got {text!r}, takes a duration such as 90s, 5m or 2h")
    return int(float(match[1]) * _UNITS_MS[match[2]])


def parse_start(option: str, text: str, now_ms: int) -> str:
    """The first entry id to look at: so long before `now_ms`, or the id itself.

    Raises:
        ConfigurationError: it is neither a duration nor an id.
    """
    if _ENTRY_ID.fullmatch(text.strip()):
        return text.strip()
    try:
        return f"{max(0, now_ms - parse_duration_ms(option, text))}-0"
    except ConfigurationError:
        raise ConfigurationError(
            f"{option}: got {text!r}, takes a duration such as 90s, 5m or 2h, or an entry id"
        ) from None


def shown_duration(duration_ms: float) -> str:
    """A duration in the largest unit that leaves at least 1, such as `3 min`."""
    for unit, unit_ms in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1_000)):
        if duration_ms >= unit_ms:
            return f"{duration_ms / unit_ms:.3g} {unit}"
    return f"{duration_ms:.0f} ms"
