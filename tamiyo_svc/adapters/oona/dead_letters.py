"""An entry that cannot be processed, with its fields and the reason, on the dead-letter stream."""

from __future__ import annotations

from typing import Final

from tamiyo_svc.adapters.oona.commit import Commit, Output
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.taxonomy import DeadLetterReason

META_PREFIX: Final = "dead."
"""Prefix of the fields added beside the original ones, so that these stay as they were."""

_DETAIL_CHARS = 200


def bury(entry: Entry, reason: DeadLetterReason, detail: str, dead_letter_stream: str) -> Commit:
    """The commit that moves an entry to the dead-letter stream and acknowledges it in one step."""
    meta = {
        "stream": entry.stream,
        "id": entry.entry_id,
        "reason": reason.value,
        "detail": detail[:_DETAIL_CHARS],
        "deliveries": str(entry.deliveries),
    }
    ours = {f"{META_PREFIX}{name}".encode(): value.encode() for name, value in meta.items()}
    # A publisher must not choose by a field of its own where a requeued letter goes.
    fields = {**ours, **entry.fields, **ours}
    return Commit(acks=[entry], outputs=[Output(dead_letter_stream, fields)])
