"""However a secret is written down, trainer and service take the same one or both refuse it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tamiyo_svc.client import Keyring, from_environment
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.service.settings import load_settings

SECRET = "0123456789abcdef-ü"
NAMES = ("ESPER_LEYLINE_SECRET", "ESPER_LEYLINE_SECRET_PREVIOUS")

TAKEN = {
    "as it is": SECRET.encode(),
    "newline": f"{SECRET}\n".encode(),
    "newlines": f"{SECRET}\n\n".encode(),
    "carriage return and newline": f"{SECRET}\r\n".encode(),
    "byte-order mark": f"\ufeff{SECRET}".encode(),
    "byte-order mark and newline": f"\ufeff{SECRET}\r\n".encode(),
}
REFUSED = {
    "newline alone": (b"\n", "blank"),
    "blanks": (b"                    ", "blank"),
    "byte-order mark alone": ("\ufeff\r\n".encode(), "blank"),
    "tabs and newlines": (b"\t\n" * 20, "blank"),
    "not UTF-8": (b"\xff\xfe" + SECRET.encode("latin-1"), "UTF-8"),
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)
    monkeypatch.setenv("TAMIYO_CLIENT_MODE", "offline")


def given(monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, form: str) -> None:
    """Set the variable, or the file that it names."""
    if form == "file":
        Path(name).write_bytes(data)
        monkeypatch.setenv(f"{name}_FILE", name)
    else:
        monkeypatch.setenv(name, os.fsdecode(data))


def keyrings() -> tuple[Keyring, Keyring]:
    """The trainer's and the service's, of the same environment."""
    trainer, service = from_environment("run-1")._keyring, load_settings().keyring()
    assert trainer is not None
    assert service is not None
    return trainer, service


@pytest.mark.parametrize("form", ["variable", "file"])
@pytest.mark.parametrize("written", TAKEN)
def test_what_surrounds_a_secret_is_no_part_of_it(
    written: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, NAMES[0], TAKEN[written], form)
    given(monkeypatch, NAMES[1], TAKEN[written].replace(b"0123", b"9876"), form)
    signature = Keyring(SECRET.encode()).sign(b"data")
    before = Keyring(SECRET.replace("0123", "9876").encode()).sign(b"data")
    for keyring in (*keyrings(), Keyring(TAKEN[written])):
        assert keyring.sign(b"data") == signature
    for keyring in keyrings():
        assert keyring.verify(b"data", before)


@pytest.mark.parametrize("form", ["variable", "file"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("written", REFUSED)
def test_what_holds_no_secret_is_refused_by_both_with_the_reason(
    written: str, name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, reason = REFUSED[written]
    given(monkeypatch, NAMES[0], SECRET.encode(), "variable")
    monkeypatch.delenv(NAMES[0]) if name == NAMES[0] else None
    given(monkeypatch, name, data, form)
    for read in (lambda: from_environment("run-1"), load_settings):
        with pytest.raises(ConfigurationError, match=reason) as refused:
            read()
        assert str(refused.value).startswith(name)
        assert SECRET[:8] not in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_that_is_given_twice_is_refused_by_both(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, NAMES[0], SECRET.encode(), "variable")
    given(monkeypatch, name, SECRET.encode(), "variable")
    given(monkeypatch, name, SECRET.encode(), "file")
    for read in (lambda: from_environment("run-1"), load_settings):
        with pytest.raises(ConfigurationError, match="set only one of them"):
            read()


def test_an_empty_variable_leaves_the_file_to_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, NAMES[0], SECRET.encode(), "file")
    monkeypatch.setenv(NAMES[0], "")
    trainer, service = keyrings()
    assert trainer.verify(b"data", service.sign(b"data"))


def test_a_trainer_is_told_of_a_secret_that_is_too_short_for_any_service(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given(monkeypatch, NAMES[0], b"short", "variable")
    from_environment("run-1")
    assert "ESPER_LEYLINE_SECRET has 5 bytes" in caplog.text
    with pytest.raises(ConfigurationError, match="16 bytes"):
        load_settings()


@pytest.mark.parametrize("secrets", [(b"",), (b" \n",), (b"a secret", b"\r\n")])
def test_a_keyring_takes_no_blank_secret(secrets: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError, match="empty or blank"):
        Keyring(*secrets)
