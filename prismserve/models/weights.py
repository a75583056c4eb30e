"""Weights of a checkpoint directory: which files hold what, and copying it into a model, memory-mapped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from prismserve.core.errors import ModelLoadError
from prismserve.models.checkpoint import read_json

if TYPE_CHECKING:
    from pathlib import Path

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LISTED = 3


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a shard, from its header. ``dtype`` is the name safetensors gives it."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 8) // 8


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors shards of a checkpoint, sorted by name.

    Raises:
        ModelLoadError: there are none, or one that the index names is missing.
    """
    index = directory / _INDEX
    if index.is_file():
        mapping = read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            message = f"{index} holds no weight_map; download the checkpoint again"
            raise ModelLoadError(message, field="model")
        shards = tuple(directory / name for name in sorted({str(name) for name in mapping.values()}))
        missing = [shard.name for shard in shards if shard.parent != directory or not shard.is_file()]
        if missing:
            message = f"{directory} lacks {_few(missing)}, which {_INDEX} names; download the checkpoint again"
            raise ModelLoadError(message, field="model")
        return shards
    if (directory / _SINGLE).is_file():
        return (directory / _SINGLE,)
    message = f"{directory} holds no safetensors weights ({_SINGLE} or {_INDEX})"
    raise ModelLoadError(message, field="model")


def stored_tensors(files: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """Every tensor of the shards by name, from the headers alone.

    Raises:
        ModelLoadError: a shard is not a complete safetensors file.
    """
    return {name: tensor for file in files for name, tensor in _header(file).items()}


def _header(path: Path) -> dict[str, StoredTensor]:
    """Parse a header: 8 bytes of length, JSON, data (https://github.com/huggingface/safetensors, "Format")."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            message = f"{path} is truncated or not a safetensors file; download the checkpoint again"
            raise ModelLoadError(message, field="model")
        header = file.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {name: StoredTensor(path, entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        message = f"{path} has a damaged safetensors header; download the checkpoint again"
        raise ModelLoadError(message, field="model") from None
    if 8 + length + end > size:
        message = f"{path} is truncated: {size} bytes of {8 + length + end}; download the checkpoint again"
        raise ModelLoadError(message, field="model")
    return tensors


def stored_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """Name of the dtype that takes most bytes, as torch spells it."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    largest = max(sizes, key=lambda dtype: (sizes[dtype], dtype), default="")
    return _NAMES.get(largest, largest.lower())


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def check_weights(
    tensors: Mapping[str, StoredTensor], rename: Callable[[str], str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Match a checkpoint's tensors with the model's parameters.

    Args:
        tensors: what the checkpoint holds.
        rename: checkpoint name to parameter name.
        shapes: parameter names with the shapes they must have.

    Returns:
        Checkpoint name to parameter name, for those to be loaded.

    Raises:
        ModelLoadError: a parameter has no tensor, or one of another shape or of a dtype that is not floating point.
    """
    matched = {name: renamed for name in tensors if (renamed := rename(name)) in shapes}
    missing = sorted(shapes.keys() - set(matched.values()))
    if missing:
        message = f"the checkpoint lacks {len(missing)} of {len(shapes)} weights: {_few(missing)}"
        raise ModelLoadError(message, field="model")
    for name, renamed in matched.items():
        stored, wanted = tensors[name], shapes[renamed]
        if stored.dtype not in _BITS:
            message = f"weight {name} is stored as {stored.dtype}; supported: {', '.join(_BITS)}"
            raise ModelLoadError(message, field="model")
        if stored.shape != wanted:
            message = f"weight {name} has shape {list(stored.shape)}, but config.json asks for {list(wanted)}"
            raise ModelLoadError(message, field="model")
    return matched


def load_weights(
    files: tuple[Path, ...],
    rename: Callable[[str], str],
    targets: Mapping[str, torch.Tensor],
    progress: Progress | None = None,
) -> None:
    """Copy every parameter from the memory-mapped shards, converting dtype and device on the way.

    Args:
        files: the shards.
        rename: checkpoint name to target name.
        targets: what to fill, by name; views of fused parameters are filled part by part.
        progress: called after each tensor.

    Raises:
        ModelLoadError: as :func:`check_weights`, or a shard cannot be read.
    """
    tensors = stored_tensors(files)
    matched = check_weights(tensors, rename, {name: tuple(target.shape) for name, target in targets.items()})
    total = sum(tensors[name].nbytes for name in matched)
    done = 0
    for file in files:
        names = [name for name in matched if tensors[name].shard == file]
        try:
            with safe_open(file, framework="pt", device="cpu") as shard, torch.no_grad():
                for name in names:
                    targets[matched[name]].copy_(shard.get_tensor(name))
                    done += tensors[name].nbytes
                    if progress is not None:
                        progress(done, total)
        except (SafetensorError, OSError) as error:
            message = f"{file} cannot be read: {error}"
            raise ModelLoadError(message, field="model") from error
