"""The client beside every trainer that it promises to work beside: `make client-matrix`.

First the resolver is asked, which downloads nothing, whether the client's wheel goes together with
old and new torch, protobuf and redis. Then the client really runs with every pair of protobuf and
redis, warnings being errors, against its stand-in and against a real service.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Final

from packages.environments import build, install, make_environment, run
from support.served_process import SECRET, serve

from tamiyo_svc.adapters.embedded import EmbeddedRedis

TORCH: Final = ("2.4.0", "2.6.0", "2.10.0", "2.13.0")
PAIRS: Final = (("5.29.*", "5.0.*"), ("6.33.*", "6.4.*"), ("7.*", "8.*"))
PROTOBUF: Final = ("5.26.*", "5.29.*", "6.33.*", "7.*")
REDIS: Final = ("5.0.2", "5.2.*", "5.3.*", "6.4.*", "7.*", "8.*")
PROBE: Final = Path(__file__).with_name("probe.py")


def resolve(python: Path, wheel: Path) -> None:
    """Ask for the client together with what trainers have."""
    dry_run = ("-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed")
    for torch, (protobuf, redis) in product(TORCH, PAIRS):
        wanted = (f"torch=={torch}", f"protobuf=={protobuf}", f"redis=={redis}")
        run(python, *dry_run, wheel, *wanted, cwd=python.parent)
        print("resolves:", *wanted, flush=True)


def try_out(python: Path, wheel: Path, folder: Path) -> None:
    """Run the client with every pair of its two needs."""
    with EmbeddedRedis() as redis, serve(redis.url, folder):
        variables = {"REDIS_URL": redis.url, "ESPER_LEYLINE_SECRET": SECRET}
        for protobuf, redis_py in product(PROTOBUF, REDIS):
            install(python, wheel, f"protobuf=={protobuf}", f"redis=={redis_py}")
            print(run(python, "-W", "error", PROBE, cwd=folder, **variables).strip(), flush=True)


def main() -> None:
    """Run the parts that the arguments name, or both."""
    parts = sys.argv[1:] or ["resolve", "run"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (wheel,) = (file for file in build(folder, "--wheel") if "client" in file.name)
        python = make_environment(folder / "environment")
        # Only a newer resolver than Python's own reads what a wheel needs without the wheel.
        install(python, "--upgrade", "pip")
        if "resolve" in parts:
            resolve(python, wheel)
        if "run" in parts:
            try_out(python, wheel, folder)


if __name__ == "__main__":
    main()
