"""Which implementation an op runs: Triton for CUDA tensors where Triton is installed, plain PyTorch otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class _Choice:
    interpreted: bool = False


_choice = _Choice()


@cache
def triton_installed() -> bool:
    """Whether ``import triton`` would find a package."""
    return find_spec("triton") is not None


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on tensors like this one run as Triton kernels."""
    return triton_installed() if tensor.is_cuda else _choice.interpreted


def use_triton_on(device: torch.device) -> bool:
    """Whether ops on tensors of this device run as Triton kernels."""
    return triton_installed() if device.type == "cuda" else _choice.interpreted


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, ops on CPU tensors run their Triton kernels in Triton's interpreter; for tests, thousands of times slower.

    Raises:
        RuntimeError: Triton is not installed, or was not told by ``TRITON_INTERPRET=1`` before its first import.
    """
    if not triton_installed():
        message = "Triton is not installed; the interpreter is part of it (pip install triton)"
        raise RuntimeError(message)
    import triton

    if not triton.knobs.runtime.interpret:
        message = "set TRITON_INTERPRET=1 before Triton is imported to run kernels on CPU tensors"
        raise RuntimeError(message)
    before, _choice.interpreted = _choice.interpreted, True
    try:
        yield
    finally:
        _choice.interpreted = before
