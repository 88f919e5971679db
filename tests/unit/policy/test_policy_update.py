from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.errors import PolicyRejectedError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.update import TakenUpdates, check_order, read_action
from tamiyo_svc.taxonomy import PolicyUpdateAction

_ISSUED_S = 1_800_000_000


def _update(issued_s: float = _ISSUED_S, policy_id: str = "p") -> leyline.PolicyUpdate:
    update = leyline.PolicyUpdate(policy_id=policy_id)
    update.issued_at.FromNanoseconds(int(issued_s * 1e9))
    return update


def _reason(
    update: leyline.PolicyUpdate,
    taken: TakenUpdates,
    *,
    digest: str = "new",
    arrived_s: float = _ISSUED_S,
    freshness_s: float = 0.0,
) -> str:
    try:
        check_order(update, digest, int(arrived_s * 1e3), taken, freshness_s)
    except PolicyRejectedError as error:
        return error.reason
    return ""


def test_the_first_update_and_newer_ones_are_taken() -> None:
    taken = TakenUpdates()
    assert _reason(_update(), taken) == ""

    taken = taken.after("p", _ISSUED_S * 10**9, "first")

    assert _reason(_update(_ISSUED_S + 1), taken) == ""


def test_what_was_taken_before_is_a_replay_under_whatever_entry_it_comes() -> None:
    taken = TakenUpdates().after("p", _ISSUED_S * 10**9, "first")

    assert _reason(_update(), taken, digest="first", arrived_s=_ISSUED_S + 9) == "replayed_update"


@pytest.mark.parametrize("behind_s", [0, 1, 3600])
def test_an_update_not_newer_than_the_newest_of_its_policy_is_stale(behind_s: int) -> None:
    taken = TakenUpdates().after("p", _ISSUED_S * 10**9, "first")

    assert _reason(_update(_ISSUED_S - behind_s), taken) == "stale_update"
    assert _reason(_update(_ISSUED_S - behind_s, "another"), taken) == ""


@pytest.mark.parametrize(("ahead_s", "reason"), [(5, ""), (6, "stale_update")])
def test_an_update_of_the_future_is_refused(ahead_s: int, reason: str) -> None:
    assert _reason(_update(_ISSUED_S + ahead_s), TakenUpdates()) == reason


@pytest.mark.parametrize(("age_s", "reason"), [(30, ""), (31, "stale_update")])
def test_age_counts_up_to_the_arrival(age_s: int, reason: str) -> None:
    update, arrived_s = _update(), _ISSUED_S + age_s

    assert _reason(update, TakenUpdates(), arrived_s=arrived_s, freshness_s=30) == reason
    assert _reason(update, TakenUpdates(), arrived_s=arrived_s) == ""


def test_an_update_without_a_time_is_stale() -> None:
    assert _reason(leyline.PolicyUpdate(policy_id="p"), TakenUpdates()) == "stale_update"


@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 2**40), st.uuids()), max_size=200))
def test_what_is_remembered_is_bounded_and_holds_the_newest(
    updates: list[tuple[str, int, object]],
) -> None:
    taken = TakenUpdates()
    for policy_id, issued_ns, digest in updates:
        taken = taken.after(policy_id, issued_ns, str(digest))

        assert taken.issued_ns[policy_id] >= issued_ns
        assert taken.digests[-1] == str(digest)
    assert len(taken.issued_ns) <= 64
    assert len(taken.digests) <= 64


def test_an_update_asks_to_be_applied_unless_it_says_otherwise() -> None:
    assert read_action({}) is PolicyUpdateAction.APPLY
    assert read_action({"policy_action": "rollback"}) is PolicyUpdateAction.ROLLBACK
    with pytest.raises(PolicyRejectedError, match="invalid_payload"):
        read_action({"policy_action": "explode"})
