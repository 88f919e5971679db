"""A candidate beside the live policy: the same packets, compared and timed, never acted on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from tamiyo_svc.adapters.policy_store import KeptPolicy
from tamiyo_svc.errors import InferenceError
from tamiyo_svc.policy.evaluator import PolicyEvaluator, PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.events import number
from tamiyo_svc.service.courtesy import ThreadTurns

REPORT_EVERY: Final = 200
"""Compared decisions from one report to the next."""

_MAX_WAITING: Final = 2
_LATENCIES: Final = 1000


class Shadow:
    """Runs a candidate on packets the live policy has answered, on another thread.

    What comes while it is busy is skipped and counted, so it never falls behind.
    """

    def __init__(
        self,
        kept: KeptPolicy,
        evaluator: PolicyEvaluator,
        executor: Executor,
        turns: ThreadTurns,
        on_report: Callable[[dict[str, str]], None],
    ) -> None:
        self.kept = kept
        self.evaluator = evaluator
        self._executor = executor
        self._turns = turns
        self._on_report = on_report
        self._lock = threading.Lock()
        self._waiting = 0
        self._compared = self._agreed = self._failed = self._skipped = 0
        self._largest_difference = 0.0
        self._live_ms: list[float] = []
        self._candidate_ms: list[float] = []
        self.closed = False

    def watch(self, request: PolicyRequest, live: Proposal) -> None:
        """Have one answered packet compared, unless enough are waiting."""
        with self._lock:
            if self.closed:
                return
            if self._waiting >= _MAX_WAITING:
                self._skipped += 1
                return
            self._waiting += 1
        try:
            self._executor.submit(self._compare, request, live)
        except RuntimeError:  # the service is stopping
            self.closed = True

    def report(self) -> dict[str, str]:
        """Agreement and latency so far, as texts."""
        with self._lock:
            return {
                "policy_id": self.kept.policy_id,
                "version": self.kept.version,
                "digest": self.kept.digest,
                "compared": str(self._compared),
                "agreement": number(self._agreed / max(1, self._compared)),
                "failed": str(self._failed),
                "skipped": str(self._skipped),
                "largest_param_delta_difference": number(self._largest_difference),
                "live_p50_ms": number(_quantile(self._live_ms, 0.5)),
                "live_p99_ms": number(_quantile(self._live_ms, 0.99)),
                "candidate_p50_ms": number(_quantile(self._candidate_ms, 0.5)),
                "candidate_p99_ms": number(_quantile(self._candidate_ms, 0.99)),
            }

    def _compare(self, request: PolicyRequest, live: Proposal) -> None:
        with self._turns.standing_back():
            (candidate,) = self.evaluator.evaluate([request])
        with self._lock:
            self._waiting -= 1
            self._compared += 1
            if isinstance(candidate, InferenceError):
                self._failed += 1
            else:
                self._agreed += _same(live, candidate)
                difference = abs(live.param_delta - candidate.param_delta)
                self._largest_difference = max(self._largest_difference, difference)
                for kept, new_ms in (
                    (self._live_ms, live.inference_ms),
                    (self._candidate_ms, candidate.inference_ms),
                ):
                    kept.append(new_ms)
                    del kept[:-_LATENCIES]
            due = self._compared % REPORT_EVERY == 0 and not self.closed
        if due:
            self._on_report(self.report())


def _same(live: Proposal, candidate: Proposal) -> bool:
    """Whether both would have led to the same kind of command on the same target."""
    return (live.action, live.seed_index, live.blueprint_index) == (
        candidate.action,
        candidate.seed_index,
        candidate.blueprint_index,
    )


def _quantile(values: list[float], share: float) -> float:
    if not values:
        return 0.0
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
