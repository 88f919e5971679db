"""`tamiyo policy`: make, look into, test, publish and take back policies."""

from __future__ import annotations

import base64
import getpass
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from google.protobuf.message import DecodeError
from redis import Redis
from redis.exceptions import RedisError
from rich.table import Table

from tamiyo_svc.adapters.oona.connection import OUTAGE_ERRORS
from tamiyo_svc.adapters.oona.entries import read_entries
from tamiyo_svc.adapters.oona.policy_stream import (
    ReplicaStatus,
    last_id,
    open_stream,
    publish_update,
    read_statuses,
)
from tamiyo_svc.errors import BusError, ConfigurationError, PolicyRejectedError
from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import EnvelopeRejectedError, open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.checkpoint import (
    MAX_BYTES,
    Checkpoint,
    header_bytes,
    read_checkpoint,
    read_header,
    write_policy,
)
from tamiyo_svc.policy.evaluator import Policy, PolicyEvaluator, PolicyRequest, build_policy
from tamiyo_svc.policy.golden import read_golden, record_golden, replay_golden, sample_requests
from tamiyo_svc.policy.network import NetworkConfig, to_contract_name
from tamiyo_svc.policy.update import ACTION_ATTRIBUTE, ISSUED_BY_ATTRIBUTE
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.taxonomy import Event, PolicyUpdateAction

_ANSWERS: Final = {
    PolicyUpdateAction.APPLY: Event.POLICY_UPDATE_APPLIED,
    PolicyUpdateAction.PROMOTE: Event.POLICY_UPDATE_APPLIED,
    PolicyUpdateAction.SHADOW: Event.POLICY_SHADOW_STARTED,
    PolicyUpdateAction.ROLLBACK: Event.POLICY_ROLLED_BACK,
}
_POLL_MS: Final = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """What one replica made of an update."""

    replica: str
    accepted: bool
    detail: str


def init(path: Path, start: str, vocabularies: Vocabularies, config: NetworkConfig | None) -> None:
    """Write a new checkpoint with the weights of a built-in policy.

    Raises:
        ConfigurationError: no such start, or the file exists or cannot be written.
    """
    if start not in ("untrained", "bootstrap"):
        raise ConfigurationError(f"--from: got {start!r}, takes untrained or bootstrap")
    policy = build_policy("bootstrap" if start == "bootstrap" else "untrained", config)
    _write_new(path, write_policy(policy, vocabularies, _now_text()))


