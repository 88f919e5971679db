"""Which partition a training run belongs to, and what streams and keys are called there.

A bus of one partition uses plain names. One of several gives every name a tag: `oona.normal.{0}`,
`oona.normal.{1}` and so on. Redis Cluster places keys by what stands between the first pair of
braces, so everything that one decision touches lies on one node.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

MAX_PARTITIONS: Final = 64
"""Each takes a connection of every replica and a few commands a second."""

REPLY_STREAMS: Final = "oona.commands."
"""What the names of all reply streams begin with."""

_TAG: Final = re.compile(r"\.\{\d+\}(?=[.:]|$)")


def partition_of(run_id: str, partitions: int) -> int:
    """The partition of a run, from 0, the same in every language and release.

    The first four bytes of the SHA-256 of the run id in UTF-8, read as an unsigned big-endian
    number, modulo the number of partitions.
    """
    digest = hashlib.sha256(run_id.encode()).digest()
    return int.from_bytes(digest[:4], "big") % partitions


def tags(partitions: int) -> tuple[str, ...]:
    """What names end with in each partition; nothing where there is only one.

    Raises:
        ValueError: not a number of partitions.
    """
    if not 1 <= partitions <= MAX_PARTITIONS:
        raise ValueError(f"{partitions} partitions: takes 1 to {MAX_PARTITIONS}")
    if partitions == 1:
        return ("",)
    return tuple(f".{{{number}}}" for number in range(partitions))


def tag_of_run(run_id: str, partitions: int) -> str:
    """What names end with in the partition of a run."""
    return tags(partitions)[partition_of(run_id, partitions)]


def tag_in(name: str) -> str:
    """The tag in the name of a stream or key, empty where there is none."""
    # Asked for every packet, and most names have none.
    if "{" not in name:
        return ""
    found = _TAG.search(name)
    return found[0] if found is not None else ""


def reply_prefix(tag: str) -> str:
    """What the name of a reply stream in a partition must begin with."""
    return f"{REPLY_STREAMS.removesuffix('.')}{tag}."
