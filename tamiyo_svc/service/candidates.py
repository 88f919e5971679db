"""Policies on their way in and out: prepared and freed in a thread that stands back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, TypeVar

import structlog

from tamiyo_svc.adapters.policy_store import KeptPolicy, PolicyStore
from tamiyo_svc.errors import InferenceError, PolicyRejectedError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.evaluator import Policy, PolicyEvaluator
from tamiyo_svc.policy.golden import sample_requests
from tamiyo_svc.policy.update import PackedFile
from tamiyo_svc.service.courtesy import ThreadTurns, courteous_executor
from tamiyo_svc.taxonomy import PolicyRejection

T = TypeVar("T")

log = structlog.get_logger("tamiyo.candidates")

_PROBE_RUNS: Final = 5


class Candidates:
    """Makes policies ready to serve and frees those that no longer do, beside the decisions."""

    def __init__(
        self,
        store: PolicyStore,
        vocabularies: Vocabularies,
        make_evaluator: Callable[[Policy, Callable[[], float]], PolicyEvaluator],
        step_timeout_ms: float,
    ) -> None:
        self._store = store
        self._vocabularies = vocabularies
        self._make_evaluator = make_evaluator
        self._step_timeout_ms = step_timeout_ms
        self._retired: list[Policy] = []
        self._closed = False
        self.executor: Executor = courteous_executor("tamiyo-policy")
        self.turns = ThreadTurns()

    async def prepare(self, kept: KeptPolicy, packed: PackedFile | None = None) -> Policy:
        """Load, fold, warm up and probe a policy.

        Loading and folding are left out where another process has left the weights `packed`.

        Raises:
            PolicyRejectedError: it cannot be loaded, fails, or is too slow at its best.
        """
        return await self.run(lambda: self._prepare(kept, packed))

    def evaluator(self, policy: Policy) -> PolicyEvaluator:
        """What runs a policy in that thread; its times leave out those of standing back."""
        return self._make_evaluator(policy, self.turns.clock)

    async def run(self, work: Callable[[], T]) -> T:
        """Have something else done in the same thread, after what was asked for before."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, work)

    def retire(self, policy: Policy) -> None:
        """Free a policy as soon as the caller has let go of it."""
        self._retired.append(policy)
        asyncio.get_running_loop().call_soon(self._free_soon)

    def close(self) -> None:
        """Take no more work; what still runs is left to its thread."""
        self._closed = True
        # What was given up unanswered stays in flight, and nobody waits for it.
        self.turns.close()
        self.executor.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, kept: KeptPolicy, packed: PackedFile | None) -> Policy:
        # Looking through its 10,000 objects for garbage would keep the interpreter for
        # milliseconds, in whatever thread that began. They are freed by hand.
        gc.disable()
        try:
            with self.turns.standing_back(frees_much=True):
                policy = self._adopted(kept, packed) if packed is not None else None
                if policy is None:
                    policy = self._store.open(kept, self._vocabularies)
                try:
                    self._try(policy)
                except PolicyRejectedError:
                    policy.weights.release()
                    raise
                self._store.give_back(policy)
                gc.freeze()
                return policy
        finally:
            gc.enable()

    def _adopted(self, kept: KeptPolicy, file: PackedFile) -> Policy | None:
        """A policy of packed weights; None if they are of no use, without which it takes longer."""
        try:
            packed = self._store.take_packed(file)
        except (OSError, ValueError) as error:
            log.warning("policy.packed_weights_unusable", error=str(error))
            return None
        policy = self._store.open_when_needed(kept, self._vocabularies, untrained=file.untrained)
        adopted = self.evaluator(policy).adopt(packed)
        packed.release()
        return policy if adopted else None

    def _try(self, policy: Policy) -> None:
        """Warm a policy up and probe it.

        Raises:
            PolicyRejectedError: it fails, or is too slow at its best.
        """
        try:
            evaluator = self.evaluator(policy)
            evaluator.warm_up()
            best_ms = _best_inference_ms(evaluator)
        except InferenceError as error:
            raise PolicyRejectedError(PolicyRejection.PROBE_FAILED, str(error)) from error
        if 0 < self._step_timeout_ms < best_ms:
            raise PolicyRejectedError(
                PolicyRejection.PROBE_FAILED,
                f"an inference takes {best_ms:.1f} ms, the budget is {self._step_timeout_ms:g} ms",
            )

    def _free_soon(self) -> None:
        if not self._closed:
            self.executor.submit(self._free_retired)

    def _free_retired(self) -> None:
        """Drop what is retired."""
        with self.turns.standing_back(frees_much=True):
            while self._retired:
                policy = self._retired.pop()
                self._store.give_back(policy)
                policy.weights.release()
                del policy


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
