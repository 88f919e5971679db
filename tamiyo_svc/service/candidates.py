"""Policies on their way in and out: prepared and freed in a thread that stands back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from tamiyo_svc.adapters.policy_store import KeptPolicy, PolicyStore
from tamiyo_svc.errors import InferenceError, PolicyRejectedError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.evaluator import Policy, PolicyEvaluator
from tamiyo_svc.policy.golden import sample_requests
from tamiyo_svc.service.courtesy import courteous_executor, standing_back
from tamiyo_svc.taxonomy import PolicyRejection

_PROBE_RUNS: Final = 5


class Candidates:
    """Makes policies ready to serve and frees those that no longer do, beside the decisions."""

    def __init__(
        self,
        store: PolicyStore,
        vocabularies: Vocabularies,
        make_evaluator: Callable[[Policy], PolicyEvaluator],
        is_busy: Callable[[], bool],
        step_timeout_ms: float,
    ) -> None:
        self._store = store
        self._vocabularies = vocabularies
        self._make_evaluator = make_evaluator
        self._is_busy = is_busy
        self._step_timeout_ms = step_timeout_ms
        self._retired: list[Policy] = []
        self._closed = False
        self.executor: Executor = courteous_executor("tamiyo-policy")

    def is_awaited(self) -> bool:
        """Whether a packet waits for its answer."""
        # At the end what was given up unanswered stays in flight, and nobody waits for it.
        return not self._closed and self._is_busy()

    async def prepare(self, kept: KeptPolicy) -> Policy:
        """Load, fold, warm up and probe a policy.

        Raises:
            PolicyRejectedError: it cannot be loaded, fails, or is too slow at its best.
        """
        return await asyncio.get_running_loop().run_in_executor(self.executor, self._prepare, kept)

    def retire(self, policy: Policy) -> None:
        """Free a policy as soon as the caller has let go of it."""
        self._retired.append(policy)
        asyncio.get_running_loop().call_soon(self._free_soon)

    def close(self) -> None:
        """Take no more work; what still runs is left to its thread."""
        self._closed = True
        self.executor.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, kept: KeptPolicy) -> Policy:
        with standing_back(self.is_awaited):
            policy = self._store.open(kept, self._vocabularies)
            try:
                evaluator = self._make_evaluator(policy)
                evaluator.warm_up()
                best_ms = _best_inference_ms(evaluator)
            except InferenceError as error:
                raise PolicyRejectedError(PolicyRejection.PROBE_FAILED, str(error)) from error
            if 0 < self._step_timeout_ms < best_ms:
                raise PolicyRejectedError(
                    PolicyRejection.PROBE_FAILED,
                    f"an inference takes {best_ms:.1f} ms, "
                    f"the budget is {self._step_timeout_ms:g} ms",
                )
            self._store.give_back(policy)
            return policy

    def _free_soon(self) -> None:
        if not self._closed:
            self.executor.submit(self._free_retired)

    def _free_retired(self) -> None:
        """Drop what is retired: some milliseconds, with the interpreter held."""
        with standing_back(self.is_awaited):
            while self._retired:
                self._store.give_back(self._retired[-1])
                self._retired.pop()


def _best_inference_ms(evaluator: PolicyEvaluator) -> float:
    """The shortest of a few inferences on the sample graphs: what it takes undisturbed.

    Raises:
        InferenceError: one of them failed.
    """
    times_ms: list[float] = []
    for request in sample_requests():
        for _ in range(_PROBE_RUNS):
            (proposal,) = evaluator.evaluate([request])
            if isinstance(proposal, InferenceError):
                raise proposal
            times_ms.append(proposal.inference_ms)
    return min(times_ms)
