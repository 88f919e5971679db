"""Every row of the risk table: where it fires, how severe it is, and what it does."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.engine import Verdict, assess
from tamiyo_svc.risk.latency import NO_LATENCIES, Latencies
from tamiyo_svc.risk.rules import RULES
from tamiyo_svc.risk.signals import Inference, Metadata, Signals, read_signals
from tamiyo_svc.risk.thresholds import Thresholds
from tamiyo_svc.taxonomy import CommandAction, Event, InferenceStatus, Severity, TimeoutAction

THRESHOLDS = Thresholds()
SEED, OPTIMIZER, BREAKER, PAUSE = CommandAction
UNCHANGED = (SEED, OPTIMIZER, BREAKER, PAUSE)
ALL_PAUSE = (PAUSE, PAUSE, PAUSE, PAUSE)
SEED_TO_OPTIMIZER = (OPTIMIZER, OPTIMIZER, BREAKER, PAUSE)
SEED_TO_PAUSE = (PAUSE, OPTIMIZER, BREAKER, PAUSE)

LEVELS = {
    Severity.CRITICAL: (
        leyline.TELEMETRY_LEVEL_CRITICAL,
        leyline.MESSAGE_PRIORITY_CRITICAL,
        True,
    ),
    Severity.HIGH: (leyline.TELEMETRY_LEVEL_ERROR, leyline.MESSAGE_PRIORITY_HIGH, True),
    Severity.WARNING: (leyline.TELEMETRY_LEVEL_WARNING, leyline.MESSAGE_PRIORITY_NORMAL, False),
    Severity.INFO: (leyline.TELEMETRY_LEVEL_INFO, leyline.MESSAGE_PRIORITY_NORMAL, False),
}


def signals(
    *,
    last_loss: float | None = None,
    loss: float = 0.0,
    training_loss: float = 0.0,
    stages: tuple[leyline.SeedLifecycleStage, ...] = (leyline.SEED_STAGE_DORMANT,),
    inference: Inference | None = None,
    metadata: Metadata | None = None,
    blueprint: Blueprint | None = None,
    emergency: leyline.EmergencySignal | None = None,
    conservative: str | None = None,
    latencies: Latencies = NO_LATENCIES,
    **metrics: float,
) -> Signals:
    """Signals of a quiet step, but for what is given; `_` in a metric's name may be a dot."""
    packet = leyline.SystemStatePacket(
        training_run_id="run-1",
        validation_loss=loss,
        training_loss=training_loss,
        training_metrics={name.replace("__", "."): value for name, value in metrics.items()},
        seed_states=[leyline.SeedState(seed_id="seed-0", stage=stage) for stage in stages],
    )
    return read_signals(
        packet,
        last_loss,
        inference=inference or Inference(coverage_mean=0.9, policy_risk_score=0.1),
        metadata=metadata or Metadata(),
        latencies=latencies,
        blueprint=blueprint,
        emergencies=() if emergency is None else (emergency,),
        conservative_reason=conservative,
    )


def blueprint(risk: float = 0.1, *, quarantine_only: bool = False) -> Blueprint:
    return Blueprint(
        leyline.BlueprintDescriptor(blueprint_id="bp", risk=risk, quarantine_only=quarantine_only)
    )


def with_sheet(
    risk: float = 0.1,
    band: leyline.HazardBand = leyline.HAZARD_BAND_LOW,
    handling: leyline.HandlingClass = leyline.HANDLING_CLASS_STANDARD,
) -> Blueprint:
    return Blueprint(
        leyline.BlueprintDescriptor(blueprint_id="bp", risk=0.1),
        bsds=leyline.BSDS(
            blueprint_id="bp",
            risk_score=risk,
            hazard_band=band,
            handling_class=handling,
            provenance=leyline.PROVENANCE_URABRASK,
        ),
    )


LEVEL, RISING, RISEN = ((20.0,) * (32 - slow) + (60.0,) * slow for slow in (0, 6, 7))
"""A steady run, and two whose last six and seven steps took three times as long."""


