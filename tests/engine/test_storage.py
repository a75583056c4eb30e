"""Quantised KV pools: the tokens of a slow cache that rounds the same way, whatever happens to the blocks."""

from __future__ import annotations

import pytest
import torch

from prismserve.core.types import KVLayout
from prismserve.engine.pool import KVPool
from prismserve.engine.storage import KVStorage
from tests.engine.rounding import QUANTISED, ROUNDED, row_bytes
from tests.engine.small_text import BLOCK, HEAD_DIM, KV_HEADS, LAYERS, Driver

PROMPT = 41
KEEPS = [
    {0: torch.tensor([0, 3, 5])},
    {layer: torch.tensor([[0, 1, 2, 3, 8], [0, 2, 4, 6, 7]]) for layer in range(LAYERS)},
    {0: torch.arange(20, 30), 2: torch.tensor([[0, 5, 29, 7], [1, 2, 3, 4]])},
]
FORMATS = pytest.mark.parametrize("kv", QUANTISED)


def layout(kv: str, head_dim: int = 6, dtype: str = "float32") -> KVLayout:
    return KVLayout(dtype, layers=2, kv_heads=2, head_dim=head_dim, block_tokens=4, kv_format=kv)


def drawn(tokens: int, channels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(tokens, 2, channels, generator=torch.Generator().manual_seed(3)) * 3 + 1
    return keys, keys.flip(0) - 2


@FORMATS
def test_what_is_written_is_read_back_rounded_once(kv) -> None:
    pool = KVPool(layout(kv), 6)
    table = pool.allocate(4)[::-1]
    keys, values = drawn(13)
    for start, end in ((0, 3), (3, 9), (9, 13)):
        pool.write(1, table, start, keys[start:end], values[start:end])
    for start, end in ((0, 13), (2, 5), (12, 13), (5, 5)):
        got = pool.read(1, table, start, end - start)
        for side, numbers in zip(got, (keys, values), strict=True):
            torch.testing.assert_close(side, ROUNDED[kv](numbers[start:end]), rtol=0, atol=1e-6)
    assert not any(part[:, 0].any() for part in pool.memory.parts)


@FORMATS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_go_from_pool_to_pool_bit_for_bit(kv, dtype) -> None:
    source, target = KVPool(layout(kv, dtype=dtype), 4), KVPool(layout(kv, dtype=dtype), 4)
    table, other = source.allocate(3), target.allocate(4)[1:]
    source.write(0, table, 0, *drawn(11))
    keys, values = source.read_rows(0, table, 2, 9)
    assert keys.dtype is torch.uint8
    assert keys.shape == (9, 2, source.layout.row_bytes)
    target.write(0, other, 2, keys, values)
    for mine, theirs in zip(source.read_rows(0, table, 2, 9), target.read_rows(0, other, 2, 9), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(source.read(0, table, 2, 9)[0], target.read(0, other, 2, 9)[0])
    assert source.read(0, table, 2, 9)[0].dtype is getattr(torch, dtype)


@FORMATS
def test_a_partial_copy_takes_codes_and_scales(kv) -> None:
    pool = KVPool(layout(kv), 2)
    source, target = pool.allocate(2)
    for layer in range(2):
        pool.write(layer, [source], 0, *drawn(4))
    pool.copy(source, target, 3)
    for part in pool.memory.parts:
        assert torch.equal(part[target, :, :, :3], part[source, :, :, :3])
        assert not part[target, :, :, 3:].any()


@pytest.mark.parametrize("kv", ["plain", *QUANTISED])
@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 64), ("bfloat16", 128), ("bfloat16", 80)])
def test_a_token_takes_the_bytes_its_layout_says(kv, dtype, head_dim) -> None:
    kind = layout(kv, head_dim, dtype)
    memory = KVStorage(kind, 3, "cpu")
    assert sum(part.nbytes for part in memory.parts) == 3 * kind.block_tokens * kind.token_bytes
    assert memory.block_bytes == kind.block_tokens * kind.token_layer_bytes


@pytest.mark.parametrize(
    ("kv", "factor"), [("auto", 1.0), ("bf16", 0.5), ("fp8", 66 / 256), ("int8", 66 / 256), ("int4", 36 / 256)]
)
def test_memory_of_the_reference_model_shrinks_by_the_stated_factor(workshop, kv, factor) -> None:
    decoder = workshop.model.decoder.config
    engine = workshop.engine(kv_cache_dtype=kv)
    assert decoder.head_dim == 64
    whole = decoder.layers * 2 * decoder.kv_heads * 64 * 4
    assert engine.layout.token_bytes == whole * factor
    held = sum(part.nbytes for part in engine.pool.memory.parts)
    assert held == engine.pool.groups * 16 * engine.layout.token_bytes
    assert engine.pool.groups == (64 << 20) // (16 * engine.layout.token_bytes)


