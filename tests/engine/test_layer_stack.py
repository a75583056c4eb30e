"""All layers in one native call give the bits of the layers one by one."""

from __future__ import annotations

import pytest
import torch

from prismserve.core.types import KVLayout
from prismserve.engine.attention import PagedAttention
from prismserve.engine.pool import KVPool
from prismserve.kernels.dispatch import use_native_on, without_native
from prismserve.models.loader import load_model
from tests.models.small import save, text_model

pytestmark = pytest.mark.skipif(not use_native_on(torch.device("cpu")), reason="no C++ compiler on this machine")

BLOCK = 16
TABLES = [[3, 1], [0], [4, 5, 2]]
STARTS = [7, 0, 40]
COUNTS = [1, 9, 4]


def model_of(tmp_path, kind, dtype="float32"):
    return load_model(save(text_model(kind), tmp_path), dtype=dtype)


def step(model, kv_dtype, *, stacked):
    """What leaves the last layer for three sequences, the cache behind it, and whether one call did it."""
    config = model.decoder.config
    layout = KVLayout(kv_dtype, config.layers, config.kv_heads, config.head_dim, BLOCK, config.position_scheme)
    pool = KVPool(layout, 8)
    pool.storage.copy_(torch.randn(pool.storage.shape, generator=torch.Generator().manual_seed(1)))
    positions = torch.tensor([s + i for s, n in zip(STARTS, COUNTS, strict=True) for i in range(n)])
    slots = [
        table[(s + i) // BLOCK] * BLOCK + (s + i) % BLOCK
        for table, s, n in zip(TABLES, STARTS, COUNTS, strict=True)
        for i in range(n)
    ]
    attention = PagedAttention(pool, TABLES, STARTS, COUNTS, torch.tensor(slots))
    x = model.decoder.embed(torch.arange(sum(COUNTS)) + 4)
    rotary = model.decoder.rotary(positions)
    with torch.inference_mode():
        if stacked:
            assert attention.stacks()
            x = attention.run_stack(model.decoder.stack(), x, rotary[0], config.layers)
        else:
            for layer in range(config.layers):
                x = model.decoder.layer(layer, x, rotary, attention)
    return x, pool.storage


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied-biased", "qwen2", "qwen3", "mistral-head-dim"])
def test_a_stack_gives_the_bits_of_single_layers(tmp_path, kind, kv_dtype):
    model = model_of(tmp_path, kind)
    for ours, expected in zip(*(step(model, kv_dtype, stacked=stacked) for stacked in (True, False)), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", ["gemma3", "mistral-window", "mixtral"])
def test_layers_that_do_more_are_run_one_by_one(tmp_path, kind):
    assert model_of(tmp_path, kind).decoder.stack() is None


def test_without_native_kernels_there_is_no_stack(tmp_path):
    with without_native():
        assert model_of(tmp_path, "llama").decoder.stack() is None
