"""Compiling the C++ sources of this folder, once per machine, user and version.

The result lies in a cache folder under a name that covers sources, flags, compiler and processor, and appears there by
an atomic rename: processes that start together may compile the same thing, but never see half of it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parent / "source"
_FLAGS: Final = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno")
_COMPILERS: Final = ("c++", "g++", "clang++")
_BUILD_TIMEOUT_S: Final = 120.0
_PROBE_TIMEOUT_S: Final = 10.0
_CPUINFO: Final = Path("/proc/cpuinfo")
_STDERR_CHARS: Final = 500


class NativeBuildError(Exception):
    """Why there are no native kernels, in one sentence."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/prismserve/native`` or ``~/.cache/prismserve/native``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prismserve" / "native"


def build(folder: Path | None = None) -> Path:
    """The shared library, compiled if it is not there yet.

    Args:
        folder: where it is kept; None takes :func:`cache_folder`.

    Raises:
        NativeBuildError: there is no compiler, it failed or took too long, or the folder cannot be written.
    """
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        message = f"no C++ compiler was found ({', '.join(_COMPILERS)})"
        raise NativeBuildError(message)
    try:
        folder = folder or cache_folder()
        target = folder / f"kernels-{_key(compiler)}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, target)
    except (OSError, RuntimeError) as error:  # Path.home() raises RuntimeError where there is no home
        message = f"the folder for compiled kernels cannot be used: {error}"
        raise NativeBuildError(message) from error
    return target


def _key(compiler: str) -> str:
    """Hash of all that the library depends on."""
    state = hashlib.blake2b(digest_size=16)
    for part in (_run([compiler, "--version"], _PROBE_TIMEOUT_S), " ".join(_FLAGS), platform.machine(), _processor()):
        state.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        state.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return state.hexdigest()


def _processor() -> str:
    """Model and features of the first processor, since the library is made for it."""
    if not _CPUINFO.is_file():
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = _CPUINFO.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(wanted))


def _compile(compiler: str, target: Path) -> None:
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    handle, made = tempfile.mkstemp(prefix=f"{target.stem}-", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        _run([compiler, *_FLAGS, *sources, "-o", made], _BUILD_TIMEOUT_S)
        Path(made).replace(target)
    finally:
        Path(made).unlink(missing_ok=True)


def _run(command: list[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except subprocess.TimeoutExpired as error:
        message = f"{command[0]} did not finish within {timeout_s:g} s"
        raise NativeBuildError(message) from error
    except (subprocess.CalledProcessError, OSError) as error:
        said = " ".join((getattr(error, "stderr", None) or str(error)).split())
        message = f"{command[0]} failed: {said[:_STDERR_CHARS]}"
        raise NativeBuildError(message) from error
    return done.stdout
