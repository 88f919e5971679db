from __future__ import annotations

import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.cli.measure import HEADINGS, Distribution, interleaved_ms, timed_ms


def test_percentiles_are_values_that_so_many_do_not_exceed() -> None:
    spread = Distribution.of([float(value) for value in range(1000, 0, -1)])

    assert (spread.p50, spread.p95, spread.p99, spread.p999) == (500.0, 950.0, 990.0, 999.0)
    assert (spread.count, spread.worst) == (1000, 1000.0)


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_of_any_sample_are_ordered_members_of_it(values: list[float]) -> None:
    spread = Distribution.of(values)
    figures = [spread.p50, spread.p90, spread.p95, spread.p99, spread.p999, spread.worst]

    assert figures == sorted(figures)
    assert set(figures) <= set(values)
    assert sum(value <= spread.p50 for value in values) * 2 >= len(values)
    assert len(spread.cells()) == len(HEADINGS)


def test_nothing_measured_is_no_number() -> None:
    assert math.isnan(Distribution.of([]).p50)


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in ("a", "b")}

    times_ms = interleaved_ms(calls, rounds=2, count=2)

    assert "".join(order) == "aabb" * 3
    assert {name: len(times) for name, times in times_ms.items()} == {"a": 4, "b": 4}


@pytest.mark.parametrize("gap_s", [0.0, 0.001])
def test_every_call_is_timed(gap_s: float) -> None:
    times_ms = timed_ms(lambda: None, 5, gap_s)

    assert len(times_ms) == 5
    assert min(times_ms) >= 0.0
