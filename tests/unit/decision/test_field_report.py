from __future__ import annotations

from dataclasses import replace

import pytest
from support.decisions import BLUEPRINT, NOW_NS, SLOW_HOOKS, decide, packet, proposal

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.decision.command import CommandOptions, build_command
from tamiyo_svc.decision.observation import (
    Observation,
    ObservationWindow,
    ObservedCommand,
    open_window,
)
from tamiyo_svc.decision.record import Decision, abort
from tamiyo_svc.decision.report import build_report, build_synthesised_report, synthesised_event
from tamiyo_svc.decision.telemetry import Timings
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.risk.latency import Latencies
from tamiyo_svc.risk.signals import Metadata
from tamiyo_svc.taxonomy import Event, InferenceStatus, PolicyAction, Severity, TimeoutAction

SUCCESS = leyline.FIELD_REPORT_OUTCOME_SUCCESS
NEUTRAL = leyline.FIELD_REPORT_OUTCOME_NEUTRAL
REGRESSION = leyline.FIELD_REPORT_OUTCOME_REGRESSION
USUAL_HOOKS = Latencies(hook=(4.0,) * 32)
ABORTED = leyline.FIELD_REPORT_OUTCOME_ABORTED


def report_on(decision: Decision) -> leyline.FieldReport:
    command = build_command(decision, CommandOptions())
    return build_report(decision, command, Timings(step_ms=3.5))


def quarantined() -> Decision:
    descriptor = leyline.BlueprintDescriptor(blueprint_id="q", quarantine_only=True)
    return decide(proposed=proposal(blueprint=Blueprint(descriptor)))


def in_quarantine_class() -> Decision:
    sheet = leyline.BSDS(handling_class=leyline.HANDLING_CLASS_QUARANTINE)
    return decide(proposed=proposal(blueprint=Blueprint(BLUEPRINT.descriptor, bsds=sheet)))


@pytest.mark.parametrize(
    ("decision", "outcome", "notes"),
    [
        (decide(), SUCCESS, "blending:cosine"),
        (decide(proposed=proposal(action=PolicyAction.OPTIMIZER)), SUCCESS, "blending:cosine"),
        (decide(packet(grad_var=2.0)), SUCCESS, "grad_variance_high"),
        (decide(status=InferenceStatus.TIMED_OUT), NEUTRAL, "timeout_inference"),
        (decide(status=InferenceStatus.LANE_BUSY), NEUTRAL, "lane_busy"),
        (decide(status=InferenceStatus.FAILED), NEUTRAL, "inference_failed"),
        (decide(proposed=proposal(action=PolicyAction.PAUSE)), NEUTRAL, "blending:cosine"),
        (decide(conservative="loss_spike"), NEUTRAL, "conservative_mode"),
        (
            decide(packet(seeds=0), status=InferenceStatus.NOT_RUN),
            NEUTRAL,
            "no_seed_candidates",
        ),
        (decide(metadata=Metadata(timed_out=True)), SUCCESS, "timeout_urza"),
        (decide(packet(loss=5.0)), REGRESSION, "loss_spike"),
        (decide(packet(loss=float("nan"))), REGRESSION, "loss_nonfinite"),
        (decide(packet(hook_latency_ms=99.0), latencies=SLOW_HOOKS), REGRESSION, "hook_budget"),
        (decide(packet(hook_latency_ms=99.0), latencies=USUAL_HOOKS), SUCCESS, "hook_budget"),
        (
            decide(packet(violations=1.0)),
            REGRESSION,
            "isolation_violations",
        ),
        (quarantined(), REGRESSION, "bp_quarantine"),
        (in_quarantine_class(), REGRESSION, "bsds_handling_quarantine"),
        (decide(packet(loss=5.0), conservative="x"), REGRESSION, "loss_spike"),
        (decide(packet(loss=5.0), status=InferenceStatus.TIMED_OUT), NEUTRAL, "timeout_inference"),
        (abort(decide(), "no seed"), ABORTED, "command_failed"),
        (
            decide(other_events=(FiredEvent(Event.BREAKER_OPENED, Severity.CRITICAL),)),
            SUCCESS,
            "breaker_opened",
        ),
    ],
)
def test_outcome_and_note(
    decision: Decision, outcome: leyline.FieldReportOutcome, notes: str
) -> None:
    report = report_on(decision)
    assert (report.outcome, report.notes) == (outcome, notes)


def test_identity() -> None:
    report = report_on(decide())
    assert report.report_id == f"fr-{report.command_id}"
    assert report.training_run_id == "run-1"
    assert report.seed_id == "seed-0"
    assert report.blueprint_id == "bp-1"
    assert report.tamiyo_policy_version == "policy-1@7"
    assert report.observation_window_epochs == 1
    assert report.issued_at.ToNanoseconds() == NOW_NS


