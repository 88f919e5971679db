"""What is exported, under which names, with which labels, and what adds up."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tamiyo_svc.adapters.metrics import OTHER, SECONDS_BUCKETS, Metrics, StreamPosition
from tamiyo_svc.graph.coverage import FAMILIES
from tamiyo_svc.risk.rules import RULES
from tamiyo_svc.taxonomy import (
    BreakerName,
    BreakerState,
    CommandAction,
    DeadLetterReason,
    Event,
    Outcome,
    PolicyUpdateOutcome,
    Severity,
    Stage,
    TimeoutPath,
)

DOCUMENTED = {
    "tamiyo_packets_total": {"outcome"},
    "tamiyo_packets_received_total": set(),
    "tamiyo_in_flight_packets": set(),
    "tamiyo_packet_age_seconds": set(),
    "tamiyo_decision_duration_seconds": set(),
    "tamiyo_stage_duration_seconds": {"stage"},
    "tamiyo_commands_total": {"type", "reason"},
    "tamiyo_events_total": {"event", "severity"},
    "tamiyo_timeouts_total": {"path"},
    "tamiyo_late_results_total": set(),
    "tamiyo_batch_size": set(),
    "tamiyo_stream_lag_entries": {"stream"},
    "tamiyo_stream_pending_entries": {"stream"},
    "tamiyo_stream_oldest_unacked_seconds": {"stream"},
    "tamiyo_entries_ignored_total": {"reason"},
    "tamiyo_commit_conflicts_total": set(),
    "tamiyo_dead_letters_total": {"reason"},
    "tamiyo_signature_failures_total": {"reason"},
    "tamiyo_emergency_published_total": set(),
    "tamiyo_emergency_rate_limited_total": set(),
    "tamiyo_breaker_state": {"breaker"},
    "tamiyo_conservative_runs": set(),
    "tamiyo_catalog_blueprints": set(),
    "tamiyo_catalog_degraded": set(),
    "tamiyo_catalog_skipped_entries": {"part"},
    "tamiyo_policy_info": {"policy_id", "version", "digest"},
    "tamiyo_policy_updates_total": {"outcome"},
    "tamiyo_gnn_compile_enabled": set(),
    "tamiyo_gnn_compile_fallback_total": set(),
    "tamiyo_gnn_compile_warm_seconds": set(),
    "tamiyo_feature_coverage_ratio": {"family"},
    "tamiyo_build_info": {"version", "python", "torch"},
    "tamiyo_log_lines_dropped_total": set(),
}


def samples(metrics: Metrics) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def use_everything(metrics: Metrics) -> None:
    metrics.packet_received(2)
    metrics.packet_ended(Outcome.DECIDED)
    metrics.observe_packet_age(0.001)
    metrics.observe_decision(0.004)
    metrics.observe_stage(Stage.INFER, 0.002)
    metrics.observe_batch(3)
    metrics.command_issued(CommandAction.SEED, "policy")
    metrics.event_reported(Event.LOSS_SPIKE, Severity.HIGH)
    metrics.timed_out(TimeoutPath.STEP)
    metrics.late_result()
    metrics.coverage_seen({"node.seed": 0.5})
    metrics.conservative_runs(1)
    metrics.breaker_state(BreakerName.BUS, BreakerState.OPEN)
    metrics.stream_position("oona.normal", StreamPosition(1, 2, 3.0))
    metrics.entry_ignored("not_for_us")
    metrics.commit_conflict()
    metrics.dead_letter(DeadLetterReason.OVERSIZED)
    metrics.emergency_published()
    metrics.emergency_rate_limited()
    metrics.policy_serving("p", "v1", "abc")
    metrics.policy_update(PolicyUpdateOutcome.APPLIED)
    metrics.compile_enabled(enabled=True)
    metrics.compile_fallback()
    metrics.compile_warmed(1.5)
    metrics.watch_log_drops(lambda: 7)


def test_every_documented_metric_is_exported_with_exactly_its_labels() -> None:
    metrics = Metrics(["oona.normal"])
    use_everything(metrics)
    found: dict[str, set[str]] = {}
    for name, labels, _ in samples(metrics):
        if name.startswith("tamiyo_"):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            found.setdefault(base, set()).update(labels.keys() - {"le"})
    assert found == DOCUMENTED


def test_process_and_python_metrics_are_exported() -> None:
    names = {name for name, _, _ in samples(Metrics())}
    assert {
        "process_resident_memory_bytes",
        "process_cpu_seconds_total",
        "python_info",
        "python_gc_collections_total",
    } <= names


def test_creation_times_are_not_exported() -> None:
    metrics = Metrics(["oona.normal"])
    use_everything(metrics)
    assert not [name for name, _, _ in samples(metrics) if name.endswith("_created")]


def test_a_bucket_edge_lies_exactly_on_the_step_budget() -> None:
    metrics = Metrics()
    metrics.observe_decision(0.005)
    metrics.observe_decision(0.0050001)
    assert value(metrics, "tamiyo_decision_duration_seconds_bucket", le="0.005") == 1
    assert (SECONDS_BUCKETS[0], SECONDS_BUCKETS[-1]) == (0.00025, 1.0)


def test_histogram_children_stay_few() -> None:
    metrics = Metrics(["oona.normal"])
    use_everything(metrics)
    children = [name for name, labels, _ in samples(metrics) if labels.get("le") == "+Inf"]
    assert len(children) <= 10


@given(st.lists(st.one_of(st.none(), st.sampled_from(Outcome)), max_size=30))
def test_received_is_always_the_outcomes_and_those_in_flight(
    steps: list[Outcome | None],
) -> None:
    metrics = Metrics()
    open_packets = 0
    for outcome in steps:
        if outcome is None:
            metrics.packet_received()
            open_packets += 1
        elif open_packets:
            metrics.packet_ended(outcome)
            open_packets -= 1
    ended = sum(value(metrics, "tamiyo_packets_total", outcome=each) or 0 for each in Outcome)
    received = value(metrics, "tamiyo_packets_received_total")
    assert value(metrics, "tamiyo_in_flight_packets") == open_packets
    assert received == ended + open_packets


def test_closed_sets_are_exported_before_anything_happened() -> None:
    metrics = Metrics()
    assert all(value(metrics, "tamiyo_packets_total", outcome=each) == 0 for each in Outcome)
    assert all(
        value(metrics, "tamiyo_dead_letters_total", reason=each) == 0 for each in DeadLetterReason
    )
    assert all(value(metrics, "tamiyo_timeouts_total", path=each) == 0 for each in TimeoutPath)
    assert all(
        value(metrics, "tamiyo_breaker_state", breaker=each) == BreakerState.CLOSED
        for each in BreakerName
    )


def test_every_rule_has_its_own_reason_and_anything_else_is_other() -> None:
    metrics = Metrics()
    for reason in {rule.reason for rule in RULES}:
        metrics.command_issued(CommandAction.PAUSE, reason)
        assert value(metrics, "tamiyo_commands_total", type="pause", reason=reason) == 1
    metrics.command_issued(CommandAction.BREAKER, "run-4711 looked odd")
    assert value(metrics, "tamiyo_commands_total", type="circuit_breaker", reason=OTHER) == 1


def test_an_unknown_stream_position_is_absent_and_not_zero() -> None:
    metrics = Metrics(["oona.normal"])
    assert value(metrics, "tamiyo_stream_lag_entries", stream="oona.normal") is None
    metrics.stream_position("oona.normal", StreamPosition(lag_entries=5, pending_entries=0))
    assert value(metrics, "tamiyo_stream_lag_entries", stream="oona.normal") == 5
    assert value(metrics, "tamiyo_stream_pending_entries", stream="oona.normal") == 0
    assert value(metrics, "tamiyo_stream_oldest_unacked_seconds", stream="oona.normal") is None
    metrics.stream_position("oona.normal", StreamPosition(pending_entries=2))
    assert value(metrics, "tamiyo_stream_lag_entries", stream="oona.normal") is None
    assert value(metrics, "tamiyo_stream_pending_entries", stream="oona.normal") == 2


def test_streams_outside_the_configured_ones_are_no_labels() -> None:
    metrics = Metrics(["oona.normal"])
    metrics.stream_position("oona.commands.run-4711", StreamPosition(lag_entries=1))
    assert value(metrics, "tamiyo_stream_lag_entries", stream=OTHER) == 1
    assert "run-4711" not in metrics.exposition().decode()


def test_reasons_to_ignore_an_entry_are_bounded() -> None:
    metrics = Metrics()
    metrics.entry_ignored("no_payload")
    metrics.entry_ignored("run-4711")
    assert value(metrics, "tamiyo_entries_ignored_total", reason="no_payload") == 1
    assert value(metrics, "tamiyo_entries_ignored_total", reason=OTHER) == 1


def test_forged_dead_letters_count_as_signature_failures_and_others_do_not() -> None:
    metrics = Metrics()
    metrics.dead_letter(DeadLetterReason.INVALID_SIGNATURE)
    metrics.dead_letter(DeadLetterReason.OVERSIZED)
    name = "tamiyo_signature_failures_total"
    assert value(metrics, name, reason="invalid_signature") == 1
    assert value(metrics, name, reason="missing_signature") == 0
    assert value(metrics, name, reason="oversized") is None


def test_only_the_serving_policy_is_exported() -> None:
    metrics = Metrics()
    metrics.policy_serving("p", "v1", "abc")
    metrics.policy_serving("p", "v2", "def")
    policies = [labels for name, labels, _ in samples(metrics) if name == "tamiyo_policy_info"]
    assert policies == [{"policy_id": "p", "version": "v2", "digest": "def"}]


def test_a_warm_up_that_never_ran_is_absent() -> None:
    metrics = Metrics()
    assert value(metrics, "tamiyo_gnn_compile_warm_seconds") is None
    metrics.compile_warmed(2.0)
    metrics.compile_warmed(1.0)
    assert value(metrics, "tamiyo_gnn_compile_warm_seconds") == 1.0


def test_coverage_has_only_the_families_of_the_contract() -> None:
    metrics = Metrics()
    metrics.coverage_seen({**dict.fromkeys(FAMILIES, 0.25), "node.run-4711": 1.0})
    families = {
        labels["family"]
        for name, labels, _ in samples(metrics)
        if name == "tamiyo_feature_coverage_ratio"
    }
    assert families == set(FAMILIES)


def test_a_clock_that_runs_backwards_gives_no_negative_age() -> None:
    metrics = Metrics()
    metrics.observe_packet_age(-3.0)
    assert value(metrics, "tamiyo_packet_age_seconds_sum") == 0.0


def test_two_instances_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.late_result()
    assert value(second, "tamiyo_late_results_total") == 0


def test_the_catalogue_is_exported_with_what_was_skipped() -> None:
    metrics = Metrics()
    metrics.catalog_state(7, {"row": 2, "bsds": 1}, degraded=True)
    assert value(metrics, "tamiyo_catalog_blueprints") == 7
    assert value(metrics, "tamiyo_catalog_degraded") == 1
    assert value(metrics, "tamiyo_catalog_skipped_entries", part="row") == 2
    metrics.catalog_state(9, {}, degraded=False)
    assert value(metrics, "tamiyo_catalog_degraded") == 0
    assert value(metrics, "tamiyo_catalog_skipped_entries", part="row") == 0
