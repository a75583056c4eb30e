"""Which implementation an op runs.

Triton for CUDA tensors where Triton is installed; native kernels (:mod:`prismserve.kernels.native`) for CPU tensors
where they can be compiled; plain PyTorch otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch


@dataclass(slots=True)
class _Choice:
    interpreted: bool = False
    native: bool = True


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


def use_native_on(device: torch.device) -> bool:
    """Whether ops on float32 tensors of this device run as native kernels, where an op has one."""
    if device.type != "cpu" or not _choice.native or _choice.interpreted:
        return False
    from prismserve.kernels.native.library import available

    return available()


def use_native(tensor: torch.Tensor) -> bool:
    """Whether ops on tensors like this one run as native kernels, where an op has one."""
    return tensor.dtype is torch.float32 and use_native_on(tensor.device)


def set_native(*, on: bool) -> None:
    """Let CPU tensors use native kernels (the default) or not, in this process from now on."""
    _choice.native = on


@contextmanager
def without_native() -> Iterator[None]:
    """Inside, CPU tensors use plain PyTorch only."""
    before, _choice.native = _choice.native, False
    try:
        yield
    finally:
        _choice.native = before


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