def step(latency_ms: float, before: tuple[float, ...]) -> Signals:
    return signals(latencies=Latencies(step=before), step_latency_ms=latency_ms)


def hook(latency_ms: float, before: tuple[float, ...]) -> Signals:
    return signals(latencies=Latencies(hook=before), hook_latency_ms=latency_ms)


def ended(status: InferenceStatus) -> Signals:
    return signals(inference=Inference(status=status, budget_ms=5.0))


def covered(mean: float) -> Signals:
    return signals(inference=Inference(coverage_mean=mean))


def scored(risk: float) -> Signals:
    return signals(inference=Inference(policy_risk_score=risk))


def emergency(
    reason: str, level: leyline.EmergencyLevel, run_id: str = "run-1"
) -> leyline.EmergencySignal:
    return leyline.EmergencySignal(reason=reason, level=level, run_id=run_id, origin="tolaria")


@dataclass(frozen=True)
class Row:
    """One row: signals on which the event must not fire, and signals on which it must."""

    event: Event
    severity: Severity
    actions: tuple[CommandAction, ...]
    quiet: tuple[Signals, ...]
    firing: tuple[Signals, ...]
    conservative: bool = False
    reason: str = ""


HALT = leyline.EMERGENCY_LEVEL_HALT
CONSERVATIVE = leyline.EMERGENCY_LEVEL_CONSERVATIVE
ELEVATED = leyline.EMERGENCY_LEVEL_ELEVATED
NAN, INF = float("nan"), float("inf")
DEAD = (leyline.SEED_STAGE_FOSSILIZED, leyline.SEED_STAGE_CULLED)