def inspect(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself, from its header alone where it has one.

    Raises:
        ConfigurationError: it cannot be read.
        PolicyRejectedError: it is no checkpoint.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            zipped = prefix[:4] == b"PK\x03\x04"
            if not zipped:
                prefix += file.read(header_bytes(prefix, size) - 8)
    except OSError as error:
        raise _unreadable(path, error) from None
    if zipped:
        checkpoint_format, metadata, shapes = "state dict", *_state_dict_shapes(path, size)
    else:
        metadata, header = read_header(prefix, size)
        checkpoint_format = "safetensors"
        shapes = {name: tuple(each["shape"]) for name, each in header.items()}
    golden = metadata.get("golden") or ()
    return {
        "file": str(path),
        "format": checkpoint_format,
        "bytes": size,
        "architecture_version": metadata.get("architecture_version"),
        "policy_id": metadata.get("policy_id"),
        "version": metadata.get("version"),
        "created_at": metadata.get("created_at"),
        "untrained": metadata.get("untrained"),
        "config": metadata.get("config"),
        "registries": metadata.get("registries"),
        "golden_packets": len(golden),
        "tensors": len(shapes),
        "parameters": sum(_count(shape) for shape in shapes.values()),
    }


def verify(path: Path, vocabularies: Vocabularies) -> Policy:
    """Do to a checkpoint what a service does before it swaps, but for the time limit.

    Raises:
        ConfigurationError: it cannot be read.
        PolicyRejectedError: a service would refuse it.
    """
    checkpoint = read(path, vocabularies)
    policy = checkpoint.build()
    evaluator = _evaluator(policy, vocabularies)
    replay_golden(evaluator, [(sample, {}) for sample in sample_requests()])
    replay_golden(evaluator, read_golden(checkpoint.metadata.get("golden")))
    return policy


def read(path: Path, vocabularies: Vocabularies) -> Checkpoint:
    """A checkpoint from a file.

    Raises:
        ConfigurationError, PolicyRejectedError: as for `verify`.
    """
    return read_checkpoint(read_payload(path), vocabularies)


def diff(one: Checkpoint, other: Checkpoint) -> dict[str, Any]:
    """How two checkpoints differ: metadata, and per weight the largest difference."""
    metadata = {
        key: [one.metadata.get(key), other.metadata.get(key)]
        for key in sorted(one.metadata.keys() | other.metadata.keys())
        if key != "golden" and one.metadata.get(key) != other.metadata.get(key)
    }
    weights: dict[str, float | str] = {}
    for name in sorted(one.weights.keys() | other.weights.keys()):
        a, b = one.weights.get(name), other.weights.get(name)
        if a is None or b is None or a.shape != b.shape:
            weights[to_contract_name(name)] = "shapes differ"
        elif largest := float((a - b).abs().max()):
            weights[to_contract_name(name)] = largest
    return {"metadata": metadata, "weights": weights, "compared": len(one.weights)}


def pack(
    path: Path,
    packets: Path | None,
    out: Path,
    vocabularies: Vocabularies,
    policy_id: str | None,
    version: str | None,
) -> int:
    """Write a checkpoint again with what it decides embedded; returns how many packets.

    Raises:
        ConfigurationError: a file cannot be read or written.
        PolicyRejectedError: the checkpoint is refused.
        InferenceError: it fails on one of the packets.
    """
    policy = read(path, vocabularies).build(policy_id or "", version or "")
    requests = sample_requests() if packets is None else list(_read_packets(packets))
    golden = record_golden(_evaluator(policy, vocabularies), requests)
    _write_new(out, write_policy(policy, vocabularies, _now_text(), golden))
    return len(golden)


def publish(
    settings: Settings,
    action: PolicyUpdateAction,
    payload: bytes = b"",
    *,
    policy_id: str = "",
    version: str = "",
    timeout_s: float,
    on_answer: Callable[[Answer], None],
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Sign and publish an update, then wait for every live replica's answer.

    True when each of them took it; False when one refused it or did not answer in time, or when
    there is none.

    Raises:
        ConfigurationError: no secret, or the update is too large.
        BusError: Redis did not take it, or was lost while the answers were awaited.
    """
    keyring = settings.keyring()
    update = leyline.PolicyUpdate(
        version=1, policy_id=policy_id, tamiyo_policy_version=version, payload=payload
    )
    update.issued_at.FromNanoseconds(time.time_ns())
    attributes = {
        ACTION_ATTRIBUTE: action.value,
        ISSUED_BY_ATTRIBUTE: f"{_user()}@{socket.gethostname()}",
    }
    sealed = seal(update, keyring, attributes)
    if len(sealed.payload) > MAX_BYTES:
        raise ConfigurationError(f"{len(sealed.payload)} bytes, replicas take {MAX_BYTES}")
    digest = sha256(sealed.payload).hexdigest()
    with open_stream(settings.redis_url) as redis:
        waiting = {status.replica for status in read_statuses(redis)}
        streams = {
            stream: last_id(redis, stream)
            for stream in settings.in_partitions(
                settings.telemetry_stream, settings.emergency_stream
            )
        }
        publish_update(redis, settings.policy_stream, sealed)
        accepted = bool(waiting)
        deadline = clock() + timeout_s
        while waiting and clock() < deadline:
            for answer in _answers(redis, streams, keyring, digest, _ANSWERS[action]):
                if answer.replica in waiting:
                    waiting.discard(answer.replica)
                    accepted = accepted and answer.accepted
                    on_answer(answer)
        for replica in sorted(waiting):
            on_answer(Answer(replica, accepted=False, detail=f"no answer within {timeout_s:g} s"))
    return accepted and not waiting


def replicas(settings: Settings) -> list[ReplicaStatus]:
    """What every live replica serves.

    Raises:
        BusError: Redis did not answer.
    """
    with open_stream(settings.redis_url) as redis:
        return read_statuses(redis)


def replicas_table(statuses: Sequence[ReplicaStatus]) -> Table:
    """The same as a table."""
    table = Table(title="Policies", title_justify="left")
    for column in ("Replica", "Policy", "Version", "Weights", "Before", "Probation", "Shadow"):
        table.add_column(column, overflow="fold")
    for status in statuses:
        shadow = status.shadow
        row = (
            status.replica,
            status.policy_id,
            status.version,
            status.digest[:12],
            status.previous or "-",
            f"{status.probation_left} left" if status.probation_left else "-",
            "-"
            if shadow is None
            else f"{shadow['version']}: agrees on {shadow['agreement']} of {shadow['compared']}, "
            f"p99 {shadow['candidate_p99_ms']} ms beside {shadow['live_p99_ms']} ms",
        )
        table.add_row(*(text.replace("[", "\\[") for text in row))
    return table


def details_table(title: str, values: Mapping[str, Any]) -> Table:
    """Names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        table.add_row(name, text.replace("[", "\\["))
    return table


def read_payload(path: Path) -> bytes:
    """The bytes of a checkpoint to publish.

    Raises:
        ConfigurationError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _answers(
    redis: Redis, streams: dict[str, str], keyring: Keyring | None, digest: str, accepted: Event
) -> Iterator[Answer]:
    """Answers to one update among the telemetry that came since the last call."""
    try:
        reply: Any = redis.xread(dict(streams.items()), count=100, block=_POLL_MS)
    except (*OUTAGE_ERRORS, RedisError) as error:
        raise BusError(f"the update is published, its answers are not heard: {error!r}") from error
    for entry in read_entries(reply):
        streams[entry.stream] = entry.entry_id
        try:
            envelope = open_envelope(entry.fields, keyring)
            if envelope.message_type != leyline.BUS_MESSAGE_TYPE_TELEMETRY:
                continue
            telemetry = parse_payload(envelope)
        except EnvelopeRejectedError:
            continue
        assert isinstance(telemetry, leyline.TelemetryPacket)
        replica = telemetry.system_health.indicators.get("replica", "")
        for event in telemetry.events:
            if event.attributes.get("update") != digest:
                continue
            if event.description == accepted.value:
                took = event.attributes.get("took_ms", "")
                yield Answer(replica, accepted=True, detail=f"after {took} ms" if took else "done")
            elif event.description == Event.POLICY_UPDATE_REJECTED.value:
                reason, detail = event.attributes["reason"], event.attributes["detail"]
                yield Answer(replica, accepted=False, detail=f"{reason}: {detail}")


def _state_dict_shapes(path: Path, size: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata and shapes of a `torch.save` file, its weights mapped and not read."""
    if size > MAX_BYTES:
        raise PolicyRejectedError("payload_too_large", f"{size} bytes")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        metadata = dict(state.pop("_metadata", None) or getattr(state, "_metadata", {}))
        return metadata, {name: tuple(weight.shape) for name, weight in state.items()}
    except Exception as error:
        raise PolicyRejectedError("invalid_payload", f"{type(error).__name__}: {error}") from error


def _evaluator(policy: Policy, vocabularies: Vocabularies) -> PolicyEvaluator:
    torch.set_num_threads(1)
    return PolicyEvaluator(GraphBuilder(GraphLimits(), vocabularies), policy)


def _read_packets(path: Path) -> Iterator[PolicyRequest]:
    """State packets from a file of JSON lines, each `{"packet": base64}`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    for number, line in enumerate(lines, start=1):
        try:
            data = base64.b64decode(json.loads(line)["packet"], validate=True)
            yield PolicyRequest(leyline.SystemStatePacket.FromString(data), (), {})
        except (ValueError, KeyError, TypeError, DecodeError) as error:
            raise ConfigurationError(
                f"{path}, line {number}: no packet ({type(error).__name__}), "
                'takes {"packet": "<base64>"}'
            ) from None


def _write_new(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        raise ConfigurationError(f"{path}: exists already, takes a new file") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written ({error.strerror})") from None


def _unreadable(path: Path, error: Exception) -> ConfigurationError:
    detail = getattr(error, "strerror", None) or "not text"
    return ConfigurationError(f"{path}: cannot be read ({detail})")


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _now_text() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        return str(os.getuid())
