"""What the two distributions say of themselves agrees with each other and with the sources."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tamiyo_svc import __version__

ROOT = Path(__file__).parents[2]
CLIENT_FOLDER = ROOT / "packages" / "client"


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


CLIENT, SERVICE = project(CLIENT_FOLDER), project(ROOT)


def test_the_client_needs_redis_and_protobuf_alone() -> None:
    names = {Requirement(text).name for text in CLIENT["project"]["dependencies"]}
    assert names == {"protobuf", "redis"}


def test_the_client_holds_no_trainer_back() -> None:
    for text in CLIENT["project"]["dependencies"]:
        assert {one.operator for one in Requirement(text).specifier} == {">="}, text


def test_the_service_needs_the_client_of_its_own_version() -> None:
    assert f"tamiyo-client=={__version__}" in SERVICE["project"]["dependencies"]


def test_both_take_their_version_and_python_from_the_same_places() -> None:
    for table in (("project", "requires-python"), ("tool", "hatch", "version", "path")):
        values = [CLIENT, SERVICE]
        for key in table:
            values = [value[key] for value in values]
        assert values[0] == values[1], table


def test_what_the_client_has_is_left_out_of_the_service() -> None:
    build = CLIENT["tool"]["hatch"]["build"]
    left_out = SERVICE["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]
    assert sorted(f"/{path}" for path in build["only-include"]) == sorted(left_out)
    for path in build["only-include"]:
        assert (ROOT / path).samefile(CLIENT_FOLDER / path)


def test_the_licence_is_the_same() -> None:
    assert (CLIENT_FOLDER / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_generated_contract_asks_for_no_version_of_protobuf() -> None:
    text = (ROOT / "tamiyo_svc" / "leyline" / "leyline_pb2.py").read_text(encoding="utf-8")
    assert not re.search(r"runtime_version|ValidateProtobuf", text)
    assert "_builder.BuildMessageAndEnumDescriptors(DESCRIPTOR, _globals)" in text


def test_the_development_environment_installs_both() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-e packages/client -e '.[dev]'" in makefile
