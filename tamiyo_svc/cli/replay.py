"""`tamiyo replay`: a recording decided again offline and compared with what was decided then."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Final

from tamiyo_svc.cli.decision_diff import Comparison, compare, comparison_text
from tamiyo_svc.cli.replay_page import render_page
from tamiyo_svc.client.capture import CaptureError, read_capture
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.service.recording import read_recording
from tamiyo_svc.service.replay import replay
from tamiyo_svc.service.settings import Settings

MOST_LINES: Final = 10


def replay_file(settings: Settings, path: Path) -> Comparison:
    """Decide what is in a capture file again, with the settings' policy and catalogue.

    Raises:
        ConfigurationError: the file cannot be read, signatures are required and there is no
            secret, or the policy cannot be read.
    """
    keyring = settings.keyring() if settings.require_signatures else None
    try:
        recording = read_recording(read_capture(path), keyring, settings.max_message_bytes)
    except CaptureError as error:
        raise ConfigurationError(str(error)) from None
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    return compare(recording, asyncio.run(replay(recording, settings)))


def comparison_output(comparison: Comparison, *, as_json: bool) -> str:
    """The comparison for the terminal, or all of it as JSON."""
    if as_json:
        return json.dumps(comparison.document(), indent=2)
    return comparison_text(comparison, MOST_LINES)


def write_page(comparison: Comparison, source: Path, page: Path) -> None:
    """Write the comparison as an HTML file.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    try:
        page.write_text(render_page(comparison, source.name), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{page}: {error.strerror}") from None
