"""The risk rules as one table, in the order that decides between events of equal severity."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk import checks
from tamiyo_svc.risk.checks import Check
from tamiyo_svc.taxonomy import CommandAction, Event, InferenceStatus, Severity, TimeoutAction


class Effect(Enum):
    """What a rule does to a proposed action."""

    NONE = "none"
    SEED_TO_OPTIMIZER = "seed_to_optimizer"
    SEED_TO_PAUSE = "seed_to_pause"
    PAUSE = "pause"
    SAFE_COMMAND = "safe_command"
    """There is no proposal: the configured safe command stands in for it."""


def effect_on(effect: Effect, proposed: CommandAction) -> CommandAction:
    """The action a rule with this effect asks for; `proposed` where it asks for none."""
    if effect is Effect.PAUSE:
        return CommandAction.PAUSE
    if proposed is CommandAction.SEED:
        if effect is Effect.SEED_TO_OPTIMIZER:
            return CommandAction.OPTIMIZER
        if effect is Effect.SEED_TO_PAUSE:
            return CommandAction.PAUSE
    return proposed


def safe_action(timeout_action: TimeoutAction) -> CommandAction:
    """The action that stands in for a proposal that never came."""
    if timeout_action is TimeoutAction.BASELINE:
        return CommandAction.OPTIMIZER
    return CommandAction.PAUSE


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: the event, how severe, what it does, and whether the run turns conservative."""

    event: Event
    severity: Severity
    effect: Effect
    check: Check
    conservative: bool = False
    reason_override: str = ""

    @property
    def reason(self) -> str:
        """The command's reason when this rule decides."""
        return self.reason_override or self.event.value


def _safe(event: Event, status: InferenceStatus) -> Rule:
    return Rule(event, Severity.HIGH, Effect.SAFE_COMMAND, checks.ended(status))


def _critical(event: Event, check: Check) -> Rule:
    return Rule(event, Severity.CRITICAL, Effect.PAUSE, check, conservative=True)


def _high(event: Event, check: Check, effect: Effect = Effect.PAUSE) -> Rule:
    return Rule(event, Severity.HIGH, effect, check)


def _warning(event: Event, check: Check, effect: Effect = Effect.SEED_TO_OPTIMIZER) -> Rule:
    return Rule(event, Severity.WARNING, effect, check)


def _info(event: Event, check: Check, effect: Effect = Effect.NONE) -> Rule:
    return Rule(event, Severity.INFO, effect, check)


RULES: Final[tuple[Rule, ...]] = (
    _safe(Event.TIMEOUT_INFERENCE, InferenceStatus.TIMED_OUT),
    _safe(Event.LANE_BUSY, InferenceStatus.LANE_BUSY),
    _safe(Event.INFERENCE_FAILED, InferenceStatus.FAILED),
    _critical(Event.ROLLBACK_DEADLINE, checks.emergency(rollback=True)),
    _critical(Event.EMERGENCY_SIGNAL, checks.emergency(rollback=False)),
    _critical(Event.BP_QUARANTINE, checks.check_blueprint_quarantine),
    _critical(Event.BSDS_HANDLING_QUARANTINE, checks.check_handling_quarantine),
    _critical(Event.BSDS_HAZARD_CRITICAL, checks.hazard_band(leyline.HAZARD_BAND_CRITICAL)),
    _critical(Event.POLICY_RISK_CRITICAL, checks.policy_risk("policy_risk_critical")),
    Rule(Event.DEGRADED_INPUTS, Severity.CRITICAL, Effect.PAUSE, checks.check_coverage_critical),
    _critical(Event.LOSS_NONFINITE, checks.check_loss_nonfinite),
    Rule(
        Event.LOSS_SPIKE,
        Severity.HIGH,
        Effect.PAUSE,
        checks.above("loss_delta", "max_loss_spike"),
        conservative=True,
    ),
    _high(Event.HOOK_BUDGET, checks.latency_high("hook", "hook_budget_ms")),
    _high(Event.STEP_LATENCY_HIGH, checks.latency_high("step", "step_latency_high_ms")),
    Rule(
        Event.ISOLATION_VIOLATIONS,
        Severity.HIGH,
        Effect.PAUSE,
        checks.above("isolation_violations", "isolation_violations"),
        reason_override="isolation_violation",
    ),
    _high(Event.DEVICE_PRESSURE_HIGH, checks.check_device_pressure, Effect.SEED_TO_PAUSE),
    _high(
        Event.CPU_PRESSURE_HIGH,
        checks.at_least("cpu_util_percent", "cpu_util_percent"),
        Effect.SEED_TO_OPTIMIZER,
    ),
    _high(Event.TIMEOUT_URZA, checks.check_metadata_timeout, Effect.NONE),
    _warning(Event.CONSERVATIVE_MODE, checks.check_conservative_mode, Effect.PAUSE),
    _warning(Event.POLICY_RISK_ELEVATED, checks.policy_risk("policy_risk_elevated")),
    _warning(Event.BLUEPRINT_RISK, checks.check_blueprint_risk),
    _warning(Event.BSDS_HAZARD_HIGH, checks.hazard_band(leyline.HAZARD_BAND_HIGH)),
    _warning(Event.LOSS_WARNING, checks.above("loss_delta", "loss_warning")),
    _warning(Event.LOSS_VOLATILITY_HIGH, checks.above("loss_volatility", "loss_volatility")),
    _warning(Event.GRAD_VARIANCE_HIGH, checks.above("grad_var", "grad_variance")),
    _warning(Event.GRAD_CONFLICT_HIGH, checks.above("grad_conflict_rate", "grad_conflict")),
    # A slow step or two say nothing about a seed: they are told and change nothing.
    _warning(Event.HOOK_BUDGET, checks.latency_rise("hook", "hook_budget_ms"), Effect.NONE),
    _warning(
        Event.STEP_LATENCY_HIGH, checks.latency_rise("step", "step_latency_high_ms"), Effect.NONE
    ),
    _warning(Event.KASMINA_APPLY_SLOW, checks.above("apply_ms", "kasmina_apply_slow_ms")),
    _warning(Event.KASMINA_FINALIZE_SLOW, checks.above("finalize_ms", "kasmina_finalize_slow_ms")),
    _warning(Event.OPTIMIZER_HINT, checks.check_optimizer_hint),
    _warning(Event.NONFINITE_INPUTS, checks.check_nonfinite_inputs, Effect.NONE),
    _info(Event.DEGRADED_INPUTS, checks.check_coverage_low),
    _info(Event.BSDS_PRESENT, checks.check_bsds_present),
    _info(Event.POLICY_RISK_SIGNAL, checks.policy_risk("policy_risk_signal")),
    _info(Event.NO_SEED_CANDIDATES, checks.check_no_seeds, Effect.PAUSE),
    _info(Event.NO_SEED_CANDIDATES, checks.check_no_seed_candidates),
    _info(Event.NO_BLUEPRINT_CANDIDATES, checks.check_no_blueprint_candidates),
    _info(Event.POLICY_UNTRAINED, checks.check_policy_untrained),
)
"""Every rule; the two rows of one event never fire together."""
