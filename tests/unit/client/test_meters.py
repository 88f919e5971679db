"""What is measured for the user, by the contract's names."""

from __future__ import annotations

import pytest

from tamiyo_svc.client.meters import (
    GradientMeter,
    LossMeter,
    PressureMeter,
    StepMeter,
    family_index,
)


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_loss_delta_is_the_change_of_validation_loss_and_else_of_the_average() -> None:
    meter = LossMeter()
    assert meter.observe(1.0)["loss_delta"] == 0.0
    assert meter.observe(2.0)["loss_delta"] == pytest.approx(0.1)
    assert meter.observe(2.0, validation_loss=3.0)["loss_delta"] == 0.0
    assert meter.observe(2.0, validation_loss=2.5)["loss_delta"] == -0.5


def test_a_steady_fall_is_not_volatile_and_a_jump_is() -> None:
    meter = LossMeter()
    for step in range(10):
        steady = meter.observe(10.0 - step)
    assert steady["loss_volatility"] == pytest.approx(0.0)
    assert meter.observe(5.0)["loss_volatility"] > 0.5


def test_gradients_have_a_norm_an_average_and_a_variance() -> None:
    meter = GradientMeter()
    assert meter.observe(2.0) == {"gradient_norm": 2.0, "grad_norm_ewma": 2.0, "grad_var": 0.0}
    second = meter.observe(4.0)
    assert second["grad_norm_ewma"] == pytest.approx(2.2)
    assert second["grad_var"] > 0.0


def test_cpu_share_is_a_percentage() -> None:
    meter = PressureMeter()
    total = sum(n * n for n in range(100_000))
    assert total > 0
    assert 0.0 < meter.observe()["cpu_util_percent"] <= 100.0


def test_latencies_are_those_of_the_step_before() -> None:
    clock = FakeClock()
    meter = StepMeter(clock=clock)
    first = meter.observe(1.0, batch_size=32)
    assert not {"step_latency_ms", "hook_latency_ms"} & set(first)
    meter.begin_hook()
    clock.now_s += 0.002
    meter.end_hook()
    clock.now_s += 0.006
    meter.begin_hook()
    clock.now_s += 0.002
    meter.end_hook()
    second = meter.observe(1.0, batch_size=32)
    assert second["hook_latency_ms"] == pytest.approx(2.0)
    assert second["step_latency_ms"] == pytest.approx(8.0)
    assert second["samples_per_s"] == pytest.approx(4000.0)


def test_enrichment_can_be_switched_off() -> None:
    rich = StepMeter(enrich=True).observe(1.0, gradient_norm=2.0, learning_rate=0.1)
    plain = StepMeter(enrich=False).observe(1.0, gradient_norm=2.0, learning_rate=0.1)
    assert {"gradient_norm", "grad_var", "cpu_util_percent"} <= set(rich) - set(plain)
    assert {"loss", "loss_ewma", "optimizer_lr"} <= set(plain)


def test_optimizer_families_are_numbered_from_one() -> None:
    assert [family_index(name) for name in ("SGD", "AdamW", "Lion")] == [1.0, 3.0, 0.0]
