"""Nothing that fails in the client's part reaches whoever trains, and copies of it work."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from typing import Any

import pytest

from tamiyo_svc.client import (
    AckOutcome,
    AsyncTamiyoClient,
    ClientMode,
    ClientSettings,
    Keyring,
    State,
    TamiyoClient,
)
from tamiyo_svc.client.core import ClientCore
from tamiyo_svc.client.drafts import PacketDraft
from tamiyo_svc.client.outbox import Outbox
from tamiyo_svc.client.testing import (
    KEYRING,
    LONG_S,
    FakeService,
    grow,
    make_packet,
    never_answer,
)

NOTHING = "redis://127.0.0.1:1/0"
"""An address where nobody listens."""


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tamiyo.client"]


def eventually(holds: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + LONG_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def client(service: FakeService) -> Iterator[TamiyoClient]:
    with service.client() as client:
        yield client


def answered(client: TamiyoClient, step: int) -> bool:
    client.publish(State(training_loss=1.0), step)
    return client.wait(step, LONG_S) is not None


class Refuses:
    """Refuses to start threads of some name, or all, as a system does that has none to give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "") -> None:
        self.asked = 0
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if name not in thread.name:
                return start(thread)
            self.asked += 1
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)


def test_without_threads_nothing_is_raised_and_all_is_sent_once_there_are_some(
    service: FakeService,
    client: TamiyoClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        refuses = Refuses(patch)
        for step in (1, 2):
            assert client.publish(State(training_loss=1.0), step)
            # With the service's patience this would take long.
            assert client.wait(step, LONG_S) is None
        assert client.publish_packet(make_packet(3))
        assert not client.flush(LONG_S)
        assert client.poll() is None
        assert refuses.asked == 3
    assert client.counters.waits_skipped == 2
    assert answered(client, 4)
    assert [packet.global_step for packet in service.packets] == [1, 2, 3, 4]
    assert lines(caplog) == [
        "going on without Tamiyo: can't start new thread",
        "there are threads for Tamiyo again",
    ]


def test_without_a_thread_to_receive_the_bus_is_away_until_there_is_one(
    service: FakeService, client: TamiyoClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        refuses = Refuses(patch, "tamiyo-client-in")
        client.publish(State(training_loss=1.0), 1)
        eventually(lambda: refuses.asked and client._exchange.reachable is False)
        assert client.wait(1, LONG_S) is None
    eventually(lambda: client._exchange.reachable)
    assert answered(client, 2)
    assert client.counters.faults == 0


def test_closing_without_threads_gives_up_what_is_queued(
    client: TamiyoClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    Refuses(monkeypatch)
    client.publish(State(training_loss=1.0), 1)
    client.close()
    assert client.counters.unpublished == 1


async def test_the_asyncio_client_closes_without_threads(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = service.async_client()
    Refuses(monkeypatch)
    client.publish(State(training_loss=1.0), 1)
    assert await client.wait(1, LONG_S) is None
    await client.aclose()
    assert client.counters.unpublished == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_was_killed_is_replaced(service: FakeService, client: TamiyoClient) -> None:
    def die(_: object) -> Any:
        raise SystemExit

    service.script = die
    client.publish(State(training_loss=1.0), 1)
    assert client._worker is not None
    client._worker._sender.join(LONG_S)
    service.script = FakeService().script
    eventually(lambda: answered(client, 2))


@pytest.mark.parametrize(("owner", "method"), [("queue", "append"), ("draft", "seal")])
def test_no_memory_costs_packets_and_nothing_else(
    owner: str, method: str, client: TamiyoClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Outbox if owner == "queue" else PacketDraft, method, fail)
        client.publish(State(training_loss=1.0), 1)
        eventually(lambda: client.counters.unpublished == 1)
        assert client.wait(1, LONG_S) is None
    assert answered(client, 2)


def test_clocks_that_raise_are_replaced_by_the_systems(service: FakeService) -> None:
    def fail() -> float:
        raise OSError("no clock")

    link = service.client()._make_link
    client = TamiyoClient(
        NOTHING,
        KEYRING,
        "run-1",
        ClientSettings(max_wait_s=LONG_S),
        clock=fail,
        monotonic=fail,
        make_link=link,
    )
    with client:
        assert answered(client, 1)
        assert client.flush(LONG_S)


def test_a_clock_that_tells_no_time_costs_the_packet(service: FakeService) -> None:
    link = service.client()._make_link
    with TamiyoClient(NOTHING, KEYRING, "r", clock=lambda: float("nan"), make_link=link) as client:
        assert client.publish(State(training_loss=1.0), 1) == ""
        assert client.wait(1, LONG_S) is None


class Raising(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("the log is full")


@pytest.fixture
def raising_log() -> Iterator[None]:
    log, handler = logging.getLogger("tamiyo.client"), Raising()
    log.addHandler(handler)
    yield
    log.removeHandler(handler)


@pytest.mark.usefixtures("raising_log")
def test_a_handler_of_the_log_that_raises_harms_neither_trainer_nor_client(
    service: FakeService, client: TamiyoClient
) -> None:
    bad: Any = State(seeds=[{"no such field": 1}])
    assert client.publish(bad, 1) == ""
    service.reachable = False
    client.publish(State(training_loss=1.0), 2)
    eventually(lambda: client.counters.bus_errors > 1)
    service.reachable = True
    eventually(lambda: client._exchange.reachable)
    assert answered(client, 3)
    client.load_state_dict({})


@pytest.mark.parametrize(
    "state",
    [
        {},
        None,
        [],
        "state",
        {"version": 2, "run_id": "run-1", "cursor": "", "accepted_s": {}},
        {"version": 1, "run_id": "run-1"},
        {"version": 1, "run_id": "run-1", "cursor": "", "accepted_s": None},
        {"version": 1, "run_id": "run-1", "cursor": 7, "accepted_s": {}},
        {"version": 1, "run_id": "run-1", "cursor": "a-b", "accepted_s": {}},
        {"version": 1, "run_id": "run-1", "cursor": "", "accepted_s": {"c": "soon"}},
        {"version": 1, "run_id": "run-1", "cursor": "", "accepted_s": {"c": float("nan")}},
        {"version": 1, "run_id": "run-1", "cursor": "", "accepted_s": [1, 2]},
    ],
)
def test_a_saved_state_that_is_none_is_left_alone_with_a_reason(
    state: Any, client: TamiyoClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.load_state_dict(state)
    assert client.state_dict()["accepted_s"] == {}
    (told,) = lines(caplog)
    assert told.startswith("the client's saved state is left alone: ")
    assert answered(client, 1)


def test_an_acknowledgement_of_nothing_is_logged(
    client: TamiyoClient, caplog: pytest.LogCaptureFixture
) -> None:
    nothing: Any = None
    client.ack(nothing, AckOutcome.APPLIED)
    assert "cannot be acknowledged" in lines(caplog)[0]


class PreemptedError(Exception):
    """What a host's signal handler raises."""


def test_a_signal_handler_that_raises_ends_a_wait_and_reaches_its_host() -> None:
    with FakeService(never_answer).client() as client:

        def handle(*_: object) -> None:
            raise PreemptedError

        before = signal.signal(signal.SIGALRM, handle)
        try:
            client.publish(State(training_loss=1.0), 1)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(PreemptedError):
                client.wait(1, LONG_S)
        finally:
            signal.signal(signal.SIGALRM, before)
        client.publish(State(training_loss=1.0), 2)
        assert client.flush(LONG_S)


def test_a_signal_handler_may_use_the_client_whatever_it_interrupts(service: FakeService) -> None:
    with service.client() as client:
        handled: list[int] = []

        def handle(*_: object) -> None:
            client.publish(State(training_loss=1.0), 1000 + len(handled))
            client.poll()
            client.state_dict()
            handled.append(1)
            if len(handled) < 50:
                signal.setitimer(signal.ITIMER_REAL, 0.0003)

        before = signal.signal(signal.SIGALRM, handle)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0003)
            step = 0
            while len(handled) < 50:
                step += 1
                client.publish(State(training_loss=1.0), step)
                client.wait(step, 0.001)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        assert client.flush(LONG_S)


def test_a_handler_of_the_end_may_close_the_client_that_waits() -> None:
    with FakeService(never_answer).client() as client:
        before = signal.signal(signal.SIGALRM, lambda *_: client.close())
        try:
            client.publish(State(training_loss=1.0), 1)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            assert client.wait(1, 0.2) is None
        finally:
            signal.signal(signal.SIGALRM, before)


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [by_pickle, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("mode", [ClientMode.ONLINE, ClientMode.DISABLED, ClientMode.OFFLINE])
def test_a_copy_of_a_client_is_one_of_its_own_of_the_same_run(
    duplicate: Callable[[ClientCore], ClientCore], mode: ClientMode
) -> None:
    settings = ClientSettings(mode=mode, max_entries=7)
    for kind in (TamiyoClient, AsyncTamiyoClient):
        client = kind(NOTHING, KEYRING, "run-7", settings)
        client.load_state_dict(
            {"version": 1, "run_id": "run-7", "cursor": "5-1", "accepted_s": {"c": 1.0}}
        )
        other = duplicate(client)
        assert type(other) is kind
        assert (other.run_id, other.settings) == ("run-7", settings)
        assert other.state_dict() == client.state_dict()
        assert other._exchange is not client._exchange


@pytest.mark.parametrize("duplicate", [by_pickle, copy.deepcopy])
def test_a_copy_refuses_what_the_first_has_accepted_and_leaves_it_alone(
    duplicate: Callable[[TamiyoClient], TamiyoClient], client: TamiyoClient
) -> None:
    assert answered(client, 1)
    with duplicate(client) as other:
        assert list(other.state_dict()["accepted_s"]) == list(client.state_dict()["accepted_s"])
        assert answered(other, 2)
        assert other.counters.received == 1
    assert answered(client, 3)
    assert client.counters.received == 2


class Extended(TamiyoClient):
    """A user's own client with something of its own."""

    def __init__(self, run_id: str) -> None:
        super().__init__(NOTHING, KEYRING, run_id)
        self.tags = ["mine"]


def test_a_client_of_a_users_own_class_keeps_what_it_has() -> None:
    assert by_pickle(Extended("run-1")).tags == ["mine"]


@pytest.mark.parametrize(
    "value",
    [
        Keyring(b"a secret for the tests", b"another secret for the tests"),
        ClientSettings(mode=ClientMode.OFFLINE),
        grow("seed-residual-mlp"),
    ],
)
def test_what_clients_are_made_of_can_be_copied(value: Any) -> None:
    for duplicate in (by_pickle, copy.deepcopy):
        assert repr(duplicate(value)) == repr(value)


def test_a_copy_of_a_keyring_verifies_what_the_first_signs_and_shows_no_secret() -> None:
    keyring = Keyring(b"a secret for the tests")
    other = by_pickle(keyring)
    assert other.verify(b"data", keyring.sign(b"data"))
    assert "secret" not in repr(other)


def test_a_copy_of_a_service_answers_on_its_own(service: FakeService) -> None:
    with service.client() as client:
        assert answered(client, 1)
    other = by_pickle(service)
    with other.client() as client:
        assert answered(client, 2)
    assert [packet.global_step for packet in service.packets] == [1]
    assert [packet.global_step for packet in other.packets] == [1, 2]


def talk_in_child(client: TamiyoClient, results: Queue[Any]) -> None:
    with client:
        results.put((client.run_id, answered(client, 5), client.counters.received))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_client_that_is_passed_to_another_process_works_there(
    method: str, client: TamiyoClient
) -> None:
    assert answered(client, 1)
    context = multiprocessing.get_context(method)
    results: Queue[Any] = context.Queue()
    process = context.Process(target=talk_in_child, args=(client, results))  # type: ignore[attr-defined]
    process.start()
    try:
        assert results.get(timeout=60.0) == ("run-1", True, 1)
    except queue.Empty:
        process.kill()
        raise
    finally:
        process.join()
    assert process.exitcode == 0
    assert answered(client, 2)
