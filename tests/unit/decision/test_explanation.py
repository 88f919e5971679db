from __future__ import annotations

from dataclasses import replace

import pytest
from support.decisions import BLUEPRINT, SLOW_HOOKS, decide, packet, proposal

from tamiyo_svc.decision.explanation import explain
from tamiyo_svc.decision.record import Decision
from tamiyo_svc.decision.telemetry import Timings, build_telemetry
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.checks import check_no_seed_candidates
from tamiyo_svc.risk.rules import RULES, Effect
from tamiyo_svc.taxonomy import InferenceStatus


def why(decision: Decision) -> str:
    return explain("c-1", telemetry=build_telemetry(decision, Timings(1.0))).why


def risky() -> Proposal:
    descriptor = leyline.BlueprintDescriptor()
    descriptor.CopyFrom(BLUEPRINT.descriptor)
    descriptor.risk = 0.5
    return proposal(blueprint=replace(BLUEPRINT, descriptor=descriptor))


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        (
            decide(),
            "the policy proposed seed (0.600; next optimizer 0.200) and no event had a say: seed",
        ),
        (
            decide(packet(hook_latency_ms=51.0), latencies=SLOW_HOOKS),
            (
                "the policy proposed seed (0.600; next optimizer 0.200); hook_budget (HIGH, value "
                "51.0, threshold 14.0) is the most severe of 1 event and asks for: pause; the most "
                "conservative action wins: pause"
            ),
        ),
        (
            decide(packet(hook_latency_ms=51.0), risky(), latencies=SLOW_HOOKS),
            (
                "the policy proposed seed (0.600; next optimizer 0.200); hook_budget (HIGH, value "
                "51.0, threshold 14.0) is the most severe of 2 events and asks for: pause; also "
                "asking: blueprint_risk; the most conservative action wins: pause"
            ),
        ),
        (
            decide(packet(violations=2.0)),
            (
                "the policy proposed seed (0.600; next optimizer 0.200); isolation_violations "
                "(HIGH, value 2.0, threshold 0.0) is the most severe of 1 event and asks for: "
                "pause; the most conservative action wins: pause"
            ),
        ),
        (
            decide(status=InferenceStatus.TIMED_OUT),
            (
                "the network gave no proposal; timeout_inference (HIGH, threshold 5.0) is the most "
                "severe of 1 event and asks for: there is no proposal, so the safe command; the "
                "most conservative action wins: pause"
            ),
        ),
        (
            decide(conservative="loss_spike"),
            (
                "the policy proposed seed (0.600; next optimizer 0.200); conservative_mode "
                "(WARNING, value loss_spike) is the most severe of 1 event and asks for: "
                "pause; the most conservative action wins: pause"
            ),
        ),
    ],
    ids=["policy", "one", "two", "renamed", "timeout", "mode"],
)
def test_why_names_the_leading_event_and_what_it_asks_for(
    decision: Decision, expected: str
) -> None:
    assert why(decision) == expected


def test_every_rule_that_acts_has_its_effect_told() -> None:
    for rule in RULES:
        telemetry = leyline.TelemetryPacket()
        event = telemetry.events.add(description=rule.event.value, level=rule.severity.level)
        if rule.check is check_no_seed_candidates:
            event.attributes["seeds"] = "2"
        telemetry.system_health.indicators["reason"] = rule.reason
        explanation = explain("c-1", telemetry=telemetry)
        assert bool(explanation.events[0].effect) is (rule.effect is not Effect.NONE)
        assert rule.event.value in explanation.why


def test_telemetry_of_another_release_is_explained_as_far_as_it_goes() -> None:
    explanation = explain("c-1", telemetry=leyline.TelemetryPacket())
    assert explanation.proposed is None
    assert explanation.seed_scores == ()
    assert explanation.why.startswith("the network gave no proposal")


def test_without_telemetry_the_command_still_says_its_reason() -> None:
    command = leyline.AdaptationCommand(
        annotations={"risk_reason": "loss_spike", "policy_version": "p-7"}
    )
    explanation = explain("c-1", telemetry=None, command=command)
    assert (explanation.reason, explanation.policy_version) == ("loss_spike", "p-7")
    assert "not on the bus any more" in explanation.why
