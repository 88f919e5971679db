"""Everything the risk rules look at, read once from a packet and from what is known around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Final

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.latency import NO_LATENCIES, Latencies
from tamiyo_svc.taxonomy import NEXT_SEED_OPERATIONS, InferenceStatus

LOSS_METRICS: Final = ("loss", "validation_loss", "training_loss")
"""Metrics that are a loss themselves; derived ones such as `loss_ewma` are ordinary inputs."""

ROLLBACK_DEADLINE: Final = "rollback_deadline"
"""Reason of the emergency signal that has an event of its own."""

_ACTING_LEVELS = (leyline.EMERGENCY_LEVEL_CONSERVATIVE, leyline.EMERGENCY_LEVEL_HALT)
_NAME_CHARS = 64


@dataclass(frozen=True, slots=True)
class Emergency:
    """An emergency signal that applies to the run."""

    reason: str
    origin: str
    level: str


@dataclass(frozen=True, slots=True)
class Inference:
    """How the network's part of the step went; budgets in milliseconds.

    `coverage_mean` and `policy_risk_score` are None unless the status is `COMPLETED`.
    """

    status: InferenceStatus = InferenceStatus.COMPLETED
    detail: str = ""
    budget_ms: float = 0.0
    coverage_mean: float | None = None
    policy_risk_score: float | None = None
    policy_untrained: bool = False


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the catalogue gave; `candidates` is None when it was not asked, budget in ms."""

    candidates: int | None = None
    timed_out: bool = False
    budget_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Signals:
    """The numbers and flags of one step; None is absent, every number is finite.

    `latencies` are those of the run's steps before this one.
    """

    inference: Inference = Inference()
    metadata: Metadata = Metadata()
    emergencies: tuple[Emergency, ...] = ()
    conservative_reason: str | None = None

    seeds: int = 0
    seed_candidates: int = 0

    validation_loss: float | None = None
    loss_delta: float | None = None
    loss_volatility: float | None = None
    grad_var: float | None = None
    grad_conflict_rate: float | None = None
    optimizer_lr: float | None = None
    hook_latency_ms: float | None = None
    step_latency_ms: float | None = None
    latencies: Latencies = NO_LATENCIES
    apply_ms: float | None = None
    finalize_ms: float | None = None
    isolation_violations: float | None = None
    gpu_util_percent: float | None = None
    gpu_mem_free_gb: float | None = None
    cpu_util_percent: float | None = None

    nonfinite_losses: tuple[str, ...] = ()
    nonfinite_inputs: tuple[str, ...] = ()

    blueprint_risk: float | None = None
    blueprint_quarantine_only: bool = False
    bsds: leyline.BSDS | None = None

    @property
    def risk_provenance(self) -> str:
        """Whose risk score `blueprint_risk` is; empty without a blueprint."""
        if self.blueprint_risk is None:
            return ""
        return "bsds" if self.bsds is not None else "descriptor"


def read_signals(
    packet: leyline.SystemStatePacket,
    last_validation_loss: float | None,
    *,
    inference: Inference,
    metadata: Metadata,
    latencies: Latencies = NO_LATENCIES,
    blueprint: Blueprint | None = None,
    emergencies: Iterable[leyline.EmergencySignal] = (),
    conservative_reason: str | None = None,
) -> Signals:
    """Collect the signals of one step.

    `latencies` are those before this step, `blueprint` is the selected one; `conservative_reason`
    is why the run or the service is in conservative mode, None when neither is. Values that are
    not finite are named and absent.
    """
    metrics = packet.training_metrics
    nonfinite_losses = _nonfinite_losses(packet)
    return Signals(
        inference=inference,
        metadata=metadata,
        emergencies=_acting(emergencies, packet.training_run_id),
        conservative_reason=conservative_reason,
        seeds=len(packet.seed_states),
        seed_candidates=sum(seed.stage in NEXT_SEED_OPERATIONS for seed in packet.seed_states),
        validation_loss=validation_loss(packet),
        loss_delta=loss_delta(packet, last_validation_loss),
        loss_volatility=_metric(metrics, "loss_volatility"),
        grad_var=_metric(metrics, "grad_var"),
        grad_conflict_rate=_metric(metrics, "grad_conflict_rate"),
        optimizer_lr=_metric(metrics, "optimizer_lr"),
        hook_latency_ms=hook_latency_ms(packet),
        step_latency_ms=_metric(metrics, "step_latency_ms"),
        latencies=latencies,
        apply_ms=_metric(metrics, "kasmina.apply_ms"),
        finalize_ms=_metric(metrics, "kasmina.finalize_ms"),
        isolation_violations=_metric(metrics, "kasmina.isolation.violations"),
        gpu_util_percent=_metric(metrics, "gpu_util_percent"),
        gpu_mem_free_gb=_metric(metrics, "gpu_mem_free_gb"),
        cpu_util_percent=_metric(metrics, "cpu_util_percent"),
        nonfinite_losses=nonfinite_losses,
        nonfinite_inputs=_nonfinite_inputs(packet),
        blueprint_risk=None if blueprint is None else _risk(blueprint),
        blueprint_quarantine_only=blueprint is not None and blueprint.descriptor.quarantine_only,
        bsds=None if blueprint is None else blueprint.bsds,
    )


