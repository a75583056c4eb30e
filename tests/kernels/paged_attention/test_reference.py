from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.kernels.dispatch import without_native
from prismserve.kernels.paged_attention import attend, paged_attention, plan_batch, reference, write_kv
from tests.models.dense_backend import dense_attention

MIXED = [(1, 1), (1, 30), (5, 5), (0, 3), (7, 40), (300, 310), (1, 33), (0, 0), (2, 2), (1, 200)]


@pytest.fixture(autouse=True, params=["native", "plain"])
def implementation(request):
    """Every test here holds for the native kernels and without them."""
    with nullcontext() if request.param == "native" else without_native():
        yield


def filled(layout, lengths, block_tokens, *, layers=2, layer=1, dtype=torch.float32):
    """A cache with scattered tables for sequences of these lengths, written through write_kv."""
    kv_heads, width = layout
    groups = sum(-(-length // block_tokens) for length in lengths) + 3
    storage = torch.zeros(groups, layers, 2, block_tokens, kv_heads, width, dtype=dtype)
    view = storage[:, layer]
    free = torch.randperm(groups).tolist()
    tables, keys, values = [], [], []
    for length in lengths:
        table = [free.pop() for _ in range(-(-length // block_tokens))]
        k, v = torch.randn(2, length, kv_heads, width, dtype=dtype)
        slots = [table[i // block_tokens] * block_tokens + i % block_tokens for i in range(length)]
        write_kv(view, torch.tensor(slots, dtype=torch.int64), k, v)
        tables.append(table)
        keys.append(k)
        values.append(v)
    return storage, tables, keys, values


def check(sequences, heads, layout, block_tokens, dtype=torch.float32, atol=4e-6):
    q_lens, kv_lens = [q for q, _ in sequences], [kv for _, kv in sequences]
    storage, tables, keys, values = filled(layout, kv_lens, block_tokens, dtype=dtype)
    q = torch.randn(sum(q_lens), heads, layout[1], dtype=dtype)
    scale = layout[1] ** -0.5
    out = paged_attention(q, storage[:, 1], tables, q_lens, kv_lens, scale)
    rows = q.split(q_lens)
    parts = [dense_attention(*parts, scale) for parts in zip(rows, keys, values, strict=True)]
    torch.testing.assert_close(out, torch.cat(parts), rtol=0, atol=atol)
    assert out.dtype == dtype


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (14, 2)])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_mixed_batches_equal_written_out_attention(heads, kv_heads, width):
    check(MIXED, heads, (kv_heads, width), 16)


@pytest.mark.parametrize("block_tokens", [1, 3, 64])
def test_block_size_does_not_matter(block_tokens):
    check(MIXED, 4, (2, 64), block_tokens)


def test_bfloat16_stays_near():
    check(MIXED, 4, (2, 64), 16, torch.bfloat16, atol=3e-2)


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(
        st.integers(0, 40).flatmap(lambda kv: st.tuples(st.integers(0, kv), st.just(kv))), min_size=1, max_size=8
    )
)
def test_any_batch_equals_written_out_attention(sequences):
    check(sequences, 4, (2, 8), 4)


@pytest.mark.parametrize("tile_rows", [1, 3, 256])
def test_tiles_of_a_chunk_do_not_show(monkeypatch, tile_rows):
    monkeypatch.setattr(reference, "_TILE_ROWS", tile_rows)
    check([(10, 25), (4, 5)], 4, (2, 16), 4)


def test_other_layers_are_not_touched():
    storage, *_ = filled((2, 8), [10, 3], 4)
    assert not storage[:, 0].any()


def test_a_sequence_alone_gives_what_it_gives_in_a_batch():
    storage, tables, _, _ = filled((2, 64), [20, 21, 90], 16)
    q = torch.randn(3, 4, 64)
    together = paged_attention(q, storage[:, 1], tables, [1, 1, 1], [20, 21, 90], 0.125)
    for row, (table, length) in enumerate(zip(tables, [20, 21, 90], strict=True)):
        alone = paged_attention(q[row : row + 1], storage[:, 1], [table], [1], [length], 0.125)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-6)


def test_stale_contents_behind_a_sequence_do_not_show():
    storage, tables, _, _ = filled((1, 8), [5, 9], 4)
    q = torch.randn(2, 2, 8)
    before = paged_attention(q, storage[:, 1], tables, [1, 1], [5, 9], 1.0)
    storage[tables[0][1], 1, :, 1:] = 1e4
    storage[tables[1][2], 1, :, 1:] = -1e4
    assert torch.equal(paged_attention(q, storage[:, 1], tables, [1, 1], [5, 9], 1.0), before)


def test_similar_lengths_share_a_call_and_padding_stays_below_twice():
    lengths = [10, 12, 20, 500, 600, 900]
    tables = [list(range(100))] * 6
    with without_native():
        batch = plan_batch(tables, [1] * 6, lengths, 16)
    assert [bucket.rows.tolist() for bucket in batch.buckets] == [[0, 1, 2], [3, 4, 5]]
    assert sum(bucket.slots * len(bucket.rows) for bucket in batch.buckets) < 2 * sum(lengths)


def test_a_table_may_be_longer_than_the_sequence():
    storage, tables, keys, values = filled((1, 8), [6], 4)
    q = torch.randn(1, 2, 8)
    out = paged_attention(q, storage[:, 1], [[*tables[0], 0, 0]], [1], [6], 1.0)
    torch.testing.assert_close(out, dense_attention(q, keys[0], values[0], 1.0))


@pytest.mark.parametrize(
    ("tables", "q_lens", "kv_lens", "reason"),
    [
        ([[0]], [1, 1], [1], "must be equal"),
        ([[0]], [2], [1], "between 0 and its kv_len"),
        ([[0]], [-1], [1], "between 0 and its kv_len"),
        ([[0]], [1], [5], "cannot hold 5 tokens"),
    ],
)
def test_lengths_that_disagree_are_refused(tables, q_lens, kv_lens, reason):
    with pytest.raises(ValueError, match=reason):
        plan_batch(tables, q_lens, kv_lens, 4)


def test_a_plan_for_other_rows_is_refused():
    with pytest.raises(ValueError, match="planned for 1 query rows, got 2"):
        attend(torch.zeros(2, 1, 8), torch.zeros(1, 2, 4, 1, 8), plan_batch([[0]], [1], [1], 4), 1.0)
