"""Whether a policy update may be taken after those that were taken before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tamiyo_svc.errors import PolicyRejectedError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import PolicyRejection, PolicyUpdateAction

ACTION_ATTRIBUTE: Final = "policy_action"
"""Envelope attribute, and so signed: what the update asks for."""

ISSUED_BY_ATTRIBUTE: Final = "issued_by"
"""Envelope attribute: who published the update; told with every event about it."""

MAX_AHEAD_S: Final = 5.0
"""An update issued this far after its arrival is refused, as consumers refuse commands."""

_REMEMBERED: Final = 64


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file of packed weights; `digest` is the SHA-256 of its bytes, as hex.

    `untrained` is what the checkpoint said that they come from.
    """

    name: str
    digest: str
    untrained: bool = False


@dataclass(frozen=True, slots=True)
class TakenUpdates:
    """What is remembered of the updates that were taken.

    `issued_ns` is the newest per policy id, `digests` are those of the last envelopes, newest
    last; both are bounded.
    """

    issued_ns: Mapping[str, int] = field(default_factory=dict)
    digests: tuple[str, ...] = ()

    def after(self, policy_id: str, issued_ns: int, digest: str) -> TakenUpdates:
        """The same with one more update taken."""
        newest = max(issued_ns, self.issued_ns.get(policy_id, 0))
        others = {name: when for name, when in self.issued_ns.items() if name != policy_id}
        kept = [*others.items(), (policy_id, newest)][-_REMEMBERED:]
        return TakenUpdates(dict(kept), (*self.digests, digest)[-_REMEMBERED:])


def read_action(attributes: Mapping[str, str]) -> PolicyUpdateAction:
    """What an update asks for.

    Raises:
        PolicyRejectedError: `invalid_payload`: it asks for something unknown.
    """
    name = attributes.get(ACTION_ATTRIBUTE, PolicyUpdateAction.APPLY)
    try:
        return PolicyUpdateAction(name)
    except ValueError:
        raise PolicyRejectedError(
            PolicyRejection.INVALID_PAYLOAD, f"unknown action {name[:40]!r}"
        ) from None


def check_order(
    update: leyline.PolicyUpdate,
    digest: str,
    arrived_ms: int,
    taken: TakenUpdates,
    freshness_s: float,
) -> None:
    """Refuse what is a replay, older than what was taken, too old, or of the future.

    `digest` is that of the envelope's bytes. Age is measured at `arrived_ms`, the time the bus
    gave the entry, so that reading an entry again later changes nothing. `freshness_s` 0 takes
    any age.

    Raises:
        PolicyRejectedError: `replayed_update` or `stale_update`.
    """
    if digest in taken.digests:
        raise PolicyRejectedError(PolicyRejection.REPLAYED_UPDATE, "it was taken before")
    issued_ns = update.issued_at.ToNanoseconds()
    newest_ns = taken.issued_ns.get(update.policy_id, 0)
    if issued_ns <= newest_ns:
        behind_s = (newest_ns - issued_ns) / 1e9
        raise PolicyRejectedError(
            PolicyRejection.STALE_UPDATE,
            f"issued {behind_s:.3f} s before the newest one of policy {update.policy_id!r}",
        )
    age_s = arrived_ms / 1e3 - issued_ns / 1e9
    if age_s < -MAX_AHEAD_S:
        raise PolicyRejectedError(
            PolicyRejection.STALE_UPDATE, f"issued {-age_s:.1f} s after it arrived"
        )
    if freshness_s > 0 and age_s > freshness_s:
        raise PolicyRejectedError(
            PolicyRejection.STALE_UPDATE,
            f"issued {age_s:.1f} s before it arrived, at most {freshness_s:g} s are taken",
        )
