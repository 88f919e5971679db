"""The compiled form of the network as a file: found where it was left, else compiled and kept.

A file is named by its source, its flags and the processor level it is for, so one that fits needs
no compiler and one that does not is never loaded. Files are only taken from folders and owners
that nobody else may write as.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

import torch

from tamiyo_svc.errors import TamiyoError
from tamiyo_svc.policy.compiled import SOURCE, Library

SHARED_FOLDER: Final = Path(sys.prefix, "share", "tamiyo", "compiled")
"""Where an image or package leaves what it compiled beforehand."""

_COMPILERS: Final = ("c++", "g++", "clang++")
_TIMEOUT_S: Final = 120.0
# Reordered sums are wanted; that NaNs do not occur must not be assumed.
_FLAGS: Final = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
_X86_LEVELS: Final = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
}
_NEED_FOR_V4: Final = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")


class CompiledFormUnavailableError(TamiyoError):
    """There is no compiled form on this machine; the message says why."""

    label = "compiled_form_unavailable"


def load_compiled(folder: Path) -> Library:
    """The compiled form for this processor; what has to be compiled is left in `folder`.

    Takes a few seconds when it compiles, and blocks.

    Raises:
        CompiledFormUnavailableError: no file, and none can be made.
    """
    level = _processor_level()
    name = _file_name(level)
    for candidate in (folder / name, SHARED_FOLDER / name):
        if candidate.exists() and _is_trusted(candidate):
            return _load(candidate)
    _compile(folder / name, level)
    if not _is_trusted(folder / name):
        raise CompiledFormUnavailableError(f"{folder} may be written by others")
    return _load(folder / name)


def compile_all(folder: Path) -> list[Path]:
    """Compile for every processor level of this architecture, as for an image that runs anywhere.

    Raises:
        CompiledFormUnavailableError: no compiler, or it failed.
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    made = []
    for level in _X86_LEVELS if x86 else ("",):
        made.append(folder / _file_name(level))
        _compile(made[-1], level)
    return made


def _processor_level() -> str:
    """The name of the best level this processor has; empty where there is only one."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    level = torch.backends.cpu.get_cpu_capability()
    has = torch.cpu.get_capabilities()
    if level == "AVX512" and not all(has.get(feature) for feature in _NEED_FOR_V4):
        level = "AVX2"
    if level not in _X86_LEVELS:
        raise CompiledFormUnavailableError("the processor lacks AVX2")
    return level


def _file_name(level: str) -> str:
    flags = (*_FLAGS, *_X86_LEVELS.get(level, ()))
    digest = sha256(SOURCE.read_bytes() + "\0".join(flags).encode()).hexdigest()[:16]
    system = f"{platform.system()}-{platform.machine()}".lower()
    return f"tamiyo-{digest}-{system}{'-' if level else ''}{level.lower()}.so"


def _load(path: Path) -> Library:
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        raise CompiledFormUnavailableError(f"{path} does not load: {error}") from error


def _is_trusted(path: Path) -> bool:
    """Whether only we or root can have put this file there, links not counted."""
    for part in (path, path.parent):
        try:
            status = part.lstat()
        except OSError:
            return False
        owned = status.st_uid in (0, os.getuid())
        if stat.S_ISLNK(status.st_mode) or not owned or status.st_mode & 0o022:
            return False
    return True


def _compile(target: Path, level: str) -> None:
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CompiledFormUnavailableError("no C++ compiler here and nothing compiled beforehand")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder, target.name)
            _call(compiler, [*_FLAGS, *_X86_LEVELS.get(level, ()), "-o", str(made), str(SOURCE)])
            # Whatever the umask: readable for a service that runs as someone else.
            made.chmod(0o755)
            os.replace(made, target)
    except OSError as error:
        raise CompiledFormUnavailableError(f"{target.parent}: {error.strerror}") from error


def _call(compiler: str, arguments: Sequence[str]) -> None:
    try:
        subprocess.run(
            [compiler, *arguments], check=True, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        detail = lines[0] if lines else f"exit code {error.returncode}"
        raise CompiledFormUnavailableError(f"{compiler} failed: {detail}") from error
    except subprocess.TimeoutExpired as error:
        raise CompiledFormUnavailableError(f"{compiler} took too long") from error
