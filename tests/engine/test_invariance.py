from __future__ import annotations

import pytest
import torch

from prismserve.core.types import KVLayout
from prismserve.engine.attention import PagedAttention
from prismserve.engine.pool import KVPool
from prismserve.kernels.dispatch import use_native_on
from prismserve.models.loader import load_model
from prismserve.models.reference import reference_path

pytestmark = pytest.mark.skipif(not use_native_on(torch.device("cpu")), reason="no C++ compiler on this machine")

BLOCK = 16
TOKENS = 150


@pytest.fixture(scope="module")
def model():
    return load_model(reference_path(), dtype="float32")


def logits_of(model, prompts, chunks):
    """Logits of every token of the prompts, computed side by side in chunks of given sizes."""
    config = model.decoder.config
    layout = KVLayout("bfloat16", config.layers, config.kv_heads, config.head_dim, BLOCK, config.position_scheme)
    width = -(-TOKENS // BLOCK)
    pool = KVPool(layout, width * len(prompts))
    tables = [list(range(i * width, (i + 1) * width)) for i in range(len(prompts))]
    starts = [0] * len(prompts)
    rows = [[] for _ in prompts]
    with torch.inference_mode():
        while any(start < TOKENS for start in starts):
            counts = [min(chunk, TOKENS - start) for chunk, start in zip(chunks, starts, strict=True)]
            spans = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
            positions = torch.tensor([at for span in spans for at in span])
            slots = [
                table[at // BLOCK] * BLOCK + at % BLOCK
                for table, span in zip(tables, spans, strict=True)
                for at in span
            ]
            attention = PagedAttention(pool, tables, starts, counts, torch.tensor(slots))
            x = model.decoder.embed(torch.cat([prompts[i][span.start : span.stop] for i, span in enumerate(spans)]))
            rotary = model.decoder.rotary(positions)
            for layer in range(config.layers):
                x = model.decoder.layer(layer, x, rotary, attention)
            for i, part in enumerate(model.decoder.logits(x).split(counts)):
                rows[i].append(part)
            starts = [start + count for start, count in zip(starts, counts, strict=True)]
    return [torch.cat(parts) for parts in rows]


def test_logits_have_the_same_bits_in_any_chunk_and_beside_any_other_sequence(model):
    prompts = [torch.randint(4, model.vocab_size, (TOKENS,)) for _ in range(3)]
    alone = [logits_of(model, [prompt], [TOKENS])[0] for prompt in prompts]
    for chunks in ([1, 1, 1], [1, 7, 64], [TOKENS, 33, 5], [100, 100, 100]):
        for got, expected in zip(logits_of(model, prompts, chunks), alone, strict=True):
            assert torch.equal(got, expected)
