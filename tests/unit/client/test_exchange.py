"""The queue and the waiting, between the training thread and the client's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.client.drafts import Outgoing, PacketDraft, ReportDraft
from tamiyo_svc.client.exchange import Exchange
from tamiyo_svc.client.outbox import Posted
from tamiyo_svc.client.testing import KEYRING, FakeService, make_packet, make_pause
from tamiyo_svc.client.verification import CommandVerifier
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import DEFAULT_MAX_BYTES, SignedEnvelope
from tamiyo_svc.taxonomy import AckOutcome, CommandRejection, Direction

SERVICE = FakeService()


class FakeTime:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_exchange(
    time: FakeTime | None = None,
    *,
    max_entries: int = 3,
    max_bytes: int = 1 << 20,
    hands_out: bool = True,
) -> Exchange:
    import time as real

    return Exchange(
        CommandVerifier(KEYRING, "run-1"),
        max_entries=max_entries,
        max_bytes=max_bytes,
        hands_out=hands_out,
        clock=real.time,
        monotonic=time or FakeTime(),
    )


def outgoing(size_bytes: int = 10) -> Outgoing:
    return Outgoing("oona.normal", SignedEnvelope(bytes(size_bytes), ""))


def post(exchange: Exchange, step: int, size_bytes: int = 10) -> bool:
    return exchange.post(PacketDraft(bytes(size_bytes), f"run-1-{step}", step))


def send(exchange: Exchange) -> list[Posted]:
    """Take everything, seal it, and have it sent."""
    batch = exchange.take(1000)
    assert all(exchange.sealed(posted, outgoing(posted.size_bytes)) for posted in batch)
    exchange.sent(batch)
    return batch


def answer(step: int) -> dict[bytes, bytes]:
    return SERVICE.sign(make_pause(), make_packet(step))


def steps_queued(exchange: Exchange) -> int:
    return len(exchange.take(1000))


def test_a_full_queue_drops_the_oldest_and_counts_it() -> None:
    exchange = make_exchange()
    for step, size_bytes in enumerate((1, 2, 3, 4, 5)):
        post(exchange, step, size_bytes)
    assert [posted.size_bytes for posted in exchange.take(10)] == [3, 4, 5]
    assert (exchange.counters.dropped, exchange.counters.unpublished) == (2, 2)


def test_a_packet_no_reader_takes_is_not_queued() -> None:
    exchange = make_exchange(max_bytes=8 << 20)
    assert not post(exchange, 1, DEFAULT_MAX_BYTES + 1)
    assert exchange.counters.unpublished == 1
    assert steps_queued(exchange) == 0


@given(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 8), st.integers(400, 900))
def test_the_queue_never_exceeds_its_bounds_and_loses_nothing_uncounted(
    sizes: list[int], max_entries: int, max_bytes: int
) -> None:
    exchange = make_exchange(max_entries=max_entries, max_bytes=max_bytes)
    for step, size_bytes in enumerate(sizes):
        post(exchange, step, size_bytes)
        assert exchange.queued_bytes <= max_bytes
        if step % 5 == 4:
            exchange.unsent(exchange.take(2))
            assert exchange.queued_bytes <= max_bytes
    batch = exchange.take(1000)
    assert len(batch) <= max_entries
    assert len(batch) + exchange.counters.dropped == len(sizes)
    assert exchange.queued_bytes == 0


def test_what_could_not_be_sent_goes_first_the_next_time() -> None:
    exchange = make_exchange()
    post(exchange, 1, 1)
    post(exchange, 2, 2)
    batch = exchange.take(1)
    post(exchange, 3, 3)
    exchange.unsent(batch)
    assert [posted.size_bytes for posted in exchange.take(10)] == [1, 2, 3]


def test_the_command_of_the_last_packet_is_handed_out_once() -> None:
    exchange = make_exchange()
    post(exchange, 1)
    send(exchange)
    exchange.deliver([answer(1)])
    command = exchange.wait(1, 5.0)
    assert command is not None
    assert command.step_index == 1
    assert exchange.poll() is None
    assert (exchange.counters.received, exchange.counters.missed) == (1, 0)


def test_a_command_for_an_earlier_packet_or_nobody_fetched_is_late() -> None:
    exchange = make_exchange()
    post(exchange, 1)
    post(exchange, 2)
    send(exchange)
    exchange.deliver([answer(1), answer(2)])
    post(exchange, 3)
    assert exchange.poll() is None
    assert exchange.counters.late == 2


def test_waiting_for_another_step_than_the_last_gets_nothing_and_takes_nothing() -> None:
    exchange = make_exchange()
    post(exchange, 2)
    send(exchange)
    exchange.deliver([answer(2)])
    assert exchange.wait(1, 5.0) is None
    assert exchange.wait(2, 5.0) is not None


def test_refusals_are_counted_by_reason() -> None:
    exchange = make_exchange()
    post(exchange, 1)
    send(exchange)
    forged = {**answer(1), b"signature": b"AAAA"}
    exchange.deliver([forged, {}, answer(1), answer(1)])
    assert exchange.counters.rejected == {
        CommandRejection.INVALID_SIGNATURE: 1,
        CommandRejection.MISSING_SIGNATURE: 1,
        CommandRejection.ALREADY_ANSWERED: 1,
    }


def test_nobody_waits_for_a_bus_that_is_away() -> None:
    exchange = make_exchange()
    exchange.failed(Direction.OUT)
    post(exchange, 1)
    # With a clock that stands still a real wait would last for ever.
    assert exchange.wait(1, 5.0) is None
    assert not exchange.flush(5.0)
    assert exchange.counters.waits_skipped == 1


class Ticking(FakeTime):
    """Time that runs out as soon as it is looked at again."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks: Iterator[float] = iter(())

    def __call__(self) -> float:
        self.now_s += next(self.ticks, 0.0)
        return self.now_s


