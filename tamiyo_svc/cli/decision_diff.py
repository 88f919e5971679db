"""Recorded and replayed decisions side by side, and what differs between them, as text."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from google.protobuf.json_format import MessageToDict

from tamiyo_svc.cli.bus_message import decision_text, plain
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.signing import SIGNATURE_ANNOTATION, signed_bytes
from tamiyo_svc.service.recording import Recording
from tamiyo_svc.service.replay import Redecided, Replay

_REASON: Final = "risk_reason"
_POLICY_VERSION: Final = "policy_version"
_POLICY_ACTION: Final = "policy_action"
_NO_PROPOSAL: Final = ("timeout", "none")


class Agreement(StrEnum):
    """How a replayed command stands to the recorded one."""

    IDENTICAL = "identical"
    """Every byte but the signature."""
    SAME_DECISION = "same decision"
    """The same order; numbers or annotations differ."""
    DIFFERENT = "different"
    UNANSWERED = "without a proposal then"
    """The network had not answered in time, or was not asked: the recorded order is a safe one."""
    NOT_RECORDED = "not recorded"
    """There is no recorded command to compare with."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One packet with both decisions in words; `changes` are field -> (recorded, replayed)."""

    run_id: str
    packet_id: str
    step: int
    added_ms: int
    agreement: Agreement
    recorded: str
    recorded_reason: str
    replayed: str
    replayed_reason: str
    changes: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A whole replay compared; `digest` is the SHA-256 over all replayed commands, as hex.

    `others` counts the packets that were not decided, by what became of them.
    """

    policy: str
    recorded_policies: Mapping[str, int]
    rows: tuple[Compared, ...]
    others: Mapping[str, int]
    refused: Mapping[str, int]
    unmatched: int
    digest: str

    def count(self, agreement: Agreement) -> int:
        """How many packets ended so."""
        return sum(row.agreement is agreement for row in self.rows)

    @property
    def compared(self) -> int:
        """How many packets have both commands."""
        return len(self.rows) - self.count(Agreement.NOT_RECORDED)

    @property
    def agrees(self) -> bool:
        """Whether every decision that could be compared is the recorded one."""
        return not self.count(Agreement.DIFFERENT)

    def transitions(self) -> list[tuple[str, str, int]]:
        """What became of what, most frequent first, of the decisions that differ."""
        counts = Counter(
            (
                f"{row.recorded} ({row.recorded_reason})",
                f"{row.replayed} ({row.replayed_reason})",
            )
            for row in self.rows
            if row.agreement is Agreement.DIFFERENT
        )
        return [(before, after, count) for (before, after), count in counts.most_common()]

    def changed_fields(self) -> Counter[str]:
        """How often each field differs where the decision is the same."""
        return Counter(
            name
            for row in self.rows
            if row.agreement is Agreement.SAME_DECISION
            for name in row.changes
        )

    def document(self) -> dict[str, Any]:
        """Everything, as values JSON can hold."""
        return {
            "policy": self.policy,
            "recorded_policies": dict(self.recorded_policies),
            "packets": {"decided": len(self.rows), **self.others},
            "refused": dict(self.refused),
            "unmatched_commands": self.unmatched,
            "compared": self.compared,
            "agreement": {kind.value: self.count(kind) for kind in Agreement},
            "commands_sha256": self.digest,
            "decisions": [asdict(row) for row in self.rows],
        }


def compare(recording: Recording, replay: Replay) -> Comparison:
    """Put every replayed command beside the recorded one."""
    digest = hashlib.sha256()
    for one in replay.decided:
        digest.update(signed_bytes(one.command))
    used = {one.command.command_id for one in replay.decided if one.recorded is not None}
    others = {outcome.value: count for outcome, count in sorted(replay.others.items())}
    if replay.before:
        others["before the recording"] = replay.before
    return Comparison(
        policy=replay.policy.version,
        recorded_policies=Counter(
            one.recorded.annotations.get(_POLICY_VERSION, "unknown")
            for one in replay.decided
            if one.recorded is not None
        ),
        rows=tuple(map(_compare, replay.decided)),
        others=others,
        refused=dict(recording.refused),
        unmatched=len(recording.commands.keys() - used),
        digest=digest.hexdigest(),
    )


def comparison_text(comparison: Comparison, most: int) -> str:
    """The comparison for a terminal, with at most so many of the decisions that differ."""
    return "\n".join(plain(line) for line in _lines(comparison, most))


def _lines(comparison: Comparison, most: int) -> Iterator[str]:
    yield f"decided again: {len(comparison.rows)}, with policy {comparison.policy}"
    if comparison.others:
        yield f"not decided:   {_counts(comparison.others)}"
    if comparison.refused:
        yield f"refused:       {_counts(comparison.refused)}"
    if comparison.recorded_policies:
        yield f"recorded with: {_counts(comparison.recorded_policies)}"
    yield f"commands:      SHA-256 {comparison.digest}"
    if not comparison.compared:
        yield "agreement:     the recording holds no commands to compare with"
        return
    yield (
        f"agreement:     {comparison.compared} compared: "
        + ", ".join(f"{comparison.count(kind)} {kind.value}" for kind in list(Agreement)[:4])
    )
    if missing := comparison.count(Agreement.NOT_RECORDED):
        yield f"               {missing} decided packets have no recorded command"
    if comparison.unmatched:
        yield f"               {comparison.unmatched} recorded commands have no packet here"
    for name, count in comparison.changed_fields().most_common(most):
        yield f"  other detail: {name} in {count}"
    for before, after, count in comparison.transitions()[:most]:
        yield f"  {count} x {before} -> {after}"
    different = [row for row in comparison.rows if row.agreement is Agreement.DIFFERENT]
    for row in different[:most]:
        yield (
            f"  {row.run_id} step {row.step} {row.packet_id}: {row.recorded} "
            f"({row.recorded_reason}) -> {row.replayed} ({row.replayed_reason})"
        )
    if len(different) > most:
        yield f"  and {len(different) - most} more"


def _compare(one: Redecided) -> Compared:
    packet, recorded, replayed = one.received.packet, one.recorded, one.command
    agreement = Agreement.NOT_RECORDED
    changes: Mapping[str, tuple[str, str]] = {}
    if recorded is not None:
        before, after = _leaves(recorded), _leaves(replayed)
        changes = {
            name: (before.get(name, ""), after.get(name, ""))
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        }
        if signed_bytes(recorded) == signed_bytes(replayed):
            agreement = Agreement.IDENTICAL
        elif _order(recorded) == _order(replayed):
            agreement = Agreement.SAME_DECISION
        elif _proposed(replayed) and not _proposed(recorded):
            agreement = Agreement.UNANSWERED
        else:
            agreement = Agreement.DIFFERENT
    return Compared(
        run_id=packet.training_run_id,
        packet_id=packet.packet_id,
        step=packet.global_step,
        added_ms=one.received.entry.added_ms,
        agreement=agreement,
        recorded="" if recorded is None else decision_text(recorded),
        recorded_reason="" if recorded is None else recorded.annotations.get(_REASON, "-"),
        replayed=decision_text(replayed),
        replayed_reason=replayed.annotations.get(_REASON, "-"),
        changes=changes,
    )


def _proposed(command: leyline.AdaptationCommand) -> bool:
    """Whether a command was made from a proposal of the network."""
    return command.annotations.get(_POLICY_ACTION) not in _NO_PROPOSAL


def _order(command: leyline.AdaptationCommand) -> tuple[object, ...]:
    """What a command orders: numbers that only shape a seed's blending are details."""
    adjustment = command.optimizer_adjustment
    return (
        command.command_type,
        command.target_seed_id,
        command.seed_operation.operation,
        command.seed_operation.blueprint_id,
        adjustment.optimizer_id,
        tuple(sorted(adjustment.hyperparameters.items())),
        command.circuit_breaker.desired_state,
    )


def _leaves(command: leyline.AdaptationCommand) -> dict[str, str]:
    """Every field of a command by its dotted name, without the signature."""
    leaves: dict[str, str] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, inner)
        else:
            leaves[prefix] = str(value)

    walk("", MessageToDict(command, preserving_proto_field_name=True))
    leaves.pop(f"annotations.{SIGNATURE_ANNOTATION}", None)
    return leaves


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
