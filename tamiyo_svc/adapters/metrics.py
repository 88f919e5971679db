"""Every Prometheus metric of the service, behind methods that speak of packets and commands.

Labels are bounded: enum members, configured stream names, coverage families; never a run, a
packet or a seed. Histogram children are few, because rendering them holds the GIL.
"""

from __future__ import annotations

import importlib.metadata
import platform
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from tamiyo_svc import __version__
from tamiyo_svc.adapters.blueprint_rows import SKIPPED_PARTS
from tamiyo_svc.graph.coverage import FAMILIES
from tamiyo_svc.risk.engine import POLICY_REASON
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

OTHER: Final = "other"
"""Stands for a label value outside its closed set."""

SECONDS_BUCKETS: Final = (
    *(0.00025, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004),
    0.005,  # the step budget: the share of decisions within it is read off this edge
    *(0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
)
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64)

_COMMAND_TYPES: Final = {
    CommandAction.SEED: "seed",
    CommandAction.OPTIMIZER: "optimizer",
    CommandAction.BREAKER: "circuit_breaker",
    CommandAction.PAUSE: "pause",
}
_COMMAND_REASONS: Final = frozenset({POLICY_REASON, *(rule.reason for rule in RULES)})
_FAMILIES: Final = frozenset(FAMILIES)
_IGNORED_REASONS: Final = frozenset({"no_payload", "not_for_us"})
_SIGNATURE_FAILURES: Final = frozenset(
    {DeadLetterReason.MISSING_SIGNATURE, DeadLetterReason.INVALID_SIGNATURE}
)


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """How far our group is behind on one stream; None is unknown, which is not 0."""

    lag_entries: int | None = None
    pending_entries: int | None = None
    oldest_unacked_s: float | None = None


