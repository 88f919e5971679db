"""The interpreter's switch interval: lowered while somebody waits, and as it was afterwards."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator

import pytest

from tamiyo_svc.client.interpreter import PROMPT_RETURN, PromptReturn
from tamiyo_svc.client.packets import State
from tamiyo_svc.client.testing import LONG_S, FakeService, always_pause
from tamiyo_svc.leyline import leyline_pb2 as leyline

LOWERED_S = pytest.approx(1e-4)


@pytest.fixture(autouse=True)
def interval_s() -> Iterator[float]:
    """One that the conversion between seconds and whole microseconds would cut."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(0.0011415)
    yield sys.getswitchinterval()
    sys.setswitchinterval(before_s)


def test_it_is_lowered_inside_and_restored_to_the_microsecond(interval_s: float) -> None:
    for _ in range(100):
        with PROMPT_RETURN:
            assert sys.getswitchinterval() == LOWERED_S
        assert sys.getswitchinterval() == interval_s


def test_whoever_leaves_last_restores_it(interval_s: float) -> None:
    with PROMPT_RETURN:
        with PROMPT_RETURN:
            pass
        assert sys.getswitchinterval() == LOWERED_S
    assert sys.getswitchinterval() == interval_s


def test_an_interval_already_lower_is_left_alone() -> None:
    sys.setswitchinterval(5e-5)
    own_s = sys.getswitchinterval()
    with PROMPT_RETURN:
        assert sys.getswitchinterval() == own_s
    assert sys.getswitchinterval() == own_s


def test_what_somebody_else_sets_meanwhile_stays() -> None:
    with PROMPT_RETURN:
        sys.setswitchinterval(0.002)
        theirs_s = sys.getswitchinterval()
    assert sys.getswitchinterval() == theirs_s


def test_a_forked_child_starts_with_what_was_there_before(interval_s: float) -> None:
    prompt = PromptReturn()
    with prompt:
        prompt.reset()
        assert sys.getswitchinterval() == interval_s
        with prompt:
            assert sys.getswitchinterval() == LOWERED_S
        assert sys.getswitchinterval() == interval_s
    assert sys.getswitchinterval() == interval_s


def test_forking_while_another_thread_waits_gives_the_child_its_interval_back(
    interval_s: float,
) -> None:
    inside, leave = threading.Event(), threading.Event()

    def wait() -> None:
        with PROMPT_RETURN:
            inside.set()
            leave.wait(LONG_S)

    thread = threading.Thread(target=wait)
    thread.start()
    assert inside.wait(LONG_S)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if sys.getswitchinterval() == interval_s else 3)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    leave.set()
    thread.join()
    assert code == 0
    assert sys.getswitchinterval() == interval_s


@pytest.fixture
def seen() -> list[float]:
    """The intervals there were when packets arrived."""
    return []


@pytest.fixture
def service(seen: list[float]) -> FakeService:
    """One that answers when the interval is the one of a wait, or in the end without."""

    def answer(packet: leyline.SystemStatePacket) -> Iterable[leyline.AdaptationCommand]:
        deadline_s = time.monotonic() + LONG_S / 2
        while sys.getswitchinterval() != LOWERED_S and time.monotonic() < deadline_s:
            time.sleep(0.001)
        seen.append(sys.getswitchinterval())
        return always_pause(packet)

    return FakeService(answer)


def test_it_is_lowered_while_a_client_waits(
    service: FakeService, seen: list[float], interval_s: float
) -> None:
    with service.client() as client:
        client.publish(State(training_loss=1.0), 1)
        assert client.wait(1, LONG_S) is not None
    assert seen == [LOWERED_S]
    assert sys.getswitchinterval() == interval_s


async def test_it_is_lowered_while_an_asyncio_client_waits(
    service: FakeService, seen: list[float], interval_s: float
) -> None:
    async with service.async_client() as client:
        client.publish(State(training_loss=1.0), 1)
        assert await client.wait(1, LONG_S) is not None
    assert seen == [LOWERED_S]
    assert sys.getswitchinterval() == interval_s
