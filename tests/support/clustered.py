"""A real Redis in cluster mode: one node that holds every slot and refuses what spans slots."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from redis import Redis

from tamiyo_svc.adapters.embedded import EmbeddedRedis

_BUS_OFFSET = 10_000
_SLOTS = 16_384
_TIMEOUT_S = 10.0


@contextmanager
def clustered_redis() -> Iterator[EmbeddedRedis]:
    """A server in cluster mode that takes commands."""
    with EmbeddedRedis(port=_free_port(), options=("--cluster-enabled", "yes")) as server:
        with Redis.from_url(server.url) as admin:
            admin.execute_command("CLUSTER ADDSLOTS", *range(_SLOTS))
            deadline_s = time.monotonic() + _TIMEOUT_S
            while admin.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                if time.monotonic() > deadline_s:
                    raise TimeoutError("the cluster does not come up")
                time.sleep(0.02)
        yield server


def _free_port() -> int:
    """A loopback port that is free and so is the one that the cluster's own bus takes."""
    while True:
        with socket.socket() as probe, socket.socket() as bus, suppress(OSError):
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port + _BUS_OFFSET < 65_536:
                bus.bind(("127.0.0.1", port + _BUS_OFFSET))
                return port