ROWS = (
    Row(
        Event.TIMEOUT_INFERENCE,
        Severity.HIGH,
        ALL_PAUSE,
        (ended(InferenceStatus.COMPLETED), ended(InferenceStatus.NOT_RUN)),
        (ended(InferenceStatus.TIMED_OUT),),
    ),
    Row(
        Event.LANE_BUSY,
        Severity.HIGH,
        ALL_PAUSE,
        (ended(InferenceStatus.TIMED_OUT),),
        (ended(InferenceStatus.LANE_BUSY),),
    ),
    Row(
        Event.INFERENCE_FAILED,
        Severity.HIGH,
        ALL_PAUSE,
        (ended(InferenceStatus.TIMED_OUT),),
        (ended(InferenceStatus.FAILED),),
    ),
    Row(
        Event.ROLLBACK_DEADLINE,
        Severity.CRITICAL,
        ALL_PAUSE,
        (
            signals(emergency=emergency("rollback_deadline", ELEVATED)),
            signals(emergency=emergency("rollback_deadline", HALT, "run-2")),
        ),
        (
            signals(emergency=emergency("rollback_deadline", CONSERVATIVE)),
            signals(emergency=emergency("rollback_deadline", HALT)),
            signals(emergency=emergency("rollback_deadline", HALT, "")),
        ),
        conservative=True,
    ),
    Row(
        Event.EMERGENCY_SIGNAL,
        Severity.CRITICAL,
        ALL_PAUSE,
        (
            signals(emergency=emergency("overheating", ELEVATED)),
            signals(emergency=emergency("rollback_deadline", HALT)),
        ),
        (
            signals(emergency=emergency("overheating", CONSERVATIVE)),
            signals(emergency=emergency("overheating", HALT, "")),
        ),
        conservative=True,
    ),
    Row(
        Event.BP_QUARANTINE,
        Severity.CRITICAL,
        ALL_PAUSE,
        (signals(blueprint=blueprint(0.79)), signals(blueprint=with_sheet(0.79)), signals()),
        (
            signals(blueprint=blueprint(0.8)),
            signals(blueprint=blueprint(0.81)),
            signals(blueprint=with_sheet(0.8)),
            signals(blueprint=blueprint(0.1, quarantine_only=True)),
            signals(blueprint=blueprint(NAN)),
        ),
        conservative=True,
    ),
    Row(
        Event.BSDS_HANDLING_QUARANTINE,
        Severity.CRITICAL,
        ALL_PAUSE,
        (signals(blueprint=with_sheet(handling=leyline.HANDLING_CLASS_RESTRICTED)),),
        (signals(blueprint=with_sheet(handling=leyline.HANDLING_CLASS_QUARANTINE)),),
        conservative=True,
    ),
    Row(
        Event.BSDS_HAZARD_CRITICAL,
        Severity.CRITICAL,
        ALL_PAUSE,
        (signals(blueprint=with_sheet(band=leyline.HAZARD_BAND_HIGH)),),
        (signals(blueprint=with_sheet(band=leyline.HAZARD_BAND_CRITICAL)),),
        conservative=True,
    ),
    Row(
        Event.POLICY_RISK_CRITICAL,
        Severity.CRITICAL,
        ALL_PAUSE,
        (scored(0.979),),
        (scored(0.98), scored(0.981)),
        conservative=True,
    ),
    Row(
        Event.DEGRADED_INPUTS,
        Severity.CRITICAL,
        ALL_PAUSE,
        (ended(InferenceStatus.TIMED_OUT), covered(0.31)),
        (covered(0.1), covered(0.099), covered(0.0)),
    ),
    Row(
        Event.LOSS_NONFINITE,
        Severity.CRITICAL,
        ALL_PAUSE,
        (signals(loss=1e30, last_loss=1e30), signals(loss_ewma=NAN), signals(grad_var=NAN)),
        (
            signals(loss=NAN),
            signals(loss=INF),
            signals(training_loss=-INF),
            signals(validation_loss=NAN),
            signals(training_loss=NAN),
            signals(loss=INF),
        ),
        conservative=True,
    ),
    Row(
        Event.LOSS_SPIKE,
        Severity.HIGH,
        ALL_PAUSE,
        (
            signals(loss_delta=0.149),
            signals(loss_delta=0.15),
            signals(last_loss=1.0, loss=1.125),
            signals(last_loss=9.0, loss=1.0),
            signals(loss_delta=-9.0),
        ),
        (signals(loss_delta=0.151), signals(last_loss=1.0, loss=1.16)),
        conservative=True,
    ),
    Row(
        Event.HOOK_BUDGET,
        Severity.HIGH,
        ALL_PAUSE,
        (
            signals(hook_latency_ms=5000.0),
            hook(60.0, (60.0,) * 32),
            hook(60.0, LEVEL),
            hook(60.0, RISING),
            hook(50.0, RISEN),
            step(60.0, RISEN),
        ),
        (hook(60.0, RISEN), hook(50.1, RISEN)),
    ),
    Row(
        Event.STEP_LATENCY_HIGH,
        Severity.HIGH,
        ALL_PAUSE,
        (
            signals(step_latency_ms=5000.0),
            step(200.0, (200.0,) * 32),
            step(60.0, LEVEL),
            step(50.0, RISEN),
            hook(60.0, RISEN),
        ),
        (step(60.0, RISEN), step(50.1, RISEN)),
    ),
    Row(
        Event.ISOLATION_VIOLATIONS,
        Severity.HIGH,
        ALL_PAUSE,
        (signals(kasmina__isolation__violations=0.0), signals()),
        (signals(kasmina__isolation__violations=1.0),),
        reason="isolation_violation",
    ),
    Row(
        Event.DEVICE_PRESSURE_HIGH,
        Severity.HIGH,
        SEED_TO_PAUSE,
        (
            signals(gpu_util_percent=94.9, gpu_mem_free_gb=0.1),
            signals(gpu_util_percent=99.0, gpu_mem_free_gb=0.21),
            signals(gpu_util_percent=99.0),
            signals(gpu_mem_free_gb=0.0),
        ),
        (
            signals(gpu_util_percent=95.0, gpu_mem_free_gb=0.2),
            signals(gpu_util_percent=95.1, gpu_mem_free_gb=0.19),
        ),
    ),
    Row(
        Event.CPU_PRESSURE_HIGH,
        Severity.HIGH,
        SEED_TO_OPTIMIZER,
        (signals(cpu_util_percent=94.9),),
        (signals(cpu_util_percent=95.0), signals(cpu_util_percent=95.1)),
    ),
    Row(
        Event.TIMEOUT_URZA,
        Severity.HIGH,
        UNCHANGED,
        (signals(metadata=Metadata(budget_ms=10.0)),),
        (signals(metadata=Metadata(timed_out=True, budget_ms=10.0)),),
    ),
    Row(
        Event.CONSERVATIVE_MODE,
        Severity.WARNING,
        ALL_PAUSE,
        (signals(),),
        (signals(conservative="loss_spike"),),
    ),
    Row(
        Event.POLICY_RISK_ELEVATED,
        Severity.WARNING,
        SEED_TO_OPTIMIZER,
        (scored(0.849),),
        (scored(0.85), scored(0.851)),
    ),
    Row(
        Event.BLUEPRINT_RISK,
        Severity.WARNING,
        SEED_TO_OPTIMIZER,
        (signals(blueprint=blueprint(0.49)),),
        (signals(blueprint=blueprint(0.5)), signals(blueprint=blueprint(0.51))),
    ),
    Row(
        Event.BSDS_HAZARD_HIGH,
        Severity.WARNING,
        SEED_TO_OPTIMIZER,
        (
            signals(blueprint=with_sheet(band=leyline.HAZARD_BAND_MEDIUM)),
            signals(blueprint=with_sheet(band=leyline.HAZARD_BAND_CRITICAL)),
        ),
        (signals(blueprint=with_sheet(band=leyline.HAZARD_BAND_HIGH)),),
    ),
    Row(
        Event.LOSS_WARNING,
        Severity.WARNING,
        SEED_TO_OPTIMIZER,
        (signals(loss_delta=0.074), signals(loss_delta=0.075), signals(last_loss=2.0, loss=1.0)),
        (signals(loss_delta=0.076), signals(last_loss=1.0, loss=1.08)),
    ),
    Row(
        Event.LOSS_VOLATILITY_HIGH,
        Severity.WARNING,
        SEED_TO_OPTIMIZER,
        (signals(loss_volatility=0.112), signals(loss_volatility=0.1125)),
        (signals(loss_volatility=0.113),),
    ),
    Row(
        Event.GRAD_VARIANCE_HIGH,
        Severity.WARNING,
        SEED_TO_OPTIMIZER,
        (signals(grad_var=0.99), signals(grad_var=1.0)),
        (signals(grad_var=1.01),),
    ),
    Row(
        Event.GRAD_CONFLICT_HIGH,
        Severity.WARNING,
        SEED_TO_OPTIMIZER,
        (signals(grad_conflict_rate=0.49), signals(grad_conflict_rate=0.5)),
        (signals(grad_conflict_rate=0.51),),
    ),
    Row(
        Event.HOOK_BUDGET,
        Severity.WARNING,
        UNCHANGED,
        (hook(50.0, LEVEL), hook(60.0, LEVEL[:15]), hook(60.0, RISEN), step(60.0, LEVEL)),
        (hook(50.1, LEVEL), hook(60.0, LEVEL[:16]), hook(60.0, RISING)),
    ),
    Row(
        Event.STEP_LATENCY_HIGH,
        Severity.WARNING,
        UNCHANGED,
        (step(50.0, LEVEL), step(60.0, LEVEL[:15]), step(60.0, RISEN), hook(60.0, LEVEL)),
        (step(50.1, LEVEL), step(60.0, LEVEL[:16]), step(60.0, RISING)),
    ),
    Row(
        Event.KASMINA_APPLY_SLOW,
        Severity.WARNING,
        SEED_TO_OPTIMIZER,
        (signals(kasmina__apply_ms=29.9), signals(kasmina__apply_ms=30.0)),
        (signals(kasmina__apply_ms=30.1),),
    ),
    Row(
        Event.KASMINA_FINALIZE_SLOW,
        Severity.WARNING,
        SEED_TO_OPTIMIZER,
        (signals(kasmina__finalize_ms=29.9), signals(kasmina__finalize_ms=30.0)),
        (signals(kasmina__finalize_ms=30.1),),
    ),
    Row(
        Event.OPTIMIZER_HINT,
        Severity.WARNING,
        SEED_TO_OPTIMIZER,
        (
            signals(optimizer_lr=0.001, loss_delta=0.1),
            signals(optimizer_lr=0.0, loss_delta=0.075),
            signals(optimizer_lr=0.0),
            signals(loss_delta=0.1),
        ),
        (
            signals(optimizer_lr=0.0, loss_delta=0.076),
            signals(optimizer_lr=-0.1, loss_delta=0.076),
        ),
        reason="loss_warning",
    ),
    Row(
        Event.NONFINITE_INPUTS,
        Severity.WARNING,
        UNCHANGED,
        (signals(grad_var=0.5), signals(loss=NAN)),
        (signals(grad_norm_ewma=NAN), signals(hook_latency_ms=INF), signals(loss_ewma=NAN)),
    ),
    Row(
        Event.DEGRADED_INPUTS,
        Severity.INFO,
        UNCHANGED,
        (covered(0.30), covered(0.31)),
        (covered(0.299), covered(0.101)),
        reason="policy",
    ),
    Row(
        Event.BSDS_PRESENT,
        Severity.INFO,
        UNCHANGED,
        (signals(blueprint=blueprint()), signals()),
        (signals(blueprint=with_sheet()),),
        reason="policy",
    ),
    Row(
        Event.POLICY_RISK_SIGNAL,
        Severity.INFO,
        UNCHANGED,
        (scored(0.49),),
        (scored(0.5), scored(0.51)),
        reason="policy",
    ),
    Row(
        Event.NO_SEED_CANDIDATES,
        Severity.INFO,
        ALL_PAUSE,
        (signals(),),
        (signals(stages=()),),
    ),
    Row(
        Event.NO_SEED_CANDIDATES,
        Severity.INFO,
        UNCHANGED,
        (signals(stages=(leyline.SEED_STAGE_UNKNOWN, *DEAD)),),
        (signals(stages=DEAD),),
        reason="policy",
    ),
    Row(
        Event.NO_BLUEPRINT_CANDIDATES,
        Severity.INFO,
        UNCHANGED,
        (signals(metadata=Metadata(candidates=1)), signals(metadata=Metadata(candidates=None))),
        (signals(metadata=Metadata(candidates=0)),),
        reason="policy",
    ),
    Row(
        Event.POLICY_UNTRAINED,
        Severity.INFO,
        UNCHANGED,
        (signals(inference=Inference(policy_untrained=False)),),
        (signals(inference=Inference(policy_untrained=True)),),
        reason="policy",
    ),
)


