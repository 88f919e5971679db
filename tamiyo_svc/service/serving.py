"""The policy that decides, and whoever looks over its shoulder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tamiyo_svc.adapters.lane import LaneWorker
from tamiyo_svc.errors import InferenceError
from tamiyo_svc.policy.evaluator import Policy, PolicyEvaluator, PolicyRequest
from tamiyo_svc.policy.proposal import Proposal

Watch = Callable[[PolicyRequest, Proposal], None]


class Serving:
    """Holds the serving policy; workers made later, for a hung lane, start with it too."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.watch: Watch | None = None
        """Is shown the first proposal of every batch, in the lane's thread."""
        self._evaluator: PolicyEvaluator | None = None

    def worker(
        self, make_evaluator: Callable[[Policy], PolicyEvaluator]
    ) -> LaneWorker[PolicyRequest, Proposal]:
        """What a thread of the lane runs."""
        self._evaluator = make_evaluator(self.policy)
        return _Worker(self, self._evaluator)

    def swap(self, policy: Policy) -> None:
        """Serve another policy from the next batch on; call it in the lane's thread."""
        self.policy = policy
        if self._evaluator is not None:
            self._evaluator.swap(policy)


class _Worker:
    def __init__(self, serving: Serving, evaluator: PolicyEvaluator) -> None:
        self._serving = serving
        self._evaluator = evaluator

    def warm_up(self) -> None:
        self._evaluator.warm_up()

    def evaluate(self, requests: Sequence[PolicyRequest]) -> Sequence[Proposal | InferenceError]:
        results = self._evaluator.evaluate(requests)
        watch = self._serving.watch
        if watch is not None and isinstance(results[0], Proposal):
            watch(requests[0], results[0])
        return results
