"""From a checkpoint directory to a model that can run."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import xxhash

from prismserve.core.errors import ModelLoadError
from prismserve.core.hashing import canonical_json, digest
from prismserve.kernels.dispatch import use_native_on
from prismserve.models.base import ModelIdentity
from prismserve.models.checkpoint import read_checkpoint
from prismserve.models.linear import pack, store_as
from prismserve.models.weights import load_weights, stored_dtype, stored_tensors, weight_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from prismserve.models.base import VisionLanguageModel
    from prismserve.models.weights import Progress, StoredTensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BF16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_HASH_CHUNK_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What is known of a checkpoint before loading it.

    Attributes:
        architecture: as in ``config.json``.
        family: the file of ``prismserve.models.families`` that serves it.
        weight_bytes: total size of its shards.
        dtype: dtype most of its weights are stored in, e.g. ``bfloat16``.
        max_model_len: usable context in tokens.
        image_tokens: visual tokens of an image (of a typical one, where they follow its size), 0 for a text-only model.
        position_scheme: as in :class:`prismserve.core.types.KVLayout`.
    """

    directory: Path
    architecture: str
    family: str
    weight_bytes: int
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    image_tokens: int
    position_scheme: str = "rope"

    @property
    def supports_images(self) -> bool:
        """Whether the model sees."""
        return self.image_tokens > 0


def inspect_checkpoint(directory: Path | str) -> CheckpointInfo:
    """Read configuration and weight headers; cheap.

    Raises:
        ModelLoadError: one sentence about the first thing that is missing, damaged or not supported.
    """
    checkpoint = read_checkpoint(directory)
    files = weight_files(checkpoint.directory)
    decoder, image = checkpoint.shape.decoder, checkpoint.shape.image
    for name in ("tokenizer.json", *(("preprocessor_config.json",) if image else ())):
        if name == "preprocessor_config.json" and (checkpoint.directory / "processor_config.json").is_file():
            continue
        if not (checkpoint.directory / name).is_file():
            message = f"{checkpoint.directory} lacks {name}; download the checkpoint again"
            raise ModelLoadError(message, field="model")
    return CheckpointInfo(
        directory=checkpoint.directory,
        architecture=checkpoint.architecture,
        family=checkpoint.family_name,
        weight_bytes=sum(file.stat().st_size for file in files),
        dtype=stored_dtype(stored_tensors(files)),
        layers=decoder.layers,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        max_model_len=decoder.max_position_embeddings,
        image_tokens=image.tokens if image else 0,
        position_scheme=decoder.position_scheme,
    )


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """The dtype to compute in: ``auto`` is bfloat16 where the processor has arithmetic for it, else float32.

    Raises:
        ModelLoadError: no such dtype.
    """
    if dtype == "auto":
        fast = torch.device(device).type == "cuda" or bool(_cpu_flags() & _BF16_CPU_FLAGS)
        return torch.bfloat16 if fast else torch.float32
    if dtype not in _DTYPES:
        message = f"dtype must be auto, float32 or bfloat16, got {dtype!r}"
        raise ModelLoadError(message, field="dtype")
    return _DTYPES[dtype]


def _cpu_flags() -> frozenset[str]:
    """Features of the first processor; empty where the system does not list them."""
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return frozenset()
    for line in listing.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def model_fingerprint(directory: Path | str, dtype: str, device: str = "cpu") -> bytes:
    """32 bytes over configuration, the content of every weight shard, and the compute dtype.

    Reads all weights once, through memory maps; XXH3-128 per shard inside BLAKE2b-256.

    Args:
        directory: the checkpoint.
        dtype: ``auto``, ``float32`` or ``bfloat16``; ``auto`` is resolved for ``device``.
        device: where the model is to run.

    Raises:
        ModelLoadError: the checkpoint or the dtype is unusable.
    """
    checkpoint = read_checkpoint(directory)
    shards = [_content_hash(file) for file in weight_files(checkpoint.directory)]
    resolved = str(resolve_dtype(dtype, device)).removeprefix("torch.")
    return digest("model", canonical_json(checkpoint.raw), resolved.encode(), *shards)


def encoder_fingerprint(model: bytes) -> bytes:
    """32 bytes for cache keys of image embeddings, from a model fingerprint."""
    return digest("encoder", model)


def _content_hash(path: Path) -> bytes:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return state.digest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            for start in range(0, len(view), _HASH_CHUNK_BYTES):
                state.update(view[start : start + _HASH_CHUNK_BYTES])
    return state.digest()


def load_model(
    directory: Path | str, *, dtype: str = "auto", device: str = "cpu", progress: Progress | None = None
) -> VisionLanguageModel:
    """Load a checkpoint.

    Args:
        directory: a Hugging Face checkpoint directory with safetensors weights.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        device: of torch, e.g. ``cpu`` or ``cuda:0``.
        progress: called with bytes done and bytes in total as weights arrive.

    Raises:
        ModelLoadError: one sentence about the first thing that is missing, damaged or not supported.
    """
    checkpoint = read_checkpoint(directory)
    files = weight_files(checkpoint.directory)
    tensors = stored_tensors(files)
    resolved = resolve_dtype(dtype, device)
    fingerprint = model_fingerprint(directory, str(resolved).removeprefix("torch."), device)
    identity = ModelIdentity(fingerprint, encoder_fingerprint(fingerprint), checkpoint.eos_token_ids)
    model = checkpoint.family.build(checkpoint.config, checkpoint.shape, identity, torch.device(device), resolved)
    module = cast("nn.Module", model)
    if _keeps_bfloat16(tensors, resolved, model.device):
        store_as(module, torch.bfloat16)
    load_weights(files, checkpoint.family.rename, model.weight_targets(), progress)
    pack(module)
    return model


def _keeps_bfloat16(tensors: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices stay bfloat16 in memory while a model computes in float32: half the bytes, the same values."""
    kinds = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1}
    return dtype is torch.float32 and kinds == {"BF16"} and use_native_on(device)
