"""Signals and a proposed action to a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tamiyo_svc.risk.events import FiredEvent, most_severe
from tamiyo_svc.risk.rules import RULES, Effect, Rule, effect_on, safe_action
from tamiyo_svc.risk.signals import Signals
from tamiyo_svc.risk.thresholds import Thresholds
from tamiyo_svc.taxonomy import CommandAction, Severity, TimeoutAction

POLICY_REASON: Final = "policy"
"""The reason of a command that no rule had a say in."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules make of a step; `events` stand in the order of the table.

    `leading` is the event that gave the reason, None when that is `policy`.
    `conservative_reason` is set when a rule asks for conservative mode.
    """

    action: CommandAction
    reason: str = POLICY_REASON
    leading: FiredEvent | None = None
    events: tuple[FiredEvent, ...] = ()
    conservative_reason: str | None = None

    @property
    def severity(self) -> Severity:
        """Severity of the worst event, INFO without any."""
        worst = most_severe(self.events)
        return worst.severity if worst else Severity.INFO

    @property
    def conservative(self) -> bool:
        """Whether the run must be in conservative mode from the next step on."""
        return self.conservative_reason is not None


def assess(
    signals: Signals,
    thresholds: Thresholds,
    proposed: CommandAction,
    timeout_action: TimeoutAction = TimeoutAction.PAUSE,
) -> Verdict:
    """Apply every rule; the most conservative action wins.

    When inference gave no proposal, the safe command stands in for `proposed`. The reason is
    that of the most severe event, the first in the table among equals. An INFO event gives the
    reason only when it fixes the action (a packet without seeds): one that merely reports must
    not hide that the policy decided.
    """
    fired: list[tuple[Rule, FiredEvent]] = []
    for rule in RULES:
        attributes = rule.check(signals, thresholds)
        if attributes is not None:
            fired.append((rule, FiredEvent(rule.event, rule.severity, attributes)))
    if not fired:
        return Verdict(proposed)
    base = proposed
    if any(rule.effect is Effect.SAFE_COMMAND for rule, _ in fired):
        base = safe_action(timeout_action)
    action = max(effect_on(rule.effect, base) for rule, _ in fired)
    reason, leading = _leading(fired)
    return Verdict(
        action=action,
        reason=reason,
        leading=leading,
        events=tuple(event for _, event in fired),
        conservative_reason=_conservative_reason(fired),
    )


def _leading(fired: list[tuple[Rule, FiredEvent]]) -> tuple[str, FiredEvent | None]:
    deciding = [
        pair
        for pair in fired
        if pair[0].severity > Severity.INFO or pair[0].effect is not Effect.NONE
    ]
    if not deciding:
        return POLICY_REASON, None
    rule, event = max(deciding, key=lambda pair: pair[0].severity)
    return rule.reason, event


def _conservative_reason(fired: list[tuple[Rule, FiredEvent]]) -> str | None:
    asking = [rule for rule, _ in fired if rule.conservative]
    return max(asking, key=lambda rule: rule.severity).reason if asking else None