def row_name(row: Row) -> str:
    return f"{row.event}-{row.severity.name.lower()}-{row.actions[0].name.lower()}"


def fired(verdict: Verdict) -> dict[Event, Severity]:
    return {event.event: event.severity for event in verdict.events}


def test_the_table_has_the_rows_of_the_rules_in_their_order() -> None:
    assert [(row.event, row.severity) for row in ROWS] == [
        (rule.event, rule.severity) for rule in RULES
    ]


@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_nothing_fires_short_of_the_condition(row: Row) -> None:
    for quiet in row.quiet:
        assert fired(assess(quiet, THRESHOLDS, SEED)).get(row.event) is not row.severity


@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_the_condition_fires_with_its_severity(row: Row) -> None:
    for firing in row.firing:
        verdict = assess(firing, THRESHOLDS, SEED)
        assert fired(verdict)[row.event] is row.severity
        event = next(event for event in verdict.events if event.event is row.event)
        level, priority, emergency_stream = LEVELS[row.severity]
        assert event.severity.level == level
        assert event.severity.priority == priority
        assert event.severity.is_emergency is emergency_stream
        assert verdict.conservative is row.conservative


@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_each_proposal_becomes_what_the_table_says(row: Row) -> None:
    for firing in row.firing:
        got = tuple(assess(firing, THRESHOLDS, proposed).action for proposed in CommandAction)
        assert got == row.actions


