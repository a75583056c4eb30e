from __future__ import annotations

import pytest
import torch

from prismserve.engine.profile import estimate_bytes, profile_bytes, warm_up

TOKENS = 64


def test_the_estimate_grows_with_the_step_and_covers_its_widest_tensors(text) -> None:
    config = text.model.decoder.config
    assert estimate_bytes(text.model, 2 * TOKENS) == 2 * estimate_bytes(text.model, TOKENS)
    assert estimate_bytes(text.model, TOKENS) >= TOKENS * 4 * (config.hidden_size + 3 * config.intermediate_size)


def test_a_cpu_is_not_made_to_run_a_full_step(text) -> None:
    layout = text.engine().layout
    assert profile_bytes(text.model, layout, TOKENS) == estimate_bytes(text.model, TOKENS)


def test_a_warm_up_runs_and_leaves_nothing(text) -> None:
    engine = text.engine()
    warm_up(text.model, engine.layout, TOKENS + 3)
    assert engine.pool.used_groups == 0


def test_a_pool_sized_from_free_memory_leaves_room_for_a_step(text, monkeypatch) -> None:
    from prismserve.engine import foundation as module
    from prismserve.engine.engine import Engine

    seen = {}

    def plan(config, layout, free, max_model_len, *, share):
        seen["free"] = free
        return 64

    monkeypatch.setattr(module, "plan_kv_groups", plan)
    monkeypatch.setattr(module, "free_memory", lambda device: (1 << 30, 0.25))
    engine = text.engine()
    assert seen["free"] == 1 << 30, "a size that is given is used as it is"
    config = engine.config.model_copy(update={"kv_cache_bytes": None, "max_step_tokens": TOKENS})
    Engine(text.model, text.processor, config)
    assert seen["free"] == (1 << 30) - estimate_bytes(text.model, TOKENS)


@pytest.mark.gpu
def test_on_a_gpu_a_step_is_measured() -> None:
    from tests.engine.small_text import TextWorkshop

    text = TextWorkshop(torch.device("cuda"))
    layout = text.engine().layout
    assert profile_bytes(text.model, layout, TOKENS) > 0
