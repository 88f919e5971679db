"""The ack-gated, versioned commit: outputs, acknowledgement and run state, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tamiyo_svc.adapters.oona.connection import OUTAGE_ERRORS
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.errors import (
    BusError,
    CommitConflictError,
    CommitRefusedError,
    DuplicateEntryError,
    TamiyoError,
)
from tamiyo_svc.leyline.envelope import SignedEnvelope

_SERVER_TROUBLES: Final = (
    *("OOM", "command not allowed when used memory", "READONLY", "You can't write against a read"),
    *(
        "MISCONF",
        "NOREPLICAS",
        "LOADING",
        "MASTERDOWN",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "BUSY",
        "NOAUTH",
    ),
    *("NOPERM", "Redis is loading", "max number of clients"),
)
"""Signs of a refusal that concerns the whole server.

redis-py strips the codes it knows, and Redis 6.2 puts the script's line before them.
"""

_SCRIPT = resources.files(__package__).joinpath("commit.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Output:
    """One entry to append; `limit` keeps about that many, `expiry_ms` removes an idle stream.

    The stream is the one of that name in the partition of the commit, unless the name is `whole`
    as it is.
    """

    stream: str
    fields: Mapping[bytes, bytes]
    limit: int = 0
    expiry_ms: int = 0
    whole: bool = False

    @classmethod
    def of(cls, stream: str, envelope: SignedEnvelope) -> Output:
        """An output that carries a signed envelope."""
        return cls(stream, envelope.fields())


@dataclass(frozen=True, slots=True)
class RunWrite:
    """The run state to store under `run_key`, valid only on top of `expected_version`."""

    run_key: str
    expected_version: int
    state: bytes
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Commit:
    """All that one outcome changes; the first of `acks` must still be pending.

    Everything in it lies in one partition: that of the entries, or without any that of `tag`.
    """

    acks: Sequence[Entry]
    outputs: Sequence[Output] = field(default=())
    run: RunWrite | None = None
    tag: str = ""

    @property
    def partition_tag(self) -> str:
        """The tag of the partition that everything in it lies in."""
        return self.acks[0].tag if self.acks else self.tag


def run_key(run_id: str, tag: str = "") -> str:
    """Redis key of a run's state in the partition of a tag."""
    return f"tamiyo:run{tag}:{run_id}"


class Committer:
    """Executes commits and loads run state over one connection that never retries."""

    def __init__(self, redis: Redis, group: str) -> None:
        self._redis = redis
        self._group = group
        self._script = redis.register_script(_SCRIPT)

    async def commit(self, commit: Commit) -> list[str]:
        """Apply a commit and return the ids of its outputs.

        Raises:
            CommitConflictError: the run state moved on; nothing was written.
            DuplicateEntryError: the first entry is not pending any more; nothing was written.
            BusError: no answer, so whether it was applied is unknown, or Redis takes no writes.
            CommitRefusedError: Redis refuses this commit and would take others.
        """
        keys, arguments = _arguments(commit, self._group)
        try:
            reply = cast("list[bytes]", await self._script(keys=keys, args=arguments))
        except OUTAGE_ERRORS as error:
            raise BusError(f"commit: {error!r}") from error
        except RedisError as error:
            raise _refusal("commit", error) from error
        status = reply[0]
        if status == b"CONFLICT":
            raise CommitConflictError(commit.run.run_key if commit.run else "")
        if status == b"DUPLICATE":
            raise DuplicateEntryError(commit.acks[0].entry_id)
        return [entry_id.decode() for entry_id in reply[1:]]

    async def load_run(self, run_key: str) -> tuple[int, bytes | None]:
        """Version and bytes of a run's state; version 0 and None for a run not seen before.

        Raises:
            BusError: Redis did not answer.
            CommitRefusedError: the key does not hold a run state.
        """
        try:
            version, state = await self._redis.hmget(run_key, ["version", "state"])
        except OUTAGE_ERRORS as error:
            raise BusError(f"run state: {error!r}") from error
        except RedisError as error:
            raise _refusal("run state", error) from error
        return (0, None) if version is None else (int(version), cast("bytes", state))


def _refusal(what: str, error: RedisError) -> TamiyoError:
    """The server's own troubles pass; a key of the wrong kind stays what it is."""
    if any(trouble in str(error) for trouble in _SERVER_TROUBLES):
        return BusError(f"{what} refused: {error}")
    return CommitRefusedError(f"{what} refused: {error}")


def _arguments(commit: Commit, group: str) -> tuple[list[str], list[Any]]:
    keys: list[str] = []

    def index(key: str) -> int:
        if key not in keys:
            keys.append(key)
        return keys.index(key) + 1

    run = commit.run
    arguments: list[Any] = [group]
    if run is None:
        arguments += [0, 0, b"", 0]
    else:
        arguments += [index(run.run_key), run.expected_version, run.state, run.ttl_ms]
    arguments.append(len(commit.acks))
    for entry in commit.acks:
        arguments += [index(entry.stream), entry.entry_id]
    tag = commit.partition_tag
    arguments.append(len(commit.outputs))
    for output in commit.outputs:
        arguments += [
            index(output.stream if output.whole else output.stream + tag),
            output.limit,
            output.expiry_ms,
            2 * len(output.fields),
        ]
        for name, value in output.fields.items():
            arguments += [name, value]
    return keys, arguments
