from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismserve.core.errors import LeaseExpiredError, OverloadedError, TransferError
from prismserve.core.types import Extent
from prismserve.kv_transfer.pages import PageAllocator


def allocator(pages: int = 32, first: int = 5) -> PageAllocator:
    return PageAllocator(first, pages, itertools.count(1).__next__)


@given(st.lists(st.one_of(st.integers(1, 12), st.integers(-40, -1)), max_size=120))
def test_extents_never_overlap_tags_only_grow_and_everything_comes_back(steps):
    pages, live, last = allocator(), [], 0
    for step in steps:
        if step > 0:
            try:
                extent = pages.allocate(step)
            except OverloadedError:
                continue
            assert extent.pages == step
            assert extent.generation > last
            last = extent.generation
            live.append(extent)
        elif live:
            pages.free(live.pop(step % len(live)))
        taken = [page for extent in live for page in range(extent.first_page, extent.first_page + extent.pages)]
        assert len(taken) == len(set(taken)) == pages.used_pages
        assert all(5 <= page < 37 for page in taken)
    for extent in live:
        pages.free(extent)
    assert pages.used_pages == 0
    assert pages.allocate(32).first_page == 5, "freed neighbours have merged into one run"


def test_an_extent_is_freed_once_and_only_under_its_own_generation():
    pages = allocator()
    extent = pages.allocate(4)
    with pytest.raises(LeaseExpiredError):
        pages.free(Extent(extent.first_page, 4, extent.generation + 1))
    pages.free(extent)
    again = pages.allocate(4)
    assert again.first_page == extent.first_page
    with pytest.raises(LeaseExpiredError):
        pages.free(extent)


@pytest.mark.parametrize("wanted", [0, -1, 33])
def test_what_can_never_fit_is_an_error_and_not_an_overload(wanted):
    with pytest.raises(TransferError, match="arena_bytes"):
        allocator().allocate(wanted)
