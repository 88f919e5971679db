"""The error tree: each class carries its metric label and what to do with the entry it hit."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class AckAction(StrEnum):
    """What becomes of the stream entry whose processing raised."""

    COMMIT = "commit"
    """Answer it with a safe command and acknowledge it."""
    DEAD_LETTER = "dead_letter"
    """Move it to the dead-letter stream."""
    RETRY = "retry"
    """Leave it pending; it is read again."""
    DROP = "drop"
    """It was already answered; acknowledge nothing."""


class TamiyoError(Exception):
    """Root of every error this package raises on purpose."""

    label: ClassVar[str] = "error"
    ack: ClassVar[AckAction] = AckAction.RETRY


class ConfigurationError(TamiyoError):
    """A setting is wrong or missing; the message names the variable and the fix."""

    label = "configuration"


class InvalidPacketError(TamiyoError):
    """A packet parsed but cannot be decided, for example without a run id."""

    label = "invalid_field"
    ack = AckAction.DEAD_LETTER


class InferenceError(TamiyoError):
    """The network raised or produced a non-finite output."""

    label = "inference_failed"
    ack = AckAction.COMMIT


class LaneBusyError(TamiyoError):
    """A job that overran its deadline still occupies the device lane."""

    label = "lane_busy"
    ack = AckAction.COMMIT


class BusError(TamiyoError):
    """Redis could not be reached or refused a command."""

    label = "bus"


class CommitRefusedError(TamiyoError):
    """Redis took the commit and refused what it asks for; trying again will not help."""

    label = "commit_refused"


class CommitConflictError(TamiyoError):
    """The run state moved on since it was read; reload it and evaluate again."""

    label = "commit_conflict"


class DuplicateEntryError(TamiyoError):
    """The entry had been acknowledged before; nothing was written."""

    label = "duplicate"
    ack = AckAction.DROP


class PolicyRejectedError(TamiyoError):
    """A policy was refused; `reason` is one of the documented rejection reasons."""

    label = "policy_rejected"

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class CommandError(TamiyoError):
    """A decision could not be put into a command."""

    label = "command_failed"
    ack = AckAction.COMMIT


class StoredStateError(TamiyoError):
    """Stored bytes are damaged or of a version this release does not know."""

    label = "stored_state"


def in_brief(error: Exception) -> str:
    """An error's type and first line, at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
