from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tamiyo_svc.adapters import compiler
from tamiyo_svc.adapters.compiler import (
    CompiledFormUnavailableError,
    compile_all,
    load_compiled,
)

_needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def _nothing_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "SHARED_FOLDER", tmp_path / "shared")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


@_needs_compiler
def test_what_was_compiled_once_is_found_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "state" / "compiled"
    load_compiled(folder)
    monkeypatch.setenv("PATH", "")

    assert load_compiled(folder).panel > 0
    assert [path.suffix for path in folder.iterdir()] == [".so"]


@_needs_compiler
def test_what_an_image_brings_is_found_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compile_all(tmp_path / "shared")
    monkeypatch.setenv("PATH", "")

    assert load_compiled(tmp_path / "state").panel > 0
    assert not (tmp_path / "state").exists()


@pytest.mark.usefixtures("no_compiler")
def test_without_file_and_compiler_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CompiledFormUnavailableError, match="no C\\+\\+ compiler"):
        load_compiled(tmp_path)


def test_a_failing_compiler_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    fake = bin_folder / "c++"
    fake.write_text("#!/bin/sh\necho 'error: out of registers' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/bin:/usr/bin")

    with pytest.raises(CompiledFormUnavailableError, match="out of registers"):
        load_compiled(tmp_path / "state")
    assert list((tmp_path / "state").iterdir()) == []


@_needs_compiler
@pytest.mark.parametrize("writable", ["file", "folder"])
def test_a_file_that_others_may_write_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: str
) -> None:
    folder = tmp_path / "state"
    load_compiled(folder)
    (file,) = folder.iterdir()
    (file if writable == "file" else folder).chmod(0o777)
    monkeypatch.setenv("PATH", "")

    with pytest.raises(CompiledFormUnavailableError):
        load_compiled(folder)


@_needs_compiler
def test_a_broken_file_is_named(tmp_path: Path) -> None:
    for file in compile_all(tmp_path / "shared"):
        file.write_bytes(b"not a library")

    with pytest.raises(CompiledFormUnavailableError, match="does not load"):
        load_compiled(tmp_path / "state")
