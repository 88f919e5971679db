"""The commands on pages of the documentation."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.served_process import START_TIMEOUT_S, ServiceProcess, free_port, started, until

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def commands(page: Path) -> list[str]:
    """The commands of a page, one a line, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines), page
    return [line.removeprefix("$ ") for line in lines]


def shell(page: Path, heading: str) -> list[str]:
    """The lines of the first shell block under a heading."""
    _, _, section = page.read_text().partition(f"\n## {heading}\n")
    (block, *_) = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return [line for line in block.splitlines() if not line.startswith("#")]


@contextmanager
def serve_as_written(redis_url: str, folder: Path, path: str) -> Iterator[ServiceProcess]:
    """A service started with the lines of getting started, but for installing and Redis.

    `path` is where programs are looked for. The service must stop cleanly at the end.
    """
    install, redis_server, *lines = shell(DOCS / "getting-started.md", "The service by itself")
    assert install.startswith("pip install ")
    assert redis_server.startswith("redis-server ")
    script = "\n".join(lines).replace("redis://localhost:6379/0", redis_url)
    port, log_file = free_port(), folder / "service.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-ec", script.replace("tamiyo serve", "exec tamiyo serve")],
            cwd=folder,
            env={
                "PATH": path,
                "HOME": str(folder),
                "OMP_NUM_THREADS": "1",
                "TAMIYO_HTTP_PORT": str(port),
            },
            stdout=log,
            stderr=log,
        )
    service = ServiceProcess(process, port, redis_url, log_file)
    try:
        until(lambda: started(service), START_TIMEOUT_S)
        yield service
        process.terminate()
        assert process.wait(30) == 0, log_file.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
