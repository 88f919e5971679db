"""How the examples get their client: a real service if there is one, else a stand-in."""

from __future__ import annotations

import os

from tamiyo_svc.client import TamiyoClient, from_environment
from tamiyo_svc.client.testing import FakeService, grow


def connect(run_id: str, blueprint_id: str) -> TamiyoClient:
    """A client of the service behind REDIS_URL, or of one that just grows seeds."""
    if "REDIS_URL" in os.environ:
        return from_environment(run_id)
    return FakeService(grow(blueprint_id)).client(run_id)
