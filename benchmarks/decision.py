"""One packet's decision and its commit on a private Redis, without a service around them."""

from __future__ import annotations

import asyncio
import itertools
import selectors
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis

from benchmarks import workload
from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.adapters.lane import DeviceLane
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.commit import Commit, Committer, run_key
from tamiyo_svc.adapters.oona.connection import ServerClock, client
from tamiyo_svc.adapters.oona.consumer import StreamConsumer
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.routing import TelemetryRouter
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.decision.record import PolicyIdentity, Runtime
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.engines import Engines
from tamiyo_svc.policy.evaluator import PolicyEvaluator, PolicyRequest, build_policy
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.breaker import BreakerPolicy
from tamiyo_svc.runs.state import EMPTY, packet_digest
from tamiyo_svc.service.evaluate import PacketPath
from tamiyo_svc.service.forms import serving_forms
from tamiyo_svc.service.outcomes import Answer, Ledger, PathOptions, Received, Sorted
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.service.state import ReplicaState
from tamiyo_svc.service.telemetry import TelemetryDispatch

GROUP: Final = "tamiyo"
NORMAL: Final = "oona.normal"
_PENDING: Final = 1000
_PACKETS: Final = 50
_KEYRING: Final = Keyring(b"a secret for the benchmark")


@dataclass
class Pending:
    """Entries that were delivered and not acknowledged; more are made when none are left."""

    redis: Redis
    fields: Any
    entries: deque[Entry] = field(default_factory=deque)

    async def take(self) -> Entry:
        """One of them."""
        if not self.entries:
            await self.refill()
        return self.entries.popleft()

    async def refill(self) -> None:
        """Publish entries and have them delivered."""
        consumer = StreamConsumer(self.redis, self.redis, (NORMAL,), GROUP, "benchmark")
        await consumer.join()
        async with self.redis.pipeline(transaction=False) as pipeline:
            for _ in range(_PENDING):
                pipeline.xadd(NORMAL, self.fields)
            await pipeline.execute()
        self.entries.extend(await consumer.read(_PENDING, 1000))


class Decisions:
    """Decides packets of one run, and commits such a decision over and over."""

    def __init__(self, path: PacketPath, ledger: Ledger, committer: Committer, redis: Redis):
        self._path = path
        self._ledger = ledger
        self._committer = committer
        packets = workload.packets(_PACKETS)
        self._packets = itertools.cycle(packets)
        self._state = EMPTY
        self.pending = Pending(redis, {"payload": packets[0].SerializeToString()})
        self._versions = itertools.count()

    def _received(self) -> Received:
        packet = next(self._packets)
        attributes = {"blueprint_id": workload.BLUEPRINT, "reply_to": "oona.commands.bench"}
        digest = packet_digest(packet.SerializeToString())
        return Received(Entry(NORMAL, "1-1", {}), packet, attributes, digest, time.perf_counter())

    async def decide(self) -> Answer:
        """Answer the next packet."""
        answer = await self._path.decide(self._received(), self._state)
        self._state = answer.state
        return answer

    async def sealed(self) -> Commit:
        """What a decision changes, everything signed."""
        answer = await self.decide()
        return self.seal(answer)

    def seal(self, answer: Answer) -> Commit:
        """What an answer changes, everything signed."""
        received = self._received()
        commit, _ = self._ledger.commit(received.run_key, 0, EMPTY, Sorted(received), answer)
        return commit

    async def for_run(self, commit: Commit, run_id: str, version: int) -> Commit:
        """The same for a run's next entry."""
        assert commit.run is not None
        run = replace(commit.run, run_key=run_key(run_id), expected_version=version)
        return replace(commit, acks=[await self.pending.take()], run=run)

    async def commit(self, commit: Commit) -> None:
        """Commit the same for the next entry of one run."""
        await self._committer.commit(await self.for_run(commit, "one", next(self._versions)))


@asynccontextmanager
async def open_decisions(redis_url: str, folder: Path) -> AsyncIterator[Decisions]:
    """A warm lane with the full-size policy, and the path of a packet around it."""
    settings = Settings(secret="a secret for the benchmark", state_dir=folder)  # type: ignore[arg-type]
    policy = build_policy("untrained")
    engines = Engines(serving_forms(settings))
    lane = DeviceLane[PolicyRequest, Proposal](
        lambda: PolicyEvaluator(workload.builder(), policy, engines=engines)
    )
    catalog = UrzaCatalog(f"sqlite:///{workload.CATALOG}", 600.0)
    await catalog.refresh()
    await lane.start()
    metrics = Metrics((NORMAL,))
    replica = ReplicaState(
        Runtime(PolicyIdentity(policy.policy_id, policy.version), replica="benchmark"),
        BreakerPolicy(),
        policy_untrained=True,
    )
    options = PathOptions(step_timeout_ms=0)
    dispatch = TelemetryDispatch(
        TelemetryRouter("oona.telemetry", "oona.emergency", 120), metrics, _KEYRING
    )
    ledger = Ledger(dispatch, metrics, replica, _KEYRING, options)

    async def restore() -> None:
        return

    async with client(redis_url, 5.0, connections=16) as redis:
        committer = Committer(redis, GROUP)
        health = BusHealth(redis, "benchmark", restore)
        path = PacketPath(
            lane,
            catalog,
            RunStore(committer),
            committer,
            health,
            ledger,
            metrics,
            replica,
            _KEYRING,
            ServerClock(),
            options,
        )
        decisions = Decisions(path, ledger, committer, redis)
        await decisions.pending.refill()
        try:
            yield decisions
        finally:
            await path.close()
            await lane.close()
            catalog.close()


@contextmanager
def decision_parts() -> Iterator[dict[str, Callable[[], object]]]:
    """Deciding a packet, sealing what is sent, and committing it, each done once by a call."""
    # As the service sets it: the lane's thread must not wait for this one.
    sys.setswitchinterval(5e-4)
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    with EmbeddedRedis() as server, tempfile.TemporaryDirectory() as folder:
        opened = open_decisions(server.url, Path(folder))
        decisions = loop.run_until_complete(opened.__aenter__())
        try:
            answer = loop.run_until_complete(decisions.decide())
            commit = decisions.seal(answer)
            yield {
                "decide": lambda: loop.run_until_complete(decisions.decide()),
                "seal the answer": lambda: decisions.seal(answer),
                "commit": lambda: loop.run_until_complete(decisions.commit(commit)),
            }
        finally:
            loop.run_until_complete(opened.__aexit__(None, None, None))
            loop.close()
