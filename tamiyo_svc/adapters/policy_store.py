"""Policies on disk: the last known good one, the one before it, and how far the stream was read.

A manifest names the files and is replaced as a whole, so a crash leaves the old state or the new
one. Files are named by the digest of their weights and never written to once they are named.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from tamiyo_svc.errors import PolicyRejectedError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.checkpoint import check_checkpoint, header_bytes, read_header
from tamiyo_svc.policy.compiled import PackedWeights
from tamiyo_svc.policy.evaluator import Policy, build_policy
from tamiyo_svc.policy.network import KeptNetwork, NetworkConfig, TamiyoNetwork
from tamiyo_svc.policy.update import PackedFile, TakenUpdates
from tamiyo_svc.taxonomy import PolicyRejection

_FOLDER: Final = "policies"
_MANIFEST: Final = "manifest.json"
_VERSION: Final = 1
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NUMPY_DTYPES: Final = {"F32": np.float32, "F16": np.float16}
# What is written, read or given back at once: the kernel takes 3.5 ms to write 1 MiB, and 0.01 ms
# to take it back.
_WRITTEN_BYTES: Final = 128 << 10
_GIVEN_BACK_BYTES: Final = 1 << 20
# From falloc.h: the bytes go, the size stays, and whoever has them mapped reads zeros.
_KEEP_SIZE_PUNCH_HOLE: Final = 0x03


@dataclass(frozen=True, slots=True)
class KeptPolicy:
    """A policy that can be loaded again; `file` is empty for one that is built in."""

    policy_id: str
    version: str
    digest: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is kept: policies, the last entry of the policy stream dealt with, updates taken."""

    cursor: str = "0"
    current: KeptPolicy | None = None
    previous: KeptPolicy | None = None
    taken: TakenUpdates = field(default_factory=TakenUpdates)
    shadow: KeptPolicy | None = None
    """What runs beside the current one."""

    def with_current(self, policy: KeptPolicy) -> Manifest:
        """The same with another policy serving and the one before kept for a rollback."""
        if self.current is not None and self.current.digest == policy.digest:
            return replace(self, current=policy)
        return replace(self, current=policy, previous=self.current)


class _Mapped(NamedTuple):
    """The file that a network's weights lie in, and the memory that it is mapped into."""

    path: Path
    memory: mmap.mmap