def validation_loss(packet: leyline.SystemStatePacket) -> float | None:
    """The packet's validation loss, from the metric map or else from its own field.

    A field that is 0 is absent, as proto3 has it.
    """
    reported = _metric(packet.training_metrics, "validation_loss")
    if reported is not None:
        return reported
    value = packet.validation_loss
    return value if value != 0.0 and isfinite(value) else None


def loss_delta(
    packet: leyline.SystemStatePacket, last_validation_loss: float | None
) -> float | None:
    """How much the validation loss rose since the run's last one.

    Where one of the two is missing, as on a run's first packet, the trainer's own `loss_delta`.
    """
    current = validation_loss(packet)
    if current is None or last_validation_loss is None:
        return _metric(packet.training_metrics, "loss_delta")
    return current - last_validation_loss


def hook_latency_ms(packet: leyline.SystemStatePacket) -> float | None:
    """Time the trainer spent in its hook, in milliseconds."""
    return _metric(packet.training_metrics, "hook_latency_ms")


def _metric(metrics: Mapping[str, float], name: str) -> float | None:
    value = metrics.get(name)
    return value if value is not None and isfinite(value) else None


def _risk(blueprint: Blueprint) -> float:
    # A risk nobody can read must not pass for a low one.
    return blueprint.risk if isfinite(blueprint.risk) else 1.0


def _acting(emergencies: Iterable[leyline.EmergencySignal], run_id: str) -> tuple[Emergency, ...]:
    return tuple(
        Emergency(
            signal.reason[:_NAME_CHARS] or "unspecified",
            signal.origin[:_NAME_CHARS],
            leyline.EmergencyLevel.Name(signal.level),
        )
        for signal in emergencies
        if signal.level in _ACTING_LEVELS and signal.run_id in ("", run_id)
    )


def _nonfinite_losses(packet: leyline.SystemStatePacket) -> tuple[str, ...]:
    metrics = packet.training_metrics
    fields = {
        "validation_loss": packet.validation_loss,
        "training_loss": packet.training_loss,
    }
    return tuple(
        name
        for name in LOSS_METRICS
        if not (isfinite(fields.get(name, 0.0)) and isfinite(metrics.get(name, 0.0)))
    )


def _nonfinite_inputs(packet: leyline.SystemStatePacket) -> tuple[str, ...]:
    """Names of every other input that is not finite.

    A float32 sum in double precision is finite exactly when all its terms are, so that the
    usual packet costs one sum per map.
    """
    names: list[str] = []
    metrics = packet.training_metrics
    if not isfinite(sum(metrics.values())):
        names += [
            name[:_NAME_CHARS]
            for name, value in metrics.items()
            if name not in LOSS_METRICS and not isfinite(value)
        ]
    if not isfinite(packet.validation_accuracy):
        names.append("validation_accuracy")
    hardware = packet.hardware_context
    names += [
        name
        for name, value in (
            ("total_memory_gb", hardware.total_memory_gb),
            ("available_memory_gb", hardware.available_memory_gb),
            ("temperature_celsius", hardware.temperature_celsius),
            ("utilization_percent", hardware.utilization_percent),
        )
        if not isfinite(value)
    ]
    for seed in packet.seed_states:
        total = seed.gradient_norm + seed.learning_rate + seed.risk_score
        if not isfinite(total + sum(seed.metrics.values())):
            names += _nonfinite_seed_inputs(seed)
    return tuple(sorted(names))


def _nonfinite_seed_inputs(seed: leyline.SeedState) -> list[str]:
    values = {
        "gradient_norm": seed.gradient_norm,
        "learning_rate": seed.learning_rate,
        "risk_score": seed.risk_score,
        **seed.metrics,
    }
    return [
        f"{seed.seed_id[:_NAME_CHARS]}.{name[:_NAME_CHARS]}"
        for name, value in values.items()
        if not isfinite(value)
    ]
