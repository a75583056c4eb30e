from __future__ import annotations

import pytest
import torch

from prismserve.engine.image_cache import ImageCache, ImageLabel, VisualTokens


def visual(tokens: int) -> VisualTokens:
    return VisualTokens(torch.zeros(tokens, 4), torch.arange(tokens), tokens)


SIZE = visual(2).nbytes


def test_the_least_recently_used_image_goes_first() -> None:
    cache = ImageCache(2 * SIZE)
    for name in (b"a", b"b"):
        cache.put(name, visual(2))
    assert cache.get(b"a") is not None
    cache.put(b"c", visual(2))
    assert [name in cache for name in (b"a", b"b", b"c")] == [True, False, True]
    assert cache.nbytes == 2 * SIZE


def test_an_image_larger_than_the_cache_is_not_held() -> None:
    cache = ImageCache(SIZE)
    cache.put(b"a", visual(1))
    cache.put(b"b", visual(3))
    assert b"b" not in cache
    assert b"a" in cache


def test_replacing_an_image_counts_its_bytes_once() -> None:
    cache = ImageCache(10 * SIZE)
    for _ in range(3):
        cache.put(b"a", visual(2))
    assert (cache.nbytes, len(cache)) == (SIZE, 1)
    assert cache.get(b"missing") is None


ORDERED = VisualTokens(
    torch.arange(8.0).reshape(4, 2), torch.tensor([3, 5, 8, 9]), 12, order=torch.tensor([2, 0, 3, 1])
)


def test_a_smaller_budget_is_the_first_of_the_order_in_raster_order() -> None:
    two = ORDERED.reduced(2)
    assert two.embeds.tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert two.positions.tolist() == [3, 8]
    assert (two.order.tolist(), two.raw_tokens) == ([1, 0], 12)
    assert ORDERED.reduced(3).reduced(1).positions.tolist() == ORDERED.reduced(1).positions.tolist() == [8]
    with pytest.raises(ValueError, match="5 tokens"):
        ORDERED.reduced(5)


def test_positions_in_three_axes_are_cut_alike() -> None:
    axes = VisualTokens(ORDERED.embeds, torch.stack([ORDERED.positions] * 3), 12, ORDERED.order)
    assert axes.reduced(2).positions.tolist() == [[3, 8]] * 3


def test_an_image_is_derived_within_its_family_only_and_from_the_nearest_budget() -> None:
    cache = ImageCache(1 << 20)
    ours, theirs = ImageLabel(family=b"f"), ImageLabel(family=b"g")
    cache.put(b"four", ORDERED, ours)
    cache.put(b"three", ORDERED.reduced(3), ours)
    assert cache.derive(b"two", theirs, 2) is None
    assert cache.derive(b"two", ImageLabel(), 2) is None
    assert cache.derive(b"five", ours, 5) is None
    assert cache.derive(b"two", ours, 2).positions.tolist() == [3, 8]
    assert b"two" in cache
    cache.clear()
    assert cache.derive(b"two", ours, 2) is None


def test_an_image_that_was_evicted_derives_nothing() -> None:
    cache = ImageCache(ORDERED.nbytes)
    cache.put(b"four", ORDERED, ImageLabel(family=b"f"))
    cache.put(b"other", ORDERED)
    assert cache.derive(b"two", ImageLabel(family=b"f"), 2) is None


def test_a_tenant_above_its_share_loses_its_own_images_first() -> None:
    cache = ImageCache(4 * SIZE)
    cache.put(b"quiet", visual(2), ImageLabel("quiet"))
    for number in range(6):
        cache.put(bytes([number]), visual(2), ImageLabel("loud", share=0.5))
    assert b"quiet" in cache
    assert [bytes([number]) in cache for number in range(6)] == [False] * 3 + [True] * 3


def test_a_tenant_alone_may_fill_the_cache_whatever_its_share() -> None:
    cache = ImageCache(4 * SIZE)
    for number in range(4):
        cache.put(bytes([number]), visual(2), ImageLabel("loud", share=0.1))
    assert len(cache) == 4
