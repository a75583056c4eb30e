"""One request's KV on its way out: layers leave as soon as they are final and the receiver has granted room."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prismserve.engine.engine import ExportView
    from prismserve.engine.pool import KVPool
    from prismserve.kv_transfer.sender import Outgoing

PUSH_TOKENS = 256
"""Smallest piece of a layer worth a write of its own, except the last."""


class Export:
    """The engine's layer sink for one prefill.

    ``layer_ready`` runs in the engine thread and only hands ranges on: reading the pool, encoding and writing happen
    on the send thread. What became ready before the receiver answered is pushed by :meth:`attach`.

    Args:
        pool: where the KV lies; blocks stay pinned until the export is released.
    """

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._view: ExportView | None = None
        self._outgoing: Outgoing | None = None
        self._ready: list[int] = []
        self._pushed: list[int] = []
        self._cancelled = False

    @property
    def view(self) -> ExportView | None:
        """The sequence's blocks, once the engine has allocated them."""
        return self._view

    def open(self, view: ExportView) -> Export:
        """Called by the engine when the blocks are allocated; cached tokens are ready at once.

        Called again after a preemption, with other blocks: what was pushed before stays valid, since KV is a function
        of the prompt, and only the rest is read from the new blocks.
        """
        with self._lock:
            layers = self._pool.layout.layers
            self._view = view
            self._ready = [view.cached_tokens] * layers
            self._pushed = self._pushed or [0] * layers
            for layer in range(layers):
                self._push_ready(layer)
        return self

    def layer_ready(self, layer: int, start_token: int, tokens: int) -> None:
        """A chunk of a layer is final."""
        with self._lock:
            self._ready[layer] = start_token + tokens
            self._push_ready(layer)

    def attach(self, outgoing: Outgoing) -> None:
        """The receiver granted room."""
        with self._lock:
            self._outgoing = outgoing
            for layer in range(len(self._ready)):
                self._push_ready(layer)

    def _push_ready(self, layer: int) -> None:
        view, outgoing = self._view, self._outgoing
        if outgoing is None or view is None or self._cancelled:
            return
        start, end = self._pushed[layer], self._ready[layer]
        if end - start < PUSH_TOKENS and not (end > start and end == view.layer_tokens[layer]):
            return
        self._pushed[layer] = end
        reader = self._pool.reader(view.table, view.layer_tables)
        outgoing.push_from(layer, start, end - start, reader)

    def complete(self, layer_tokens: tuple[int, ...]) -> None:
        """Push what is left: the prefill is over, and each layer holds so many slots."""
        with self._lock:
            if self._view is None:
                return
            self._view = dataclasses.replace(self._view, layer_tokens=layer_tokens)
            for layer in range(len(layer_tokens)):
                self._push_ready(layer)

    def cancel(self) -> None:
        """Push nothing more."""
        with self._lock:
            self._cancelled = True
