"""Short campaigns; `make campaign` runs them at their full length."""

from __future__ import annotations

import pytest
from chaos import policy_scenarios

pytestmark = pytest.mark.timeout(180)


@pytest.mark.redis
def test_a_killed_service_comes_back_with_the_old_policy_or_the_new_one() -> None:
    figures = policy_scenarios.kill_during_updates(2)

    assert figures["kills"] == 2


def test_a_damaged_checkpoint_is_refused_or_harmless() -> None:
    figures = policy_scenarios.mutate_checkpoints(500)

    assert figures["refused"]
