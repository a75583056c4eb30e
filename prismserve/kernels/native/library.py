"""The compiled kernels as Python functions.

Pointers and sizes go through ``ctypes``, which lets other threads run meanwhile. The kernels use the OpenMP runtime
that PyTorch has loaded, so that one pool of threads serves both, and as many threads as PyTorch was told to use.
Nothing is compiled, loaded or started before the first op asks for it.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from prismserve.kernels.native.build import NativeBuildError, build

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_log = logging.getLogger(__name__)

_POINTER: Final = ctypes.c_void_p
_INTEGER: Final = ctypes.c_int64
_FLOAT: Final = ctypes.c_float
_SMALL: Final = ctypes.c_int

_TYPES: Final = {"p": _POINTER, "n": _INTEGER, "f": _FLOAT, "i": _SMALL}
# Arguments of each function in order: p pointer, n int64, f float, i int.
_FUNCTIONS: Final = {
    "linear": "pnnnpinppfpnpnii",
    "repack": "pinnii",
    "gather": "pinnpnp",
    "advise": "pn",
    "rms_norm": "pnnnpfpni",
    "silu_mul": "pnnnpni",
    "rotary": "pnnnnppnppnfi",
    "attend": "pipnnnpnnpnpppnfppi",
    "write_kv": "pipnnnpnpnpn",
    "layers": "pnipfpnpppipnppnpppnfpppi",
    "largest_determinant": "pnnnppffnfp",
    "determinant_folded": "pnnnppffnfffpp",
    "farthest_first": "pnnnnp",
    "merge_alike": "pnnnnnpp",
    "drop_alike": "pnnnpnnn",
    "closest": "pnnnpnpnp",
    "fold_alike": "pnnnpnpnffp",
    "fold_nearest": "pnnnpnpnip",
    "merge_rows": "pnnnpnnp",
    "top_k": "pnnnnp",
    "copy_hashed": "ppnp",
}

ELEMENTS: Final = {torch.float32: 0, torch.bfloat16: 1}
"""Element types of weights and caches, as the sources number them."""


@dataclass(slots=True)
class _Loaded:
    functions: dict[str, Callable[..., int]] | None = None
    tried: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


_loaded = _Loaded()


def available() -> bool:
    """Whether the kernels can be used; compiles and loads them when first asked, and warns once if that fails."""
    if not _loaded.tried:
        with _loaded.lock:
            if not _loaded.tried:
                _loaded.functions = _load()
                _loaded.tried = True
    return _loaded.functions is not None


def _load() -> dict[str, Callable[..., int]] | None:
    try:
        path = build()
        opened = ctypes.CDLL(str(path))
    except (NativeBuildError, OSError) as error:
        _log.warning("native kernels are off, PyTorch's own run instead, which are slower: %s", error)
        return None
    functions: dict[str, Callable[..., int]] = {}
    for name, arguments in _FUNCTIONS.items():
        function = getattr(opened, f"ps_{name}")
        function.argtypes = [_TYPES[kind] for kind in arguments]
        function.restype = _SMALL
        functions[name] = function
    return functions


def call(name: str, *arguments: object) -> None:
    """Run a kernel.

    Raises:
        RuntimeError: the kernels are not available.
        MemoryError: the kernel found no working memory.
    """
    functions = _loaded.functions
    if functions is None:
        if not available():
            message = "native kernels are not available on this machine"
            raise RuntimeError(message)
        functions = _loaded.functions or {}
    if functions[name](*arguments):
        message = f"no memory for the native kernel {name}"
        raise MemoryError(message)


def strides(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """A short array of int64 for a kernel; alive as long as the caller keeps it."""
    return (_INTEGER * len(values))(*values)