class PolicyStore:
    """The policies under a state folder; one process writes at a time."""

    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir / _FOLDER
        self._mapped: WeakKeyDictionary[TamiyoNetwork, _Mapped] = WeakKeyDictionary()

    def load(self) -> Manifest:
        """The manifest, or an empty one where there is none that can be read."""
        try:
            return _read_manifest((self.folder / _MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            # Without it the policy stream is read from its beginning, which is always right.
            return Manifest()

    def save(self, manifest: Manifest) -> None:
        """Replace the manifest, then remove the files it no longer names.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": _VERSION, **asdict(manifest)}, indent=1)
        temporary = self.folder / f"{_MANIFEST}.{os.getpid()}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / _MANIFEST)
        _sync_folder(self.folder)

    def sweep(self, manifest: Manifest) -> None:
        """Remove every policy file but those of the manifest and of networks not yet freed."""
        policies = (manifest.current, manifest.previous, manifest.shadow)
        # A checkpoint that the operator named may lie here, too.
        kept = {(self.folder / policy.file).resolve() for policy in policies if policy}
        networks = [reference() for reference in self._mapped.keyrefs()]
        kept |= {self._mapped[network].path for network in networks if network is not None}
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name != _MANIFEST and path.resolve() not in kept:
                    _remove(path)

    def write(self, digest: str, data: bytes) -> str:
        """Keep a checkpoint under the digest of its weights; returns the file's name.

        Raises:
            OSError: the folder cannot be written to.
        """
        name = f"{digest}.safetensors"
        self._write(name, data)
        return name

    def write_packed(self, digest: str, packed: PackedWeights) -> PackedFile:
        """Leave a policy's packed weights to be read once, soon.

        Raises:
            OSError: the folder cannot be written to.
        """
        metadata = {
            "config": json.dumps(asdict(packed.config)),
            "columns": json.dumps(
                {name: (part.start, part.stop) for name, part in packed.columns.items()}
            ),
        }
        data = safetensors.numpy.save(packed.arrays, metadata)
        name = f"{digest}.packed"
        self._write(name, data)
        return PackedFile(name, sha256(data).hexdigest())

    def take_packed(self, file: PackedFile) -> PackedWeights:
        """Read packed weights and remove their file.

        Raises:
            OSError: it cannot be read.
            ValueError: it does not hold what was written.
        """
        path = self.folder / file.name
        try:
            with path.open("rb") as source:
                return _read_packed(source, file.digest)
        except (PolicyRejectedError, ValueError, KeyError, TypeError, MemoryError) as error:
            raise ValueError(f"{file.name}: {error}") from error
        finally:
            _remove(path)

    def _write(self, name: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{name}.{os.getpid()}.tmp"
        with temporary.open("wb") as file:
            # A process cannot be stopped within a write.
            for start in range(0, len(data), _WRITTEN_BYTES):
                file.write(memoryview(data)[start : start + _WRITTEN_BYTES])
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / name)
        _sync_folder(self.folder)

    def open(self, kept: KeptPolicy, vocabularies: Vocabularies) -> Policy:
        """Load a kept policy, checking it as if it had come from outside.

        Its weights are mapped into memory rather than read: a single read of 56 MB would keep every
        other thread of the interpreter waiting.

        Raises:
            PolicyRejectedError: its file is gone, damaged or not the one that was kept.
        """
        if not kept.file:
            name = kept.policy_id
            if name not in ("untrained", "bootstrap"):
                raise PolicyRejectedError(
                    PolicyRejection.INVALID_PAYLOAD, f"{name!r} is not built in"
                )
            policy = build_policy("bootstrap" if name == "bootstrap" else "untrained")
            return replace(policy, version=kept.version)
        path = self.folder / kept.file
        weights, metadata, memory = _map_file(path)
        checkpoint = check_checkpoint(
            weights, metadata, vocabularies, check_architecture=False, copy=False
        )
        policy = checkpoint.build(kept.policy_id, kept.version)
        if policy.digest != kept.digest:
            raise PolicyRejectedError(
                PolicyRejection.INVALID_PAYLOAD, f"{kept.file} holds other weights than it should"
            )
        self._mapped[policy.network] = _Mapped(path.resolve(), memory)
        return policy

    def open_when_needed(
        self, kept: KeptPolicy, vocabularies: Vocabularies, *, untrained: bool
    ) -> Policy:
        """A kept policy that another process has read and packed; its file is opened, as above, if
        the network itself is needed.
        """
        return Policy(
            policy_id=kept.policy_id,
            version=kept.version,
            digest=kept.digest,
            untrained=untrained,
            weights=KeptNetwork(lambda: self.open(kept, vocabularies).network),
        )

    def give_back(self, policy: Policy) -> None:
        """Let the system have the memory that a policy's weights are mapped into.

        Whoever reads them again has them mapped again. What is left to do when the policy goes is
        little then.
        """
        weights = policy.weights
        network = weights.loaded if isinstance(weights, KeptNetwork) else weights
        mapped = self._mapped.get(network) if network is not None else None
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            size = len(mapped.memory)
            for start in range(0, size, _GIVEN_BACK_BYTES):
                length = min(_GIVEN_BACK_BYTES, size - start)
                mapped.memory.madvise(mmap.MADV_DONTNEED, start, length)


def _remove(path: Path) -> None:
    """Remove a file, and what it held part by part if this was its last name.

    The kernel takes 9 ms to drop 56 MB at once, in which nobody else gets that processor.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        path.unlink(missing_ok=True)
        return
    try:
        path.unlink(missing_ok=True)
        status = os.fstat(descriptor)
        size = 0 if status.st_nlink else status.st_size
        with suppress(AttributeError):  # Linux alone has this
            punch = ctypes.CDLL(None).fallocate
            for start in range(0, size, _WRITTEN_BYTES):
                part = ctypes.c_int64(start), ctypes.c_int64(_WRITTEN_BYTES)
                if punch(descriptor, _KEEP_SIZE_PUNCH_HOLE, *part):
                    return  # this file system cannot
    finally:
        os.close(descriptor)


def _read_packed(source: IO[bytes], digest: str) -> PackedWeights:
    size = os.fstat(source.fileno()).st_size
    seen = sha256()

    def fill(part: memoryview) -> None:
        if source.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise ValueError("the file ends early")
        seen.update(part)

    prefix = bytearray(8)
    fill(memoryview(prefix))
    prefix += bytes(header_bytes(bytes(prefix), size) - len(prefix))
    fill(memoryview(prefix)[8:])
    metadata, header = read_header(bytes(prefix), size)
    arrays = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        arrays[name] = array = np.empty(entry["shape"], _NUMPY_DTYPES[entry["dtype"]])
        into = array.reshape(-1).view(np.uint8).data
        # In parts, so that a thread that stands back can do so.
        for start in range(0, len(into), _WRITTEN_BYTES):
            fill(into[start : start + _WRITTEN_BYTES])
    if seen.hexdigest() != digest:
        raise ValueError("it was changed")
    columns = {name: slice(*ends) for name, ends in json.loads(metadata["columns"]).items()}
    return PackedWeights(NetworkConfig(**metadata["config"]), columns, arrays)


def _map_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], mmap.mmap]:
    """Weights and metadata of a safetensors file, and the memory that the weights lie in."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = header_bytes(prefix, size)
            metadata, header = read_header(prefix + file.read(length - 8), size)
            # A private copy that nobody writes to: torch takes no memory that is read-only.
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        return dict(_tensors(memory, header, length)), metadata, memory
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise PolicyRejectedError(
            PolicyRejection.INVALID_PAYLOAD, f"{path.name}: {error}"
        ) from error


def _tensors(memory: mmap.mmap, header: dict[str, Any], start: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a header's table; their bytes begin at `start`."""
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        count = (end - begin) // dtype.itemsize
        weight = torch.frombuffer(memory, dtype=dtype, count=count, offset=start + begin)
        yield name, weight.reshape(entry["shape"])


def _read_manifest(text: str) -> Manifest:
    value = json.loads(text)
    if value["format"] != _VERSION:
        raise ValueError("written by another release")
    return Manifest(
        cursor=str(value["cursor"]),
        current=KeptPolicy(**value["current"]) if value["current"] else None,
        previous=KeptPolicy(**value["previous"]) if value["previous"] else None,
        shadow=KeptPolicy(**value["shadow"]) if value.get("shadow") else None,
        taken=TakenUpdates(
            {str(name): int(when) for name, when in value["taken"]["issued_ns"].items()},
            tuple(map(str, value["taken"]["digests"])),
        ),
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
