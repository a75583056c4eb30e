from __future__ import annotations

import gc

from prismserve.core.heap import settle


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_there_is_spared_and_garbage_is_not():
    alive = Node()
    before = gc.get_freeze_count()
    try:
        settle()
        assert gc.get_freeze_count() > before
        assert not any(kept is alive for kept in gc.get_objects())
        later = Node()
        assert any(kept is later for kept in gc.get_objects())
    finally:
        gc.unfreeze()
