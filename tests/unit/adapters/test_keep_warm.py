from __future__ import annotations

import pytest

from tamiyo_svc.adapters.keep_warm import KeepWarm


def forecast(*arrivals_s: float) -> float | None:
    warm = KeepWarm(lambda part, parts: None, lead_s=0.002)
    for arrival_s in arrivals_s:
        warm.arrived(arrival_s)
    return warm.due_s()


def test_the_weights_are_touched_just_before_the_next_step_of_a_steady_pace() -> None:
    assert forecast(1.00, 1.02, 1.04) == pytest.approx(1.058)


def test_one_odd_gap_does_not_move_the_forecast() -> None:
    assert forecast(1.00, 1.02, 1.04, 1.30, 1.32) == pytest.approx(1.338)


def test_nothing_is_foreseen_from_a_single_arrival() -> None:
    assert forecast() is None
    assert forecast(1.0) is None


@pytest.mark.parametrize("gap_s", [0.001, 5.0])
def test_work_that_keeps_coming_or_hardly_comes_is_not_waited_for(gap_s: float) -> None:
    assert forecast(1.0, 1.0 + gap_s, 1.0 + 2 * gap_s) is None


def test_a_new_pace_is_followed_after_a_few_steps() -> None:
    old = [1.0 + 0.02 * step for step in range(8)]
    new = [old[-1] + 0.1 * step for step in range(1, 9)]

    assert forecast(*old, *new) == pytest.approx(new[-1] + 0.098)
