"""Every packet is counted once, by the way it ended, whatever becomes of replies."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
from support.bus import Bus, as_fields, state_packet
from support.proxy import FaultyProxy
from support.running import Running, StartService
from support.served_process import free_port

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.errors import InferenceError
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.evaluator import PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.service.wiring import Worker

pytestmark = pytest.mark.redis


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def redis_url(port: int) -> Iterator[str]:
    with EmbeddedRedis(port=port) as server:
        yield server.url


@pytest.fixture
def proxy(redis_url: str, port: int) -> Iterator[FaultyProxy]:
    with FaultyProxy(port) as proxy:
        yield proxy


class Gated:
    """A lane worker that holds every batch back until told."""

    def __init__(self, worker: Worker, gate: threading.Event) -> None:
        self._worker = worker
        self._gate = gate

    def warm_up(self) -> None:
        self._worker.warm_up()

    def evaluate(self, requests: Sequence[PolicyRequest]) -> Sequence[Proposal | InferenceError]:
        self._gate.wait(30)
        return self._worker.evaluate(requests)


def received(running: Running) -> float | None:
    return running.value("tamiyo_packets_received_total")


async def test_packet_that_ends_while_its_own_replica_claims_it_is_counted_once(
    bus: Bus, start_service: StartService, proxy: FaultyProxy
) -> None:
    gate, held, passed = threading.Event(), threading.Event(), threading.Event()
    claims: list[bytes] = []

    def hold(reply: bytes) -> bool:
        if b"run-1-step-1" not in reply or passed.is_set():
            return False
        held.set()
        return True

    def count_claims(request: bytes) -> bool:
        if passed.is_set() and b"XAUTOCLAIM" in request:
            claims.append(request)
        return False

    running = await start_service(
        lambda worker: Gated(worker, gate),
        redis_url=f"redis://127.0.0.1:{proxy.port}/0",
        claim_idle_ms=100,
    )
    packet = state_packet("run-1", 1)
    await bus.publish(packet)

    async def in_flight() -> bool:
        return running.value("tamiyo_in_flight_packets") == 1.0

    await bus.until(in_flight)
    # The packet has been read, so a reply that holds it now is that of a claim.
    proxy.hold = hold

    async def claimed() -> bool:
        return held.is_set()

    await bus.until(claimed)
    gate.set()
    await bus.command_for(packet)

    async def ended() -> bool:
        return running.outcomes() == {"decided": 1}

    await bus.until(ended)
    proxy.swallow = count_claims
    passed.set()

    async def claimed_again() -> bool:
        return len(claims) >= 4  # two streams, so the one whose reply was held is done with

    await bus.until(claimed_again)
    assert running.outcomes() == {"decided": 1}
    assert received(running) == 1


@pytest.mark.parametrize("packets", [1, 4])
async def test_commit_whose_reply_was_lost_is_counted_as_what_it_did(
    bus: Bus, start_service: StartService, proxy: FaultyProxy, packets: int
) -> None:
    running = await start_service(redis_url=f"redis://127.0.0.1:{proxy.port}/0")
    first = state_packet("run-0", 1)
    await bus.publish(first)
    await bus.command_for(first)  # from now on Redis has the script of the commit
    proxy.swallow = lambda request: (
        proxy.swallowed == 0 and b"EVALSHA" in request and b"tamiyo:run:run-1" in request
    )
    published = [state_packet("run-1", step) for step in range(1, packets + 1)]
    async with bus.redis.pipeline(transaction=True) as together:
        for packet in published:
            together.xadd("oona.normal", as_fields(seal(packet, bus.keyring)))
        await together.execute()

    async def ended() -> bool:
        return sum(running.outcomes().values()) > packets

    await bus.until(ended)
    assert proxy.swallowed == 1
    superseded = {"superseded": packets - 1.0} if packets > 1 else {}
    assert running.outcomes() == {"decided": 2.0, **superseded}
    assert received(running) == packets + 1
    _, command = await bus.commands()
    assert command.annotations["packet_id"] == published[-1].packet_id


async def test_dead_letter_whose_reply_was_lost_is_counted_as_one(
    bus: Bus, start_service: StartService, proxy: FaultyProxy
) -> None:
    running = await start_service(redis_url=f"redis://127.0.0.1:{proxy.port}/0")
    first = state_packet("run-1", 1)
    await bus.publish(first)
    await bus.command_for(first)
    proxy.swallow = lambda request: proxy.swallowed == 0 and b"oona.dead" in request
    forged = seal(state_packet("run-1", 2), Keyring(b"another secret"))
    await bus.add(forged)

    async def ended() -> bool:
        return sum(running.outcomes().values()) > 1

    await bus.until(ended)
    assert proxy.swallowed == 1
    assert running.outcomes() == {"decided": 1, "dead_lettered": 1}
    assert running.value("tamiyo_dead_letters_total", reason="invalid_signature") == 1
    assert await bus.redis.xlen("oona.dead") == 1