@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_the_reason_is_that_of_the_event(row: Row) -> None:
    verdict = assess(row.firing[0], THRESHOLDS, SEED)
    assert verdict.reason == (row.reason or row.event.value)


@pytest.mark.parametrize("proposed", list(CommandAction))
def test_a_quiet_step_leaves_the_proposal_to_the_policy(proposed: CommandAction) -> None:
    assert assess(signals(), THRESHOLDS, proposed) == Verdict(proposed, "policy")


@pytest.mark.parametrize(
    "status", [InferenceStatus.TIMED_OUT, InferenceStatus.LANE_BUSY, InferenceStatus.FAILED]
)
@pytest.mark.parametrize("proposed", list(CommandAction))
def test_the_baseline_command_stands_in_for_a_missing_proposal(
    status: InferenceStatus, proposed: CommandAction
) -> None:
    verdict = assess(ended(status), THRESHOLDS, proposed, TimeoutAction.BASELINE)
    assert verdict.action is OPTIMIZER


def test_conservative_mode_overrides_the_baseline_command() -> None:
    late = replace(ended(InferenceStatus.TIMED_OUT), conservative_reason="loss_spike")
    verdict = assess(late, THRESHOLDS, SEED, TimeoutAction.BASELINE)
    assert (verdict.action, verdict.reason) == (PAUSE, "timeout_inference")


