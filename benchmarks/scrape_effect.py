"""What a scrape every second does to decisions: windows with and without, by turns, in one run.

A service of its own over a private Redis, one virtual trainer at a fixed rate. Run with
`python benchmarks/scrape_effect.py [--seconds N] [--rate R]`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from typing import Any

import numpy as np
from redis import Redis

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring

_WINDOW_S = 5.0
_RUN = "scrape-effect"
_REPLY_TO = f"oona.commands.{_RUN}"


def packet(step: int) -> leyline.SystemStatePacket:
    """A packet with four seeds."""
    state = leyline.SystemStatePacket(
        version=1,
        training_run_id=_RUN,
        packet_id=f"p-{step}",
        global_step=step,
        validation_loss=0.5,
        training_loss=0.5,
        timestamp_ns=time.time_ns(),
    )
    for index in range(4):
        state.seed_states.add(seed_id=f"seed-{index}", stage=leyline.SEED_STAGE_DORMANT)
    return state


def measure(redis: Redis, keyring: Keyring, url: str, seconds: float, rate: float) -> Any:
    """Step latencies in ms, as the service's telemetry tells them, by whether it was scraped."""
    took: dict[bool, list[float]] = {False: [], True: []}
    scraping = threading.Event()
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(1.0):
            if scraping.is_set():
                urllib.request.urlopen(url, timeout=5).read()

    scraper = threading.Thread(target=scrape)
    scraper.start()
    started = time.monotonic()
    scraped_at: dict[str, bool] = {}
    step = 0
    while (elapsed := time.monotonic() - started) < seconds:
        scraped = int(elapsed / _WINDOW_S) % 2 == 1
        (scraping.set if scraped else scraping.clear)()
        fields: Any = seal(packet(step), keyring, {"reply_to": _REPLY_TO}).fields()
        redis.xadd("oona.normal", fields)
        # The first window warms caches.
        if elapsed > _WINDOW_S:
            scraped_at[f"p-{step}"] = scraped
        step += 1
        time.sleep(max(0.0, started + step / rate - time.monotonic()))
    time.sleep(1.0)
    stop.set()
    scraper.join()
    for stream in ("oona.telemetry", "oona.emergency"):
        entries: Any = redis.xrange(stream)
        for _, stored in entries:
            told: Any = parse_payload(open_envelope(stored, keyring))
            for metric in getattr(told, "metrics", ()):
                if metric.name == "tamiyo.step.latency_ms" and told.packet_id in scraped_at:
                    took[scraped_at[told.packet_id]].append(metric.value)
    return {
        ("scraped every second" if scraped else "not scraped"): {
            "decisions": len(times),
            **{f"p{q}_ms": round(float(np.percentile(times, q)), 3) for q in (50, 95, 99)},
        }
        for scraped, times in took.items()
    }


def main() -> None:
    """Start a service, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=125.0)
    parser.add_argument("--rate", type=float, default=50.0)
    arguments = parser.parse_args()
    secret = secrets.token_hex(32)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis() as server:
        environment = {
            **os.environ,
            "REDIS_URL": server.url,
            "ESPER_LEYLINE_SECRET": secret,
            "TAMIYO_POLICY": "bootstrap",
            "TAMIYO_STATE_DIR": folder,
            "TAMIYO_HTTP_HOST": "127.0.0.1",
            "TAMIYO_HTTP_PORT": str(port),
            # Off, so that a slow decision is measured and not cut short.
            "TAMIYO_STEP_TIMEOUT_MS": "0",
        }
        service = subprocess.Popen(
            [sys.executable, "-m", "tamiyo_svc.cli.main", "serve"],
            env=environment,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{url}/startupz", timeout=1)
                    break
                except OSError:
                    time.sleep(0.1)
            with Redis.from_url(server.url, protocol=2) as redis:
                result = measure(
                    redis,
                    Keyring(secret.encode()),
                    f"{url}/metrics",
                    arguments.seconds,
                    arguments.rate,
                )
            exported = urllib.request.urlopen(f"{url}/metrics", timeout=5).read().decode()
        finally:
            service.terminate()
            service.wait()
    result["samples in a scrape"] = len(re.findall(r"^\w", exported, re.MULTILINE))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
