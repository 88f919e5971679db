"""A short campaign: every fault a few times; `make chaos` runs it at its full length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from chaos import scenarios
from chaos.soak import soak

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]

SHORT: list[tuple[Callable[[int], scenarios.Figures], int]] = [
    (scenarios.kill_under_load, 3),
    (scenarios.kill_one_of_three, 2),
    (scenarios.kill_one_of_three_on_partitions, 2),
    (scenarios.lose_replies, 10),
    (scenarios.restart_redis, 2),
    (scenarios.pause_redis, 1),
    (scenarios.flush_redis, 1),
    (scenarios.fail_over, 1),
    (scenarios.exhaust_memory, 1),
    (scenarios.disturb_network, 3),
    (scenarios.poison, 2000),
    (scenarios.repeat_packets, 1000),
    (scenarios.shift_clocks, 4),
    (scenarios.hang_lane, 2),
    (scenarios.stop_under_load, 2),
    (soak, 2000),
]


@pytest.mark.parametrize(
    ("scenario", "times"), SHORT, ids=[scenario.__name__ for scenario, _ in SHORT]
)
def test_every_packet_has_one_outcome_under(
    scenario: Callable[[int], scenarios.Figures], times: int
) -> None:
    assert scenario(times)
