"""What combining the commits of sixteen runs would save.

`python -m benchmarks.commits [--rounds N]` commits the same decision of sixteen runs one after
the other, at once over sixteen connections as the service does, in one pipeline, and in one
script; it prints milliseconds and processor time for each commit, ours and the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import selectors
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from benchmarks.decision import GROUP, open_decisions
from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.adapters.oona import commit as commit_module
from tamiyo_svc.adapters.oona.commit import Commit, Committer
from tamiyo_svc.adapters.oona.connection import client
from tamiyo_svc.cli.measure import Distribution, machine

RUNS: Final = 16
_WARM_UP: Final = 20

Variant = Callable[[Sequence[Commit]], Awaitable[None]]


def variants(redis: Redis) -> dict[str, Variant]:
    """Ways to commit for several runs."""
    committer = Committer(redis, GROUP)
    source = commit_module._SCRIPT
    single = redis.register_script(source)
    many = redis.register_script(combined(source))

    async def one_by_one(commits: Sequence[Commit]) -> None:
        for commit in commits:
            await committer.commit(commit)

    async def at_once(commits: Sequence[Commit]) -> None:
        await asyncio.gather(*map(committer.commit, commits))

    async def pipelined(commits: Sequence[Commit]) -> None:
        async with redis.pipeline(transaction=False) as pipeline:
            for commit in commits:
                keys, arguments = commit_module._arguments(commit, GROUP)
                pipeline.evalsha(single.sha, len(keys), *keys, *arguments)
            replies = await pipeline.execute()
        assert all(reply[0] == b"OK" for reply in replies)

    async def in_one_script(commits: Sequence[Commit]) -> None:
        keys: list[str] = []
        arguments: list[Any] = []
        for commit in commits:
            own_keys, own_arguments = commit_module._arguments(commit, GROUP)
            arguments += [len(keys), *own_arguments]
            keys += own_keys
        replies: Any = await many(keys=keys, args=arguments)
        assert all(reply[0] == b"OK" for reply in replies)

    return {
        "one after the other": one_by_one,
        "at once, 16 connections": at_once,
        "one pipeline": pipelined,
        "one script": in_one_script,
    }


def combined(script: str) -> str:
    """The commit's script for several commits: each has its own keys, after those before it."""
    body = script[script.index("local position = 0") :]
    body = body.replace("local position = 0", "").replace("KEYS[", "keys[")
    return f"""
local position = 0
local keys = setmetatable({{}}, {{}})
local function one()
{body}
end
local replies = {{}}
while position < #ARGV do
  local offset = tonumber(ARGV[position + 1])
  position = position + 1
  keys = setmetatable({{}}, {{__index = function(_, index) return KEYS[offset + index] end}})
  replies[#replies + 1] = one()
end
return replies
"""


async def measure(rounds: int) -> dict[str, tuple[list[float], float, float]]:
    """Milliseconds of sixteen commits by variant, and processor ms of one, ours and Redis's."""
    found = {}
    with EmbeddedRedis() as server, tempfile.TemporaryDirectory() as folder:
        async with (
            open_decisions(server.url, Path(folder)) as decisions,
            client(server.url, 5.0, connections=RUNS) as redis,
        ):
            commit = await decisions.sealed()
            for name, variant in variants(redis).items():
                times_ms: list[float] = []
                ours_s = theirs_s = 0.0
                for version in range(rounds + _WARM_UP):
                    commits = [
                        await decisions.for_run(commit, f"{name}-{number}", version)
                        for number in range(RUNS)
                    ]
                    before = await _server_s(redis)
                    cpu_s, started = time.process_time(), time.perf_counter()
                    await variant(commits)
                    took_s, used_s = time.perf_counter() - started, time.process_time() - cpu_s
                    if version >= _WARM_UP:
                        times_ms.append(took_s * 1e3)
                        ours_s += used_s
                        theirs_s += await _server_s(redis) - before
                each = 1e3 / rounds / RUNS
                found[name] = (times_ms, ours_s * each, theirs_s * each)
    return found


async def _server_s(redis: Redis) -> float:
    usage: Any = await redis.info("cpu")
    return float(usage["used_cpu_user"]) + float(usage["used_cpu_sys"])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=300)
    rounds = arguments.parse_args().rounds
    with asyncio.Runner(
        loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
    ) as runner:
        found = runner.run(measure(rounds))
    title = f"{RUNS} commits of different runs, {rounds} times; milliseconds"
    columns = ("", "all p50", "all p99", "CPU of one, ours", "CPU of one, Redis")
    table = Table(*columns, title=title, title_justify="left")
    for name, (times_ms, ours_ms, theirs_ms) in found.items():
        whole = Distribution.of(times_ms)
        cells = (whole.p50, whole.p99, ours_ms, theirs_ms)
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    console = Console(width=110)
    console.print(table)
    console.print(str(machine()), highlight=False)


if __name__ == "__main__":
    main()