class _Ledger(Collector):
    """Packets received, ended and in flight, always exported as of one moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._received = 0
        self._in_flight = 0
        self._ended = dict.fromkeys(Outcome, 0)

    def receive(self, count: int) -> None:
        with self._lock:
            self._received += count
            self._in_flight += count

    def end(self, outcome: Outcome, count: int) -> None:
        with self._lock:
            self._ended[outcome] += count
            self._in_flight -= count

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            received, in_flight, ended = self._received, self._in_flight, dict(self._ended)
        packets = CounterMetricFamily(
            "tamiyo_packets", "State packets by how they ended.", labels=["outcome"]
        )
        for outcome, count in ended.items():
            packets.add_metric([outcome.value], count)
        yield packets
        yield CounterMetricFamily(
            "tamiyo_packets_received",
            "State packets read; always the outcomes and those in flight together.",
            value=received,
        )
        yield GaugeMetricFamily(
            "tamiyo_in_flight_packets", "State packets that have not ended yet.", value=in_flight
        )


class _CountedElsewhere(Collector):
    """A counter whose owner counts; it is read when scraped."""

    def __init__(self, name: str, text: str, read: Callable[[], int]) -> None:
        self._name = name
        self._text = text
        self._read = read

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._text, value=self._read())


class Metrics:
    """The service's metrics in a registry of their own.

    `streams` are the stream names that may become label values. Methods may be called from any
    thread.
    """

    content_type: Final = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, streams: Iterable[str] = ()) -> None:
        # Creation times would double the number of exported samples and nothing reads them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._streams = frozenset(streams)
        self._ledger = _Ledger()
        self.registry.register(self._ledger)
        self._build_decision_metrics()
        self._build_bus_metrics()
        self._build_policy_metrics()
        self._build_process_metrics()

    def _build_decision_metrics(self) -> None:
        registry = self.registry
        self._packet_age = Histogram(
            "tamiyo_packet_age_seconds",
            "Age of a packet when it was read, by the Redis clock.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._decision_duration = Histogram(
            "tamiyo_decision_duration_seconds",
            "From packet read to command ready.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        stages = Histogram(
            "tamiyo_stage_duration_seconds",
            "Parts of one packet's path.",
            ["stage"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._stages = {stage: stages.labels(stage.value) for stage in Stage}
        self._commands = Counter(
            "tamiyo_commands_total",
            "Commands committed, by type and reason.",
            ["type", "reason"],
            registry=registry,
        )
        self._events = Counter(
            "tamiyo_events_total",
            "Events reported, by severity.",
            ["event", "severity"],
            registry=registry,
        )
        timeouts = Counter("tamiyo_timeouts_total", "Budgets missed.", ["path"], registry=registry)
        self._timeouts = {path: timeouts.labels(path.value) for path in TimeoutPath}
        self._late_results = Counter(
            "tamiyo_late_results_total",
            "Inference results that came after their packet had been answered.",
            registry=registry,
        )
        self._batch_size = Histogram(
            "tamiyo_batch_size",
            "Packets in one inference.",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._coverage = Gauge(
            "tamiyo_feature_coverage_ratio",
            "Share of inputs present in the newest decision.",
            ["family"],
            registry=registry,
        )
        # Made on first sight, so that coverage nobody measured is absent; kept, because this is
        # written on every decision.
        self._coverage_children: dict[str, Gauge] = {}
        self._conservative_runs = Gauge(
            "tamiyo_conservative_runs", "Runs in conservative mode.", registry=registry
        )
        self._catalog_blueprints = Gauge(
            "tamiyo_catalog_blueprints", "Blueprints known.", registry=registry
        )
        self._catalog_degraded = Gauge(
            "tamiyo_catalog_degraded",
            "1 while the catalogue cannot be read and its last good state serves.",
            registry=registry,
        )
        skipped = Gauge(
            "tamiyo_catalog_skipped_entries",
            "Catalogue rows, or parts of rows, that cannot be used as they stand.",
            ["part"],
            registry=registry,
        )
        self._catalog_skipped = {part: skipped.labels(part) for part in SKIPPED_PARTS}
        breakers = Gauge(
            "tamiyo_breaker_state",
            "Circuit breakers: 1 closed, 2 open, 3 half open.",
            ["breaker"],
            registry=registry,
        )
        self._breakers = {name: breakers.labels(name.value) for name in BreakerName}
        for breaker in self._breakers.values():
            breaker.set(BreakerState.CLOSED)

    def _build_bus_metrics(self) -> None:
        registry = self.registry
        self._lag = Gauge(
            "tamiyo_stream_lag_entries",
            "Entries not yet delivered to our group; absent when the server does not know.",
            ["stream"],
            registry=registry,
        )
        self._pending = Gauge(
            "tamiyo_stream_pending_entries",
            "Entries delivered and not yet acknowledged; absent when unknown.",
            ["stream"],
            registry=registry,
        )
        self._oldest_unacked = Gauge(
            "tamiyo_stream_oldest_unacked_seconds",
            "Age of the oldest entry not yet acknowledged; absent when unknown.",
            ["stream"],
            registry=registry,
        )
        self._ignored = Counter(
            "tamiyo_entries_ignored_total",
            "Entries acknowledged without a look at their message.",
            ["reason"],
            registry=registry,
        )
        self._commit_conflicts = Counter(
            "tamiyo_commit_conflicts_total",
            "Commits refused because the run state had moved on.",
            registry=registry,
        )
        dead_letters = Counter(
            "tamiyo_dead_letters_total",
            "Entries moved to the dead-letter stream.",
            ["reason"],
            registry=registry,
        )
        self._dead_letters = {
            reason: dead_letters.labels(reason.value) for reason in DeadLetterReason
        }
        failures = Counter(
            "tamiyo_signature_failures_total",
            "Entries refused for their signature.",
            ["reason"],
            registry=registry,
        )
        self._signature_failures = {
            reason: failures.labels(reason.value) for reason in sorted(_SIGNATURE_FAILURES)
        }
        self._emergency_published = Counter(
            "tamiyo_emergency_published_total",
            "Telemetry packets sent to the emergency stream.",
            registry=registry,
        )
        self._emergency_rate_limited = Counter(
            "tamiyo_emergency_rate_limited_total",
            "Emergency telemetry sent to the telemetry stream because of the rate limit.",
            registry=registry,
        )

    def _build_policy_metrics(self) -> None:
        registry = self.registry
        self._policy = Gauge(
            "tamiyo_policy_info",
            "The policy that serves.",
            ["policy_id", "version", "digest"],
            registry=registry,
        )
        updates = Counter(
            "tamiyo_policy_updates_total",
            "Policy updates by outcome.",
            ["outcome"],
            registry=registry,
        )
        self._policy_updates = {
            outcome: updates.labels(outcome.value) for outcome in PolicyUpdateOutcome
        }
        self._compile_enabled = Gauge(
            "tamiyo_gnn_compile_enabled", "1 while a compiled network serves.", registry=registry
        )
        self._compile_fallback = Counter(
            "tamiyo_gnn_compile_fallback_total",
            "Falls back from a compiled network to a slower one.",
            registry=registry,
        )
        # Registered with its first value: no warm-up is not a warm-up of 0 seconds.
        self._compile_warm: Gauge | None = None

    def _build_process_metrics(self) -> None:
        Info("tamiyo_build", "What runs here.", registry=self.registry).info(
            {
                "version": __version__,
                "python": platform.python_version(),
                "torch": importlib.metadata.version("torch"),
            }
        )
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def exposition(self) -> bytes:
        """The metrics as Prometheus reads them; holds the GIL for about a millisecond."""
        return generate_latest(self.registry)

    def packet_received(self, count: int = 1) -> None:
        """Packets were read and are now in flight."""
        self._ledger.receive(count)

    def packet_ended(self, outcome: Outcome, count: int = 1) -> None:
        """Packets in flight reached their one outcome."""
        self._ledger.end(outcome, count)

    def observe_packet_age(self, age_s: float) -> None:
        """Age of a packet when it was read; never below 0, whatever the clocks say."""
        self._packet_age.observe(max(0.0, age_s))

    def observe_decision(self, duration_s: float) -> None:
        """Time from packet read to command ready."""
        self._decision_duration.observe(duration_s)

    def observe_stage(self, stage: Stage, duration_s: float) -> None:
        """Time one part of the path took."""
        self._stages[stage].observe(duration_s)

    def observe_batch(self, packets: int) -> None:
        """Packets that one inference took together."""
        self._batch_size.observe(packets)

    def command_issued(self, action: CommandAction, reason: str) -> None:
        """A command was committed; a reason outside the rules counts as `other`."""
        known = reason if reason in _COMMAND_REASONS else OTHER
        self._commands.labels(_COMMAND_TYPES[action], known).inc()

    def event_reported(self, event: Event, severity: Severity) -> None:
        """An event went out in telemetry."""
        self._events.labels(event.value, severity.name.lower()).inc()

    def timed_out(self, path: TimeoutPath) -> None:
        """A budget was missed."""
        self._timeouts[path].inc()

    def late_result(self) -> None:
        """An inference finished after its packet had been answered."""
        self._late_results.inc()

    def coverage_seen(self, by_family: Mapping[str, float]) -> None:
        """Coverage of the newest decision; families outside the contract are left out."""
        for family, share in by_family.items():
            child = self._coverage_children.get(family)
            if child is None:
                if family not in _FAMILIES:
                    continue
                child = self._coverage_children[family] = self._coverage.labels(family)
            child.set(share)

    def conservative_runs(self, count: int) -> None:
        """Runs in conservative mode now."""
        self._conservative_runs.set(count)

    def catalog_state(self, blueprints: int, skipped: Mapping[str, int], *, degraded: bool) -> None:
        """What the catalogue holds now, and what of it had to be left out."""
        self._catalog_blueprints.set(blueprints)
        self._catalog_degraded.set(int(degraded))
        for part, child in self._catalog_skipped.items():
            child.set(skipped.get(part, 0))

    def breaker_state(self, breaker: BreakerName, state: BreakerState) -> None:
        """A breaker is in this state now."""
        self._breakers[breaker].set(state)

    def stream_position(self, stream: str, position: StreamPosition) -> None:
        """Where our group stands on a stream; unknown values disappear from the export."""
        label = stream if stream in self._streams else OTHER
        for gauge, value in (
            (self._lag, position.lag_entries),
            (self._pending, position.pending_entries),
            (self._oldest_unacked, position.oldest_unacked_s),
        ):
            if value is None:
                gauge.remove_by_labels({"stream": label})
            else:
                gauge.labels(label).set(value)

    def entry_ignored(self, reason: str) -> None:
        """An entry was no message for us: `no_payload`, `not_for_us`, else `other`."""
        self._ignored.labels(reason if reason in _IGNORED_REASONS else OTHER).inc()

    def commit_conflict(self) -> None:
        """A commit found that the run state had moved on."""
        self._commit_conflicts.inc()

    def dead_letter(self, reason: DeadLetterReason) -> None:
        """An entry went to the dead-letter stream; forged ones count as signature failures too."""
        self._dead_letters[reason].inc()
        if reason in self._signature_failures:
            self._signature_failures[reason].inc()

    def emergency_published(self) -> None:
        """Telemetry went to the emergency stream."""
        self._emergency_published.inc()

    def emergency_rate_limited(self) -> None:
        """Emergency telemetry went to the telemetry stream instead."""
        self._emergency_rate_limited.inc()

    def policy_serving(self, policy_id: str, version: str, digest: str) -> None:
        """This policy serves from now on, and no other."""
        self._policy.clear()
        self._policy.labels(policy_id, version, digest).set(1)

    def policy_update(self, outcome: PolicyUpdateOutcome) -> None:
        """A policy update ended."""
        self._policy_updates[outcome].inc()

    def compile_enabled(self, *, enabled: bool) -> None:
        """Whether a compiled network serves now."""
        self._compile_enabled.set(int(enabled))

    def compile_fallback(self) -> None:
        """A compiled network was given up."""
        self._compile_fallback.inc()

    def compile_warmed(self, duration_s: float) -> None:
        """A warm-up ran."""
        if self._compile_warm is None:
            self._compile_warm = Gauge(
                "tamiyo_gnn_compile_warm_seconds",
                "Time the last warm-up took; absent when none ran.",
                registry=self.registry,
            )
        self._compile_warm.set(duration_s)

    def watch_log_drops(self, dropped: Callable[[], int]) -> None:
        """Export the number of log lines that were dropped, as `dropped` gives it."""
        self.registry.register(
            _CountedElsewhere(
                "tamiyo_log_lines_dropped", "Log lines dropped, never waited for.", dropped
            )
        )
