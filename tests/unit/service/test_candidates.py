"""Making a policy ready: what it does without, and what it must not do."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any, cast

import pytest
from support.policies import POLICY_ID, checkpoint, trained

from tamiyo_svc.adapters.policy_store import KeptPolicy, PolicyStore
from tamiyo_svc.errors import PolicyRejectedError
from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.evaluator import PolicyEvaluator
from tamiyo_svc.policy.update import PackedFile
from tamiyo_svc.service.candidates import Candidates
from tamiyo_svc.taxonomy import PolicyRejection


class _Store:
    """Opens a policy of many objects, which then turns out to be of no use."""

    def __init__(self) -> None:
        self.collections: list[str] = []

    def open(self, kept: object, vocabularies: object) -> Any:
        def note(phase: str, info: object) -> None:
            self.collections.append(phase)

        gc.callbacks.append(note)
        try:
            held = [[number] for number in range(10_000)]
        finally:
            gc.callbacks.remove(note)
        raise PolicyRejectedError(PolicyRejection.INVALID_PAYLOAD, f"{len(held)} objects")


def test_no_garbage_is_looked_for_while_a_policy_is_made_ready() -> None:
    store = _Store()
    candidates = Candidates(cast("Any", store), Vocabularies(), cast("Any", None), 5.0)

    async def prepare() -> None:
        try:
            await candidates.prepare(cast("Any", None))
        finally:
            candidates.close()

    with pytest.raises(PolicyRejectedError, match="10000 objects"):
        asyncio.run(prepare())
    assert store.collections == []
    assert gc.isenabled()


async def test_packed_weights_that_are_of_no_use_are_done_without(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    policy = trained(1.0)
    kept = KeptPolicy(POLICY_ID, "v1", policy.digest, store.write(policy.digest, checkpoint(1.0)))
    builder = GraphBuilder(GraphLimits(), Vocabularies())
    candidates = Candidates(
        store,
        Vocabularies(),
        lambda policy, clock: PolicyEvaluator(builder, policy, clock=clock),
        step_timeout_ms=0.0,
    )
    try:
        prepared = await candidates.prepare(kept, PackedFile("gone.packed", ""))
    finally:
        candidates.close()

    assert prepared.digest == policy.digest
