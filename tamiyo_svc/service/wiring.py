"""The one place where real parts are picked and joined."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import structlog
from redis.asyncio import Redis

from tamiyo_svc.adapters.http import HealthServer
from tamiyo_svc.adapters.keep_warm import KeepWarm
from tamiyo_svc.adapters.lane import DeviceLane, LaneWorker
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.breaker_store import BreakerStore
from tamiyo_svc.adapters.oona.bulletin import Bulletin
from tamiyo_svc.adapters.oona.commit import Committer
from tamiyo_svc.adapters.oona.connection import ServerClock, client
from tamiyo_svc.adapters.oona.consumer import StreamConsumer
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.outbox import Outbox
from tamiyo_svc.adapters.oona.routing import TelemetryRouter
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.policy_store import Manifest, PolicyStore
from tamiyo_svc.adapters.tracing import open_tracing
from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.adapters.vocabulary_store import load_vocabularies
from tamiyo_svc.decision.record import PolicyIdentity, Runtime
from tamiyo_svc.graph.builder import GraphBuilder
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.compiled import Library
from tamiyo_svc.policy.engines import Engines, EngineStatus
from tamiyo_svc.policy.evaluator import Policy, PolicyEvaluator, PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.service.evaluate import PacketPath
from tamiyo_svc.service.forms import serving_forms
from tamiyo_svc.service.intake import Intake, Notice
from tamiyo_svc.service.lifecycle import Service
from tamiyo_svc.service.notices import Inbox, NoticeBoard
from tamiyo_svc.service.options import (
    breaker_policy,
    graph_limits,
    intake_limits,
    path_options,
    update_options,
)
from tamiyo_svc.service.outcomes import Ledger
from tamiyo_svc.service.policy_updates import PolicyUpdates
from tamiyo_svc.service.serving import Serving
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.service.starting_policy import starting_policy
from tamiyo_svc.service.state import ReplicaState
from tamiyo_svc.service.telemetry import TelemetryDispatch
from tamiyo_svc.taxonomy import BreakerName, Event, Severity

Worker = LaneWorker[PolicyRequest, Proposal]
WrapWorker = Callable[[Worker], Worker]

log = structlog.get_logger("tamiyo.wiring")

_BACKGROUND_CONNECTIONS = 4
_COMMIT_CONNECTIONS = 16


@dataclass(frozen=True, slots=True)
class _Mind:
    """What proposes and what is known about it; it needs no bus."""

    vocabularies: Vocabularies
    store: PolicyStore
    manifest: Manifest
    serving: Serving
    make_evaluator: Callable[[Policy, Callable[[], float]], PolicyEvaluator]
    replica: ReplicaState
    catalog: UrzaCatalog
    lane: DeviceLane[PolicyRequest, Proposal]
    library: Library | None


@dataclass(frozen=True, slots=True)
class _Bus:
    """The adapters of the bus, over connections that are open."""

    background: Redis
    consumers: tuple[StreamConsumer, ...]
    committer: Committer
    clock: ServerClock
    breakers: BreakerStore
    health: BusHealth


@asynccontextmanager
async def open_service(
    settings: Settings,
    metrics: Metrics,
    wrap_worker: WrapWorker = lambda worker: worker,
    wall_clock_ns: Callable[[], int] = time.time_ns,
) -> AsyncIterator[Service]:
    """Build a service on open connections; leaving the block closes them.

    `wrap_worker` may put something around what runs in the device lane.

    Raises:
        ConfigurationError: no secret, an unreadable policy or vocabulary, a port in use.
    """
    keyring = settings.keyring()
    mind = _make_mind(settings, metrics, wrap_worker)
    replica = mind.replica

    async def refresh() -> None:
        await inbox.refresh()

    async with AsyncExitStack() as stack:
        bus = await _open_bus(stack, settings, replica, metrics, refresh)
        export_spans = await stack.enter_async_context(
            open_tracing(settings.otlp_endpoint, settings.consumer_name)
        )
        router = TelemetryRouter(
            settings.telemetry_stream, settings.emergency_stream, settings.emergency_max_per_min
        )
        dispatch = TelemetryDispatch(router, metrics, keyring)
        outbox = Outbox(bus.committer, bus.health, settings.tags[0])
        board = NoticeBoard(outbox, dispatch, replica, metrics, wall_clock_ns)
        runs = RunStore(bus.committer)
        inbox = Inbox(
            mind.catalog,
            Bulletin(bus.background),
            bus.committer,
            runs,
            bus.health,
            board,
            replica,
            settings.run_ttl_s,
            settings.conservative_cooldown_steps,
            settings.message_ttl_ms,
            settings.partitions,
            bus.clock.now_ms,
        )
        options = path_options(settings)
        path = PacketPath(
            mind.lane,
            mind.catalog,
            runs,
            bus.committer,
            bus.health,
            Ledger(dispatch, metrics, replica, keyring, options, wall_clock_ns, export_spans),
            metrics,
            replica,
            keyring,
            bus.clock,
            options,
            wall_clock_ns,
        )
        stack.push_async_callback(path.close)
        intake = Intake(
            bus.consumers,
            bus.committer,
            bus.health,
            path,
            metrics,
            keyring if settings.require_signatures else None,
            settings.dead_letter_stream,
            intake_limits(settings),
            _notices(inbox),
        )
        updates = PolicyUpdates(
            update_options(settings, mind.library),
            mind.store,
            mind.manifest,
            mind.serving,
            mind.lane,
            mind.make_evaluator,
            mind.vocabularies,
            replica,
            board,
            metrics,
            bus.health,
            bus.background,
        )
        intake.on_busy, intake.on_idle = updates.stand_back, updates.go_on
        replica.on_inference = updates.inference_ended
        service = Service(
            settings,
            bus.background,
            mind.lane,
            bus.health,
            bus.clock,
            intake,
            outbox,
            board,
            inbox,
            bus.breakers,
            updates,
            mind.catalog,
            runs,
            metrics,
            replica,
            mind.vocabularies,
        )
        http = stack.enter_context(
            HealthServer(settings.http_host, settings.http_port, metrics, service)
        )
        service.http_port = http.port
        yield service


def _make_mind(settings: Settings, metrics: Metrics, wrap_worker: WrapWorker) -> _Mind:
    """The policy with its engines, the lane that runs them, and the replica's state.

    Raises:
        ConfigurationError: an unreadable policy or vocabulary.
    """
    vocabularies = load_vocabularies(settings.state_dir)
    store = PolicyStore(settings.state_dir)
    policy, manifest = starting_policy(settings.policy, store, vocabularies)
    serving = Serving(policy)
    engines = Engines(serving_forms(settings))
    replica = _replica_state(settings, policy, engines.status)
    metrics.policy_serving(policy.policy_id, policy.version, policy.digest)
    metrics.compile_enabled(enabled=engines.status.is_compiled)
    loop = asyncio.get_running_loop()

    def on_engine_changed(status: EngineStatus) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(_engine_changed, replica, metrics, status)

    engines.on_change = on_engine_changed
    catalog = UrzaCatalog(
        settings.urza_database_url,
        settings.metadata_refresh_s,
        lambda event, attributes: replica.report(FiredEvent(event, Severity.WARNING, attributes)),
        optional=settings.catalog_is_optional,
    )
    limits = graph_limits(settings)

    def make_evaluator(
        policy: Policy, clock: Callable[[], float] = time.perf_counter
    ) -> PolicyEvaluator:
        return PolicyEvaluator(
            GraphBuilder(limits, vocabularies), policy, settings.cpu_threads, clock, engines
        )

    keep_warm = KeepWarm(lambda part, parts: engines.touch(serving.policy.weights, part, parts))
    lane = _lane(
        settings,
        lambda: wrap_worker(serving.worker(make_evaluator)),
        replica,
        metrics,
        keep_warm,
    )
    return _Mind(
        vocabularies,
        store,
        manifest,
        serving,
        make_evaluator,
        replica,
        catalog,
        lane,
        engines.library,
    )


def _replica_state(settings: Settings, policy: Policy, engine: EngineStatus) -> ReplicaState:
    return ReplicaState(
        runtime=Runtime(
            policy=PolicyIdentity(policy.policy_id, policy.version),
            device=engine.device,
            compile_enabled=engine.is_compiled,
            replica=settings.consumer_name,
            step_timeout_ms=settings.step_timeout_ms,
            metadata_timeout_ms=settings.metadata_timeout_ms,
        ),
        breaker_policy=breaker_policy(settings),
        operator_conservative=settings.conservative_mode,
        policy_untrained=policy.untrained,
    )


def _lane(
    settings: Settings,
    make_worker: Callable[[], Worker],
    replica: ReplicaState,
    metrics: Metrics,
    keep_warm: KeepWarm,
) -> DeviceLane[PolicyRequest, Proposal]:
    def on_hung() -> None:
        hung_s = str(settings.lane_hang_s)
        event = FiredEvent(Event.EXECUTOR_HUNG, Severity.CRITICAL, {"hang_s": hung_s})
        replica.report(event)

    return DeviceLane(
        make_worker,
        max_batch=settings.max_batch,
        hang_s=settings.lane_hang_s,
        on_hung=on_hung,
        on_batch=metrics.observe_batch,
        on_late=metrics.late_result,
        keep_warm=keep_warm if settings.keep_warm else None,
    )


async def _open_bus(
    stack: AsyncExitStack,
    settings: Settings,
    replica: ReplicaState,
    metrics: Metrics,
    refresh: Callable[[], Awaitable[None]],
) -> _Bus:
    """Open the connections; `refresh` is the last thing done whenever the bus comes back."""
    timeout_s = settings.commit_timeout_ms / 1e3
    # Reads block for `block_ms`; a shorter socket timeout would lose their replies.
    reader_timeout_s = settings.block_ms / 1e3 + 2.0
    reader = await stack.enter_async_context(
        client(settings.redis_url, reader_timeout_s, settings.partitions)
    )
    writer = await stack.enter_async_context(
        client(settings.redis_url, timeout_s, _COMMIT_CONNECTIONS)
    )
    background = await stack.enter_async_context(
        client(settings.redis_url, timeout_s, _BACKGROUND_CONNECTIONS)
    )
    # One read cannot span partitions, so each has a reader with a connection of its own.
    consumers = tuple(
        StreamConsumer(
            reader,
            background,
            (settings.emergency_stream + tag, settings.normal_stream + tag),
            settings.consumer_group,
            settings.consumer_name,
        )
        for tag in settings.tags
    )
    clock = ServerClock()
    breakers = BreakerStore(background, settings.consumer_name, clock)
    restored = False

    async def restore() -> None:
        nonlocal restored
        for consumer in consumers:
            await consumer.join()
        await clock.sync(background)
        if not restored:
            replica.restore(await breakers.load())
            restored = True
        await refresh()

    def on_bus(reason: str | None) -> None:
        if reason is None:
            replica.recovered(BreakerName.BUS)
        else:
            replica.record(BreakerName.BUS, success=False, now_s=time.monotonic())
        metrics.breaker_state(BreakerName.BUS, replica.breakers[BreakerName.BUS].state)

    health = BusHealth(background, settings.consumer_name, restore)
    health.on_change = on_bus
    health.on_probe_failed = lambda: on_bus("probe failed")
    committer = Committer(writer, settings.consumer_group)
    return _Bus(background, consumers, committer, clock, breakers, health)


def _notices(inbox: Inbox) -> dict[int, Notice]:
    """The messages beside state packets that are for us, by type."""
    return dict.fromkeys(
        (
            leyline.BUS_MESSAGE_TYPE_BSDS_ISSUED,
            leyline.BUS_MESSAGE_TYPE_BSDS_FAILED,
            leyline.BUS_MESSAGE_TYPE_KERNEL_CATALOG_UPDATE,
            leyline.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL,
        ),
        inbox.take,
    )


def _engine_changed(replica: ReplicaState, metrics: Metrics, status: EngineStatus) -> None:
    """Take over what the engines say of themselves; runs on the event loop."""
    before = replica.runtime
    replica.runtime = replace(
        before,
        device=status.device,
        compile_enabled=status.is_compiled,
        compile_warm_ms=status.warm_ms,
        compile_fallbacks=status.fallbacks,
        compile_reason=status.reason,
    )
    metrics.compile_enabled(enabled=status.is_compiled)
    for _ in range(status.fallbacks - before.compile_fallbacks):
        metrics.compile_fallback()
    if status.warm_ms is not None:
        metrics.compile_warmed(status.warm_ms / 1e3)
    if status.fallbacks > before.compile_fallbacks:
        log.warning("engine.fell_back", device=status.device, reason=status.reason)
