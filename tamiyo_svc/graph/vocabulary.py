"""Names to small integers that never change once given, and hashes for open sets of ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b, sha256
from threading import Lock
from typing import Final

from tamiyo_svc.graph.schema import BUCKETS
from tamiyo_svc.taxonomy import BLENDING_METHODS, OPTIMIZER_FAMILIES

# An index is a feature scaled by `BUCKETS`; more names than that could not be told apart.
_MAX_NAMES: Final = BUCKETS
_MAX_NAME_LENGTH: Final = 128

_FOUNDING_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "layer_types": (),
    "activation_types": (),
    "optimizer_families": OPTIMIZER_FAMILIES,
    "hazard_classes": ("low", "medium", "high", "critical"),
    "blending_schedules": BLENDING_METHODS,
}


class Vocabulary:
    """An append-only mapping of names to indices from 1; 0 is unknown.

    Threads may learn and read at once: a lane's thread that hangs can outlive its replacement's
    start, and the event loop stores what both learn.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._indices: dict[str, int] = {}
        self._learning = Lock()
        for name in names:
            self.learn(name)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[str]:
        # A copy: another thread may learn a name meanwhile.
        return iter(list(self._indices))

    def index(self, name: str) -> int:
        """Index of a known name, else 0."""
        return self._indices.get(name, 0)

    def learn(self, name: str) -> int:
        """Index of a name, appended when it is new; 0 when empty, too long or the table is full."""
        known = self._indices.get(name)
        if known is not None:
            return known
        if not name or len(name) > _MAX_NAME_LENGTH:
            return 0
        with self._learning:
            if name in self._indices:
                return self._indices[name]
            if len(self._indices) >= _MAX_NAMES:
                return 0
            self._indices[name] = index = len(self._indices) + 1
            return index

    def digest(self) -> str:
        """SHA-256 over the key-sorted [name, index] pairs, as hex."""
        return _digest(list(self))

    def accepts(self, digest: str) -> bool:
        """Whether `digest` is that of this vocabulary or of an earlier state of it."""
        names = list(self)
        return any(_digest(names[:length]) == digest for length in range(len(names), -1, -1))


class Vocabularies:
    """The vocabularies of the service by name."""

    def __init__(self, names: Mapping[str, Iterable[str]] | None = None) -> None:
        """Start from snapshots; founding names always come first.

        Raises:
            ValueError: a snapshot does not continue the founding names of its vocabulary.
        """
        self._tables: dict[str, Vocabulary] = {}
        for table, founding in _FOUNDING_NAMES.items():
            given = list((names or {}).get(table, ()))
            common = min(len(given), len(founding))
            if tuple(given[:common]) != founding[:common]:
                raise ValueError(f"vocabulary {table} does not start with {', '.join(founding)}")
            self._tables[table] = Vocabulary((*founding, *given[common:]))

    @property
    def layer_types(self) -> Vocabulary:
        """Layer types seen in blueprint metadata."""
        return self._tables["layer_types"]

    @property
    def activation_types(self) -> Vocabulary:
        """Activation types seen in blueprint metadata."""
        return self._tables["activation_types"]

    @property
    def optimizer_families(self) -> Vocabulary:
        """Optimizer families."""
        return self._tables["optimizer_families"]

    @property
    def hazard_classes(self) -> Vocabulary:
        """Hazard classes of safety sheets."""
        return self._tables["hazard_classes"]

    @property
    def blending_schedules(self) -> Vocabulary:
        """Blending schedules."""
        return self._tables["blending_schedules"]

    @property
    def size(self) -> int:
        """Number of names in all of them; grows with every name learnt."""
        return sum(map(len, self._tables.values()))

    def digests(self) -> dict[str, str]:
        """Digest of every vocabulary."""
        return {table: vocabulary.digest() for table, vocabulary in self._tables.items()}

    def snapshot(self) -> dict[str, list[str]]:
        """Names of every vocabulary in insertion order."""
        return {table: list(vocabulary) for table, vocabulary in self._tables.items()}

    def mismatches(self, digests: Mapping[str, object]) -> list[str]:
        """The vocabularies whose digest in `digests` belongs to no state they ever had."""
        return [
            table
            for table, digest in digests.items()
            if not isinstance(digest, str)
            or table not in self._tables
            or not self._tables[table].accepts(digest)
        ]

    def to_json(self) -> str:
        """The snapshot as JSON text."""
        return json.dumps(self.snapshot(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Vocabularies:
        """Read `to_json`'s text.

        Raises:
            ValueError: it is not that, or does not continue the founding names.
        """
        value = json.loads(text)
        if not isinstance(value, dict) or not all(
            isinstance(names, list) and all(isinstance(name, str) for name in names)
            for names in value.values()
        ):
            raise ValueError("a vocabulary snapshot is an object of lists of names")
        return cls(value)


@lru_cache(maxsize=8192)
def id_bucket(identifier: str) -> int:
    """Stable bucket in [0, 1024) of a seed or blueprint id, from a 64-bit hash."""
    data = identifier.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") % BUCKETS


def _digest(names: list[str]) -> str:
    pairs = sorted([name, index] for index, name in enumerate(names, start=1))
    return sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()
