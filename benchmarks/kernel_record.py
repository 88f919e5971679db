"""What the kernel knows of a time span: who ran on which core, and who waited for whom.

It records every switch between threads (`sched_switch`, `sched_waking`, `sched_wakeup`) and how
long each ran but for what the host of a virtual machine took meanwhile (`sched_stat_runtime`). That
needs root and a mounted or mountable tracefs. Times are those of `time.monotonic`.
"""

from __future__ import annotations

import re
import subprocess
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

_FOLDER: Final = Path("/sys/kernel/tracing")
_EVENTS: Final = (
    "sched_switch",
    "sched_waking",
    "sched_wakeup",
    "sched_process_fork",
    "sched_stat_runtime",
)
_BUFFER_KB: Final = 400_000
_NORMAL_PRIORITY: Final = 120
_LINE: Final = re.compile(
    r"\s*.{1,16}-(\d+)\s+\([\s\d-]+\)\s+\[(\d+)\]\s+\S+\s+([\d.]+): (\w+): (.*)"
)
_SWITCH: Final = re.compile(
    r"prev_comm=.*? prev_pid=(\d+) prev_prio=\d+ prev_state=(\S+)"
    r" ==> next_comm=(.*?) next_pid=(\d+) next_prio=(\d+)"
)
_WAKING: Final = re.compile(r"comm=.*? pid=(\d+) prio=\d+ target_cpu=(\d+)")
_RUNTIME: Final = re.compile(r"comm=.*? pid=(\d+) runtime=(\d+)")
# The times of two events and the run time between them are not taken at quite the same moment.
_UNCERTAIN_S: Final = 5e-5
_FORK: Final = re.compile(r"comm=.*? pid=(\d+) child_comm=.*? child_pid=(\d+)")

RUNS, READY, ASLEEP, BLOCKED = "runs", "ready", "asleep", "blocked"
"""What a thread does; one that is ready waits for a core, one that is blocked mostly for a disk."""

NO_CORE: Final = -1
"""Where a thread is ready that is woken on a core which has not heard of it yet."""