SLOW_HOOK = {"hook_latency_ms": 60.0, "latencies": Latencies(hook=RISEN)}


@pytest.mark.parametrize(
    ("one", "other", "reason", "action"),
    [
        (
            {"hook_latency_ms": 60.0, "latencies": Latencies(RISEN, RISEN)},
            {"step_latency_ms": 60.0},
            "hook_budget",
            PAUSE,
        ),
        ({"loss_delta": 0.2}, SLOW_HOOK, "loss_spike", PAUSE),
        ({"cpu_util_percent": 99.0}, {"grad_var": 2.0}, "cpu_pressure_high", OPTIMIZER),
        ({"cpu_util_percent": 99.0}, {"conservative": "x"}, "cpu_pressure_high", PAUSE),
        ({"conservative": "x"}, {"grad_var": 2.0}, "conservative_mode", PAUSE),
        ({"blueprint": blueprint(0.9)}, {"loss": NAN}, "bp_quarantine", PAUSE),
        ({"loss": NAN}, {"loss_delta": 0.2}, "loss_nonfinite", PAUSE),
        ({"loss": NAN}, {"inference": Inference(coverage_mean=0.05)}, "degraded_inputs", PAUSE),
        (
            {"metadata": Metadata(timed_out=True)},
            {"cpu_util_percent": 99.0},
            "cpu_pressure_high",
            OPTIMIZER,
        ),
        ({"metadata": Metadata(timed_out=True)}, {"grad_var": 2.0}, "timeout_urza", OPTIMIZER),
        (SLOW_HOOK, {"loss": INF}, "loss_nonfinite", PAUSE),
        ({"grad_var": 2.0}, {"grad_norm_ewma": NAN}, "grad_variance_high", OPTIMIZER),
        ({"stages": ()}, {"grad_var": 2.0}, "grad_variance_high", PAUSE),
        ({"stages": ()}, {"blueprint": with_sheet()}, "no_seed_candidates", PAUSE),
        (
            {"inference": Inference(status=InferenceStatus.TIMED_OUT)},
            {"loss_delta": 0.2},
            "timeout_inference",
            PAUSE,
        ),
        (
            {"inference": Inference(status=InferenceStatus.TIMED_OUT)},
            {"loss": NAN},
            "loss_nonfinite",
            PAUSE,
        ),
    ],
)
def test_of_two_events_the_severe_one_explains_and_the_cautious_one_acts(
    one: dict[str, float], other: dict[str, float], reason: str, action: CommandAction
) -> None:
    for given in (one | other, other | one):
        verdict = assess(signals(**given), THRESHOLDS, SEED)  # type: ignore[arg-type]
        assert (verdict.reason, verdict.action) == (reason, action)


