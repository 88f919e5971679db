"""The steps of the image, without a container engine: wheels, empty environment, constraints."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from packages.environments import CONSTRAINTS, build, install, make_environment, run
from support.served_process import command_for, serve

from tamiyo_svc.adapters.embedded import EmbeddedRedis

pytestmark = [pytest.mark.redis, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PROBE = ROOT / "tests" / "packages" / "probe.py"


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The client's wheel and sources and the service's, each wheel built from the sources."""
    return build(tmp_path_factory.mktemp("dist"))


def test_each_file_is_in_one_wheel(distributions: list[Path]) -> None:
    client, service = (contents(file) for file in distributions if file.suffix == ".whl")
    for needed in ("__init__.py", "py.typed", "leyline/leyline.proto", "client/seeds/slot.py"):
        assert f"tamiyo_svc/{needed}" in client
    for needed in ("adapters/oona/commit.lua", "policy/compiled.cpp", "cli/main.py"):
        assert f"tamiyo_svc/{needed}" in service
    assert client & service == set()
    packed = {name for name in client | service if not name.partition("/")[0].endswith("-info")}
    sources = [path for path in (ROOT / "tamiyo_svc").rglob("*") if path.is_file()]
    assert packed == {
        str(path.relative_to(ROOT)) for path in sources if "__pycache__" not in path.parts
    }


def test_the_sources_have_no_file_twice(distributions: list[Path]) -> None:
    for file in distributions:
        if file.suffix != ".gz":
            continue
        with tarfile.open(file) as archive:
            names = archive.getnames()
        assert len(names) == len(set(names))
        assert sum(name.endswith("tamiyo_svc/__init__.py") for name in names) == 1
        assert not any("/packages/client/" in name for name in names)


def test_the_client_brings_and_needs_redis_and_protobuf_alone(
    distributions: list[Path], tmp_path: Path
) -> None:
    python = make_environment(tmp_path / "environment")
    install(python, "-c", CONSTRAINTS, distributions[0])
    listed = run(python, "-m", "pip", "list", "--format", "freeze", cwd=tmp_path)
    names = {line.partition("==")[0].lower() for line in listed.splitlines()}
    assert names - {"pip", "setuptools", "async-timeout"} == {"tamiyo-client", "redis", "protobuf"}
    printed = run(python, "-W", "error", PROBE, cwd=tmp_path)
    assert printed.strip().endswith("with fake service")


def test_installed_wheels_serve_a_packet_in_an_empty_environment(
    distributions: list[Path], tmp_path: Path
) -> None:
    environment, folder = tmp_path / "environment", tmp_path / "service"
    folder.mkdir()
    python = make_environment(environment)
    wheels = [file for file in distributions if file.suffix == ".whl"]
    install(python, "-c", CONSTRAINTS, *wheels)
    with (
        EmbeddedRedis() as redis,
        serve(redis.url, folder, command=(str(environment / "bin" / "tamiyo"),)) as service,
    ):
        command = command_for(redis.url, "run-1", 1)
        assert command.issued_by == "tamiyo"
        assert service.metric('tamiyo_packets_total{outcome="decided"}') == 1
