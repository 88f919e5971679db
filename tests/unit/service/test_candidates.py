"""Making a policy ready: what it does without, and what it must not do."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from support.policies import POLICY_ID, checkpoint, trained

from tamiyo_svc.adapters.compiler import CompiledFormUnavailableError, load_compiled
from tamiyo_svc.adapters.policy_store import KeptPolicy, PolicyStore
from tamiyo_svc.errors import PolicyRejectedError
from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.compiled import pack
from tamiyo_svc.policy.engines import EAGER_CPU, Engines
from tamiyo_svc.policy.evaluator import Policy, PolicyEvaluator
from tamiyo_svc.policy.folding import fold_weights
from tamiyo_svc.policy.golden import sample_requests
from tamiyo_svc.policy.network import KeptNetwork, TamiyoNetwork
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.policy.update import PackedFile
from tamiyo_svc.service.candidates import Candidates
from tamiyo_svc.service.forms import compiled_form
from tamiyo_svc.taxonomy import PolicyRejection, WeightDtype

FP32 = WeightDtype.FP32


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


async def test_packed_weights_that_are_of_no_use_are_done_without(
    store: PolicyStore, kept: KeptPolicy
) -> None:
    prepared = await _prepared(store, Engines(), kept, PackedFile("gone.packed", ""))

    assert isinstance(prepared.weights, TamiyoNetwork)
    assert prepared.digest == kept.digest


async def test_a_form_that_takes_no_packed_weights_has_the_network_loaded(
    store: PolicyStore, kept: KeptPolicy
) -> None:
    file = store.write_packed(kept.digest, pack(fold_weights(trained(1.0).network), 16, FP32))

    prepared = await _prepared(store, Engines(), kept, file)

    assert isinstance(prepared.weights, TamiyoNetwork)
    assert not (store.folder / file.name).exists()


@pytest.mark.parametrize("untrained", [False, True])
async def test_a_policy_that_came_packed_serves_without_its_network(
    store: PolicyStore, kept: KeptPolicy, tmp_path: Path, untrained: bool
) -> None:
    try:
        library = load_compiled(tmp_path)
    except CompiledFormUnavailableError as error:
        pytest.skip(str(error))
    engines = Engines([compiled_form(library, FP32), EAGER_CPU])
    packed = pack(fold_weights(trained(1.0).network), library.panel, FP32)
    file = store.write_packed(kept.digest, packed)

    prepared = await _prepared(store, engines, kept, replace(file, untrained=untrained))

    assert isinstance(prepared.weights, KeptNetwork)
    assert prepared.weights.loaded is None
    assert (prepared.policy_id, prepared.version, prepared.digest, prepared.untrained) == (
        *(kept.policy_id, kept.version, kept.digest),
        untrained,
    )
    (proposal,) = _evaluator(prepared, engines).evaluate(sample_requests()[:1])
    assert isinstance(proposal, Proposal)
    assert proposal.value_estimate == pytest.approx(1.0)


@pytest.fixture
def store(tmp_path: Path) -> PolicyStore:
    return PolicyStore(tmp_path)


@pytest.fixture
def kept(store: PolicyStore) -> KeptPolicy:
    digest = trained(1.0).digest
    return KeptPolicy(POLICY_ID, "v1", digest, store.write(digest, checkpoint(1.0)))


async def _prepared(
    store: PolicyStore, engines: Engines, kept: KeptPolicy, file: PackedFile
) -> Policy:
    candidates = Candidates(
        store, Vocabularies(), lambda policy, clock: _evaluator(policy, engines), 0.0
    )
    try:
        return await candidates.prepare(kept, file)
    finally:
        candidates.close()


def _evaluator(policy: Policy, engines: Engines) -> PolicyEvaluator:
    return PolicyEvaluator(GraphBuilder(GraphLimits(), Vocabularies()), policy, engines=engines)
