"""Run states as Redis holds them, with the newest ones kept in memory."""

from __future__ import annotations

from collections import OrderedDict

from tamiyo_svc.adapters.oona.commit import Committer
from tamiyo_svc.runs.state import EMPTY, RunState


class RunStore:
    """Loads run states by their keys and remembers up to `capacity` of them with their versions.

    A remembered state may be stale; the commit notices, and `forget` makes the next load read.
    """

    def __init__(self, committer: Committer, capacity: int = 4096) -> None:
        self._committer = committer
        self._capacity = capacity
        self._known: OrderedDict[str, tuple[int, RunState]] = OrderedDict()

    async def load(self, run_key: str) -> tuple[int, RunState]:
        """Version and state of a run; version 0 and the empty state for a new one.

        Raises:
            BusError: Redis did not answer.
            RunStateError: what Redis holds is not a run state this release can read.
        """
        known = self._known.get(run_key)
        if known is not None:
            self._known.move_to_end(run_key)
            return known
        version, data = await self._committer.load_run(run_key)
        state = EMPTY if data is None else RunState.from_bytes(data)
        self.remember(run_key, version, state)
        return version, state

    def remember(self, run_key: str, version: int, state: RunState) -> None:
        """Keep a state that Redis is known to hold."""
        self._known[run_key] = (version, state)
        self._known.move_to_end(run_key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def forget(self, run_key: str) -> None:
        """Drop a state that turned out to be stale."""
        self._known.pop(run_key, None)

    def conservative_runs(self) -> int:
        """How many of the remembered runs are in conservative mode."""
        return sum(state.mode.active for _, state in self._known.values())
