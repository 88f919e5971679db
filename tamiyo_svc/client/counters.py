"""What a client counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tamiyo_svc.taxonomy import CommandRejection


@dataclass(slots=True)
class ClientCounters:
    """What became of packets and commands.

    `published` counts entries of packets that the bus has taken, `unpublished` packets that were
    never sent: refused, dropped from a full queue (`dropped`, oldest first) or lost at closing.
    Every `wait` ends in `received` or `missed`; `waits_skipped` of the misses did not wait,
    because the bus or the service had been silent. `late` commands came for an earlier packet or
    after nobody waited any more. `observed` commands were only logged.
    """

    published: int = 0
    unpublished: int = 0
    dropped: int = 0
    received: int = 0
    observed: int = 0
    missed: int = 0
    waits_skipped: int = 0
    late: int = 0
    acknowledged: int = 0
    bus_errors: int = 0
    faults: int = 0
    rejected: Counter[CommandRejection] = field(default_factory=Counter)
