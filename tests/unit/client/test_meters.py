"""What is measured for the user, by the contract's names."""

from __future__ import annotations

import math

import pytest

from tamiyo_svc.client.meters import (
    GradientMeter,
    LossMeter,
    Moving,
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


BAD = [math.nan, math.inf, -math.inf]
HUGE = [1e30, -1e38, 1e300]


@pytest.mark.parametrize("bad", BAD + HUGE)
@pytest.mark.parametrize("at", [0, 10], ids=["first", "later"])
def test_one_bad_value_is_forgotten_and_a_later_spike_is_still_seen(bad: float, at: int) -> None:
    losses, gradients = LossMeter(), GradientMeter()
    clean = LossMeter()
    for step in range(300):
        value = 1.0 + 0.01 * (step % 2)
        clean.observe(value)
        metrics = losses.observe(bad if step == at else value) | gradients.observe(
            bad if step == at else value
        )
        if step == at:
            assert metrics["loss"] is bad
            assert metrics["gradient_norm"] is bad
    assert metrics == pytest.approx(metrics | clean.observe(value), abs=0.02)
    assert metrics["grad_norm_ewma"] == pytest.approx(1.0, abs=0.02)
    assert metrics["grad_var"] < 1e-3
    assert losses.observe(4.0)["loss_volatility"] > 0.5
    assert gradients.observe(4.0)["grad_var"] > 0.5


@pytest.mark.parametrize("bad", BAD)
def test_what_was_left_out_is_counted(bad: float) -> None:
    meter = StepMeter()
    assert "nonfinite_total" not in meter.observe(1.0, gradient_norm=1.0)
    assert meter.observe(bad, gradient_norm=1.0)["nonfinite_total"] == 1.0
    assert meter.observe(bad, gradient_norm=bad)["nonfinite_total"] == 3.0
    assert meter.observe(1.0, gradient_norm=1.0)["nonfinite_total"] == 3.0


def test_a_bad_validation_loss_is_no_change_and_the_next_is_compared_with_the_last_good() -> None:
    meter = LossMeter()
    meter.observe(1.0, validation_loss=2.0)
    assert meter.observe(1.0, validation_loss=math.nan)["loss_delta"] == 0.0
    assert meter.observe(1.0, validation_loss=1.5)["loss_delta"] == -0.5


def test_a_run_without_one_good_loss_has_no_average() -> None:
    assert "loss_ewma" not in LossMeter().observe(math.nan)


def test_an_average_follows_where_everything_has_grown() -> None:
    moving = Moving()
    for value in [1.0] * 20 + [1e12] * 200:
        moving.observe(value)
    assert moving.mean == pytest.approx(1e12, rel=1e-3)


def test_ordinary_values_are_averaged_as_they_are() -> None:
    moving, mean = Moving(), 1.0
    moving.observe(mean)
    for value in (2.0, 50.0, 0.0, 3.0, -40.0):
        moving.observe(value)
        mean += 0.1 * (value - mean)
        assert moving.mean == pytest.approx(mean)


def test_what_is_not_tamiyos_own_work_has_metrics_of_its_own() -> None:
    clock = FakeClock()
    meter = StepMeter(clock=clock)
    for _ in range(2):
        clock.now_s += 0.1
        meter.begin_hook()
        for name in ("command_wait_ms", "isolated_pass_ms", "isolated_pass_ms"):
            with meter.aside(name):
                clock.now_s += 0.02
        clock.now_s += 0.003
        meter.end_hook()
    metrics = meter.observe(1.0)
    assert metrics["hook_latency_ms"] == pytest.approx(3.0)
    assert metrics["command_wait_ms"] == pytest.approx(20.0)
    assert metrics["isolated_pass_ms"] == pytest.approx(40.0)
    assert metrics["step_latency_ms"] == pytest.approx(163.0)


def test_a_step_without_them_does_not_repeat_those_of_an_earlier_one() -> None:
    meter = StepMeter(clock=FakeClock())
    meter.begin_hook()
    with meter.aside("isolated_pass_ms"):
        pass
    meter.end_hook()
    assert "isolated_pass_ms" in meter.observe(1.0)
    meter.begin_hook()
    meter.end_hook()
    assert "isolated_pass_ms" not in meter.observe(1.0)


def test_a_clock_set_back_measures_nothing_below_zero() -> None:
    clock = FakeClock()
    meter = StepMeter(clock=clock)
    for move in (0.1, -5.0, 0.1):
        meter.begin_hook()
        with meter.aside("command_wait_ms"):
            clock.now_s += move
        meter.end_hook()
        metrics = meter.observe(1.0, batch_size=8)
        assert all(value >= 0.0 for name, value in metrics.items() if name.endswith("_ms"))
        assert math.isfinite(metrics.get("samples_per_s", 0.0))


def test_batches_of_a_step_are_added_up() -> None:
    clock = FakeClock()
    meter = StepMeter(clock=clock)
    meter.begin_hook()
    meter.end_hook()
    clock.now_s += 0.1
    meter.begin_hook()
    meter.end_hook()
    meter.note_batch(2.0, 16)
    meter.note_batch(3.0, 16)
    metrics = meter.observe(1.0)
    assert metrics["input_wait_ms"] == 5.0
    assert metrics["samples_per_s"] == pytest.approx(320.0)
    assert "input_wait_ms" not in meter.observe(1.0)


def test_the_hardware_says_what_trains_and_how_much_memory_there_is() -> None:
    meter = StepMeter()
    meter.observe(1.0)
    hardware = meter.hardware
    assert hardware is not None
    assert hardware["device_type"] in ("cpu", "cuda")
    assert 0.0 <= hardware["utilization_percent"] <= 100.0
    assert 0.0 < hardware["available_memory_gb"] <= hardware["total_memory_gb"]
    assert StepMeter(enrich=False).hardware is None


def test_a_time_between_steps_is_left_out_of_the_next() -> None:
    clock = FakeClock()
    meter = StepMeter(clock=clock)
    for _ in range(2):
        clock.now_s += 60.0
        meter.pass_over(59.9)
        meter.begin_hook()
        meter.end_hook()
    assert meter.observe(1.0)["step_latency_ms"] == pytest.approx(100.0)
