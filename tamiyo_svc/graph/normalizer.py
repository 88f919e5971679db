"""Z-scores against what a run has shown so far, and the statistics they need.

A metric's statistics are an exponentially weighted mean and variance that start from its prior.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

from tamiyo_svc.leyline import leyline_pb2 as leyline

Statistics = Mapping[str, tuple[float, float]]
"""Metric -> (mean, variance); a metric that is absent still has its prior."""

PRIORS: Final[Mapping[str, tuple[float, float]]] = {
    "loss": (0.8, 0.3),
    "validation_loss": (0.8, 0.3),
    "training_loss": (0.8, 0.3),
    "gradient_norm": (1.0, 0.5),
    "samples_per_s": (4500.0, 500.0),
    "hook_latency_ms": (12.0, 6.0),
    "seed_learning_rate": (0.01, 0.005),
    "seed_risk": (0.4, 0.2),
    "seed_gradient_norm": (1.0, 0.5),
    "seed_age_epochs": (10.0, 4.0),
    "epoch_progress": (0.5, 0.25),
    "epoch": (10.0, 5.0),
    "log_step": (math.log1p(100.0), 1.0),
    "layer_latency_ms": (6.0, 2.0),
    "log_layer_parameters": (math.log1p(1024.0), 1.0),
    "weight_norm": (1.0, 0.4),
    "layer_gradient_norm": (0.8, 0.4),
    "saturation": (0.5, 0.2),
    "gradient_flow": (0.8, 0.2),
    "log_cost": (math.log1p(128.0), 1.0),
    "nonlinearity": (0.5, 0.2),
    "parameter_min": (0.0, 0.5),
    "parameter_max": (1.0, 0.5),
    "parameter_span": (0.5, 0.4),
    "parameter_default": (0.5, 0.4),
    "log_blueprint_parameters": (math.log1p(2048.0), 1.0),
    "candidate_score": (0.5, 0.25),
}
"""Metric -> (mean, standard deviation) before anything was seen."""

METRICS: Final[tuple[str, ...]] = (
    "loss",
    "validation_loss",
    "training_loss",
    "gradient_norm",
    "samples_per_s",
    "hook_latency_ms",
    "epoch",
    "log_step",
    "epoch_progress",
    "seed_learning_rate",
    "seed_risk",
    "seed_gradient_norm",
    "seed_age_epochs",
)
"""The metrics whose statistics a run keeps, in the order in which they are stored."""

GLOBAL_METRICS: Final = METRICS[:6]
"""The metrics a packet reports about the run as a whole."""

_ALPHA: Final = 0.1
_EPSILON: Final = 1e-6
# Far outside anything a run shows; keeps a hostile value from overflowing float32 in the network.
_Z_LIMIT: Final = 1e4


def prior(metric: str) -> tuple[float, float]:
    """Mean and variance of a metric before anything was seen."""
    mean, deviation = PRIORS[metric]
    return mean, deviation * deviation


def normalize(value: float, metric: str, statistics: Statistics) -> float:
    """Z-score of a finite value, limited to ±10⁴; without statistics the prior is used."""
    mean, variance = statistics.get(metric) or prior(metric)
    z = (value - mean) / math.sqrt(variance + _EPSILON)
    return max(-_Z_LIMIT, min(_Z_LIMIT, z))


def run_values(packet: leyline.SystemStatePacket) -> dict[str, float]:
    """The run's own metrics as far as they are there and finite.

    The metric map comes first, then the packet's field, where 0 means absent.
    """
    reported = packet.training_metrics
    values: dict[str, float] = {}
    for metric in GLOBAL_METRICS:
        if metric in reported and math.isfinite(value := reported[metric]):
            values[metric] = value
    if "validation_loss" not in values and _is_present(packet.validation_loss):
        values["validation_loss"] = packet.validation_loss
    if "training_loss" not in values and _is_present(packet.training_loss):
        values["training_loss"] = packet.training_loss
    values["epoch"] = float(packet.current_epoch)
    values["log_step"] = math.log1p(packet.global_step)
    if "epochs_total" in reported and 0 < (total := reported["epochs_total"]) < math.inf:
        values["epoch_progress"] = packet.current_epoch / total
    return values


def seed_values(seed: leyline.SeedState) -> dict[str, float]:
    """A seed's metrics as far as they are there and finite; 0 means absent."""
    values = {
        "seed_learning_rate": seed.learning_rate,
        "seed_risk": seed.risk_score,
        "seed_gradient_norm": seed.gradient_norm,
        "seed_age_epochs": float(seed.age_epochs),
    }
    return {metric: value for metric, value in values.items() if _is_present(value)}


def observe(
    packet: leyline.SystemStatePacket, statistics: Statistics
) -> dict[str, tuple[float, float]]:
    """New statistics with the packet's present values folded in.

    Several seeds count as one value, the mean of those present, so that their order is nothing.
    """
    values = run_values(packet)
    gathered: dict[str, list[float]] = {}
    for seed in packet.seed_states:
        for metric, value in seed_values(seed).items():
            gathered.setdefault(metric, []).append(value)
    for metric, several in gathered.items():
        values[metric] = math.fsum(several) / len(several)
    return {**statistics, **dict(_folded(values.items(), statistics))}


def _folded(
    values: Iterable[tuple[str, float]], statistics: Statistics
) -> Iterable[tuple[str, tuple[float, float]]]:
    for metric, value in values:
        mean, variance = statistics.get(metric) or prior(metric)
        step = value - mean
        yield metric, (mean + _ALPHA * step, (1.0 - _ALPHA) * (variance + _ALPHA * step * step))


def _is_present(value: float) -> bool:
    return value != 0.0 and math.isfinite(value)
