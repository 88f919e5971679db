"""The policy a replica starts with: named, last known good, or built in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import structlog

from tamiyo_svc.adapters.policy_store import KeptPolicy, Manifest, PolicyStore
from tamiyo_svc.errors import ConfigurationError, PolicyRejectedError
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.policy.checkpoint import read_policy
from tamiyo_svc.policy.evaluator import Policy, build_policy

log = structlog.get_logger("tamiyo.starting_policy")


def load_policy(name: str | None, vocabularies: Vocabularies) -> Policy:
    """The policy to start with: built in, or read from a checkpoint file.

    Raises:
        ConfigurationError: the checkpoint cannot be read or is refused.
    """
    if name is None or name == "untrained":
        return build_policy("untrained")
    if name == "bootstrap":
        return build_policy("bootstrap")
    try:
        return read_policy(Path(name).read_bytes(), vocabularies)
    except OSError as error:
        raise ConfigurationError(
            f"TAMIYO_POLICY: got {name!r} ({error.strerror}), takes untrained, bootstrap or the "
            "path of a checkpoint"
        ) from None
    except PolicyRejectedError as error:
        raise ConfigurationError(f"TAMIYO_POLICY: {name!r} was refused: {error}") from None


def starting_policy(
    name: str | None, store: PolicyStore, vocabularies: Vocabularies
) -> tuple[Policy, Manifest]:
    """The policy to start with, and what is kept on disk with that one as the current.

    Raises:
        ConfigurationError: a policy that was named cannot be read or is refused.
    """
    manifest = store.load()
    if name is None:
        for kept in (manifest.current, manifest.previous):
            if kept is None or not (kept.file or kept is manifest.current):
                continue
            try:
                return store.open(kept, vocabularies), manifest
            except PolicyRejectedError as error:
                log.warning("policy.kept_unusable", version=kept.version, error=str(error))
            # What was taken is lost, so the stream has to be read again from its beginning.
            manifest = Manifest(current=manifest.previous)
    policy = load_policy(name, vocabularies)
    file = "" if name in (None, "untrained", "bootstrap") else str(Path(str(name)).resolve())
    kept = KeptPolicy(policy.policy_id, policy.version, policy.digest, file)
    return policy, replace(manifest, current=kept, previous=None, shadow=None)
