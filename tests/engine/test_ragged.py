from __future__ import annotations

import pytest
import torch

from prismserve.core.errors import EngineError, InvalidRequestError, LeaseExpiredError, OutOfBlocksError
from prismserve.core.types import FinishReason
from tests.engine.small_text import BLOCK, KV_HEADS, LAYERS, Driver

PROMPT = 37


def per_head(seed: int, tokens: int, kept: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=generator)[:kept].sort().values for _ in range(KV_HEADS)])


def pyramid(seed: int = 0, tokens: int = PROMPT) -> dict[int, torch.Tensor]:
    """Fewer slots the higher the layer; other slots in each head but for the first layer."""
    return {
        0: per_head(seed, tokens, tokens * 3 // 4)[0],
        1: per_head(seed + 1, tokens, tokens // 2),
        2: per_head(seed + 2, tokens, 5),
    }


def only(layer: int, keep: torch.Tensor) -> dict[int, torch.Tensor]:
    return {layer: keep}


KEEPS = {
    "a pyramid": pyramid(),
    "one layer": only(1, per_head(3, PROMPT, 9)),
    "sinks and window": dict.fromkeys(range(LAYERS), torch.cat((torch.arange(9), torch.arange(30, PROMPT)))),
    "nothing": dict.fromkeys(range(LAYERS), torch.empty(0, dtype=torch.int64)),
    "everything, turned round": dict.fromkeys(range(LAYERS), torch.arange(PROMPT).flip(0)),
    "one slot": only(2, torch.tensor([17])),
}


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_compacted_request_answers_as_a_dense_cache_of_the_kept_slots(text, keep, prefix_caching) -> None:
    ids = text.prompt(1, PROMPT)
    engine = text.engine(prefix_caching=prefix_caching, max_step_tokens=10)
    driver = Driver(engine, {"a": keep})
    engine.submit(text.request("a", ids, 20), worker="local")
    assert driver.run()["a"] == text.expected(ids, 20, keep)
    assert engine.pool.used_groups == 0
    assert len(engine.pool.slab) == 0


@pytest.mark.parametrize("step_tokens", [7, 512])
def test_ragged_and_uniform_requests_share_a_batch_and_a_prefix(text, step_tokens) -> None:
    prompts = {f"r{n}": text.prompt(n, PROMPT, shared=22) for n in range(6)}
    keeps = {"r1": pyramid(), "r4": KEEPS["one layer"]}
    engine = text.engine(max_step_tokens=step_tokens)
    for _ in range(2):
        driver = Driver(engine, keeps)
        for name, ids in prompts.items():
            engine.submit(text.request(name, ids, 16), worker="local")
        assert driver.run() == {name: text.expected(ids, 16, keeps.get(name)) for name, ids in prompts.items()}
    assert engine.stats().prefix_hit_tokens > 6 * 20
    assert engine.pool.used_groups == 0


def start(text, engine, name: str, seed: int, tokens: int = PROMPT, max_tokens: int = 60) -> tuple[int, ...]:
    ids = text.prompt(seed, tokens)
    engine.submit(text.request(name, ids, max_tokens), worker="local")
    while not engine.step():
        pass
    return ids


def test_compacting_every_layer_gives_the_memory_back_and_one_layer_its_own_part(text) -> None:
    engine = text.engine(prefix_caching=False)
    start(text, engine, "a", 1, 80)
    assert engine.pool.used_groups == 20
    half = torch.arange(40)
    engine.compact("a", 0, 0, half)
    engine.check_integrity()
    assert (engine.pool.used_groups, engine.pool.slab.free_blocks) == (20, 10)
    engine.compact("a", 0, 1, half)
    engine.compact("a", 0, 2, half)
    engine.check_integrity()
    assert (engine.pool.used_groups, engine.pool.slab.free_blocks) == (10, 0)
    assert engine.export_view("a", 0).layer_tokens == (40, 40, 40)


def test_free_single_layer_blocks_serve_any_layer_of_any_request(text) -> None:
    engine = text.engine(prefix_caching=False)
    start(text, engine, "a", 1, 40)
    engine.compact("a", 0, 0, torch.arange(4))
    assert engine.pool.slab.free_blocks == 9
    start(text, engine, "b", 2, 40)
    engine.compact("b", 0, 2, torch.arange(40).flip(0))
    driver = Driver(engine)
    for _ in range(3 * BLOCK):
        driver.step()
    views = [engine.export_view(name, 0) for name in "ab"]
    held = sum(len(table) for view in views for table in view.layer_tables)
    assert engine.pool.used_groups == -(-held // LAYERS), "no group is broken while single blocks are free"


def test_cached_blocks_are_copied_on_compaction_and_leading_kept_ones_stay_shared(text) -> None:
    engine = text.engine()
    ids = start(text, engine, "a", 1, 41)
    keys = engine.cached_keys()
    pinned = engine.pin_blocks(keys)
    before = [engine.pool.read(layer, pinned.table, 0, pinned.tokens) for layer in range(LAYERS)]
    for layer in range(LAYERS):
        engine.compact("a", 0, layer, torch.cat((torch.arange(8), torch.arange(20, 41))))
        engine.check_integrity()
    view = engine.export_view("a", 0)
    assert view.table == pinned.table[:2]
    assert [table[:2] for table in view.layer_tables] == [
        tuple(group * LAYERS + layer for group in view.table) for layer in range(LAYERS)
    ]
    for layer in range(LAYERS):
        assert all(map(torch.equal, engine.pool.read(layer, pinned.table, 0, pinned.tokens), before[layer]))
    assert engine.cached_keys() == keys
    engine.unpin(pinned.pin_id)
    engine.submit(text.request("b", ids, 9), worker="local")
    assert Driver(engine).run()["b"] == text.expected(ids, 9)


def test_what_a_layer_holds_can_be_read_and_is_what_was_kept(text) -> None:
    engine = text.engine(max_running=2)
    ids = text.prompt(1, PROMPT)
    engine.submit(text.request("a", ids), worker="prefill")
    while not engine.step():
        pass
    whole = [engine.read_layer("a", 0, layer) for layer in range(LAYERS)]
    keep = pyramid()
    for layer, rows in keep.items():
        engine.compact("a", 0, layer, rows)
    view = engine.export_view("a", 0)
    assert view.layer_tokens == (27, 18, 5)
    for layer, rows in keep.items():
        index = (rows[None].expand(KV_HEADS, -1) if rows.dim() == 1 else rows).T[:, :, None].expand(-1, -1, 8)
        kept = [part.gather(0, index) for part in whole[layer]]
        assert all(map(torch.equal, engine.read_layer("a", 0, layer), kept))
        assert all(map(torch.equal, engine.pool.read_blocks(view.layer_tables[layer], 0, len(index)), kept))
    engine.release_export("a", 0)
    engine.check_integrity()
    assert engine.pool.used_groups == 0


def test_a_layer_can_be_compacted_again_as_the_sequence_grows(text) -> None:
    engine = text.engine()
    start(text, engine, "a", 1, max_tokens=200)
    driver = Driver(engine)
    for _ in range(20):
        for _ in range(3):
            driver.step()
        for layer in range(LAYERS):
            tokens = engine.export_view("a", 0).layer_tokens[layer]
            engine.compact("a", 0, layer, torch.cat((torch.arange(4), torch.arange(tokens - 8, tokens))))
        engine.check_integrity()
        assert engine.pool.used_groups <= 6
    engine.cancel("a", 0)
    engine.check_integrity()
    assert engine.pool.used_groups == 0


@pytest.mark.parametrize(
    "keep",
    [
        torch.tensor([0, 0]),
        torch.tensor([-1]),
        torch.tensor([PROMPT]),
        torch.zeros(3, 4, dtype=torch.int64),
        torch.tensor([0.0]),
        torch.tensor(3),
    ],
)
def test_slots_that_make_no_sense_are_refused_and_change_nothing(text, keep) -> None:
    engine = text.engine()
    start(text, engine, "a", 1)
    with pytest.raises(InvalidRequestError, match="keep must"):
        engine.compact("a", 0, 0, keep)
    with pytest.raises(InvalidRequestError, match="layer 3"):
        engine.compact("a", 0, LAYERS, torch.tensor([0]))
    with pytest.raises(EngineError, match="holds no KV"):
        engine.compact("b", 0, 0, torch.tensor([0]))
    assert engine.export_view("a", 0).layer_tables is None


def test_a_streamed_export_is_not_compacted(text) -> None:
    class Sink:
        def layer_ready(self, layer: int, start_token: int, tokens: int) -> None:
            pass

    engine = text.engine()
    engine.submit(text.request("a", text.prompt(1, 9)), worker="prefill", sink_factory=lambda view: Sink())
    engine.step()
    with pytest.raises(EngineError, match="reads this request"):
        engine.compact("a", 0, 0, torch.tensor([0]))


def test_short_of_memory_what_nobody_shares_is_changed_in_place(text) -> None:
    engine = text.engine(12)
    ids = start(text, engine, "a", 1, 40, max_tokens=8)
    keep = {layer: torch.arange(1, 40) for layer in range(LAYERS)}
    for layer in range(LAYERS):
        engine.compact("a", 0, layer, keep[layer])
        engine.check_integrity()
    assert Driver(engine).run()["a"] == text.expected(ids, 8, keep)[1:]
    assert engine.drain_cache_events().added == engine.cached_keys() == []


def test_a_copy_that_finds_no_room_leaves_the_request_as_it_was(text) -> None:
    engine = text.engine(14)
    ids = start(text, engine, "a", 1, 40, max_tokens=4)
    pinned = engine.pin_blocks(engine.cached_keys())
    keep = {0: torch.arange(1, 37)}
    engine.compact("a", 0, 0, keep[0])
    held = engine.export_view("a", 0)
    with pytest.raises(OutOfBlocksError):
        engine.compact("a", 0, 1, torch.arange(1, 40))
    engine.check_integrity()
    assert engine.export_view("a", 0) == held
    assert Driver(engine).run()["a"] == text.expected(ids, 4, keep)[1:]
    engine.unpin(pinned.pin_id)


def test_a_late_writer_into_single_layer_blocks_is_refused_once_they_were_freed(text) -> None:
    pool = text.engine().pool
    blocks = pool.allocate_blocks(LAYERS)[:2]
    tags = [pool.slab.tag(block) for block in blocks]
    keys = torch.ones(5, KV_HEADS, 8)
    pool.write_blocks(blocks, 1, keys, keys, tags)
    assert torch.equal(pool.read_blocks(blocks, 1, 5)[1], keys)
    pool.free_blocks(blocks)
    again = pool.allocate_blocks(2)
    assert sorted(again) == sorted(blocks)
    with pytest.raises(LeaseExpiredError):
        pool.write_blocks(blocks, 1, keys, keys, tags)


def test_a_ragged_request_that_is_alone_gives_up_its_cache_entries_before_its_life(text) -> None:
    engine = text.engine(12)
    ids = start(text, engine, "a", 1, 30, max_tokens=18)
    keep = {1: torch.arange(30).flip(0)}
    engine.compact("a", 0, 1, keep[1])
    driver = Driver(engine)
    assert driver.run()["a"] == text.expected(ids, 18, keep)[1:]
    assert engine.pool.used_groups == 0


def test_a_ragged_request_that_outgrows_the_pool_ends_with_an_error_of_its_own(text) -> None:
    engine = text.engine(12)
    start(text, engine, "a", 1, 30, max_tokens=100)
    pinned = engine.pin_blocks(engine.cached_keys())
    engine.compact("a", 0, 1, torch.arange(30).flip(0))
    driver = Driver(engine)
    engine.submit(text.request("b", text.prompt(2, 18), 3), worker="local")
    assert driver.run()["b"] == text.expected(text.prompt(2, 18), 3)
    assert driver.ends["a"].finish_reason is FinishReason.ERROR
    assert driver.ends["a"].error.startswith("invalid: the KV pool of 12 blocks cannot hold")
    engine.unpin(pinned.pin_id)
    assert engine.pool.used_groups == 0
