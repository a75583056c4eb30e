from __future__ import annotations

import pytest
import torch

from prismserve.kernels.masked_attention import MaskedRows, masked_attention
from prismserve.kernels.paged_attention import paged_attention
from prismserve.kernels.paged_cache import KVFormat, new_quantised_layer, read_blocks, write_kv

BLOCK, HEADS, KV_HEADS, WIDTH = 4, 4, 2, 8


def paged(lengths, seed=0):
    """A random cache with a shuffled table for each length."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts), generator=generator).split(counts)
    layer = torch.randn(sum(counts), 2, BLOCK, KV_HEADS, WIDTH, generator=generator)
    return layer, list(order), generator


def written_out(q, layer, rows, window):
    """The same with every score in the open."""
    keys, values = (layer[rows.blocks, part].flatten(0, 1)[: rows.cached] for part in (0, 1))
    keys, values = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (keys, values))
    scores = torch.einsum("thd,shd->hts", q[rows.start : rows.start + rows.queries], keys) * WIDTH**-0.5
    for row in range(rows.queries):
        position = rows.cached - rows.queries + row
        for slot in range(rows.cached):
            image = any(a <= position < b and a <= slot < b for a, b in rows.together)
            if not (slot <= position or image) or (window and slot <= position - window):
                scores[:, row, slot] = float("-inf")
    return torch.einsum("hts,shd->thd", scores.softmax(-1), values)


@pytest.mark.parametrize("window", [0, 1, 3, 50])
@pytest.mark.parametrize("together", [(), ((2, 9),), ((0, 3), (5, 13))])
def test_rows_see_what_window_and_images_leave_them(window, together):
    lengths, queries = (13, 1, 22), (11, 1, 5)
    layer, tables, generator = paged(lengths)
    q = torch.randn(sum(queries), HEADS, WIDTH, generator=generator)
    rows, start = [], 0
    for length, count, table in zip(lengths, queries, tables, strict=True):
        rows.append(MaskedRows(start, count, length, table, together if length >= 13 else ()))
        start += count
    got = masked_attention(q, layer, rows, WIDTH**-0.5, window)
    expected = torch.cat([written_out(q, layer, item, window) for item in rows])
    torch.testing.assert_close(got, expected)


def test_without_window_and_images_it_is_causal_attention():
    lengths, queries = (700, 9), (600, 9)
    layer, tables, generator = paged(lengths)
    q = torch.randn(sum(queries), HEADS, WIDTH, generator=generator)
    rows = [MaskedRows(0, 600, 700, tables[0]), MaskedRows(600, 9, 9, tables[1])]
    expected = paged_attention(q, layer, [table.tolist() for table in tables], queries, lengths, WIDTH**-0.5)
    torch.testing.assert_close(masked_attention(q, layer, rows, WIDTH**-0.5, 0), expected)


@pytest.mark.parametrize("kv_format", KVFormat)
def test_a_quantised_cache_is_read_as_what_its_codes_stand_for(kv_format):
    layer, (table,), generator = paged((22,))
    codes = new_quantised_layer(kv_format, (layer.shape[0], BLOCK, KV_HEADS, WIDTH))
    write_kv(codes, torch.arange(layer.shape[0] * BLOCK), *(layer[:, part].flatten(0, 1) for part in (0, 1)))
    restored = torch.stack(read_blocks(codes, torch.arange(layer.shape[0])), dim=1)
    q = torch.randn(9, HEADS, WIDTH, generator=generator)
    rows = [MaskedRows(0, 9, 22, table, ((14, 20),))]
    expected = masked_attention(q, restored, rows, WIDTH**-0.5, 6)
    torch.testing.assert_close(masked_attention(q, codes, rows, WIDTH**-0.5, 6), expected)
    assert not torch.equal(expected, masked_attention(q, layer, rows, WIDTH**-0.5, 6))
