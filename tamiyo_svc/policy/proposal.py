"""What the network's outputs mean: one proposal in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.errors import InferenceError
from tamiyo_svc.graph.coverage import Coverage
from tamiyo_svc.graph.schema import STAGE_SCALE
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import BLENDING_METHODS, NEXT_SEED_OPERATIONS, PolicyAction

_REQUIRED_HEADS: Final = (
    "policy_logits",
    "policy_params",
    "blending_logits",
    "schedule_params",
    "risk_logits",
    "value",
    "breaker_logits",
)


@dataclass(frozen=True, slots=True)
class Proposal:
    """What the policy would do with one packet.

    Probabilities, schedule, risk and coverage lie in [0, 1]; `seed_index` counts in the packet's
    `seed_states`, `blueprint_index` in the candidates that were given.
    """

    action: PolicyAction
    action_probabilities: tuple[float, ...]
    runner_up: tuple[PolicyAction, float]
    parameters: tuple[float, ...]
    blending_method: str
    blending_method_index: int
    schedule_start: float
    schedule_end: float
    risk_score: float
    risk_index: int
    value_estimate: float
    breaker_open_score: float
    breaker_close_score: float
    seed_index: int | None
    seed_id: str
    seed_score: float | None
    seed_scores: tuple[float, ...]
    blueprint: Blueprint | None
    blueprint_index: int | None
    blueprint_score: float | None
    blueprint_scores: tuple[float, ...]
    blueprint_ids: tuple[str, ...]
    coverage: Coverage
    truncated: Mapping[str, int]
    skipped_metadata: int
    build_ms: float
    inference_ms: float

    @property
    def param_delta(self) -> float:
        """The adjustment proposed for the step, in [-1, 1]."""
        return self.parameters[0]


def is_candidate(seed: leyline.SeedState) -> bool:
    """Whether anything can still be done with a seed."""
    return seed.stage in NEXT_SEED_OPERATIONS


def propose(
    heads: Mapping[str, Sequence[float]],
    *,
    seeds: Sequence[leyline.SeedState],
    blend_allowed: Sequence[bool],
    blueprints: Sequence[Blueprint],
    coverage: Coverage,
    truncated: Mapping[str, int],
    skipped_metadata: int,
    build_ms: float,
    inference_ms: float,
) -> Proposal:
    """Read one graph's outputs, by head name, as a proposal.

    `seeds`, `blend_allowed` and `blueprints` are those the graph kept, in its order.

    Raises:
        InferenceError: an output other than a node score is not finite.
    """
    for head in _REQUIRED_HEADS:
        if not all(map(math.isfinite, heads[head])):
            raise InferenceError(f"{head} is not finite")

    candidates = [index for index, seed in enumerate(seeds) if is_candidate(seed)]
    seed_scores = tuple(heads["seed_scores"])
    if not all(map(math.isfinite, seed_scores)):
        seed_scores = tuple(
            2.0 * allowed + (1.0 - _finite(seed.risk_score)) + _stage(seed) / STAGE_SCALE
            for seed, allowed in zip(seeds, blend_allowed, strict=True)
        )
    blueprint_scores = tuple(heads["blueprint_scores"])
    if not all(map(math.isfinite, blueprint_scores)):
        blueprint_scores = tuple(_finite(blueprint.candidate_score) for blueprint in blueprints)
    seed_index = _best(seed_scores, candidates)
    blueprint_index = _best(blueprint_scores, range(len(blueprints)))

    probabilities = _action_probabilities(
        heads["policy_logits"],
        may_seed=seed_index is not None and blueprint_index is not None,
    )
    ranked = sorted(PolicyAction, key=lambda action: (-probabilities[action], action))
    blending_index = _argmax(heads["blending_logits"][: len(BLENDING_METHODS)])
    start, end = sorted(min(1.0, max(0.0, (x + 1.0) / 2.0)) for x in heads["schedule_params"][:2])
    risks = _softmax(heads["risk_logits"])
    return Proposal(
        action=ranked[0],
        action_probabilities=probabilities,
        runner_up=(ranked[1], probabilities[ranked[1]]),
        parameters=tuple(heads["policy_params"]),
        blending_method=BLENDING_METHODS[blending_index],
        blending_method_index=blending_index,
        schedule_start=start,
        schedule_end=end,
        risk_score=sum(p * k for k, p in enumerate(risks)) / (len(risks) - 1),
        risk_index=_argmax(risks),
        value_estimate=heads["value"][0],
        breaker_open_score=_sigmoid(heads["breaker_logits"][0]),
        breaker_close_score=_sigmoid(heads["breaker_logits"][1]),
        seed_index=seed_index,
        seed_id="" if seed_index is None else seeds[seed_index].seed_id,
        seed_score=None if seed_index is None else seed_scores[seed_index],
        seed_scores=seed_scores,
        blueprint=None if blueprint_index is None else blueprints[blueprint_index],
        blueprint_index=blueprint_index,
        blueprint_score=None if blueprint_index is None else blueprint_scores[blueprint_index],
        blueprint_scores=blueprint_scores,
        blueprint_ids=tuple(blueprint.blueprint_id for blueprint in blueprints),
        coverage=coverage,
        truncated=truncated,
        skipped_metadata=skipped_metadata,
        build_ms=build_ms,
        inference_ms=inference_ms,
    )


def _action_probabilities(logits: Sequence[float], *, may_seed: bool) -> tuple[float, ...]:
    known = list(logits[: len(PolicyAction)])
    if not may_seed:
        known[PolicyAction.SEED] = -math.inf
    return _softmax(known)


def _softmax(logits: Sequence[float]) -> tuple[float, ...]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))
    return 1.0 / (1.0 + small) if x >= 0.0 else small / (1.0 + small)


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: (values[index], -index))


def _best(scores: Sequence[float], candidates: Sequence[int]) -> int | None:
    return max(candidates, key=lambda index: (scores[index], -index), default=None)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _stage(seed: leyline.SeedState) -> int:
    return seed.stage if 0 <= seed.stage <= STAGE_SCALE else leyline.SEED_STAGE_UNKNOWN
