from __future__ import annotations

import torch

from prismserve.engine.image_cache import ImageCache, VisualTokens


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
