"""The numbers a packet carries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tamiyo_svc.trainer.learner import StepResult
from tamiyo_svc.trainer.metrics import Timings, TrainingMeters

GOLDEN = Path(__file__).parents[2] / "data" / "golden.jsonl"
GPU_ONLY = {"gpu_mem_free_gb", "gpu_util_percent"}


def observe(
    meters: TrainingMeters,
    *,
    loss: float = 1.0,
    validation_loss: float = 1.0,
    gradient_norm: float = 1.0,
    timings: Timings | None = None,
) -> dict[str, float]:
    return meters.observe(
        StepResult(loss, gradient_norm, conflict_rate=0.25, isolation_violations=2),
        validation_loss,
        timings or Timings(),
        batch_size=64,
        learning_rate=3e-3,
        epochs=16,
    )


def test_names_are_those_of_the_contract_vectors() -> None:
    vectors = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    decoded = next(v["decoded"] for v in vectors if v["name"] == "state-0-seeds")
    metrics = observe(TrainingMeters(), timings=Timings(step_latency_ms=20.0))
    assert set(decoded["training_metrics"]) - GPU_ONLY <= set(metrics)


def test_loss_delta_is_the_change_of_validation_loss() -> None:
    meters = TrainingMeters()
    assert observe(meters, validation_loss=2.0)["loss_delta"] == 0.0
    assert observe(meters, validation_loss=1.5)["loss_delta"] == -0.5
    assert observe(meters, validation_loss=1.75)["loss_delta"] == 0.25


def test_a_steady_fall_is_not_volatile_and_a_jump_is() -> None:
    meters = TrainingMeters()
    for step in range(10):
        metrics = observe(meters, loss=10.0 - step)
    assert metrics["loss_volatility"] == pytest.approx(0.0)
    assert observe(meters, loss=5.0)["loss_volatility"] > 0.5


def test_averages_follow_slowly() -> None:
    meters = TrainingMeters()
    observe(meters, loss=1.0, gradient_norm=1.0)
    metrics = observe(meters, loss=2.0, gradient_norm=3.0)
    assert metrics["loss_ewma"] == pytest.approx(1.1)
    assert metrics["grad_norm_ewma"] == pytest.approx(1.2)
    assert metrics["grad_var"] == pytest.approx(0.9 * 0.1 * 4.0)
    assert metrics["gradient_norm"] == 3.0


def test_latencies_are_those_of_the_step_before_and_absent_at_first() -> None:
    meters = TrainingMeters()
    assert not {"hook_latency_ms", "step_latency_ms", "samples_per_s"} & set(observe(meters))
    metrics = observe(meters, timings=Timings(1.0, 2.0, 32.0, 4.0, 5.0))
    assert metrics["input_wait_ms"] == 1.0
    assert metrics["hook_latency_ms"] == 2.0
    assert metrics["step_latency_ms"] == 32.0
    assert metrics["samples_per_s"] == pytest.approx(2000.0)
    assert (metrics["kasmina.apply_ms"], metrics["kasmina.finalize_ms"]) == (4.0, 5.0)


def test_says_what_trains() -> None:
    metrics = observe(TrainingMeters())
    assert metrics["optimizer_family_index"] == 3.0
    assert metrics["optimizer_lr"] == 3e-3
    assert metrics["epochs_total"] == 16.0
    assert metrics["kasmina.isolation.violations"] == 2.0
    assert 0.0 <= metrics["cpu_util_percent"] <= 100.0
