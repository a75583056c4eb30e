"""An image comes back out of a tier as it went in, or not at all."""

from __future__ import annotations

import pytest
import torch

from prismserve.engine.image_cache import ImageCache, ImageLabel, VisualTokens
from prismserve.kv_transfer.tiers.config import TierConfig
from prismserve.kv_transfer.tiers.store import TierStore
from prismserve.worker_runtime.image_shelf import ImageShelf, owner_bytes, pack, packed_bytes, part_keys, unpack

BLOCK = 4096
KEY = b"i" * 32


def image(rows=300, columns=16, axes=0, order=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    places = torch.randint(0, 999, (axes, rows) if axes else (rows,), generator=generator).sort().values
    ranks = torch.randperm(rows, generator=generator) if order else None
    return VisualTokens(torch.randn(rows, columns, generator=generator).to(dtype), places, 999, ranks)


def same(one, other):
    assert torch.equal(one.embeds, other.embeds)
    assert torch.equal(one.positions, other.positions)
    assert one.raw_tokens == other.raw_tokens
    assert (one.order is None) == (other.order is None)
    assert one.order is None or torch.equal(one.order, other.order)


@pytest.mark.parametrize(
    "tokens", [image(), image(axes=3, order=False), image(rows=1, dtype=torch.bfloat16), image(dtype=torch.float16)]
)
def test_packing_keeps_every_bit(tokens):
    data = pack(tokens)
    assert packed_bytes(data) == len(data)
    same(unpack(data), tokens)


def test_bytes_of_something_else_are_no_image():
    assert packed_bytes(torch.zeros(4096, dtype=torch.uint8)) is None
    assert packed_bytes(pack(image())[:10]) is None


@pytest.fixture
def shelf():
    cache = ImageCache(1 << 20)
    shelf = ImageShelf(cache, BLOCK)

    class Source:
        copy_block = staticmethod(shelf.copy_part)

    store = TierStore(TierConfig(host_bytes=64 * BLOCK), BLOCK, bytes(32), Source())
    yield shelf, cache, store
    store.close()


def shelve(shelf, cache, store, tokens):
    cache.put(KEY, tokens, ImageLabel("tenant", 0.5))
    keys = shelf.parts(KEY)
    store.offer(keys)
    assert store.drain(10)
    return keys


@pytest.mark.parametrize("rows", [1, 50, 300])
def test_an_image_is_found_in_a_tier_after_it_left_the_cache(shelf, rows):
    keys = shelve(*shelf, image(rows))
    assert len(keys) == -(-len(pack(image(rows))) // BLOCK)
    assert shelf[2].host.label(keys[-1]).owner == owner_bytes("tenant")
    shelf[1].clear()
    same(shelf[0].load(KEY, shelf[2]), image(rows))


def test_an_image_that_lost_a_part_is_not_found(shelf):
    keys = shelve(*shelf, image())
    shelf[2].host.drop(keys[2])
    assert shelf[0].load(KEY, shelf[2]) is None
    shelf[2].host.drop(keys[0])
    assert shelf[0].load(KEY, shelf[2]) is None


def test_an_image_that_left_before_it_was_copied_is_not_kept(shelf):
    made, cache, store = shelf
    cache.put(KEY, image())
    keys = made.parts(KEY)
    cache.clear()
    store.offer(keys)
    assert store.drain(10)
    assert len(store.host) == 0
    assert made.parts(KEY) == []


def test_parts_of_two_images_never_share_a_key():
    assert not set(part_keys(KEY, 9)) & set(part_keys(b"j" * 32, 9))
