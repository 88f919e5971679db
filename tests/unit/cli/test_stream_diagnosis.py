"""What `stream status` says of a stream in plain words."""

from __future__ import annotations

import pytest

from tamiyo_svc.adapters.oona.inspection import ConsumerView, GroupView, StreamView
from tamiyo_svc.cli.stream import Examiner, streams_of
from tamiyo_svc.service.settings import Settings

NOW_MS = 1_700_000_000_000


def diagnose(
    *consumers: ConsumerView,
    lag: int | None = 0,
    pending: int = 0,
    waiting_ms: int | None = None,
    pending_ms: int | None = None,
    stream: str = "oona.normal",
    group: str = "tamiyo",
) -> list[str]:
    view = GroupView(
        name=group,
        lag=lag,
        pending=pending,
        waiting_id=None if waiting_ms is None else f"{NOW_MS - waiting_ms}-0",
        pending_id=None if pending_ms is None else f"{NOW_MS - pending_ms}-0",
        consumers=consumers,
    )
    return Examiner(Settings(), NOW_MS).diagnose(
        StreamView(stream, exists=True, length=10, groups=(view,))
    )


def alive(pending: int = 0, name: str = "a") -> ConsumerView:
    return ConsumerView(name, pending, 20)


def gone(pending: int = 0, name: str = "b", minutes: int = 3) -> ConsumerView:
    return ConsumerView(name, pending, minutes * 60_000)


def test_a_stream_that_is_read_and_empty_needs_no_words() -> None:
    assert diagnose(alive()) == []


def test_nobody_reads() -> None:
    assert diagnose() == ["no consumer is reading, and none ever did"]
    assert diagnose(gone(minutes=9), gone(name="c")) == [
        "no consumer is reading; the last one, c, was seen 3 min ago"
    ]


def test_entries_of_a_consumer_that_is_gone_are_claimed_by_those_alive() -> None:
    (line,) = diagnose(alive(), gone(4), pending=4, pending_ms=180_000)
    assert line == (
        "4 entries pending for b, which has been gone for 3 min; "
        "they are claimed by another consumer after 5 s"
    )


def test_entries_of_a_consumer_that_is_gone_wait_when_nobody_is_alive() -> None:
    nobody, abandoned = diagnose(gone(1), pending=1, pending_ms=180_000)
    assert nobody == "no consumer is reading; the last one, b, was seen 3 min ago"
    assert abandoned == (
        "1 entry pending for b, which has been gone for 3 min; "
        "they stay until any consumer of the group is started"
    )


@pytest.mark.parametrize(
    ("lag", "what"),
    [
        (7, "7 entries not delivered yet"),
        (None, "entries not delivered yet, how many cannot be told"),
    ],
)
def test_consumers_that_do_not_keep_up(lag: int | None, what: str) -> None:
    assert diagnose(alive(), lag=lag, waiting_ms=2000) == [
        f"{what}, the oldest for 2 s: the consumers do not keep up"
    ]
    assert diagnose(alive(), lag=lag, waiting_ms=20) == []


def test_entries_that_stay_in_work() -> None:
    assert diagnose(alive(2), pending=2, pending_ms=12_000) == [
        "2 entries in work, the oldest for 12 s; one that keeps failing becomes a dead letter"
    ]
    assert diagnose(alive(2), pending=2, pending_ms=1000) == []


def test_groups_of_others_are_named_when_something_waits_for_them() -> None:
    others = {"stream": "oona.telemetry", "group": "nissa"}
    first, second = diagnose(gone(), lag=1, waiting_ms=60_000, **others)  # type: ignore[arg-type]
    assert first.startswith("nissa: no consumer is reading")
    assert second.startswith("nissa: 1 entry not delivered yet")
    # Being silent on a quiet stream is no finding.
    assert diagnose(gone(), **others) == []  # type: ignore[arg-type]


def test_outputs_without_a_group_are_fine_and_inputs_are_not() -> None:
    examiner = Examiner(Settings(), NOW_MS)
    assert examiner.diagnose(StreamView("oona.telemetry", exists=True, length=5)) == []
    assert examiner.diagnose(StreamView("oona.telemetry")) == []
    (line,) = examiner.diagnose(StreamView("oona.normal", exists=True, length=5))
    assert line == "no consumer group 'tamiyo': no service has read this stream"


def test_dead_letters_are_pointed_at() -> None:
    (line,) = Examiner(Settings(), NOW_MS).diagnose(StreamView("oona.dead", exists=True, length=2))
    assert line == "2 entries could not be processed; `tamiyo dlq ls` lists them"


def test_the_oldest_entry_is_the_older_of_pending_and_waiting() -> None:
    view = GroupView("g", None, 1, "2000-1", "1000-5", ())
    assert view.oldest_id == "1000-5"
    assert GroupView("g", None, 0, None, None, ()).oldest_id is None


def test_streams_that_share_a_name_are_looked_at_once() -> None:
    assert len(streams_of(Settings())) == 5
    apart = Settings(command_stream="oona.out")
    assert "oona.out" in streams_of(apart)