@dataclass(slots=True)
class Record:
    """Everything recorded, by thread and by core; both in order of time."""

    names: dict[int, str] = field(default_factory=dict)
    process_of: dict[int, int] = field(default_factory=dict)
    children: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    nice: set[int] = field(default_factory=set)
    """Threads that ran with a lower priority than the usual one."""
    states: dict[int, list[tuple[float, str, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """When a thread changed to which state, on which core."""
    on_core: dict[int, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    """When a core changed to which thread."""
    stolen: dict[int, list[tuple[float, float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Beginning and end of a span and how much of it the host kept a core for itself."""
    running_on: dict[int, int] = field(default_factory=dict)
    """The core that a thread runs or ran on last."""
    accounted_s: dict[int, float] = field(default_factory=dict)
    """Until when the run time of a core's thread is known."""
    lost: int = 0
    """Events that the kernel dropped."""

    def state(self, thread: int, at_s: float) -> tuple[str, int]:
        """A thread's state at a time and its core."""
        events = self.states.get(thread, [])
        place = bisect_right(events, at_s, key=lambda event: event[0])
        return events[place - 1][1:] if place else (ASLEEP, 0)

    def occupant(self, core: int, at_s: float) -> int:
        """The thread that a core ran at a time."""
        events = self.on_core.get(core, [])
        place = bisect_right(events, at_s, key=lambda event: event[0])
        return events[place - 1][1] if place else 0

    def stolen_s(self, core: int, start_s: float, end_s: float) -> float:
        """How much of a span the host kept a core for itself, taken as even between two events."""
        total_s = 0.0
        spans = self.stolen.get(core, [])
        place = bisect_right(spans, start_s, key=lambda span: span[1])
        while place < len(spans) and spans[place][0] < end_s:
            from_s, to_s, kept_s = spans[place]
            shared_s = min(to_s, end_s) - max(from_s, start_s)
            total_s += kept_s * max(0.0, shared_s) / (to_s - from_s)
            place += 1
        return total_s

    def family(self, process: int) -> set[int]:
        """A process and all that it started, directly or not."""
        found = {process}
        todo = [process]
        while todo:
            for child in self.children.get(todo.pop(), ()):
                if child not in found:
                    found.add(child)
                    todo.append(child)
        return found

    def ran_s(self, thread: int, start_s: float, end_s: float) -> float:
        """How long a thread ran within a span."""
        times = self.changes({thread}, start_s, end_s)
        return sum(
            next_s - at_s for at_s, next_s in pairwise(times) if self.state(thread, at_s)[0] == RUNS
        )

    def changes(self, threads: set[int], start_s: float, end_s: float) -> list[float]:
        """The times within a span at which any of some threads changed its state."""
        times = {start_s, end_s}
        for thread in threads:
            events = self.states.get(thread, [])
            place = bisect_right(events, start_s, key=lambda event: event[0])
            while place < len(events) and events[place][0] < end_s:
                times.add(events[place][0])
                place += 1
        return sorted(times)

    def switches(self, core: int, start_s: float, end_s: float) -> list[float]:
        """The times within a span at which a core changed to another thread."""
        events = self.on_core.get(core, [])
        first = bisect_right(events, start_s, key=lambda event: event[0])
        last = bisect_right(events, end_s, key=lambda event: event[0])
        return [at_s for at_s, _ in events[first:last]]


@contextmanager
def recording() -> Iterator[Record]:
    """Record while the context lasts; what was recorded is there when it ends.

    Raises:
        OSError: the kernel does not let us.
    """
    if not (_FOLDER / "trace").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(_FOLDER)], check=True)
    record = Record()
    _set("tracing_on", 0)
    _set("trace_clock", "mono")
    _set("buffer_size_kb", _BUFFER_KB)
    _set("options/record-tgid", 1)
    _set("trace", "")
    for event in _EVENTS:
        _set(f"events/sched/{event}/enable", 1)
    _set("tracing_on", 1)
    try:
        yield record
        _set("tracing_on", 0)
        _read(record)
    finally:
        _set("tracing_on", 0)
        for event in _EVENTS:
            _set(f"events/sched/{event}/enable", 0)
        _set("trace", "")
        _set("buffer_size_kb", 1)


def _set(name: str, value: object) -> None:
    (_FOLDER / name).write_text(f"{value}\n")


def _read(record: Record) -> None:
    for line in (_FOLDER / "saved_tgids").read_text().splitlines():
        thread, process = map(int, line.split())
        record.process_of[thread] = process
    for stats in _FOLDER.glob("per_cpu/cpu*/stats"):
        record.lost += int(stats.read_text().partition("overrun: ")[2].split()[0])
    with (_FOLDER / "trace").open(errors="replace") as lines:
        for line in lines:
            found = _LINE.match(line)
            if found is not None:
                runner, core, at_s, kind, rest = found.groups()
                _runs(record, int(runner), int(core), float(at_s))
                _note(record, int(core), float(at_s), kind, rest)


def _runs(record: Record, thread: int, core: int, at_s: float) -> None:
    """Note that a thread runs if that is new: some kernels keep a core's way out of idleness to
    themselves.
    """
    if thread and (not record.on_core[core] or record.on_core[core][-1][1] != thread):
        record.running_on[thread] = core
        record.accounted_s[core] = at_s
        record.on_core[core].append((at_s, thread))
        record.states[thread].append((at_s, RUNS, core))


def _note(record: Record, core: int, at_s: float, kind: str, rest: str) -> None:
    match kind:
        case "sched_stat_runtime":
            found = _RUNTIME.match(rest)
            assert found is not None, rest
            # Another core may settle the account when it wakes somebody here.
            core = record.running_on.get(int(found[1]), core)
            since_s = record.accounted_s.get(core, at_s)
            kept_s = at_s - since_s - int(found[2]) / 1e9
            if kept_s > _UNCERTAIN_S:
                record.stolen[core].append((since_s, at_s, kept_s))
            record.accounted_s[core] = at_s
        case "sched_switch":
            found = _SWITCH.match(rest)
            assert found is not None, rest
            record.running_on[int(found[4])] = core
            record.accounted_s[core] = at_s
            before, now = int(found[1]), int(found[4])
            state = {"R": READY, "D": BLOCKED}.get(found[2][0], ASLEEP)
            record.states[before].append((at_s, state, core))
            record.states[now].append((at_s, RUNS, core))
            record.on_core[core].append((at_s, now))
            record.names[now] = found[3]
            if int(found[5]) > _NORMAL_PRIORITY:
                record.nice.add(now)
        case "sched_waking":
            found = _WAKING.match(rest)
            assert found is not None, rest
            events = record.states[int(found[1])]
            if not events or events[-1][1] in (ASLEEP, BLOCKED):
                events.append((at_s, READY, NO_CORE))
        case "sched_wakeup":
            found = _WAKING.match(rest)
            assert found is not None, rest
            thread, target = int(found[1]), int(found[2])
            events = record.states[thread]
            if events and events[-1][1:] == (READY, NO_CORE):
                events.append((at_s, READY, target))
            if core == target and record.on_core[core] and record.on_core[core][-1][1] == 0:
                # An idle core that wakes a thread goes on to run it.
                _runs(record, thread, core, at_s)
        case "sched_process_fork":
            found = _FORK.match(rest)
            assert found is not None, rest
            parent, child = (record.process_of.get(int(pid), int(pid)) for pid in found.groups())
            if parent != child:
                record.children[parent].add(child)
