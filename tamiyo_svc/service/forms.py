"""Which forms of the network the settings allow on this machine, fastest first."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Final

import structlog
import torch

from tamiyo_svc.adapters.compiler import CompiledFormUnavailableError, load_compiled
from tamiyo_svc.policy.compiled import CompiledNetwork, Library, PackedWeights
from tamiyo_svc.policy.cuda import cuda_forms
from tamiyo_svc.policy.engines import EAGER_CPU, Form
from tamiyo_svc.policy.folding import fold_weights
from tamiyo_svc.policy.layout import Bucket
from tamiyo_svc.policy.network import TamiyoNetwork
from tamiyo_svc.policy.padded import Choice
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.taxonomy import CpuEngine, WeightDtype

log = structlog.get_logger("tamiyo.forms")

_FOLDER: Final = "compiled"
_INDUCTOR: Final = "inductor"


def serving_forms(settings: Settings) -> list[Form]:
    """The forms to serve in; the last one always works.

    May compile for a few seconds when this machine does so for the first time.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    forms: list[Form] = []
    if device.startswith("cuda"):
        # Where the next start finds what torch.compile made.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.state_dir / _INDUCTOR))
        forms += cuda_forms(
            device,
            enable_compile=settings.enable_compile is not False,
            clock=time.perf_counter,
            report=_log_choices,
        )
    return [*forms, *_cpu_forms(settings)]


def _cpu_forms(settings: Settings) -> list[Form]:
    engine = settings.cpu_engine
    if engine is CpuEngine.AUTO and settings.enable_compile is False:
        engine = CpuEngine.EAGER
    if engine is CpuEngine.EAGER:
        return [EAGER_CPU]
    folder = settings.state_dir / _FOLDER
    try:
        library = load_compiled(folder)
    except CompiledFormUnavailableError as error:
        log.warning("engine.compiled_unavailable", reason=str(error))
        if engine is CpuEngine.AUTO:
            return [EAGER_CPU]
        return [_unavailable(error), EAGER_CPU]
    return [compiled_form(library, settings.weight_dtype), EAGER_CPU]


def compiled_form(library: Library, dtype: WeightDtype) -> Form:
    """The form compiled ahead of time for the CPU."""

    def build(network: TamiyoNetwork) -> CompiledNetwork:
        weights = fold_weights(network)
        compiled = CompiledNetwork(library, weights, dtype)
        weights.release()
        return compiled

    def build_packed(packed: PackedWeights) -> CompiledNetwork:
        return CompiledNetwork(library, packed)

    return Form("cpu", is_compiled=True, build=build, build_packed=build_packed, library=library)


def _log_choices(choices: Mapping[Bucket, Choice]) -> None:
    for bucket, choice in choices.items():
        log.info("engine.bucket_chosen", nodes=bucket.nodes, **asdict(choice))


def _unavailable(error: CompiledFormUnavailableError) -> Form:
    """Stands for a form that was demanded and is not there, so that giving it up is counted."""

    def build(network: object) -> CompiledNetwork:
        raise error

    return Form("cpu", is_compiled=True, build=build)