def both(one: Signals, other: Signals) -> Signals | None:
    """Signals on which both fire; None when the two ask for different values of one signal."""
    quiet, changes = signals(), {}
    for field in fields(Signals):
        plain, first, second = (getattr(each, field.name) for each in (quiet, one, other))
        if field.name == "inference" and plain not in (first, second):
            first, second, plain = _merged_inference(first, second, plain)
        if plain not in (first, second) and first != second:
            return None
        changes[field.name] = second if first == plain else first
    return replace(quiet, **changes)


def _merged_inference(
    first: Inference, second: Inference, plain: Inference
) -> tuple[Inference, Inference, Inference]:
    """One inference with what both differ in, where they do not contradict each other."""
    changes = {}
    for field in fields(Inference):
        usual, one, other = (getattr(each, field.name) for each in (plain, first, second))
        if usual not in (one, other) and one != other:
            return first, second, plain
        changes[field.name] = other if one == usual else one
    merged = replace(plain, **changes)
    return merged, merged, plain


@pytest.mark.parametrize("one", ROWS, ids=row_name)
def test_of_any_two_events_the_severe_one_explains_and_the_cautious_one_acts(one: Row) -> None:
    paired = 0
    for other in ROWS:
        joint = both(one.firing[-1], other.firing[-1])
        if joint is None or one is other:
            continue
        for proposed in CommandAction:
            verdict = assess(joint, THRESHOLDS, proposed)
            if not {one.event, other.event} <= fired(verdict).keys():
                continue
            paired += 1
            alone = [assess(row.firing[-1], THRESHOLDS, proposed) for row in (one, other)]
            worst = max(event.severity for event in verdict.events)
            assert verdict.action >= max(each.action for each in alone)
            assert verdict.severity is worst
            leading = verdict.leading
            if worst > Severity.INFO:
                assert leading is next(e for e in verdict.events if e.severity is worst)
                first = next(
                    rule
                    for rule in RULES
                    if (rule.event, rule.severity) == (leading.event, leading.severity)
                )
                assert verdict.reason == first.reason
            assert verdict.conservative >= any(each.conservative for each in alone)
    assert paired > len(ROWS)


def test_the_conservative_reason_is_that_of_the_rule_that_asks_for_it() -> None:
    both = signals(loss_delta=0.2, inference=Inference(coverage_mean=0.05))
    verdict = assess(both, THRESHOLDS, SEED)
    assert (verdict.reason, verdict.conservative_reason) == ("degraded_inputs", "loss_spike")


@pytest.mark.parametrize(
    ("field", "value", "quieted"),
    [
        ("max_loss_spike", 0.5, signals(loss_delta=0.2)),
        ("loss_volatility", 0.5, signals(loss_volatility=0.2)),
        ("grad_variance", 9.0, signals(grad_var=2.0)),
        ("grad_conflict", 0.9, signals(grad_conflict_rate=0.6)),
        ("hook_latency_rise_ratio", 4.0, hook(60.0, RISEN)),
        ("step_latency_rise_ratio", 4.0, step(60.0, RISEN)),
        ("latency_rise_ms", 50.0, step(60.0, RISEN)),
        ("latency_rise_steps", 9, hook(60.0, RISEN)),
        ("kasmina_apply_slow_ms", 60.0, signals(kasmina__apply_ms=40.0)),
        ("kasmina_finalize_slow_ms", 60.0, signals(kasmina__finalize_ms=40.0)),
        ("isolation_violations", 3.0, signals(kasmina__isolation__violations=2.0)),
        ("gpu_util_percent", 99.5, signals(gpu_util_percent=98.0, gpu_mem_free_gb=0.1)),
        ("gpu_mem_free_gb", 0.05, signals(gpu_util_percent=98.0, gpu_mem_free_gb=0.1)),
        ("cpu_util_percent", 99.5, signals(cpu_util_percent=98.0)),
        ("coverage_crit", 0.01, covered(0.05)),
        ("policy_risk_critical", 1.5, scored(0.99)),
        ("blueprint_quarantine", 0.95, signals(blueprint=blueprint(0.9))),
        ("optimizer_lr_min", -1.0, signals(optimizer_lr=0.0, loss_delta=0.1)),
        ("loss_warning", 0.5, signals(loss_delta=0.1)),
        ("coverage_warn", 0.15, covered(0.2)),
        ("policy_risk_elevated", 0.95, scored(0.9)),
        ("policy_risk_signal", 0.9, scored(0.6)),
        ("blueprint_risk", 0.9, signals(blueprint=blueprint(0.6))),
    ],
)
def test_a_raised_threshold_silences_its_event(field: str, value: float, quieted: Signals) -> None:
    before = assess(quieted, THRESHOLDS, SEED).events
    raised = replace(THRESHOLDS, **{field: value})  # type: ignore[arg-type]
    after = assess(quieted, raised, SEED).events
    assert len(after) < len(before) or after[0].severity < before[0].severity


