from __future__ import annotations

import pytest
import torch

from prismserve.core.errors import ConfigurationError
from prismserve.core.types import KVLayout
from prismserve.engine.config import EngineConfig
from prismserve.engine.sizing import free_memory, kv_dtype, kv_format, plan_kv_groups

LAYOUT = KVLayout("float32", layers=2, kv_heads=2, head_dim=8, block_tokens=16)
GROUP = 16 * LAYOUT.token_bytes


def test_a_quarter_of_free_memory_is_taken_when_it_is_the_smaller() -> None:
    assert plan_kv_groups(EngineConfig(), LAYOUT, 400 * GROUP, 320) == 100


def test_no_more_than_the_running_sequences_can_use_is_taken() -> None:
    assert plan_kv_groups(EngineConfig(max_running=4), LAYOUT, 10**12, 330) == 4 * 21


def test_a_given_size_is_used_as_it_is() -> None:
    config = EngineConfig(kv_cache_bytes=50 * GROUP + 7, max_running=1)
    assert plan_kv_groups(config, LAYOUT, 0, 320) == 50


@pytest.mark.parametrize("config", [EngineConfig(), EngineConfig(kv_cache_bytes=19 * GROUP)])
def test_a_pool_too_small_for_one_sequence_is_refused(config) -> None:
    with pytest.raises(ConfigurationError, match=f"max_model_len 320 needs {20 * GROUP} bytes"):
        plan_kv_groups(config, LAYOUT, 40 * GROUP, 320)


def test_the_free_memory_of_this_machine_is_known() -> None:
    free, share = free_memory(torch.device("cpu"))
    assert free > 0
    assert share == 0.25


def test_the_pool_takes_the_type_of_the_weights_or_the_one_named() -> None:
    assert kv_dtype("auto", torch.float16) == "float16"
    assert kv_dtype("bf16", torch.float32) == "bfloat16"

    assert kv_dtype("int4", torch.bfloat16) == "bfloat16"


@pytest.mark.parametrize("choice", ["fp8", "int8", "int4"])
def test_a_format_that_cannot_hold_the_heads_is_refused_by_name(choice) -> None:
    assert kv_format(choice, 80) == choice
    assert kv_format("auto", 7) == kv_format("bf16", 7) == "plain"
    with pytest.raises(ConfigurationError, match=f"kv_cache_dtype {choice} needs .* even .* have 7") as caught:
        kv_format(choice, 7)
    assert caught.value.field == "kv_cache_dtype"


def test_a_quantised_pool_holds_more_tokens_in_the_same_memory(text) -> None:
    layouts = {kv: text.engine(kv_cache_dtype=kv).layout for kv in ("auto", "int8", "int4")}
    config = EngineConfig(kv_cache_bytes=1 << 20)
    groups = {kv: plan_kv_groups(config, layout, 0, 64) for kv, layout in layouts.items()}
    assert groups["int8"] == pytest.approx(groups["auto"] * 32 / 10, rel=0.01)
    assert groups["int4"] == pytest.approx(groups["auto"] * 32 / 8, rel=0.01)


def test_a_bf16_pool_under_float32_weights_halves_the_memory_and_stays_close(text) -> None:
    exact, halved = text.engine(), text.engine(kv_cache_dtype="bf16")
    assert halved.layout.token_bytes * 2 == exact.layout.token_bytes
    assert halved.layout.fingerprint() != exact.layout.fingerprint()
    kept = []
    for engine in (exact, halved):
        engine.submit(text.request("a", text.prompt(1, 30), 4), worker="local")
        engine.step()
        kept.append(engine.read_layer("a", 0, 0)[0])
        engine.check_integrity()
    assert kept[1].dtype is torch.bfloat16
    torch.testing.assert_close(kept[1].float(), kept[0], rtol=2**-7, atol=1e-3)
