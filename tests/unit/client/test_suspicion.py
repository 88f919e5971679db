"""What a trainer is told when the service's commands cannot be used, and how often."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.client.suspicion import Suspicion
from tamiyo_svc.taxonomy import CommandRejection


class FakeTime:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def unanswered(suspicion: Suspicion, steps: int) -> None:
    for _ in range(steps):
        suspicion.sent(1)
        suspicion.missed()


def test_waits_that_time_out_are_silence_once_the_service_had_time_to_answer() -> None:
    time = FakeTime()
    suspicion = Suspicion(time)
    doubts = []
    for _ in range(3):
        unanswered(suspicion, 1)
        doubts.append(suspicion.is_doubtful)
    assert doubts == [False, False, True]
    assert not suspicion.is_silent(last=False)
    time.now_s += 1.0
    assert [suspicion.is_silent(last=False) for _ in range(3)] == [True, False, False]
    assert [suspicion.is_doubtful] == [False]


def test_who_never_waits_is_told_after_more_packets_and_a_longer_time() -> None:
    time = FakeTime()
    suspicion = Suspicion(time)
    suspicion.sent(30)
    time.now_s += 1.0
    assert not suspicion.is_silent(last=True)
    time.now_s += 10.0
    assert suspicion.is_silent(last=False)


def test_two_packets_prove_nothing_even_at_the_end() -> None:
    suspicion = Suspicion(FakeTime())
    unanswered(suspicion, 2)
    assert not suspicion.is_silent(last=True)


def test_a_command_ends_silence_and_the_same_is_told_again_after_a_minute_at_most() -> None:
    time = FakeTime()
    suspicion = Suspicion(time)
    unanswered(suspicion, 3)
    assert suspicion.is_silent(last=True)
    assert [suspicion.accepted() for _ in range(2)] == ["commands can be used again", ""]
    unanswered(suspicion, 9)
    assert not suspicion.is_silent(last=True)
    time.now_s += 60.0
    assert suspicion.is_silent(last=True)


def test_each_reason_of_refusal_is_told_the_first_time() -> None:
    suspicion = Suspicion(FakeTime())
    stale, forged = CommandRejection.STALE, CommandRejection.INVALID_SIGNATURE
    assert "90 s ago; is the clock" in suspicion.refused(stale, "issued 90 s ago")
    assert "ESPER_LEYLINE_SECRET" in suspicion.refused(forged, "")
    assert suspicion.refused(stale, "") == suspicion.refused(forged, "") == ""


def test_a_refusal_is_reason_enough_for_silence() -> None:
    suspicion = Suspicion(FakeTime())
    suspicion.refused(CommandRejection.INVALID_SIGNATURE, "")
    unanswered(suspicion, 9)
    assert not suspicion.is_silent(last=True)


def test_waits_that_are_too_short_are_told_once_commands_came_after_them() -> None:
    suspicion = Suspicion(FakeTime())
    for _ in range(19):
        suspicion.missed()
        assert suspicion.late(0.005) == ""
    suspicion.missed()
    assert "0.005 s" in suspicion.late(0.005)
    assert suspicion.late(0.005) == ""


@given(st.lists(st.sampled_from(["accept", "refuse", "miss", "look"]), max_size=300))
def test_whatever_comes_there_are_few_lines(events: list[str]) -> None:
    time = FakeTime()
    suspicion = Suspicion(time)
    told = 0
    for event in events:
        time.now_s += 0.1
        match event:
            case "accept":
                told += bool(suspicion.accepted())
            case "refuse":
                told += bool(suspicion.refused(CommandRejection.STALE, ""))
            case "miss":
                unanswered(suspicion, 1)
            case _:
                told += suspicion.is_silent(last=False)
    # The first refusal, and one trouble a minute with its end.
    assert told <= 2 + 2
