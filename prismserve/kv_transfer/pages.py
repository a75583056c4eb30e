"""Which pages of an arena are taken: extents, first fit, freed neighbours merged. No memory, no threads."""

from __future__ import annotations

import bisect
from collections.abc import Callable

from prismserve.core.errors import LeaseExpiredError, OverloadedError, TransferError
from prismserve.core.types import Extent


class PageAllocator:
    """Hands out runs of pages of [first_page, first_page + pages).

    Args:
        first_page: where the region starts.
        pages: how long it is.
        next_generation: gives the tag of each allocation; a tag is never given twice.
    """

    def __init__(self, first_page: int, pages: int, next_generation: Callable[[], int]) -> None:
        self._first_page = first_page
        self._pages = pages
        self._next_generation = next_generation
        self._free_starts: list[int] = [first_page]
        self._free_pages: dict[int, int] = {first_page: pages}
        self._live: dict[int, Extent] = {}

    @property
    def pages(self) -> int:
        """Size of the region."""
        return self._pages

    @property
    def used_pages(self) -> int:
        """Pages that are allocated."""
        return sum(extent.pages for extent in self._live.values())

    def owns(self, extent: Extent) -> bool:
        """Whether the extent lies in this region."""
        return self._first_page <= extent.first_page < self._first_page + self._pages

    def allocate(self, pages: int) -> Extent:
        """Take the first run that is long enough.

        Raises:
            TransferError: the region could never hold it.
            OverloadedError: no run is long enough now.
        """
        if not 0 < pages <= self._pages:
            message = f"an extent of {pages} pages can never fit a region of {self._pages}; raise transfer.arena_bytes"
            raise TransferError(message, field="arena_bytes")
        for index, start in enumerate(self._free_starts):
            length = self._free_pages[start]
            if length < pages:
                continue
            del self._free_pages[start]
            if length == pages:
                del self._free_starts[index]
            else:
                self._free_starts[index] = start + pages
                self._free_pages[start + pages] = length - pages
            extent = Extent(start, pages, self._next_generation())
            self._live[start] = extent
            return extent
        message = f"no run of {pages} pages is free ({self.used_pages} of {self._pages} pages are in use)"
        raise OverloadedError(message, retry_after_s=0.1)

    def check_live(self, extent: Extent) -> None:
        """Raise LeaseExpiredError unless exactly this allocation is live."""
        if self._live.get(extent.first_page) != extent:
            message = f"the extent at page {extent.first_page} with generation {extent.generation} is not allocated"
            raise LeaseExpiredError(message)

    def free(self, extent: Extent) -> None:
        """Give an allocation back; LeaseExpiredError if it is not live (freed before, or of another generation)."""
        self.check_live(extent)
        del self._live[extent.first_page]
        start, length = extent.first_page, extent.pages
        index = bisect.bisect_left(self._free_starts, start)
        if index < len(self._free_starts) and self._free_starts[index] == start + length:
            length += self._free_pages.pop(self._free_starts.pop(index))
        if index and self._free_starts[index - 1] + self._free_pages[self._free_starts[index - 1]] == start:
            self._free_pages[self._free_starts[index - 1]] += length
            return
        self._free_starts.insert(index, start)
        self._free_pages[start] = length
