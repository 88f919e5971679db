"""From the policy stream to the device lane: check, prepare, swap, keep, watch, roll back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog
from redis.asyncio import Redis

from tamiyo_svc.adapters.lane import DeviceLane
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.policy_stream import FROM_THE_END, ReplicaStatus, write_status
from tamiyo_svc.adapters.policy_store import KeptPolicy, Manifest, PolicyStore
from tamiyo_svc.decision.record import PolicyIdentity
from tamiyo_svc.errors import BusError, PolicyRejectedError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.evaluator import Policy, PolicyEvaluator, PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.service.candidates import Candidates
from tamiyo_svc.service.loader_process import LoaderProcess
from tamiyo_svc.service.notices import NoticeBoard
from tamiyo_svc.service.policy_loader import Finding, LoaderRequest
from tamiyo_svc.service.probation import Probation, ProbationState
from tamiyo_svc.service.serving import Serving
from tamiyo_svc.service.shadow import Shadow
from tamiyo_svc.service.state import ReplicaState
from tamiyo_svc.taxonomy import (
    BreakerName,
    Event,
    PolicyRejection,
    PolicyUpdateAction,
    PolicyUpdateOutcome,
    Severity,
)

log = structlog.get_logger("tamiyo.policy_updates")

_SWAP_TIMEOUT_S: Final = 10.0
_CATCH_UP_TIMEOUT_S: Final = 30.0
_STATUS_EVERY_S: Final = 5.0
_FIRST_DELAY_S: Final = 0.2
_MAX_DELAY_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """What an operator chose for policy updates."""

    request: LoaderRequest
    """The part of every request that never changes."""
    replica: str
    step_timeout_ms: float = 5.0
    probation_decisions: int = 200
    probation_failures: int = 10
    breaker_failures: int = 3
    pinned: bool = False
    """Whether the policy to start with was named; then only updates from now on count."""


class PolicyUpdates:
    """Applies the updates of the policy stream to this replica, one after the other."""

    def __init__(
        self,
        options: UpdateOptions,
        store: PolicyStore,
        manifest: Manifest,
        serving: Serving,
        lane: DeviceLane[PolicyRequest, Proposal],
        make_evaluator: Callable[[Policy, Callable[[], float]], PolicyEvaluator],
        vocabularies: Vocabularies,
        replica: ReplicaState,
        board: NoticeBoard,
        metrics: Metrics,
        health: BusHealth,
        redis: Redis,
        wall_clock_s: Callable[[], float] = time.time,
    ) -> None:
        self._options = options
        self._store = store
        self._manifest = manifest
        self._serving = serving
        self._lane = lane
        self._vocabularies = vocabularies
        self._replica = replica
        self._board = board
        self._metrics = metrics
        self._health = health
        self._redis = redis
        self._wall_clock_s = wall_clock_s
        self._candidates = Candidates(store, vocabularies, make_evaluator, options.step_timeout_ms)
        self._loader = LoaderProcess(FROM_THE_END if options.pinned else manifest.cursor)
        self._previous: Policy | None = None
        self._probation: Probation | None = None
        self._shadow: Shadow | None = None
        self._failed_probation = asyncio.Event()
        self._changing = asyncio.Lock()
        self._changed = asyncio.Event()

    async def wait_caught_up(self) -> None:
        """Wait until what the stream held at the start is dealt with, or half a minute."""
        try:
            async with asyncio.timeout(_CATCH_UP_TIMEOUT_S):
                await self._loader.caught_up.wait()
        except TimeoutError:
            log.warning("policy.catch_up_timed_out")

    async def close(self) -> None:
        """End the loader and take no more work."""
        await self._loader.close()
        self._candidates.close()

    def stand_back(self) -> None:
        """Have all that is done for updates make room for a packet."""
        self._loader.stand_back()
        self._candidates.turns.stand_back()

    def go_on(self) -> None:
        """Have it use the time until the next packet."""
        self._loader.go_on()
        self._candidates.turns.go_on()

    def inference_ended(self, success: bool) -> None:
        """Note how one inference of the serving policy went."""
        if self._probation is None:
            return
        match self._probation.record(success=success):
            case ProbationState.FAILED:
                self._failed_probation.set()
            case ProbationState.PASSED:
                log.info("policy.probation_passed", version=self._serving.policy.version)
                self._probation = None
                self._forget_previous()

    async def follow(self) -> None:
        """Take one update of the policy stream after the other, until cancelled."""
        if self._manifest.shadow is not None:
            await self._resume_shadow(self._manifest.shadow)
        delay_s = _FIRST_DELAY_S
        while True:
            await self._health.wait_up()
            try:
                finding = await self._next_finding()
            except (OSError, ValueError) as error:
                # No process could be started, or what it said makes no sense.
                log.warning("policy.loader_failed", error=str(error))
                finding = None
            if finding is None:
                # Nothing of this is an update's fault.
                await asyncio.sleep(delay_s)
                delay_s = min(_MAX_DELAY_S, 2 * delay_s)
                continue
            delay_s = _FIRST_DELAY_S
            async with self._changing:
                await self._settle(finding)

    async def _next_finding(self) -> Finding | None:
        """What a process of its own found in the next entry; None when it read none."""
        await self._candidates.run(self._sweep)
        taken = self._manifest.taken
        return await self._loader.find(
            replace(
                self._options.request,
                after=self._loader.position,
                first=self._loader.is_first,
                issued_ns=dict(taken.issued_ns),
                digests=taken.digests,
                vocabularies=self._vocabularies.snapshot(),
            )
        )

    async def _settle(self, finding: Finding) -> None:
        """Bring one entry to its end; whatever goes wrong leaves the policy that serves."""
        if finding.ignored:
            return
        before = self._manifest
        try:
            if finding.reason:
                raise PolicyRejectedError(finding.reason, finding.detail)
            match finding.action:
                case PolicyUpdateAction.ROLLBACK:
                    await self._roll_back("operator", finding)
                case PolicyUpdateAction.SHADOW:
                    await self._start_shadow(finding)
                case PolicyUpdateAction.PROMOTE:
                    await self._promote(finding)
                case _:
                    await self._apply(finding)
        except PolicyRejectedError as error:
            self._manifest = replace(before, cursor=finding.entry_id)
            self._refused(finding, error)
        except Exception as error:  # the one boundary: an unforeseen failure is a refusal
            log.exception("policy.update_failed")
            self._manifest = replace(before, cursor=finding.entry_id)
            self._refused(
                finding, PolicyRejectedError(PolicyRejection.SWAP_FAILED, type(error).__name__)
            )
        else:
            return
        try:
            await asyncio.to_thread(self._save, self._manifest)
        except OSError as error:
            log.warning("policy.store_failed", error=str(error))

    async def _apply(self, finding: Finding) -> None:
        kept = self._kept(finding)
        if not finding.file:
            policy = replace(self._serving.policy, version=kept.version)
        else:
            policy = await self._candidates.prepare(kept, finding.packed)
        await self._change_to(policy, self._manifest.with_current(kept), finding)
        self._applied(finding, policy)

    async def _promote(self, finding: Finding) -> None:
        if self._shadow is None:
            raise PolicyRejectedError(PolicyRejection.INVALID_PAYLOAD, "no candidate in shadow")
        shadow = self._end_shadow()
        policy = shadow.evaluator.policy
        manifest = replace(self._manifest.with_current(shadow.kept), shadow=None)
        await self._change_to(policy, manifest, finding)
        self._applied(finding, policy)

    async def _start_shadow(self, finding: Finding) -> None:
        kept = self._kept(finding)
        policy = await self._candidates.prepare(kept, finding.packed)
        manifest = self._after(replace(self._manifest, shadow=kept), finding)
        await asyncio.to_thread(self._save, manifest)
        self._cast_shadow(kept, policy)
        self._tell(Event.POLICY_SHADOW_STARTED, self._attributes(finding))

    async def _resume_shadow(self, kept: KeptPolicy) -> None:
        """Go on with the shadow of before a restart; a promotion must find it on every replica."""
        try:
            policy = await self._candidates.prepare(kept)
        except PolicyRejectedError as error:
            log.warning("policy.shadow_lost", version=kept.version, error=str(error))
            self._manifest = replace(self._manifest, shadow=None)
        else:
            self._cast_shadow(kept, policy)

    def _cast_shadow(self, kept: KeptPolicy, policy: Policy) -> None:
        loop = asyncio.get_running_loop()

        def on_report(report: dict[str, str]) -> None:
            loop.call_soon_threadsafe(self._tell, Event.POLICY_SHADOW_REPORT, report)

        if self._shadow is not None:
            self._candidates.retire(self._end_shadow().evaluator.policy)
        evaluator = self._candidates.evaluator(policy)
        self._shadow = Shadow(
            kept, evaluator, self._candidates.executor, self._candidates.turns, on_report
        )
        self._serving.watch = self._shadow.watch

    def _end_shadow(self) -> Shadow:
        shadow = self._shadow
        assert shadow is not None
        self._serving.watch = None
        self._shadow = None
        shadow.closed = True
        return shadow

    async def _change_to(self, policy: Policy, manifest: Manifest, finding: Finding | None) -> None:
        """Keep, swap, and put on probation; a failure leaves everything as it was."""
        before, previous = self._manifest, self._serving.policy
        manifest = self._after(manifest, finding)
        try:
            await asyncio.to_thread(self._save, manifest)
        except OSError as error:
            self._manifest = before
            raise PolicyRejectedError(
                PolicyRejection.SWAP_FAILED, f"it cannot be kept: {error.strerror}"
            ) from error
        if policy.weights is not previous.weights:
            try:
                await self._swap(policy)
            except Exception as error:
                self._manifest = before
                raise PolicyRejectedError(
                    PolicyRejection.SWAP_FAILED, f"{type(error).__name__}: {error}"
                ) from error
            if self._previous is not None:
                self._candidates.retire(self._previous)
            self._previous = previous
            self._start_probation()
        else:
            await self._swap(policy)
        self._serve(policy)

    async def _swap(self, policy: Policy) -> None:
        given_up = False

        def swap(worker: object) -> None:
            if not given_up:
                self._serving.swap(policy)

        try:
            async with asyncio.timeout(_SWAP_TIMEOUT_S):
                await self._lane.call(swap)
        except TimeoutError:
            given_up = True
            if self._serving.policy is not policy:
                raise

    def _serve(self, policy: Policy) -> None:
        identity = PolicyIdentity(policy.policy_id, policy.version)
        self._replica.serve(identity, untrained=policy.untrained)
        # It has just run on the probe graphs.
        self._replica.recovered(BreakerName.INFERENCE)
        self._metrics.policy_serving(policy.policy_id, policy.version, policy.digest)

    def _start_probation(self) -> None:
        options = self._options
        self._failed_probation.clear()
        self._probation = None
        if options.probation_decisions > 0:
            self._probation = Probation(
                options.probation_decisions, options.probation_failures, options.breaker_failures
            )
        else:
            self._forget_previous()

    def _forget_previous(self) -> None:
        """Leave the policy before to the disk; only a probation needs it at once."""
        kept = self._manifest.previous
        # A checkpoint the operator named may be gone or changed by the time it is needed.
        if self._previous is not None and (kept is None or not Path(kept.file).is_absolute()):
            self._candidates.retire(self._previous)
            self._previous = None

    async def guard(self) -> None:
        """Roll back whenever a probation fails, until cancelled."""
        while True:
            await self._failed_probation.wait()
            async with self._changing:
                self._failed_probation.clear()
                if self._probation is None:
                    continue
                try:
                    await self._roll_back("probation", None)
                except (PolicyRejectedError, OSError) as error:
                    self._probation = None
                    log.error("policy.rollback_failed", error=str(error))

    async def _roll_back(self, reason: str, finding: Finding | None) -> None:
        """Serve the previous policy again."""
        kept = self._manifest.previous
        if kept is None:
            raise PolicyRejectedError(PolicyRejection.INVALID_PAYLOAD, "nothing to go back to")
        bad, probation = self._serving.policy, self._probation
        policy = self._previous
        if policy is None:
            policy = await self._candidates.prepare(kept)
        manifest = self._after(replace(self._manifest, current=kept, previous=None), finding)
        if reason == "probation":
            # Trainers wait for the old policy more urgently than the disk does.
            await self._swap(policy)
            await asyncio.to_thread(self._save, manifest)
            self._serve(policy)
        else:
            await self._change_to(policy, manifest, finding)
        self._probation = self._previous = None
        self._candidates.retire(bad)
        attributes = {
            **(self._attributes(finding) if finding is not None else {}),
            "reason": reason,
            "policy_id": policy.policy_id,
            "version": policy.version,
            "digest": policy.digest,
            "from_policy_id": bad.policy_id,
            "from_version": bad.version,
            "from_digest": bad.digest,
        }
        if probation is not None:
            attributes |= {"failed": str(probation.failed), "decisions": str(probation.seen)}
        self._metrics.policy_update(PolicyUpdateOutcome.ROLLED_BACK)
        self._tell(Event.POLICY_ROLLED_BACK, attributes, Severity.HIGH)

    def _kept(self, finding: Finding) -> KeptPolicy:
        """The policy an update brings, or the serving one under the name it gives."""
        serving = self._serving.policy
        current = self._manifest.current
        return KeptPolicy(
            policy_id=finding.policy_id if finding.file else serving.policy_id,
            version=finding.version,
            digest=finding.digest or serving.digest,
            file=finding.file or (current.file if current is not None else ""),
        )

    def _after(self, manifest: Manifest, finding: Finding | None) -> Manifest:
        """The manifest with an update taken."""
        if finding is None:
            return replace(manifest, cursor=self._manifest.cursor)
        return replace(
            manifest,
            cursor=finding.entry_id,
            taken=self._manifest.taken.after(finding.policy_id, finding.issued_ns, finding.update),
        )

    def _save(self, manifest: Manifest) -> None:
        self._store.save(manifest)
        self._manifest = manifest

    def _sweep(self) -> None:
        """Remove files that nothing needs, while nobody writes one."""
        try:
            with self._candidates.turns.standing_back():
                self._store.sweep(self._manifest)
        except OSError as error:
            log.warning("policy.store_failed", error=str(error))

    def _applied(self, finding: Finding, policy: Policy) -> None:
        self._metrics.policy_update(PolicyUpdateOutcome.APPLIED)
        arrived_s = int(finding.entry_id.partition("-")[0]) / 1e3
        took_ms = max(0.0, (self._wall_clock_s() - arrived_s) * 1e3)
        self._tell(
            Event.POLICY_UPDATE_APPLIED,
            {
                **self._attributes(finding),
                "policy_id": policy.policy_id,
                "version": policy.version,
                "digest": policy.digest,
                "took_ms": f"{took_ms:.0f}",
                "golden_packets": str(finding.golden),
            },
        )

    def _refused(self, finding: Finding, error: PolicyRejectedError) -> None:
        self._metrics.policy_update(PolicyUpdateOutcome.REJECTED)
        attributes = {
            **self._attributes(finding),
            "policy_id": finding.policy_id,
            "version": finding.version,
            "reason": error.reason,
            "detail": error.detail[:400],
        }
        self._tell(Event.POLICY_UPDATE_REJECTED, attributes, Severity.WARNING)

    @staticmethod
    def _attributes(finding: Finding) -> dict[str, str]:
        return {
            "entry_id": finding.entry_id,
            "update": finding.update,
            "action": finding.action,
            "issued_by": finding.issued_by,
        }

    def _tell(
        self, event: Event, attributes: dict[str, str], severity: Severity = Severity.INFO
    ) -> None:
        self._board.publish([FiredEvent(event, severity, attributes)])
        self._changed.set()

    async def announce(self) -> None:
        """Keep saying which policy this replica serves, until cancelled."""
        while True:
            await self._health.wait_up()
            try:
                await write_status(self._redis, self.status())
            except BusError as error:
                self._health.failed(error)
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_STATUS_EVERY_S):
                    await self._changed.wait()

    def status(self) -> ReplicaStatus:
        """Which policy serves, what it could go back to, and what runs in its shadow."""
        policy, previous = self._serving.policy, self._manifest.previous
        return ReplicaStatus(
            replica=self._options.replica,
            policy_id=policy.policy_id,
            version=policy.version,
            digest=policy.digest,
            previous=previous.version if previous is not None else "",
            probation_left=self._probation.left if self._probation is not None else 0,
            shadow=self._shadow.report() if self._shadow is not None else None,
        )
