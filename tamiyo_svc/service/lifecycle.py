"""A running service: start, serve until told to stop, drain, report health."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Final

import structlog
from redis.asyncio import Redis

from tamiyo_svc import __version__
from tamiyo_svc.adapters.cancellation import cancel
from tamiyo_svc.adapters.lane import DeviceLane
from tamiyo_svc.adapters.metrics import Metrics, StreamPosition
from tamiyo_svc.adapters.oona.breaker_store import BreakerStore
from tamiyo_svc.adapters.oona.connection import ServerClock
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.housekeeping import read_status, trim
from tamiyo_svc.adapters.oona.outbox import Outbox
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.adapters.vocabulary_store import save_vocabularies
from tamiyo_svc.errors import BusError, StoredStateError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.evaluator import PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.service.courtesy import return_freed_memory
from tamiyo_svc.service.intake import Intake
from tamiyo_svc.service.notices import Inbox, NoticeBoard
from tamiyo_svc.service.policy_updates import PolicyUpdates
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.service.state import ReplicaState

log = structlog.get_logger("tamiyo.lifecycle")

# Python hands the interpreter over every 5 ms by default, which is the whole step budget.
_SWITCH_INTERVAL_S: Final = 5e-4
# Objects, then collections: by default the middle one looks at up to 7,000 objects, which takes
# 2 ms while a policy is built, and keeps the interpreter.
_COLLECT_AFTER: Final = (700, 2, 10)
_TICK_S: Final = 0.5
_STALLED_S: Final = 10.0
_SILENT_S: Final = 10.0
_OBSERVE_S: Final = 1.0
_TRIM_S: Final = 15.0


class Service:
    """Owns the tasks of a replica; its parts are made and closed by the wiring."""

    def __init__(
        self,
        settings: Settings,
        redis: Redis,
        lane: DeviceLane[PolicyRequest, Proposal],
        health: BusHealth,
        clock: ServerClock,
        intake: Intake,
        outbox: Outbox,
        notices: NoticeBoard,
        inbox: Inbox,
        breakers: BreakerStore,
        updates: PolicyUpdates,
        catalog: UrzaCatalog,
        runs: RunStore,
        metrics: Metrics,
        replica: ReplicaState,
        vocabularies: Vocabularies,
    ) -> None:
        self._settings = settings
        self._redis = redis
        self._lane = lane
        self._health = health
        self._clock = clock
        self._intake = intake
        self._outbox = outbox
        self._notices = notices
        self._inbox = inbox
        self._breakers = breakers
        self._updates = updates
        self._catalog = catalog
        self._runs = runs
        self._metrics = metrics
        self._replica = replica
        self._vocabularies = vocabularies
        self._saved_vocabulary_size = vocabularies.size
        self._ticked_s = time.monotonic()
        self._started = False
        self._draining = False
        self.http_port = settings.http_port

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` is set, then finish what was read and return.

        Raises:
            Whatever the lane's warm-up raises.
        """
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        await self._catalog.refresh()
        await self._lane.start()
        # What is alive now lives until the end; a full collection need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT_AFTER)
        return_freed_memory()
        async with asyncio.TaskGroup() as group:

            def start(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
                return group.create_task(work, name=f"tamiyo-{name}")

            background = [
                start(self._tick(), "tick"),
                start(self._health.supervise(), "bus"),
                start(self._outbox.run(), "outbox"),
                start(self._catalog.run(), "catalog"),
                start(self._observe(), "observe"),
                start(self._trim(), "trim"),
                start(self._updates.follow(), "policy-stream"),
                start(self._updates.guard(), "policy-probation"),
                start(self._updates.announce(), "policy-status"),
            ]
            intake: list[asyncio.Task[None]] = []
            try:
                await self._until(self._health.wait_up(), stop)
                await self._until(self._updates.wait_caught_up(), stop)
                intake.append(start(self._intake.claim(), "claim"))
                for consumer in self._intake.consumers:
                    intake.append(start(self._intake.read(consumer), "read"))
                self._started = True
                if not stop.is_set():
                    log.info(
                        "service.started",
                        version=__version__,
                        policy=self._replica.runtime.policy.version,
                        device=self._replica.runtime.device,
                        consumer=self._settings.consumer_name,
                        blueprints=len(self._catalog.snapshot.blueprints),
                    )
                    if self._catalog.absent:
                        log.info(
                            "catalog.absent",
                            detail="no catalogue is configured: blueprints that trainers name are "
                            "used as they are (`tamiyo catalog init` makes a catalogue)",
                        )
                    on_ready()
                await stop.wait()
                self._draining = True
                await cancel(intake)
                await self._drain()
            finally:
                # Also when one of them failed: the group cancels the others once, which is not
                # always enough.
                await cancel([*intake, *background])
        await self._updates.close()
        await self._lane.close()
        self._catalog.close()
        await self._save_vocabularies()
        with suppress(BusError):
            await self._breakers.save(self._replica.breakers)
        log.info("service.stopped")

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await self._intake.drain()
        except TimeoutError:
            left = await self._intake.abandon()
            log.warning("service.drain_timed_out", left_pending=left)

    @staticmethod
    async def _until(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> None:
        """Wait for `work`, or for `stop` if that comes first."""
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(tasks)

    async def _tick(self) -> None:
        while True:
            self._ticked_s = time.monotonic()
            await asyncio.sleep(_TICK_S)

    async def _observe(self) -> None:
        """Keep the server's clock, the streams' positions and the gauges current.

        What is asked of Redis for that is asked between decisions.
        """
        streams = self._settings.input_streams
        while True:
            await asyncio.sleep(_OBSERVE_S)
            self._notices.publish_unreported()
            self._metrics.conservative_runs(self._runs.conservative_runs())
            self._observe_catalog()
            await self._save_vocabularies()
            try:
                for ask in (
                    self._health.check_writes,
                    lambda: self._clock.sync(self._redis),
                    self._inbox.refresh,
                    lambda: self._breakers.save(self._replica.breakers),
                ):
                    await self._intake.quiet()
                    await ask()
                for stream in streams:
                    await self._intake.quiet()
                    status = await read_status(self._redis, stream, self._settings.consumer_group)
                    oldest_s = None
                    if status.oldest_unacked_id is not None:
                        added_ms = int(status.oldest_unacked_id.partition("-")[0])
                        oldest_s = max(0.0, (self._clock.now_ms() - added_ms) / 1e3)
                    self._metrics.stream_position(
                        stream, StreamPosition(status.lag, status.pending, oldest_s)
                    )
            except BusError as error:
                self._health.failed(error)
                for stream in streams:
                    self._metrics.stream_position(stream, StreamPosition())
                await self._health.wait_up()
            else:
                self._health.seen()

    async def _trim(self) -> None:
        """Remove what every group is done with and what is past its time."""
        settings = self._settings
        ages_ms = {
            settings.normal_stream: settings.message_ttl_ms,
            settings.emergency_stream: settings.message_ttl_ms,
            settings.telemetry_stream: settings.message_ttl_ms,
            settings.command_stream: settings.message_ttl_ms,
        }
        if settings.field_report_stream not in ages_ms:
            retention_ms = int(settings.field_report_retention_hours * 3.6e6)
            ages_ms[settings.field_report_stream] = retention_ms
        while True:
            await asyncio.sleep(_TRIM_S)
            await self._health.wait_up()
            try:
                for name, age_ms in ages_ms.items():
                    for stream in settings.in_partitions(name):
                        await self._intake.quiet()
                        await trim(self._redis, stream, self._clock.now_ms() - age_ms)
            except BusError as error:
                self._health.failed(error)

    def _observe_catalog(self) -> None:
        snapshot = self._catalog.snapshot
        degraded = self._catalog.degraded is not None
        self._metrics.catalog_state(len(snapshot.blueprints), snapshot.skipped, degraded=degraded)
        for name, breaker in self._replica.breakers.items():
            self._metrics.breaker_state(name, breaker.state)

    async def _save_vocabularies(self) -> None:
        size = self._vocabularies.size
        if size == self._saved_vocabulary_size:
            return
        text = self._vocabularies.to_json()
        try:
            await asyncio.to_thread(save_vocabularies, self._settings.state_dir, text)
        except (OSError, StoredStateError) as error:
            log.warning("vocabularies.save_failed", error=str(error))
        else:
            self._saved_vocabulary_size = size

    def liveness(self) -> Mapping[str, str | None]:
        """Whether restarting this process would help; Redis has no part in it."""
        silent_s = time.monotonic() - self._ticked_s
        return {
            "event_loop": f"no tick for {silent_s:.0f} s" if silent_s > _STALLED_S else None,
            "lane": "hung, and so did its replacement" if self._lane.failed else None,
        }

    def readiness(self) -> Mapping[str, str | None]:
        """Whether this replica takes work now."""
        seen_s = self._health.seen_s
        bus = self._health.reason
        if bus is None and (seen_s is None or time.monotonic() - seen_s > _SILENT_S):
            bus = f"not heard of for more than {_SILENT_S:.0f} s"
        return {
            "bus": bus,
            "policy": None if self._lane.ready else "not warm",
            "draining": "stopping" if self._draining else None,
        }

    def startup(self) -> Mapping[str, str | None]:
        """Whether it has finished starting."""
        return {"started": None if self._started else "starting"}
