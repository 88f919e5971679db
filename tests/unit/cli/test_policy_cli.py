"""`tamiyo policy` and `tamiyo keys` on files; what needs a bus is tested with a service."""

from __future__ import annotations

import base64
import io
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.bus import state_packet
from support.policies import altered, checkpoint, trained
from typer.testing import CliRunner

from tamiyo_svc.cli.main import app
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.settings import VARIABLES, load_settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting from the machine the tests run on."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str | Path, code: int = 0) -> str:
    """What `tamiyo <arguments>` prints, all of it."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, ConfigurationError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def written(path: Path, payload: bytes) -> Path:
    path.write_bytes(payload)
    return path


@pytest.mark.parametrize("start", ["untrained", "bootstrap"])
def test_a_new_checkpoint_can_be_verified(tmp_path: Path, start: str) -> None:
    path = tmp_path / "new.safetensors"

    run("policy", "init", path, "--from", start, "--small")

    assert "good" in run("policy", "verify", path)
    about = json.loads(run("policy", "inspect", path, "--json"))
    assert (about["policy_id"], about["untrained"]) == (start, True)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path / "there", b"precious")

    for command in (["policy", "init", "--small", str(path)], ["keys", "generate", str(path)]):
        with pytest.raises(ConfigurationError, match="exists already"):
            run(*command)
    assert path.read_bytes() == b"precious"


def test_inspecting_does_not_read_the_weights(tmp_path: Path) -> None:
    payload = checkpoint()
    header = 8 + int.from_bytes(payload[:8], "little")
    whole = written(tmp_path / "whole", payload)
    # The right size, and nothing but zeros where the weights were.
    hollow = written(tmp_path / "hollow", payload[:header] + bytes(len(payload) - header))

    about = [json.loads(run("policy", "inspect", path, "--json")) for path in (whole, hollow)]

    assert about[0]["parameters"] == sum(w.numel() for w in trained().network.parameters())
    assert {**about[0], "file": ""} == {**about[1], "file": ""}


def test_a_saved_state_dict_can_be_inspected(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({**safetensors.torch.load(checkpoint()), "_metadata": {"version": "7"}}, file)

    about = json.loads(run("policy", "inspect", written(tmp_path / "s", file.getvalue()), "--json"))

    assert (about["format"], about["version"]) == ("state dict", "7")


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "invalid_payload"),
        (checkpoint()[:-1], "invalid_payload"),
        (altered(checkpoint(), architecture_version="v9"), "version_mismatch"),
        (checkpoint(3e38, heads__value__weight=3e38), "probe_failed"),
    ],
)
def test_what_a_service_would_refuse_fails_the_verification(
    tmp_path: Path, payload: bytes, reason: str
) -> None:
    assert reason in run("policy", "verify", written(tmp_path / "bad", payload), code=1)


def test_differences_are_named_and_sized(tmp_path: Path) -> None:
    one = written(tmp_path / "1", checkpoint(1.0))
    other = written(tmp_path / "2", altered(checkpoint(3.0), version="next"))

    run("policy", "diff", one, one)
    found = json.loads(run("policy", "diff", one, other, "--json", code=1))

    assert found["weights"] == {"_value_head.bias": 2.0}
    assert found["metadata"] == {"version": ["bootstrap-1", "next"]}


def test_the_checkpoint_of_two_that_is_refused_is_named(tmp_path: Path) -> None:
    good, bad = (
        written(tmp_path / "good", checkpoint(1.0)),
        written(tmp_path / "bad", b"none of it"),
    )

    assert f"{bad}: invalid_payload" in run("policy", "diff", good, bad, code=1)


def packets_file(path: Path, packets: Sequence[Any]) -> Path:
    lines = [
        json.dumps({"packet": base64.b64encode(packet.SerializeToString()).decode()})
        for packet in packets
    ]
    path.write_text("\n".join(lines))
    return path


def test_golden_packets_are_packed_and_then_guard_the_checkpoint(tmp_path: Path) -> None:
    path = written(tmp_path / "plain", checkpoint(1.0))
    packets = packets_file(tmp_path / "p.jsonl", [state_packet("run", step) for step in (1, 2)])
    out = tmp_path / "packed"

    run("policy", "pack", path, "--packets", packets, "--out", out, "--version", "9")

    assert json.loads(run("policy", "inspect", out, "--json"))["golden_packets"] == 2
    assert " 9, " in run("policy", "verify", out)
    other = altered(out.read_bytes(), {"_value_head.bias": torch.tensor([2.0])})
    assert "golden packet 0" in run("policy", "verify", written(tmp_path / "o", other), code=1)


def test_a_packet_file_that_is_none_names_the_line(tmp_path: Path) -> None:
    path = written(tmp_path / "plain", checkpoint(1.0))
    packets = packets_file(tmp_path / "p.jsonl", [state_packet("run", 1)])
    packets.write_text(packets.read_text() + '\n{"packet": 5}')

    with pytest.raises(ConfigurationError, match="line 2"):
        run("policy", "pack", path, "--packets", packets, "--out", tmp_path / "out")


def test_a_generated_secret_is_only_its_owners_and_is_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("first", "second")]

    printed = "".join(run("keys", "generate", path) for path in paths)

    secrets = [path.read_text().strip() for path in paths]
    assert len(set(secrets)) == 2
    assert all(len(secret) == 64 and secret not in printed for secret in secrets)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in paths)
    monkeypatch.setenv("ESPER_LEYLINE_SECRET_FILE", str(paths[1]))
    monkeypatch.setenv("ESPER_LEYLINE_SECRET_PREVIOUS_FILE", str(paths[0]))
    keyring = load_settings().keyring()
    assert keyring is not None
    assert keyring.verify(b"old", Keyring(secrets[0].encode()).sign(b"old"))
    assert keyring.sign(b"new") == Keyring(secrets[1].encode()).sign(b"new")


def test_publishing_needs_a_secret_and_a_server(tmp_path: Path) -> None:
    path = written(tmp_path / "plain", checkpoint(1.0))

    with pytest.raises(ConfigurationError, match="REDIS_URL"):
        run("policy", "publish", path, "--redis-url", f"unix://{tmp_path}/none.sock")


@pytest.mark.parametrize(
    ("payload", "option"),
    [
        (altered(checkpoint(1.0), policy_id=""), "--policy-id"),
        (altered(checkpoint(1.0), version=""), "--version"),
    ],
    ids=["policy_id", "version"],
)
def test_what_is_published_has_names(tmp_path: Path, payload: bytes, option: str) -> None:
    with pytest.raises(ConfigurationError, match=option):
        run("policy", "publish", written(tmp_path / "plain", payload))