def miss(exchange: Exchange, time: Ticking, step: int) -> bool:
    """Publish and wait in vain; whether it did wait."""
    skipped = exchange.counters.waits_skipped
    post(exchange, step)
    time.ticks = iter((0.0, 1.0))
    assert exchange.wait(step, 0.5) is None
    time.ticks = iter(())
    return exchange.counters.waits_skipped == skipped


def test_after_three_misses_waiting_stops_and_is_tried_again_ever_less_often() -> None:
    time = Ticking()
    exchange = make_exchange(time)
    assert [miss(exchange, time, step) for step in (1, 2, 3)] == [True] * 3
    time.now_s -= 1.0
    assert not miss(exchange, time, 4)
    time.now_s += 10.0
    assert miss(exchange, time, 5)


def test_any_command_that_verifies_ends_the_impatience() -> None:
    time = Ticking()
    exchange = make_exchange(time)
    for step in (1, 2, 3):
        miss(exchange, time, step)
    send(exchange)
    exchange.deliver([answer(3)])
    post(exchange, 4)
    send(exchange)
    exchange.deliver([answer(4)])
    assert exchange.wait(4, 0.5) is not None
    assert miss(exchange, time, 5)


def test_observing_counts_and_hands_out_nothing() -> None:
    exchange = make_exchange(hands_out=False)
    post(exchange, 1)
    send(exchange)
    exchange.deliver([answer(1)])
    assert exchange.poll() is None
    assert exchange.wait(1, 5.0) is None
    assert (exchange.counters.observed, exchange.counters.received) == (1, 0)


def test_reports_share_the_queue_and_have_a_count_of_their_own() -> None:
    exchange = make_exchange()
    post(exchange, 1)
    command = leyline.AdaptationCommand(command_id="c")
    exchange.post(ReportDraft(command, "run-1-1", 1, AckOutcome.APPLIED, "", 0))
    send(exchange)
    assert (exchange.counters.published, exchange.counters.acknowledged) == (1, 1)
    assert exchange.flush(0.0)


@pytest.mark.parametrize("lost", [0, 2])
def test_closing_counts_what_was_never_sent(lost: int) -> None:
    exchange = make_exchange()
    for step in range(lost):
        post(exchange, step)
    exchange.discard()
    assert exchange.counters.unpublished == lost


def test_a_packet_that_turns_out_too_large_is_found_when_it_is_sealed() -> None:
    exchange = make_exchange(max_bytes=100)
    post(exchange, 1)
    (posted,) = exchange.take(1)
    assert not exchange.sealed(posted, outgoing(101))


def test_nobody_waits_for_the_command_of_a_packet_that_was_refused() -> None:
    exchange = make_exchange()
    post(exchange, 1)
    (posted,) = exchange.take(1)
    exchange.refuse(1, "it does not fit", posted)
    # With a clock that stands still a real wait would last for ever.
    assert exchange.wait(1, 5.0) is None
    assert exchange.counters.unpublished == 1
    assert exchange.flush(0.0)


def test_the_bus_is_back_when_it_answers_both_ways() -> None:
    exchange = make_exchange()
    assert not exchange.answered(Direction.OUT)
    assert exchange.failed(Direction.IN)
    assert not exchange.failed(Direction.OUT)
    assert not exchange.answered(Direction.OUT)
    post(exchange, 1)
    assert not exchange.may_come(1)
    assert exchange.answered(Direction.IN)
    assert exchange.may_come(1)
    assert exchange.counters.bus_errors == 2
