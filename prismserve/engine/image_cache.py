"""Embeddings of images seen before, bounded in bytes, least recently used out first, with a share for every tenant."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """One image after encoder, compression and projector.

    Attributes:
        embeds: [k, D * (1 + n)] decoder inputs, followed by what is added to them after each of the first n layers.
        positions: [k] int64 on the CPU, ascending positions within the image; or [3, k], time, row and column.
        raw_tokens: tokens before compression.
        order: [k] int64 on the CPU, rows in the order in which smaller budgets of the same method keep them; None where
            smaller budgets cannot be derived.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    raw_tokens: int
    order: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory held by the tensors."""
        order_bytes = 0 if self.order is None else self.order.nbytes
        return self.embeds.nbytes + self.positions.nbytes + order_bytes

    def reduced(self, tokens: int) -> VisualTokens:
        """The same image under a smaller budget of its nested method; ValueError where that cannot be derived."""
        if self.order is None or not 0 < tokens <= len(self.order):
            message = f"{tokens} tokens cannot be derived from {self.embeds.shape[0]} without an order"
            raise ValueError(message)
        first = self.order[:tokens]
        rows, places = first.sort()
        return VisualTokens(
            self.embeds[rows.to(self.embeds.device)], self.positions[..., rows], self.raw_tokens, places.argsort()
        )


@dataclass(frozen=True, slots=True)
class ImageLabel:
    """Whose an image is, and which others can be derived from it.

    Attributes:
        owner: tenant; "" is the default one.
        share: part of the cache the owner may fill while others want room.
        family: equal for one image under all budgets of one nested method and one tenant; b"" for none.
    """

    owner: str = ""
    share: float = 1.0
    family: bytes = b""


NO_LABEL: Final = ImageLabel()


@dataclass(slots=True)
class _Entry:
    tokens: VisualTokens
    label: ImageLabel


@dataclass(slots=True)
class _Books:
    """Bytes by owner, and keys by family and count of tokens."""

    owners: dict[str, int] = field(default_factory=dict)
    families: dict[bytes, dict[int, bytes]] = field(default_factory=dict)

    def enter(self, key: bytes, entry: _Entry) -> None:
        label, tokens = entry.label, entry.tokens
        self.owners[label.owner] = self.owners.get(label.owner, 0) + tokens.nbytes
        if label.family and tokens.order is not None:
            self.families.setdefault(label.family, {})[len(tokens.order)] = key

    def leave(self, key: bytes, entry: _Entry) -> None:
        label, tokens = entry.label, entry.tokens
        self.owners[label.owner] -= tokens.nbytes
        if not self.owners[label.owner]:
            del self.owners[label.owner]
        budgets = self.families.get(label.family, {})
        if tokens.order is not None and budgets.get(len(tokens.order)) == key:
            del budgets[len(tokens.order)]
            if not budgets:
                del self.families[label.family]


class ImageCache:
    """Key of an image's embeddings (``MediaSegment.key``) to the embeddings. Safe to use from several threads.

    When room is wanted, the least recently used image of an owner above its share leaves first, then the least recently
    used one.

    Attributes:
        max_bytes: bound on the tensors held.
        on_change: called with (key, held) after a key was gained or lost, in the thread that caused it; it must
            return at once.
    """

    def __init__(self, max_bytes: int) -> None:
        """Hold at most ``max_bytes`` of tensors; 0 holds nothing."""
        self.max_bytes = max_bytes
        self.on_change: Callable[[bytes, bool], None] | None = None
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._books = _Books()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory held now."""
        return self._bytes

    def __len__(self) -> int:
        """Images held."""
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        """Whether the key is held; does not count as use."""
        with self._lock:
            return key in self._entries

    def get(self, key: bytes) -> VisualTokens | None:
        """The embeddings under ``key``, now the most recently used."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.tokens

    def label(self, key: bytes) -> ImageLabel | None:
        """What was said of an image when it was put here."""
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None else entry.label

    def derive(self, key: bytes, label: ImageLabel, tokens: int) -> VisualTokens | None:
        """Make an image under a smaller budget out of the nearest larger one of its family, and hold it too.

        Args:
            key: of the image that is wanted.
            label: whose it is to be, and its family.
            tokens: its budget.

        Returns:
            The image; None if the family has none to derive it from.
        """
        with self._lock:
            budgets = self._books.families.get(label.family, {}) if label.family else {}
            larger = min((count for count in budgets if count >= tokens), default=None)
            if larger is None:
                return None
            source = self._entries[budgets[larger]].tokens
            self._entries.move_to_end(budgets[larger])
        derived = source.reduced(tokens)
        self.put(key, derived, label)
        return derived

    def put(self, key: bytes, tokens: VisualTokens, label: ImageLabel = NO_LABEL) -> None:
        """Hold embeddings; one larger than the whole cache is not held. The tensors must not be changed afterwards."""
        changes: list[tuple[bytes, bool]] = []
        with self._lock:
            known = key in self._entries
            if known:
                self._drop(key)
            if tokens.nbytes <= self.max_bytes:
                self._entries[key] = _Entry(tokens, label)
                self._books.enter(key, self._entries[key])
                self._bytes += tokens.nbytes
            if known != (key in self._entries):
                changes.append((key, not known))
            while self._bytes > self.max_bytes:
                lost = self._victim(key)
                self._drop(lost)
                changes.append((lost, False))
        if self.on_change is not None:
            for changed, held in changes:
                self.on_change(changed, held)

    def clear(self) -> None:
        """Hold nothing."""
        with self._lock:
            lost = list(self._entries)
            self._entries.clear()
            self._books = _Books()
            self._bytes = 0
        if self.on_change is not None:
            for key in lost:
                self.on_change(key, False)

    def _victim(self, newest: bytes) -> bytes:
        """Who leaves next; under the lock."""
        owners = self._books.owners
        for key, entry in self._entries.items():
            if key != newest and owners[entry.label.owner] > entry.label.share * self.max_bytes:
                return key
        return next(iter(self._entries))

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._books.leave(key, entry)
        self._bytes -= entry.tokens.nbytes
