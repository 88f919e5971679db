from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.graph.normalizer import METRICS, PRIORS, Statistics, normalize, observe, run_values
from tamiyo_svc.leyline import leyline_pb2 as leyline

_finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


def test_priors_stand_in_until_something_was_seen() -> None:
    assert normalize(1.1, "validation_loss", {}) == pytest.approx(1.0, abs=1e-4)
    assert normalize(1.1, "validation_loss", {"validation_loss": (1.1, 0.5)}) == 0.0


def test_every_stored_metric_has_a_prior() -> None:
    assert set(METRICS) <= set(PRIORS)
    assert len(set(METRICS)) == len(METRICS)


def test_one_observation_moves_mean_and_variance_by_a_tenth() -> None:
    packet = leyline.SystemStatePacket(validation_loss=1.8)

    mean, variance = observe(packet, {"validation_loss": (0.8, 0.09)})["validation_loss"]

    assert mean == pytest.approx(0.9)
    assert variance == pytest.approx(0.9 * (0.09 + 0.1 * 1.0))


def test_absent_and_non_finite_values_leave_statistics_alone() -> None:
    packet = leyline.SystemStatePacket(
        validation_loss=math.nan,
        training_loss=0.0,
        training_metrics={"loss": math.inf, "samples_per_s": math.nan},
        seed_states=[leyline.SeedState(learning_rate=math.inf, risk_score=0.0)],
    )

    assert set(observe(packet, {})) == {"epoch", "log_step"}


def test_observing_leaves_the_given_statistics_as_they_were() -> None:
    statistics: Statistics = {"loss": (0.5, 0.1)}

    after = observe(leyline.SystemStatePacket(training_metrics={"loss": 2.0}), statistics)

    assert statistics == {"loss": (0.5, 0.1)}
    assert after["loss"] != statistics["loss"]


@given(st.permutations([0.01, 0.02, 0.5, 0.0]))
def test_seed_order_does_not_matter(rates: list[float]) -> None:
    def packet(values: list[float]) -> leyline.SystemStatePacket:
        return leyline.SystemStatePacket(
            seed_states=[leyline.SeedState(learning_rate=value) for value in values]
        )

    assert observe(packet(rates), {}) == observe(packet(sorted(rates)), {})


def test_the_metric_map_comes_before_the_packets_own_field() -> None:
    packet = leyline.SystemStatePacket(
        validation_loss=0.5, training_loss=0.25, training_metrics={"validation_loss": 0.0}
    )

    values = run_values(packet)

    assert values["validation_loss"] == 0.0
    assert values["training_loss"] == 0.25


def test_progress_needs_a_usable_number_of_epochs() -> None:
    def progress(total: float) -> float | None:
        packet = leyline.SystemStatePacket(
            current_epoch=5, training_metrics={"epochs_total": total}
        )
        return run_values(packet).get("epoch_progress")

    assert progress(10.0) == 0.5
    assert progress(0.0) is progress(math.nan) is progress(math.inf) is progress(-1.0) is None


@given(_finite, st.lists(_finite, max_size=20))
def test_no_finite_history_makes_a_score_that_is_not(value: float, history: list[float]) -> None:
    statistics: Statistics = {}
    for past in history:
        packet = leyline.SystemStatePacket(training_metrics={"loss": past})
        statistics = observe(packet, statistics)

    assert abs(normalize(value, "loss", statistics)) <= 1e4