def test_no_two_formats_are_interchangeable(text) -> None:
    layouts = [text.engine(kv_cache_dtype=kv).layout for kv in ("auto", "bf16", *QUANTISED)]
    assert len({kind.fingerprint() for kind in layouts}) == len(layouts)


# ---- through the engine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["bf16", *QUANTISED])
@pytest.mark.parametrize("step_tokens", [5, 16, 512])
def test_any_chunking_gives_the_tokens_of_a_cache_that_rounds_alike(text, kv, step_tokens) -> None:
    engine = text.engine(kv_cache_dtype=kv, max_step_tokens=step_tokens)
    for number in range(3):
        engine.submit(text.request(f"q{number}", text.prompt(number, PROMPT), 20), worker="local")
    done = Driver(engine).run()
    assert done == {f"q{n}": text.expected(text.prompt(n, PROMPT), 20, None, kv) for n in range(3)}
    if kv == "int4":
        assert done != {f"q{n}": text.expected(text.prompt(n, PROMPT), 20) for n in range(3)}, "rounding shows"


@FORMATS
def test_prefix_hits_and_copied_partial_blocks_change_nothing(text, kv) -> None:
    engine = text.engine(kv_cache_dtype=kv)
    for number, (shared, tokens) in enumerate(((0, 30), (22, 40), (22, 33), (17, 50))):
        ids = text.prompt(number, tokens, shared)
        engine.submit(text.request(f"q{number}", ids, 15), worker="local")
        assert Driver(engine).run()[f"q{number}"] == text.expected(ids, 15, None, kv)
    assert engine.stats().prefix_hit_tokens > 20
    assert engine.stats().prefix_hit_tokens % BLOCK, "a partial block was copied"


@FORMATS
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("keep", [None, *KEEPS], ids=["uniform", "one", "heads", "some"])
def test_preempted_and_compacted_requests_give_the_same_tokens(text, kv, preemption, keep) -> None:
    engine = text.engine(30, kv_cache_dtype=kv, preemption=preemption, max_step_tokens=24)
    driver = Driver(engine, {"s1": keep, "s3": keep} if keep else {})
    for number in range(4):
        engine.submit(text.request(f"s{number}", text.prompt(number, 30), 40), worker="local")
    kept = {f"s{n}": keep if n % 2 else None for n in range(4)}
    assert driver.run() == {f"s{n}": text.expected(text.prompt(n, 30), 40, kept[f"s{n}"], kv) for n in range(4)}
    counters = engine._stepper.counters
    assert counters.preemptions > 0
    assert (counters.swaps > 0) == (preemption == "swap")
    assert engine.pool.used_groups == engine._blocks.swap.used_bytes == 0


@FORMATS
def test_compaction_moves_codes_and_scales_without_rounding_again(text, kv) -> None:
    engine = text.engine(kv_cache_dtype=kv, prefix_caching=False)
    engine.submit(text.request("a", text.prompt(1, 30), 4), worker="local")
    engine.step()
    before = [side[:30] for side in engine.read_layer("a", 0, 1)]
    keep = torch.tensor([[29, 3, 7], [0, 2, 11]])
    engine.compact("a", 0, 1, keep)
    after = engine.read_layer("a", 0, 1)
    for old, new in zip(before, after, strict=True):
        expected = torch.stack([old[keep[head], head] for head in range(KV_HEADS)], dim=1)
        assert torch.equal(new, expected)
        assert new.shape == (3, KV_HEADS, HEAD_DIM)


# Numbers restored from int4 codes may round to others: its offset is a float16, and the least number need not be one.
@pytest.mark.parametrize(
    ("kv", "exact"), [("fp8", True), ("int8", True), ("int4", True), ("fp8", False), ("int8", False)]
)
def test_imported_kv_continues_as_at_home(text, kv, exact) -> None:
    ids = text.prompt(5, PROMPT)
    source, target = (text.engine(kv_cache_dtype=kv, max_step_tokens=16) for _ in range(2))
    request = text.request("t", ids, 15)
    source.submit(request, worker="prefill")
    first = [token for _ in range(4) for output in source.step() for token in output.token_ids]
    view = source.export_view("t", 0)
    ticket = target.begin_import(request)
    write = target.import_writer(ticket)
    read = source.pool.read_rows if exact else source.pool.read
    for layer in range(LAYERS):
        write(layer, 0, *read(layer, view.table, 0, PROMPT))
    target.finish_import(ticket, request, tuple(first), view.next_position, None)
    assert Driver(target).run()["t"] == text.expected(ids, 15, None, kv)
    assert row_bytes(kv, HEAD_DIM) == target.layout.row_bytes
