from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tamiyo_svc.adapters import compiler
from tamiyo_svc.policy.engines import Engines
from tamiyo_svc.policy.network import NetworkConfig, untrained
from tamiyo_svc.service.forms import serving_forms
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.taxonomy import CpuEngine


@pytest.fixture(autouse=True)
def _no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(compiler, "SHARED_FOLDER", tmp_path / "shared")


def kinds(tmp_path: Path, **chosen: object) -> list[tuple[str, bool]]:
    settings = Settings(secret="a secret for the tests", state_dir=tmp_path, **chosen)  # type: ignore[arg-type]
    return [(form.device, form.is_compiled) for form in serving_forms(settings)]


def test_the_eager_form_serves_where_nothing_compiled_is_to_be_had(tmp_path: Path) -> None:
    assert kinds(tmp_path, device="cpu") == [("cpu", False)]
    assert kinds(tmp_path, device="cpu", cpu_engine=CpuEngine.EAGER) == [("cpu", False)]


def test_a_compiled_form_that_was_demanded_and_is_missing_counts_as_a_fall(tmp_path: Path) -> None:
    settings = Settings(
        secret="a secret for the tests",  # type: ignore[arg-type]
        state_dir=tmp_path,
        device="cpu",
        cpu_engine=CpuEngine.COMPILED,
    )
    network = untrained(NetworkConfig(sage_hidden_dim=4, gat_hidden_dim=2, attention_heads=1))
    engines = Engines(serving_forms(settings))

    engines.warm_up(network, [], lambda: 0.0)

    assert (engines.status.is_compiled, engines.status.fallbacks) == (False, 1)
    assert "no C++ compiler" in engines.status.reason


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_cuda_device_is_tried_compiled_then_eager_then_the_cpu(
    tmp_path: Path, device: str
) -> None:
    expected = [(device, True), (device, False), ("cpu", False)]
    assert kinds(tmp_path, device=device) == expected
    assert kinds(tmp_path, device=device, enable_compile=False) == expected[1:]


def test_auto_takes_the_gpu_if_there_is_one(tmp_path: Path) -> None:
    first = "cuda" if torch.cuda.is_available() else "cpu"
    assert kinds(tmp_path)[0][0] == first