def test_every_bsds_event_names_its_provenance() -> None:
    sheet = with_sheet(0.9, leyline.HAZARD_BAND_CRITICAL, leyline.HANDLING_CLASS_QUARANTINE)
    verdict = assess(signals(blueprint=sheet), THRESHOLDS, SEED)
    named = [event for event in verdict.events if event.event.value.startswith("bsds")]
    assert len(named) == 3
    assert {event.attributes["provenance"] for event in named} == {"URABRASK"}
    quarantine = next(e for e in verdict.events if e.event is Event.BP_QUARANTINE)
    assert quarantine.attributes["risk_provenance"] == "bsds"


def test_an_event_carries_its_value_and_threshold() -> None:
    (event,) = assess(signals(grad_var=1.5), THRESHOLDS, SEED).events
    assert event.attributes == {"value": "1.5", "threshold": "1.0"}


def test_a_rise_carries_the_median_and_how_long_it_has_lasted() -> None:
    (event,) = assess(hook(60.0, RISEN), THRESHOLDS, SEED).events
    assert event.attributes == {
        "value": "60.0",
        "threshold": "50.0",
        "median": "20.0",
        "steps": "8",
    }


@pytest.mark.parametrize(
    ("limit", "event", "quiet", "firing"),
    [
        ({"hook_budget_ms": 50.0}, Event.HOOK_BUDGET, 50.0, 50.1),
        ({"hook_budget_ms": 0.0}, Event.HOOK_BUDGET, 0.0, 0.1),
        ({"step_latency_high_ms": 120.0}, Event.STEP_LATENCY_HIGH, 120.0, 120.1),
    ],
)
def test_a_limit_that_is_set_pauses_above_it_whatever_the_run_is_used_to(
    limit: dict[str, float], event: Event, quiet: float, firing: float
) -> None:
    thresholds = replace(THRESHOLDS, **limit)  # type: ignore[arg-type]
    make = hook if event is Event.HOOK_BUDGET else step
    for before in ((), (firing,) * 32):
        assert assess(make(quiet, before), thresholds, SEED) == Verdict(SEED, "policy")
        verdict = assess(make(firing, before), thresholds, SEED)
        assert (verdict.action, verdict.reason) == (PAUSE, event.value)
        assert fired(verdict) == {event: Severity.HIGH}


def test_a_rise_can_be_switched_off() -> None:
    off = replace(THRESHOLDS, step_latency_rise_ratio=0.0)
    assert assess(step(6000.0, RISEN), off, SEED).events == ()
    assert fired(assess(hook(6000.0, RISEN), off, SEED)) == {Event.HOOK_BUDGET: Severity.HIGH}


def test_a_violation_pauses_its_own_step_alone() -> None:
    assert assess(signals(kasmina__isolation__violations=2.0), THRESHOLDS, SEED).action is PAUSE
    assert assess(signals(kasmina__isolation__violations=0.0), THRESHOLDS, SEED).events == ()


def test_a_timeout_carries_its_budget() -> None:
    (event,) = assess(ended(InferenceStatus.TIMED_OUT), THRESHOLDS, SEED).events
    assert event.attributes == {"budget_ms": "5.0"}
