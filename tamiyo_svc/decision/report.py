"""Field reports: one per decision, and one for what was observed after a command."""

from __future__ import annotations

from typing import Final

from tamiyo_svc.decision.observation import ObservationWindow, Sums
from tamiyo_svc.decision.record import Decision, timestamp
from tamiyo_svc.decision.telemetry import Timings
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.events import FiredEvent, most_severe
from tamiyo_svc.taxonomy import CommandAction, Event, InferenceStatus, Severity

_SAFE_COMMANDS: Final = (
    InferenceStatus.TIMED_OUT,
    InferenceStatus.LANE_BUSY,
    InferenceStatus.FAILED,
)
_TIMEOUTS: Final = (Event.TIMEOUT_INFERENCE, Event.LANE_BUSY, Event.TIMEOUT_URZA)
_REGRESSIONS: Final = frozenset(
    {
        Event.BP_QUARANTINE,
        Event.BSDS_HANDLING_QUARANTINE,
        Event.BSDS_HAZARD_CRITICAL,
        Event.LOSS_SPIKE,
        # What no spike could exceed.
        Event.LOSS_NONFINITE,
        Event.ISOLATION_VIOLATIONS,
        Event.HOOK_BUDGET,
    }
)
"""Events that, from HIGH on, make a decision's report a regression."""


def build_report(
    decision: Decision,
    command: leyline.AdaptationCommand,
    timings: Timings,
    window_epochs: int = 1,
) -> leyline.FieldReport:
    """What became of one decision; `window_epochs` is how long its effect is observed."""
    packet = decision.packet
    report = leyline.FieldReport(
        version=1,
        report_id=f"fr-{command.command_id}",
        command_id=command.command_id,
        training_run_id=packet.training_run_id,
        seed_id=command.target_seed_id,
        blueprint_id=command.seed_operation.blueprint_id,
        outcome=_outcome(decision),
        observation_window_epochs=window_epochs,
        issued_at=timestamp(decision.now_ns),
        tamiyo_policy_version=decision.runtime.policy.version,
        notes=_notes(decision),
    )
    report.metrics.update(_metrics(decision, timings))
    return report


def build_synthesised_report(window: ObservationWindow, run_id: str) -> leyline.FieldReport:
    """What was observed after one command, from a window that closed.

    Seed, blueprint, policy and time of issue are the command's. `notes` says how the window ended
    and, after a colon, the command's reason.
    """
    command, sums = window.command, window.sums
    ended = "closed_early" if window.closed_early else Event.FIELD_REPORT_SYNTHESISED.value
    report = leyline.FieldReport(
        version=1,
        report_id=f"fr-synth-{command.command_id}-{window.label}",
        command_id=command.command_id,
        training_run_id=run_id,
        seed_id=command.seed_id,
        blueprint_id=command.blueprint_id,
        outcome=_observed_outcome(sums),
        observation_window_epochs=window.observed_epochs,
        issued_at=timestamp(command.issued_at_ns),
        tamiyo_policy_version=command.policy_version,
        notes=f"{ended}:{command.reason}" if command.reason else ended,
    )
    report.metrics["observed_epochs"] = window.observed_epochs
    report.metrics["observed_steps"] = window.observed_steps
    report.metrics["loss_delta_total"] = sums.loss_delta_total
    if sums.losses:
        report.metrics["loss_delta_min"] = sums.loss_delta_min
        report.metrics["loss_delta_max"] = sums.loss_delta_max
    if sums.hooks:
        report.metrics["avg_hook_latency_ms"] = sums.hook_latency_total_ms / sums.hooks
    return report


def synthesised_event(window: ObservationWindow) -> FiredEvent:
    """The event that goes with a synthesised report."""
    command = window.command
    attributes = {
        "command_id": command.command_id,
        "seed_id": command.seed_id,
        "blueprint_id": command.blueprint_id,
        "reason": command.reason,
        "start_epoch": str(window.start_epoch),
        "start_step": str(window.start_step),
        "epochs": str(window.observed_epochs),
        "steps": str(window.observed_steps),
        "closed_early": str(int(window.closed_early)),
    }
    return FiredEvent(Event.FIELD_REPORT_SYNTHESISED, Severity.INFO, attributes)


def _outcome(decision: Decision) -> leyline.FieldReportOutcome:
    verdict = decision.verdict
    severe = {event.event for event in verdict.events if event.severity >= Severity.HIGH}
    if Event.COMMAND_FAILED in severe:
        return leyline.FIELD_REPORT_OUTCOME_ABORTED
    if decision.signals.inference.status in _SAFE_COMMANDS:
        return leyline.FIELD_REPORT_OUTCOME_NEUTRAL
    if severe & _REGRESSIONS:
        return leyline.FIELD_REPORT_OUTCOME_REGRESSION
    if verdict.action is CommandAction.PAUSE and (
        decision.conservative
        or verdict.leading is None
        or verdict.leading.severity is Severity.INFO
    ):
        return leyline.FIELD_REPORT_OUTCOME_NEUTRAL
    return leyline.FIELD_REPORT_OUTCOME_SUCCESS


def _observed_outcome(sums: Sums) -> leyline.FieldReportOutcome:
    if sums.critical or sums.loss_delta_total > 0.0:
        return leyline.FIELD_REPORT_OUTCOME_REGRESSION
    if sums.loss_delta_total < 0.0:
        return leyline.FIELD_REPORT_OUTCOME_SUCCESS
    return leyline.FIELD_REPORT_OUTCOME_NEUTRAL


def _notes(decision: Decision) -> str:
    for fired in decision.verdict.events:
        if fired.event in _TIMEOUTS:
            return fired.event.value
    # An event that merely informs does not displace the blend, as it does not give the reason.
    telling = [fired for fired in decision.events if fired.severity > Severity.INFO]
    leading = most_severe(telling) or decision.verdict.leading
    if leading is not None:
        return leading.event.value
    proposal = decision.proposal
    return f"blending:{proposal.blending_method if proposal is not None else 'none'}"


def _metrics(decision: Decision, timings: Timings) -> dict[str, float]:
    signals, proposal = decision.signals, decision.proposal
    known: dict[str, float | None] = {
        "loss_delta": signals.loss_delta,
        "hook_latency_ms": signals.hook_latency_ms,
        "tamiyo_latency_ms": timings.step_ms,
        "blueprint_risk": signals.blueprint_risk,
    }
    if proposal is not None:
        known |= {
            "param_delta": proposal.param_delta,
            "value_estimate": proposal.value_estimate,
            "risk_index": float(proposal.risk_index),
            "risk_score": proposal.risk_score,
            "blending_index": float(proposal.blending_method_index),
            "blending_schedule_start": proposal.schedule_start,
            "blending_schedule_end": proposal.schedule_end,
            "selected_seed_score": proposal.seed_score,
        }
    return {name: value for name, value in known.items() if value is not None}
