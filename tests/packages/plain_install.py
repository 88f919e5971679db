"""Everything that the documentation lets a new user do, after a plain installation: `make plain`.

Both distributions are built (sources, and from them wheels) and installed into new environments:
the client with what the examples ask for into a trainer's, the service into another. Then the
trainer guide's blocks and the examples run against the stand-in, the service starts with the lines
of getting started, and the examples and the page's other commands run against it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from packages.environments import CONSTRAINTS, build, install, make_environment, run
from packages.plain import example_needs
from support.pages import DOCS, ROOT, commands, serve_as_written

from tamiyo_svc.adapters.embedded import EmbeddedRedis

GUIDE_RUNNER: Final = Path(__file__).with_name("guide.py")
TORCHRUN: Final = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SERVICE_ONLY: Final = ("pydantic_settings", "pytest", "structlog", "torch_geometric")


def run_examples(python: Path, variables: dict[str, str]) -> None:
    """Run every example with its own defaults; each must answer and, with seeds, grow one."""
    for name in example_needs():
        arguments = []
        if name == "bare_packet":
            if not variables:
                continue
            arguments = [variables["REDIS_URL"]]
        launcher = TORCHRUN if name == "data_parallel" else ()
        example = ROOT / "examples" / f"{name}.py"
        printed = run(python, *launcher, example, *arguments, cwd=ROOT, **variables)
        last = printed.strip().splitlines()[-1]
        assert "DORMANT" not in last, printed
        print(f"{name} with the {'real' if variables else 'stand-in'} service: {last}", flush=True)


def main() -> None:
    """Build, install, run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (dist := folder / "dist").mkdir()
        (serving := folder / "serving").mkdir()
        client, service = (file for file in build(dist) if file.suffix == ".whl")
        print("built:", *sorted(file.name for file in dist.iterdir()), flush=True)

        trainer = make_environment(folder / "trainer")
        needs = [need for needs in example_needs().values() for need in needs]
        extras = ",".join(sorted({extra for need in needs for extra in need.extras}))
        others = sorted({need.name for need in needs} - {"tamiyo-client"})
        install(trainer, "-c", CONSTRAINTS, f"{client}[{extras}]", *others)
        lacks = f"import importlib.util as u; assert not any(map(u.find_spec, {SERVICE_ONLY}))"
        run(trainer, "-c", lacks, cwd=folder)
        print(run(trainer, GUIDE_RUNNER, DOCS / "trainer-guide.md", cwd=folder).strip(), flush=True)
        run_examples(trainer, {})

        server = make_environment(folder / "service")
        install(server, "-c", CONSTRAINTS, client, f"{service}[demo]")
        path = f"{server.parent}:{os.environ['PATH']}"
        with EmbeddedRedis() as redis, serve_as_written(redis.url, serving, path):
            secret = (serving / "leyline.secret").read_text().strip()
            variables = {"REDIS_URL": redis.url, "ESPER_LEYLINE_SECRET": secret}
            run_examples(trainer, variables)
            for command in commands(DOCS / "getting-started.md"):
                run("bash", "-c", command, cwd=ROOT, PATH=path, COLUMNS="160", **variables)
                print("ran:", command, flush=True)
        run(server.parent / "tamiyo", "demo", "--report", serving / "demo.html", cwd=serving)
        print("ran: tamiyo demo", flush=True)


if __name__ == "__main__":
    main()
