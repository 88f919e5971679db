"""Packets and reports from plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.message import Message

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import AckOutcome

_MAX_NOTE_CHARS: Final = 200
LARGEST: Final = 3.4e38
"""About the largest number that a packet's 32-bit floats can hold."""
_FLOAT: Final = frozenset({float})

SeedValues = leyline.SeedState | Mapping[str, Any]
HardwareValues = leyline.HardwareContext | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class State:
    """How training stands after a step.

    Losses in the loss's own unit, `validation_accuracy` in 0 to 1, `epoch` from 1. `metrics` are
    named with their unit, such as `step_latency_ms`. Seeds and hardware are Leyline messages or
    mappings of the same fields. What is None is left out.
    """

    training_loss: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    epoch: int = 1
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    seeds: Sequence[SeedValues] = ()
    hardware: HardwareValues | None = None


# Not frozen like `State`, as it is made in the training thread and that takes three times as long.
@dataclass(slots=True, eq=False)
class Snapshot:
    """A state as it was: numbers of its own, and its messages as bytes."""

    training_loss: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    epoch: int
    metrics: dict[str, float]
    seeds: list[bytes]
    hardware: bytes | None


def freeze(state: State) -> Snapshot:
    """A copy that no later change to the caller's values reaches.

    Metrics that are no numbers are left out.

    Raises:
        TypeError, ValueError: another value does not fit its field.
    """
    return Snapshot(
        _number(state.training_loss),
        _number(state.validation_loss),
        _number(state.validation_accuracy),
        state.epoch,
        _numbers(state.metrics),
        [_bytes(leyline.SeedState, seed) for seed in state.seeds],
        None if state.hardware is None else _bytes(leyline.HardwareContext, state.hardware),
    )


def build_packet(
    state: Snapshot,
    *,
    run_id: str,
    packet_id: str,
    step: int,
    timestamp_ns: int,
    experiment: str = "",
) -> leyline.SystemStatePacket:
    """The state packet of one step; metrics too large for it become the largest number it holds.

    Raises:
        TypeError, ValueError: a value does not fit its field.
    """
    hardware = state.hardware
    return leyline.SystemStatePacket(
        version=1,
        packet_id=packet_id,
        training_run_id=run_id,
        experiment_name=experiment,
        source_subsystem="tolaria",
        current_epoch=state.epoch,
        global_step=step,
        timestamp_ns=timestamp_ns,
        training_loss=state.training_loss,
        validation_loss=state.validation_loss,
        validation_accuracy=state.validation_accuracy,
        hardware_context=None if hardware is None else leyline.HardwareContext.FromString(hardware),
        training_metrics={name: _limit(value) for name, value in state.metrics.items()},
        seed_states=[leyline.SeedState.FromString(seed) for seed in state.seeds],
    )


def build_report(
    command: leyline.AdaptationCommand,
    outcome: AckOutcome,
    reason: str,
    *,
    run_id: str,
    issued_ns: int,
) -> leyline.FieldReport:
    """The field report that says what became of a command.

    Raises:
        ValueError: no such outcome.
    """
    outcome = AckOutcome(outcome)
    applied = outcome is AckOutcome.APPLIED
    report = leyline.FieldReport(
        version=1,
        report_id=f"fr-ack-{command.command_id}",
        command_id=command.command_id,
        training_run_id=run_id,
        seed_id=command.target_seed_id,
        blueprint_id=command.seed_operation.blueprint_id,
        outcome=leyline.FIELD_REPORT_OUTCOME_SUCCESS
        if applied
        else leyline.FIELD_REPORT_OUTCOME_ABORTED,
        tamiyo_policy_version=command.annotations.get("policy_version", ""),
        notes=f"{outcome}: {reason}"[:_MAX_NOTE_CHARS] if reason else str(outcome),
    )
    report.issued_at.FromNanoseconds(issued_ns)
    return report


def _number(value: Any) -> float | None:
    return None if value is None else _limit(float(value))


def _limit(value: float) -> float:
    # What is infinite stays so.
    return math.copysign(LARGEST, value) if LARGEST < abs(value) < math.inf else value


def _bytes(kind: type[Message], value: Any) -> bytes:
    message = value if isinstance(value, kind) else kind(**value)
    return message.SerializeToString()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    if set(map(type, metrics.values())) <= _FLOAT:
        return dict(metrics)
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        # RuntimeError is what a tensor of several elements raises.
        except (TypeError, ValueError, OverflowError, RuntimeError):
            continue
    return numbers
