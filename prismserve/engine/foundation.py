"""What an engine stands on: the layout of its KV, the pool sized for model and memory, recorded decode steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismserve.core.types import KVLayout
from prismserve.engine.graphs import DecodeGraphs, replay_for
from prismserve.engine.pool import KVPool
from prismserve.engine.profile import profile_bytes
from prismserve.engine.sizing import free_memory, kv_dtype, kv_format, plan_kv_groups

if TYPE_CHECKING:
    from prismserve.engine.config import EngineConfig
    from prismserve.models.base import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Foundation:
    """Layout and memory of one engine; ``graphs`` is None where decode steps are launched kernel by kernel."""

    layout: KVLayout
    pool: KVPool
    graphs: DecodeGraphs | None


def lay_foundation(model: VisionLanguageModel, config: EngineConfig, max_model_len: int) -> Foundation:
    """Size and allocate.

    Args:
        model: loaded.
        config: of the engine.
        max_model_len: longest sequence, in positions.

    Raises:
        ConfigurationError: the configuration and the model or the memory do not agree.
    """
    decoder = model.decoder.config
    layout = KVLayout(
        dtype=kv_dtype(config.kv_cache_dtype, model.dtype),
        layers=decoder.layers,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        block_tokens=config.block_tokens,
        position_scheme=decoder.position_scheme,
        kv_format=kv_format(config.kv_cache_dtype, decoder.head_dim),
    )
    free, share = free_memory(model.device)
    if config.kv_cache_bytes is None:
        free = max(0, free - profile_bytes(model, layout, config.max_step_tokens))
    groups = plan_kv_groups(config, layout, free, max_model_len, share=share)
    replay = replay_for(config, decoder, model.device)
    pool = KVPool(layout, groups, model.device, scratch=replay is not None)
    if replay is None:
        return Foundation(layout, pool, None)
    graphs = DecodeGraphs(model, pool, config.max_running, pool.blocks_for(max_model_len), replay)
    return Foundation(layout, pool, graphs)
