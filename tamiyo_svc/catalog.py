"""A blueprint as the catalogue describes it: Leyline's descriptor and what came beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tamiyo_svc.leyline import leyline_pb2 as leyline

MAX_NAME_CHARACTERS: Final = 128
"""A blueprint's id goes into annotations, telemetry and logs of every decision about it."""

# Not 0, which would say that it is harmless; half of where `blueprint_risk` fires by default.
_NEUTRAL_RISK: Final = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """One catalogue entry, immutable once made; identity is a cache key for what is built from it.

    `graph_metadata` and `guard_spec` are the JSON values as found, not validated: their reader
    skips and counts what does not fit. `bsds` is the newest safety sheet known.
    """

    descriptor: leyline.BlueprintDescriptor
    bsds: leyline.BSDS | None = None
    graph_metadata: Mapping[str, Any] | None = None
    guard_spec: Sequence[Any] | None = None
    tags: tuple[str, ...] = field(default=())

    @property
    def blueprint_id(self) -> str:
        """Identifier of the blueprint."""
        return self.descriptor.blueprint_id

    @property
    def risk(self) -> float:
        """Risk in [0, 1]; a safety sheet's score supersedes the descriptor's."""
        return float(self.bsds.risk_score if self.bsds is not None else self.descriptor.risk)

    @property
    def candidate_score(self) -> float:
        """How good a candidate this is when nothing else is known, at least 0."""
        stage = 0.05 * self.descriptor.stage
        allowed = 0.02 * len(self.descriptor.allowed_parameters)
        return max(0.0, (1.0 - self.risk) + stage + allowed)

    @property
    def is_quarantined(self) -> bool:
        """Whether the descriptor or the safety sheet confines it to quarantine."""
        handling = leyline.HANDLING_CLASS_UNSPECIFIED
        if self.bsds is not None:
            handling = self.bsds.handling_class
        return self.descriptor.quarantine_only or handling == leyline.HANDLING_CLASS_QUARANTINE


def is_name(text: str) -> bool:
    """Whether a trainer can ask for a blueprint by this id.

    It asks with a list separated by commas, whose parts lose the spaces around them.
    """
    return (
        0 < len(text) <= MAX_NAME_CHARACTERS
        and text.isprintable()
        and text == text.strip()
        and "," not in text
    )


def neutral_descriptor(blueprint_id: str) -> leyline.BlueprintDescriptor:
    """A descriptor that says no more than that there is such a blueprint and that it blends."""
    bounds = leyline.BlueprintParameterBounds(min_value=0.0, max_value=1.0)
    return leyline.BlueprintDescriptor(
        blueprint_id=blueprint_id,
        name=blueprint_id,
        allowed_parameters={"alpha": bounds},
        risk=_NEUTRAL_RISK,
    )