def test_metrics_as_known() -> None:
    report = report_on(decide(last_loss=0.5))
    assert dict(report.metrics) == pytest.approx(
        {
            "loss_delta": 0.25,
            "param_delta": 0.15,
            "value_estimate": 0.5,
            "risk_index": 1.0,
            "risk_score": 0.25,
            "blending_index": 1.0,
            "blending_schedule_start": 0.25,
            "blending_schedule_end": 0.75,
            "selected_seed_score": 1.5,
            "blueprint_risk": 0.25,
            "hook_latency_ms": 4.0,
            "tamiyo_latency_ms": 3.5,
        }
    )


def test_metrics_that_are_not_known_are_absent() -> None:
    report = report_on(decide(status=InferenceStatus.TIMED_OUT, last_loss=None))
    assert report.metrics.keys() == {"hook_latency_ms", "tamiyo_latency_ms"}


def test_same_decision_same_bytes() -> None:
    first, second = (report_on(decide()).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


COMMAND = ObservedCommand("c-1", NOW_NS, "policy", "seed-0", "bp-1", "policy-1@7")
WINDOW = ObservationWindow(COMMAND, start_epoch=4, start_step=120, epochs=2, steps=0)


def seen(
    *deltas: float | None, hook: float | None = None, critical: bool = False
) -> ObservationWindow:
    window = WINDOW
    for delta in deltas:
        window = window.observe(Observation(delta, hook, critical))
    return window


@pytest.mark.parametrize(
    ("window", "outcome"),
    [
        (seen(-0.5, 0.25), SUCCESS),
        (seen(0.5, -0.25), REGRESSION),
        (seen(-0.5, critical=True), REGRESSION),
        (seen(0.25, -0.25), NEUTRAL),
        (seen(None), NEUTRAL),
        (WINDOW, NEUTRAL),
    ],
)
def test_synthesised_outcome(
    window: ObservationWindow, outcome: leyline.FieldReportOutcome
) -> None:
    assert build_synthesised_report(window, "run-1").outcome == outcome


def test_synthesised_report() -> None:
    window = seen(-0.5, None, 0.25, hook=3.0)
    report = build_synthesised_report(window.close(6, 131), "run-1")
    assert report.report_id == "fr-synth-c-1-4+2"
    assert (report.command_id, report.training_run_id) == ("c-1", "run-1")
    assert (report.seed_id, report.blueprint_id) == ("seed-0", "bp-1")
    assert report.tamiyo_policy_version == "policy-1@7"
    assert report.issued_at.ToNanoseconds() == NOW_NS
    assert report.observation_window_epochs == 2
    assert report.notes == "field_report_synthesised:policy"
    assert dict(report.metrics) == {
        "observed_epochs": 2.0,
        "observed_steps": 11.0,
        "loss_delta_total": -0.25,
        "loss_delta_min": -0.5,
        "loss_delta_max": 0.25,
        "avg_hook_latency_ms": 3.0,
    }


def test_a_window_closed_early_says_so() -> None:
    early = WINDOW.close(4, 125, early=True)
    report = build_synthesised_report(early, "run-1")
    assert report.notes == "closed_early:policy"
    assert report.observation_window_epochs == 0
    assert report.metrics["observed_steps"] == 5.0
    event = synthesised_event(early)
    assert (event.event, event.severity) == (Event.FIELD_REPORT_SYNTHESISED, Severity.INFO)
    assert event.attributes["closed_early"] == "1"
    assert (event.attributes["epochs"], event.attributes["steps"]) == ("0", "5")
    assert event.attributes["reason"] == "policy"


@pytest.mark.parametrize(
    ("decision", "opens"),
    [
        (decide(), True),
        (decide(packet(cpu_util_percent=99.0)), True),
        (decide(proposed=proposal(action=PolicyAction.BREAKER_OPEN)), True),
        (decide(proposed=proposal(action=PolicyAction.OPTIMIZER)), True),
        (
            decide(proposed=proposal(action=PolicyAction.OPTIMIZER, parameters=(0.0,) * 4)),
            False,
        ),
        (decide(status=InferenceStatus.TIMED_OUT, timeout_action=TimeoutAction.BASELINE), False),
        (decide(proposed=proposal(action=PolicyAction.PAUSE)), False),
        (decide(packet(loss=5.0)), False),
    ],
)
def test_only_a_command_that_changes_something_is_observed(decision: Decision, opens: bool) -> None:
    command = build_command(decision, CommandOptions())
    window = open_window(decision, command, epochs=2, steps=0)
    assert (window is not None) is opens


def test_a_window_knows_its_command() -> None:
    decision = decide()
    window = open_window(decision, build_command(decision, CommandOptions()), epochs=2, steps=7)
    assert window is not None
    assert window.command == replace(COMMAND, command_id=decision.command_id)
    assert (window.start_epoch, window.start_step) == (3, 12)
    assert (window.epochs, window.steps) == (2, 7)


@pytest.mark.parametrize(
    ("epochs", "steps", "label"),
    [(1, 0, None), (2, 0, "3+2"), (1, 9, "12+9steps"), (2, 9, "3+2")],
)
def test_one_epoch_is_no_window_and_a_label_names_the_limit(
    epochs: int, steps: int, label: str | None
) -> None:
    decision = decide()
    command = build_command(decision, CommandOptions())
    window = open_window(decision, command, epochs, steps)
    assert (window.label if window is not None else None) == label
