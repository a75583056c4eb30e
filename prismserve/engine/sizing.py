"""How large the KV pool is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prismserve.core.errors import ConfigurationError

if TYPE_CHECKING:
    from prismserve.core.types import KVLayout
    from prismserve.engine.config import EngineConfig

_CPU_SHARE = 0.25
_ACCELERATOR_SHARE = 0.85
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def plan_kv_groups(
    config: EngineConfig, layout: KVLayout, free_bytes: int, max_model_len: int, *, share: float = _CPU_SHARE
) -> int:
    """Number of block groups of the pool.

    Args:
        config: ``kv_cache_bytes`` if set is used as it is.
        layout: of one block.
        free_bytes: memory that is free for use.
        max_model_len: longest sequence, in tokens.
        share: part of ``free_bytes`` the pool may take.

    Returns:
        Groups; at least one sequence of full length fits, and no more than ``max_running`` of them.

    Raises:
        ConfigurationError: one full-length sequence does not fit.
    """
    group_bytes = layout.block_tokens * layout.token_bytes
    per_sequence = -(-max_model_len // layout.block_tokens)
    if config.kv_cache_bytes is not None:
        groups = config.kv_cache_bytes // group_bytes
        source = "kv_cache_bytes"
    else:
        groups = min(int(free_bytes * share) // group_bytes, config.max_running * per_sequence)
        source = f"{share:.0%} of the free memory"
    if groups < per_sequence:
        message = (
            f"{source} holds {groups * layout.block_tokens} tokens of KV, one sequence of max_model_len "
            f"{max_model_len} needs {per_sequence * group_bytes} bytes; raise kv_cache_bytes or lower max_model_len"
        )
        raise ConfigurationError(message, field="kv_cache_bytes")
    return groups


def kv_dtype(choice: str, model_dtype: torch.dtype) -> str:
    """``KVLayout.dtype``: of keys and values as attention sees them.

    Args:
        choice: ``EngineConfig.kv_cache_dtype``.
        model_dtype: of the weights.
    """
    return "bfloat16" if choice == "bf16" else str(model_dtype).removeprefix("torch.")


def kv_format(choice: str, head_dim: int) -> str:
    """``KVLayout.kv_format``: how they lie in memory.

    Args:
        choice: ``EngineConfig.kv_cache_dtype``.
        head_dim: channels per head.

    Raises:
        ConfigurationError: the format cannot hold heads of this size.
    """
    if choice in {"auto", "bf16"}:
        return "plain"
    if head_dim % 2:
        message = f"kv_cache_dtype {choice} needs heads of an even number of channels, the model's have {head_dim}"
        raise ConfigurationError(message, field="kv_cache_dtype")
    return choice


def free_memory(device: torch.device) -> tuple[int, float]:
    """Free bytes on a device, and the share of them a KV pool may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], _ACCELERATOR_SHARE
    return min(_host_available(), _cgroup_available()), _CPU_SHARE


def _host_available() -> int:
    for line in _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else ():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    message = "the free memory of this machine is unknown; set kv_cache_bytes"
    raise ConfigurationError(message, field="kv_cache_bytes")


def _cgroup_available() -> int:
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        return max(0, int(text) - int(used.read_text()))
    return 1 << 62
